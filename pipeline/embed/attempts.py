"""Counts how often a shard has ended its worker, so that one shard cannot end the stage.

A mark in {root}/.attempts/ says that a worker has begun a shard; it is removed when the shard is
done or has failed with an error. A mark that is found is of a worker that died. Only those of the
same command count: an interrupted command leaves marks too.
"""

import json
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field

from pipeline.store import storage

MOST_DEATHS = 3  # of workers by one shard; then it is quarantined


@dataclass(frozen=True)
class Attempts:
    """The marks of one command."""

    folder: storage.Folder
    command: str  # unique

    def deaths(self, stem: str) -> int:
        """How many workers of this command have died of the shard."""
        found = self.folder.peek(f"{stem}.json") or {}
        return int(found["times"]) if found.get("command") == self.command else 0

    @contextmanager
    def attempt(self, stem: str, deaths: int) -> Iterator[None]:
        """The shard has a mark while the block runs."""
        mark = {"command": self.command, "times": deaths + 1}
        storage.write_bytes(self.folder.file(f"{stem}.json"), json.dumps(mark).encode())
        try:
            yield
        finally:
            self.folder.remove({f"{stem}.json"})


@dataclass
class Turns:
    """Calls of a worker: many together, or one alone."""

    _together: int = 0
    _changed: threading.Condition = field(default_factory=threading.Condition)

    @contextmanager
    def turn(self, alone: bool) -> Iterator[None]:
        """Wait for a turn. A shard that may end the worker is alone: the others are not blamed."""
        with self._changed:
            self._changed.wait_for(lambda: self._together == 0 if alone else self._together >= 0)
            self._together += -1 if alone else 1
        try:
            yield
        finally:
            with self._changed:
                self._together += 1 if alone else -1
                self._changed.notify_all()
