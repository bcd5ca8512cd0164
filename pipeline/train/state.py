"""All that an unfinished training resumes from, in memory."""

import copy
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from pipeline.mcr2.network import Network


@dataclass
class State:
    """All that training goes on from, and the best network on the way."""

    network: Network
    optimizer: torch.optim.Adam
    step: int = 0
    history: list[dict[str, Any]] = field(default_factory=list)
    looks: list[dict[str, Any]] = field(default_factory=list)  # step, information
    kept: dict[str, Tensor] = field(default_factory=dict)  # weights at the best look
    rescued: bool = False  # training has failed and gone on with a smaller step

    def looked(self) -> bool:
        """Whether this step was looked at already."""
        return bool(self.looks) and bool(self.looks[-1]["step"] >= self.step)

    def note(self, information: float) -> None:
        """A look at the network as it is now; the first of the best is kept."""
        if all(information > look["information"] for look in self.looks):
            self.kept = {name: t.clone() for name, t in self.network.state_dict().items()}
        self.looks.append({"step": self.step, "information": information})

    def best(self) -> Network:
        """The network of the best look."""
        self.network.load_state_dict(self.kept)
        return self.network

    def slow_down(self, factor: float) -> None:
        """Smaller steps from now on."""
        self.rescued = True
        for group in self.optimizer.param_groups:
            group["lr"] *= factor

    def tensors(self) -> dict[str, Tensor]:
        """Weights, the best weights and the optimizer's moments by name."""
        found = {f"network.{name}": t for name, t in self.network.state_dict().items()}
        found |= {f"kept.{name}": t for name, t in self.kept.items()}
        for index, moments in self.optimizer.state_dict()["state"].items():
            found |= {f"optimizer.{index}.{name}": t for name, t in moments.items()}
        return {name: tensor.contiguous() for name, tensor in found.items()}

    def facts(self) -> dict[str, Any]:
        """The rest, as JSON values."""
        rates = [group["lr"] for group in self.optimizer.param_groups]
        names = ("step", "history", "looks", "rescued")
        return {"learning_rates": rates, **{name: getattr(self, name) for name in names}}

    def saved(self) -> tuple[dict[str, Tensor], dict[str, Any]]:
        """A copy, for `restore`."""
        tensors = {name: tensor.clone() for name, tensor in self.tensors().items()}
        return tensors, copy.deepcopy(self.facts())

    def restore(self, tensors: dict[str, Tensor], facts: dict[str, Any]) -> None:
        """Go on from what `tensors` and `facts` recorded."""
        self.network.load_state_dict(_below("network.", tensors))
        self.kept = _below("kept.", tensors)
        saved = self.optimizer.state_dict()
        saved["state"] = {}
        for name, tensor in _below("optimizer.", tensors).items():
            index, _, moment = name.partition(".")
            saved["state"].setdefault(int(index), {})[moment] = tensor
        for group, rate in zip(saved["param_groups"], facts["learning_rates"], strict=True):
            group["lr"] = rate
        self.optimizer.load_state_dict(saved)
        self.step, self.rescued = facts["step"], facts["rescued"]
        self.history, self.looks = list(facts["history"]), list(facts["looks"])


def _below(prefix: str, tensors: dict[str, Tensor]) -> dict[str, Tensor]:
    return {n.removeprefix(prefix): t.clone() for n, t in tensors.items() if n.startswith(prefix)}
