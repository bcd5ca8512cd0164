"""How far a stage is: a live bar on a terminal, a plain line now and then elsewhere.

And whether it stands still: where nothing moves for `Config.stall_s`, the stage fails and says what
it waited for. What moves is `advance` and `waiting_for`.
"""

import logging
import math
import threading
import time
from collections.abc import Collection, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from types import TracebackType
from typing import Any

from rich.progress import BarColumn, Progress, SpinnerColumn, TaskID, TextColumn
from rich.table import Column

from pipeline.runtime import console
from pipeline.runtime.config import setting
from pipeline.runtime.errors import UserError
from pipeline.runtime.interrupt import Interruption

log = logging.getLogger(__name__)
EVERY_S = 10.0  # seconds between plain lines
NAMED = 5  # of the things waited for


@dataclass(frozen=True, kw_only=True)
class Config:
    """How a command runs, whatever its stages."""

    stall_s: float = setting(
        1800.0,
        "seconds without progress until a stage fails: more than a shard takes, or a 128th of "
        "all parts in select_k; 0: never",
        operational=True,
    )

    def __post_init__(self) -> None:
        if self.stall_s < 0:
            raise UserError(f"run.stall_s = {self.stall_s}: give 0 (never) or more")


@dataclass
class _Process:
    """A process runs one command, and that one stage at a time."""

    stage: "StageProgress | None" = None
    limit_s: float = math.inf


_process = _Process()


@contextmanager
def watched(cfg: Config) -> Iterator[None]:
    """Stages of this block fail where they stand still."""
    before, _process.limit_s = _process.limit_s, cfg.stall_s or math.inf
    try:
        yield
    finally:
        _process.limit_s = before


def current() -> dict[str, Any] | None:
    """`StageProgress.facts` of the stage that is under way."""
    stage = _process.stage
    return stage.facts() if stage else None


def waiting_for(names: Collection[str]) -> None:
    """Something has moved, and this is waited for now; the collection may change later."""
    if stage := _process.stage:
        stage.pending, stage.moved = names, time.monotonic()


class StageProgress:
    """Counts units (shards, steps), samples and rejects of one stage; a context manager."""

    def __init__(self, stage: str, total: int, unit: str) -> None:
        self.stage, self.total, self.unit = stage, total, unit
        self.units = self.samples = self.rejected = 0
        self.started = self.printed = self.first_at = self.moved = time.monotonic()
        self.first_units = 0
        self.pending: Collection[str] = ()
        self._interruption, self._over = Interruption(), threading.Event()
        self._bar: Progress | None = None
        self._task = TaskID(0)

    def __enter__(self) -> "StageProgress":
        if terminal := console.terminal():
            columns = (
                SpinnerColumn(),
                TextColumn("{task.description}", markup=False),
                BarColumn(None, table_column=Column(ratio=1)),
                TextColumn("{task.fields[s]}", markup=False),
            )
            self._bar = Progress(*columns, console=terminal, transient=True, expand=True)
            self._task = self._bar.add_task(self.stage, total=self.total, s="starting")
            self._bar.start()
        _process.stage = self
        self._interruption.__enter__()
        if _process.limit_s < math.inf:
            threading.Thread(target=self._watch, args=(_process.limit_s,), daemon=True).start()
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self._over.set()
        _process.stage = None
        if self._bar:
            self._bar.stop()
        self._interruption.__exit__(kind, error, trace)

    def _watch(self, limit_s: float) -> None:
        """Interrupt the stage where nothing moves, and again where it waits on as long."""
        while not self._over.wait(min(1.0, limit_s / 4)):
            if time.monotonic() - self.moved > limit_s:
                self.moved = time.monotonic()
                self._interruption.interrupt(
                    f"{self.stage}: nothing finished for {limit_s:g} s, waiting for "
                    f"{self._waited()}; if one of them can take longer, raise run.stall_s, else "
                    "run the same command again"
                )

    def _waited(self) -> str:
        names = list(self.pending)
        more = f" and {len(names) - NAMED} more" if len(names) > NAMED else ""
        left = f"{self.total - self.units} of {self.total} {self.unit}"
        return ", ".join(names[:NAMED]) + more if names else left

    @property
    def seconds(self) -> float:
        """Since the stage began."""
        return time.monotonic() - self.started

    @property
    def samples_per_s(self) -> float:
        """Since the stage began."""
        return round(self.samples / max(self.seconds, 1e-9), 1)

    def advance(self, units: int = 1, samples: int = 0, rejected: int = 0) -> None:
        """Count what has just been done."""
        if units or samples:
            self.moved = time.monotonic()
        if not self.units:
            self.first_units, self.first_at = units, time.monotonic()
        self.units += units
        self.samples += samples
        self.rejected += rejected
        if self._bar:
            s = self.status().replace(", ", " · ")
            self._bar.update(self._task, completed=self.units, total=self.total, s=s)
        elif time.monotonic() - self.printed > EVERY_S:
            self.printed = time.monotonic()
            log.info("%s: %s", self.stage, self.status())

    def facts(self) -> dict[str, Any]:
        """How far it is, as JSON values."""
        return {
            "stage": self.stage,
            "line": f"{self.stage}: {self.status()}",
            "done": self.units,
            "total": self.total,
            "samples": self.samples,
            "rejected": self.rejected,
            "samples_per_s": self.samples_per_s,
            "left_s": self.left_s(),
        }

    def left_s(self) -> int | None:
        """Seconds left at the pace since the first unit; what came before was starting up."""
        if self.units <= self.first_units:
            return None
        pace = (time.monotonic() - self.first_at) / (self.units - self.first_units)
        return int(pace * (self.total - self.units))

    def status(self) -> str:
        """One line: done of all, samples, rate, rejected, time left."""
        parts = [f"{self.units:,}/{self.total:,} {self.unit}"]
        if self.samples:
            rate = self.samples / max(self.seconds, 1e-9)
            parts += [f"{self.samples:,} samples", f"{rate:,.0f} samples/s"]
        if self.rejected:
            parts.append(f"{self.rejected:,} rejected")
        if (left := self.left_s()) is not None:
            parts.append(f"{left // 60}:{left % 60:02d} left")
        return ", ".join(parts)
