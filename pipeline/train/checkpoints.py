"""Checkpoints: the last state of an unfinished training, in network/."""

import json
from collections.abc import Iterator
from typing import TYPE_CHECKING, Any

from pipeline.artifacts import layout
from pipeline.store import storage

if TYPE_CHECKING:  # importing it imports torch, which `status` does without
    from pipeline.train.state import State


class Checkpoints:
    """The checkpoint of a training with fingerprint `made_of`; rank 0 writes, all read."""

    def __init__(self, paths: layout.RunPaths, made_of: str) -> None:
        self.folder, self.made_of = paths.network, made_of

    def save(self, state: "State") -> None:
        """Commit the weights, then the json that makes them valid; then remove older ones."""
        from safetensors.torch import save as save_tensors

        name = f"checkpoint-{state.step}"
        storage.write_bytes(self.folder.file(f"{name}.safetensors"), save_tensors(state.tensors()))
        facts = {"made_of": self.made_of, **state.facts()}
        storage.write_bytes(self.folder.file(f"{name}.json"), json.dumps(facts).encode())
        self.folder.remove({n for n in self._names() if n.rpartition(".")[0] != name})

    def restore(self, state: "State") -> None:
        """Load the newest complete checkpoint of this training into `state`, if there is one."""
        from safetensors.torch import load as load_tensors

        for name, facts in self._newest_first():
            if facts["made_of"] == self.made_of:
                weights = self.folder.file(name.replace(".json", ".safetensors"))
                tensors = load_tensors(storage.read_bytes(weights))
                state.restore(tensors, facts)
                return

    def reached(self) -> int:
        """The step of the newest checkpoint, for any batch size; 0 without one."""
        mine = (f["step"] for _, f in self._newest_first() if f["made_of"].startswith(self.made_of))
        return next(mine, 0)

    def _newest_first(self) -> Iterator[tuple[str, dict[str, Any]]]:
        found = [n for n in self._names() if n.endswith(".json")]
        for name in sorted(found, key=lambda n: -int(n[len("checkpoint-") : -len(".json")])):
            yield name, json.loads(storage.read_bytes(self.folder.file(name)))

    def drop(self) -> None:
        """Remove all checkpoints."""
        self.folder.remove(self._names())

    def _names(self) -> set[str]:
        return {name for name in self.folder.names() if name.startswith("checkpoint-")}
