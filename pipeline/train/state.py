"""The state of a training: all that it resumes from, and the best network so far."""

import copy
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import torch
from torch import Tensor

from pipeline.mcr2.model_selection import better
from pipeline.mcr2.network import FeatureNetwork


@dataclass
class State:
    """What a training resumes from, and the weights of the best network so far."""

    network: FeatureNetwork
    optimizer: torch.optim.Optimizer
    step: int = 0
    history: list[dict[str, Any]] = field(default_factory=list)
    validations: list[dict[str, Any]] = field(default_factory=list)  # step, information, kept
    best_scores: list[float] = field(default_factory=list)  # of the network to keep, per bootstrap
    kept: dict[str, Tensor] = field(default_factory=dict)  # weights at the best validation
    rescued: bool = False  # a step has failed, and the learning rate is smaller since

    def validated(self) -> bool:
        """Whether the network of this step has been validated."""
        return bool(self.validations) and bool(self.validations[-1]["step"] >= self.step)

    def record_validation(self, scores: np.ndarray) -> None:
        """Record the scores (B,) of the network as it is now; keep it if it is surely better."""
        won = not self.validations or better(scores, np.array(self.best_scores))
        if won:
            self.kept = {name: t.clone() for name, t in self.network.state_dict().items()}
            self.best_scores = scores.tolist()
        found = {"step": self.step, "information": float(scores.mean()), "kept": won}
        self.validations.append(found)

    def losing(self) -> int:
        """How many of the last validations in a row did not win."""
        return next((n for n, v in enumerate(reversed(self.validations)) if v["kept"]), 0)

    def best(self) -> FeatureNetwork:
        """The network with the weights of the best validation."""
        self.network.load_state_dict(self.kept)
        return self.network

    def slow_down(self, factor: float) -> None:
        """Multiply the learning rate by `factor`."""
        self.rescued = True
        for group in self.optimizer.param_groups:
            group["lr"] *= factor

    def tensors(self) -> dict[str, Tensor]:
        """The weights, the best weights and the moments of the optimizer, by name."""
        found = {f"network.{name}": t for name, t in self.network.state_dict().items()}
        found |= {f"kept.{name}": t for name, t in self.kept.items()}
        for index, moments in self.optimizer.state_dict()["state"].items():
            found |= {f"optimizer.{index}.{name}": t for name, t in moments.items()}
        return {name: tensor.contiguous() for name, tensor in found.items()}

    def facts(self) -> dict[str, Any]:
        """The rest, as JSON values."""
        rates = [group["lr"] for group in self.optimizer.param_groups]
        names = ("step", "history", "rescued", "best_scores")
        found = {"learning_rates": rates, "looks": self.validations}
        return found | {name: getattr(self, name) for name in names}

    def snapshot(self) -> tuple[dict[str, Tensor], dict[str, Any]]:
        """A copy, for `restore`."""
        tensors = {name: tensor.clone() for name, tensor in self.tensors().items()}
        return tensors, copy.deepcopy(self.facts())

    def restore(self, tensors: dict[str, Tensor], facts: dict[str, Any]) -> None:
        """Take the state that `tensors` and `facts` recorded."""
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
        self.history, self.validations = list(facts["history"]), list(facts["looks"])
        self.best_scores = list(facts["best_scores"])


def _below(prefix: str, tensors: dict[str, Tensor]) -> dict[str, Tensor]:
    return {n.removeprefix(prefix): t.clone() for n, t in tensors.items() if n.startswith(prefix)}
