"""All that an unfinished training goes on from: in memory, and in network/ while it trains."""

import copy
import json
from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import Any

import torch
from safetensors.torch import load as load_tensors
from safetensors.torch import save as save_tensors
from torch import Tensor

from pipeline.artifacts import layout
from pipeline.mcr2.network import Network
from pipeline.store import storage


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


class Checkpoints:
    """The last state of an unfinished training, in network/; rank 0 writes, all read."""

    def __init__(self, paths: layout.RunPaths, made_of: str) -> None:
        self.folder, self.made_of = paths.network, made_of

    def save(self, state: State) -> None:
        """Commit the weights, then the json that makes them count, then drop older ones."""
        name = f"checkpoint-{state.step}"
        storage.write_bytes(self.folder.file(f"{name}.safetensors"), save_tensors(state.tensors()))
        facts = {"made_of": self.made_of, **state.facts()}
        storage.write_bytes(self.folder.file(f"{name}.json"), json.dumps(facts).encode())
        self.folder.remove({n for n in self._names() if n.rpartition(".")[0] != name})

    def restore(self, state: State) -> None:
        """The newest whole checkpoint of this very training, if there is one."""
        for name, facts in self._newest_first():
            if facts["made_of"] == self.made_of:
                weights = self.folder.file(name.replace(".json", ".safetensors"))
                tensors = load_tensors(storage.read_bytes(weights))
                state.restore(tensors, facts)
                return

    def reached(self) -> int:
        """The step of the newest one, whatever the size of its batches; 0 without one."""
        mine = (f["step"] for _, f in self._newest_first() if f["made_of"].startswith(self.made_of))
        return next(mine, 0)

    def _newest_first(self) -> Iterator[tuple[str, dict[str, Any]]]:
        found = [n for n in self._names() if n.endswith(".json")]
        for name in sorted(found, key=lambda n: -int(n[len("checkpoint-") : -len(".json")])):
            yield name, json.loads(storage.read_bytes(self.folder.file(name)))

    def drop(self) -> None:
        """Training is over."""
        self.folder.remove(self._names())

    def _names(self) -> set[str]:
        return {name for name in self.folder.names() if name.startswith("checkpoint-")}
