"""Partial sums over the parts, from which an interrupted stage resumes.

writes  {stage}/unfinished-{name}.safetensors   removed when the stage is done

Chunks are always added in their order, so an interruption does not change a bit of the result.
"""

import json
import logging
import time
from collections.abc import Callable, Sequence
from contextlib import suppress
from typing import TypeVar

import numpy as np
from safetensors import SafetensorError
from safetensors.numpy import load as load_arrays
from safetensors.numpy import save as save_arrays

from pipeline.store import storage
from pipeline.store.storage import Folder

log = logging.getLogger(__name__)
T = TypeVar("T")
PREFIX = "unfinished-"
EVERY_S = 30.0  # seconds between commits, at least
WORK = 20  # a commit may take 1/WORK of the time between two commits

Arrays = dict[str, np.ndarray]


class PartialResult:
    """Saved arrays of an unfinished stage; those of another fingerprint are removed."""

    def __init__(self, folder: Folder, name: str, made_of: str) -> None:
        self.folder, self.name, self.made_of = folder, f"{PREFIX}{name}.safetensors", made_of

    def load(self) -> Arrays | None:
        """The arrays of an interrupted run; None without usable ones."""
        url = self.folder.file(self.name)
        try:
            data = storage.read_bytes(url)
            if _made_of(data) == self.made_of:
                return {name: array.copy() for name, array in load_arrays(data).items()}
        except FileNotFoundError:
            return None
        except (SafetensorError, ValueError, KeyError) as error:
            log.warning("%s cannot be read, so the sum starts again: %s", url, error)
        self.drop()
        return None

    def save(self, arrays: Arrays) -> None:
        """Replace the saved arrays."""
        whole = {name: np.asarray(array, order="C") for name, array in arrays.items()}
        data = save_arrays(whole, metadata={"made_of": self.made_of})
        storage.write_bytes(self.folder.file(self.name), data)

    def drop(self) -> None:
        """Delete the saved arrays."""
        self.folder.remove({self.name})


class ResumableSum:
    """Counts the chunks that are in a sum, and saves the sum every EVERY_S or less often."""

    def __init__(self, folder: Folder, name: str, made_of: str, chunks: int) -> None:
        self.file = PartialResult(folder, name, f"{made_of}-{chunks}")
        self.restored = self.file.load() or {}  # the sum of the first `done` chunks
        self.done = int(self.restored.pop("done", np.int64(0)))
        self._committed, self._wait_s = time.monotonic(), EVERY_S

    def forget(self) -> None:
        """Start again from the first chunk."""
        self.file.drop()
        self.restored, self.done = {}, 0

    def left(self, chunks: Sequence[T]) -> Sequence[T]:
        """The chunks that are not in the sum yet."""
        return chunks[self.done :]

    def advance(self, arrays: Callable[[], Arrays]) -> None:
        """Count one more chunk; save the sum `arrays()` if the last save is old enough."""
        self.done += 1
        if (began := time.monotonic()) - self._committed >= self._wait_s:
            self.file.save({**arrays(), "done": np.int64(self.done)})
            self._committed = time.monotonic()
            self._wait_s = max(EVERY_S, WORK * (self._committed - began))


def remove_all(folder: Folder) -> None:
    """Delete all partial sums of a finished stage."""
    folder.remove({name for name in folder.names() if name.startswith(PREFIX)})


def exists(folder: Folder, made_of: str) -> bool:
    """Whether a stage with this fingerprint has a partial sum. Changes nothing."""
    for name in folder.names():
        url = folder.file(name)
        with suppress(FileNotFoundError, ValueError, KeyError):  # the stage has just ended; damaged
            if name.startswith(PREFIX):
                size = int.from_bytes(storage.read_range(url, 0, 8), "little")
                if _made_of(storage.read_range(url, 0, 8 + size)).startswith(made_of):
                    return True
    return False


def _made_of(data: bytes) -> str:
    """The fingerprint in the header."""
    size = int.from_bytes(data[:8], "little")
    return str(json.loads(data[8 : 8 + size])["__metadata__"]["made_of"])
