"""All that an unfinished training goes on from: in memory, and in network/ while it trains."""

import json
from dataclasses import dataclass
from typing import Any

import torch
from safetensors.torch import load as load_tensors
from safetensors.torch import save as save_tensors
from torch import Tensor

from pipeline import artifacts
from pipeline.mcr2.network import Network
from pipeline.store import storage


@dataclass
class State:
    """All that training goes on from."""

    network: Network
    optimizer: torch.optim.SGD
    step: int
    history: list[dict[str, Any]]

    def tensors(self) -> dict[str, Tensor]:
        """Weights and momenta by name."""
        found = {f"network.{name}": t for name, t in self.network.state_dict().items()}
        for index, state in self.optimizer.state_dict()["state"].items():
            if (buffer := state["momentum_buffer"]) is not None:
                found[f"momentum.{index}"] = buffer
        return {name: tensor.contiguous() for name, tensor in found.items()}

    def restore(self, tensors: dict[str, Tensor], step: int, history: list[dict[str, Any]]) -> None:
        """Go on from what `tensors` and the checkpoint's json recorded."""
        prefix = "network."
        weights = {n.removeprefix(prefix): t for n, t in tensors.items() if n.startswith(prefix)}
        self.network.load_state_dict(weights)
        saved = self.optimizer.state_dict()
        saved["state"] = {
            int(name.removeprefix("momentum.")): {"momentum_buffer": tensor}
            for name, tensor in tensors.items()
            if name.startswith("momentum.")
        }
        self.optimizer.load_state_dict(saved)
        self.step, self.history = step, history


class Checkpoints:
    """The last state of an unfinished training, in network/; rank 0 writes, all read."""

    def __init__(self, paths: artifacts.RunPaths, made_of: str) -> None:
        self.folder, self.made_of = paths.network, made_of

    def save(self, state: State) -> None:
        """Commit the weights, then the json that makes them count, then drop older ones."""
        name = f"checkpoint-{state.step}"
        storage.write_bytes(self.folder.file(f"{name}.safetensors"), save_tensors(state.tensors()))
        facts = {"made_of": self.made_of, "step": state.step, "history": state.history}
        storage.write_bytes(self.folder.file(f"{name}.json"), json.dumps(facts).encode())
        self.folder.remove({n for n in self._names() if n.rpartition(".")[0] != name})

    def restore(self, state: State) -> None:
        """The newest whole checkpoint of this very training, if there is one."""
        found = [n for n in self._names() if n.endswith(".json")]
        for name in sorted(found, key=lambda n: -int(n[len("checkpoint-") : -len(".json")])):
            facts = json.loads(storage.read_bytes(self.folder.file(name)))
            if facts["made_of"] == self.made_of:
                weights = self.folder.file(name.replace(".json", ".safetensors"))
                tensors = load_tensors(storage.read_bytes(weights))
                state.restore(tensors, facts["step"], facts["history"])
                return

    def drop(self) -> None:
        """Training is over."""
        self.folder.remove(self._names())

    def _names(self) -> set[str]:
        return {name for name in self.folder.names() if name.startswith("checkpoint-")}
