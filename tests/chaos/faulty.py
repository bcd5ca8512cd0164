"""An object store over a local folder, and a disk's renames, which fail as a plan says.

The plan is JSON in the environment variable CHAOS_PLAN: {"seed", "rate", "most", "log", "hang_s"}.
What befalls a call depends on nothing but the seed, the operation, the file, and how often this
process has asked for that; every fault done is a line of the file `log`, and there are `most`.
"""

import errno
import io
import json
import os
import random
import time
from collections import Counter
from pathlib import Path
from typing import Any
from uuid import uuid4

from fsspec import AbstractFileSystem
from fsspec.implementations.local import LocalFileSystem

from pipeline.store.storage import PARTIAL

READ_FAULTS = ("read fails", "read is slow", "read is cut short")
HANGS = 0.03  # of the faults of reads
WRITE_FAULTS = (
    "write fails",
    "write is half done, then fails",
    "write is done, but says it failed",
)
LIST_FAULTS = ("listing fails",)
RENAME_FAULTS = ("rename fails", "rename is done, but says it failed")
SLOW_S = 1.0


class Plan:
    """Which calls fail."""

    def __init__(self, facts: dict[str, Any]) -> None:
        self.facts = facts
        self.asked: Counter[tuple[str, str]] = Counter()

    def draw(self, faults: tuple[str, ...], path: str) -> str:
        """The fault that befalls this call, or ''."""
        self.asked[faults[0], path] += 1
        number = self.asked[faults[0], path]
        dice = random.Random(f"{self.facts['seed']} {faults[0]} {path} {number}")
        if dice.random() >= self.facts["rate"]:
            return ""
        fault = dice.choice(faults)
        if faults is READ_FAULTS and dice.random() < HANGS:
            fault = "read hangs"
        return fault if self._noted(fault, path) else ""

    def _noted(self, fault: str, path: str) -> bool:
        log = Path(self.facts["log"])
        if log.exists() and len(log.read_text().splitlines()) >= self.facts["most"]:
            return False
        with log.open("a") as file:
            file.write(f"{fault}\t{path}\n")
        return True


PLAN = Plan(json.loads(os.environ["CHAOS_PLAN"]))


class FaultyFileSystem(AbstractFileSystem):
    """`faulty:///path`: an object is seen whole or not at all, as in an object store."""

    protocol = "faulty"
    local = LocalFileSystem(auto_mkdir=True)

    @classmethod
    def _strip_protocol(cls, path: Any) -> Any:
        if isinstance(path, list):
            return [cls._strip_protocol(each) for each in path]
        return "/" + str(path).removeprefix("faulty://").strip("/")

    def ls(self, path: str, detail: bool = True, **kwargs: Any) -> Any:
        path = self._strip_protocol(path)
        _fail(PLAN.draw(LIST_FAULTS, path), path)
        return self.local.ls(path, detail=detail)

    def info(self, path: str, **kwargs: Any) -> dict[str, Any]:
        return dict(self.local.info(self._strip_protocol(path)))

    def cat_file(self, path: str, start: Any = None, end: Any = None, **kwargs: Any) -> bytes:
        with self._open(self._strip_protocol(path)) as file:
            return bytes(file.read()[start:end])

    def _open(self, path: str, mode: str = "rb", **kwargs: Any) -> Any:
        if mode != "rb":
            raise NotImplementedError(f"{mode}: objects are put whole")
        data = Path(path).read_bytes()
        fault = PLAN.draw(READ_FAULTS, path)
        if fault == "read is cut short":
            data = data[: len(data) // 2]
        elif fault == "read is slow":
            time.sleep(SLOW_S)
        elif fault == "read hangs":
            time.sleep(PLAN.facts["hang_s"])
        else:
            _fail(fault, path)
        return io.BytesIO(data)

    def pipe_file(self, path: str, value: bytes, mode: str = "overwrite", **kwargs: Any) -> None:
        path = self._strip_protocol(path)
        if mode == "create":
            Path(path).parent.mkdir(parents=True, exist_ok=True)
            with Path(path).open("xb") as file:
                file.write(value)
        else:
            self._put(value, path)

    def put_file(self, lpath: str, rpath: str, *args: Any, **kwargs: Any) -> None:
        self._put(Path(lpath).read_bytes(), self._strip_protocol(rpath))

    def _put(self, data: bytes, path: str) -> None:
        fault = PLAN.draw(WRITE_FAULTS, path)
        if fault == "write is half done, then fails":  # an upload never completed: not seen
            data = data[: len(data) // 2]
        if fault != "write fails":
            Path(path).parent.mkdir(parents=True, exist_ok=True)
            upload = Path(path).parent / f".upload-{uuid4().hex}"
            upload.write_bytes(data)
            if fault == "write is half done, then fails":
                upload.unlink()
            else:
                upload.replace(path)
        _fail(fault, path)

    def _rm(self, path: str) -> None:
        Path(self._strip_protocol(path)).unlink()

    def rm_file(self, path: str) -> None:
        self._rm(path)

    def rm(self, path: Any, recursive: bool = False, maxdepth: Any = None) -> None:
        self.local.rm(self._strip_protocol(path), recursive=recursive)

    def created(self, path: str) -> Any:
        return self.local.created(self._strip_protocol(path))


def break_renames() -> None:
    """Of the project's own temporary files, which only local disk has beside their targets."""
    rename = Path.replace

    def replace(path: Path, target: Any) -> Path:
        fault = PLAN.draw(RENAME_FAULTS, str(target)) if PARTIAL in path.name else ""
        if fault != "rename fails":
            rename(path, target)
        _fail(fault, str(target))
        return Path(target)

    Path.replace = replace  # type: ignore[method-assign]


def _fail(fault: str, path: str) -> None:
    if fault:
        raise OSError(errno.EIO, f"{fault}, as the plan says", path)
