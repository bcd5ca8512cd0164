"""Progress of a stage: a live bar on a terminal, elsewhere a plain line every EVERY_S seconds.

A stage without progress for `Config.stall_s` fails and names what it waited for. Progress is a call
of `advance` or `waiting_for`.
"""

import logging
import math
import threading
import time
from collections.abc import Collection, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

from rich.progress import BarColumn, Progress, SpinnerColumn, TextColumn
from rich.table import Column

from pipeline.runtime import console
from pipeline.runtime.config import setting
from pipeline.runtime.errors import UserError
from pipeline.runtime.interrupt import Interruption

log = logging.getLogger(__name__)
EVERY_S = 10.0  # seconds between plain lines
NAMED = 5  # names in a message


@dataclass(frozen=True, kw_only=True)
class Config:
    """Settings of any command."""

    stall_s: float = setting(
        1800.0,
        "seconds without progress until a stage fails; must be longer than the largest shard takes "
        "in embed, or 1/128 of all parts in select_k; 0: never",
        operational=True,
    )

    def __post_init__(self) -> None:
        if self.stall_s < 0:
            raise UserError(f"run.stall_s = {self.stall_s}: give 0 (never) or more")


@dataclass
class _Process:
    """The one stage that this process runs now."""

    stage: "StageProgress | None" = None
    limit_s: float = math.inf


_process = _Process()


@contextmanager
def watched(cfg: Config) -> Iterator[None]:
    """Stages in this block fail if they make no progress."""
    before, _process.limit_s = _process.limit_s, cfg.stall_s or math.inf
    try:
        yield
    finally:
        _process.limit_s = before


def current() -> dict[str, Any] | None:
    """The progress of the running stage as JSON values."""
    if (stage := _process.stage) is None:
        return None
    return {
        "stage": stage.stage,
        "line": f"{stage.stage}: {stage.status()}",
        "done": stage.units,
        "total": stage.total,
        "samples": stage.samples,
        "rejected": stage.rejected,
        "samples_per_s": stage.samples_per_s,
        "left_s": stage.left_s(),
    }


def waiting_for(names: Collection[str]) -> None:
    """Report progress, and what the stage waits for now; the collection may change later."""
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

    def __enter__(self) -> "StageProgress":
        if terminal := console.terminal():
            columns = (
                SpinnerColumn(),
                TextColumn("{task.description}", markup=False),
                BarColumn(None, table_column=Column(ratio=1)),
                TextColumn("{task.fields[s]}", markup=False),
            )
            self._bar = Progress(*columns, console=terminal, transient=True, expand=True)
            self._bar.add_task(self.stage, total=self.total, s="starting")
            self._bar.start()
        _process.stage = self
        self._interruption.__enter__()
        if _process.limit_s < math.inf:
            threading.Thread(target=self._watch, args=(_process.limit_s,), daemon=True).start()
        return self

    def __exit__(self, *error: Any) -> None:
        self._over.set()
        _process.stage = None
        if self._bar:
            self._bar.stop()
        self._interruption.__exit__(*error)

    def _watch(self, limit_s: float) -> None:
        """Interrupt the stage if it makes no progress, and again after the same time."""
        while not self._over.wait(min(1.0, limit_s / 4)):
            if time.monotonic() - self.moved > limit_s:
                self.moved = time.monotonic()
                names = list(self.pending)
                more = f" and {len(names) - NAMED} more" if len(names) > NAMED else ""
                left = f"{self.total - self.units} of {self.total} {self.unit}"
                self._interruption.interrupt(
                    f"{self.stage}: nothing finished for {limit_s:g} s, waiting for "
                    f"{', '.join(names[:NAMED]) + more or left}; if one of them can take longer, "
                    "raise run.stall_s, else run the same command again"
                )

    @property
    def seconds(self) -> float:
        """Since the stage began."""
        return time.monotonic() - self.started

    @property
    def samples_per_s(self) -> float:
        """Since the stage began."""
        return round(self.samples / max(self.seconds, 1e-9), 1)

    def advance(self, units: int = 1, samples: int = 0, rejected: int = 0) -> None:
        """Count finished units."""
        if units or samples:
            self.moved = time.monotonic()
        if not self.units:
            self.first_units, self.first_at = units, time.monotonic()
        self.units += units
        self.samples += samples
        self.rejected += rejected
        if self._bar:
            s = self.status().replace(", ", " · ")
            self._bar.update(self._bar.task_ids[0], completed=self.units, total=self.total, s=s)
        elif time.monotonic() - self.printed > EVERY_S:
            self.printed = time.monotonic()
            log.info("%s: %s", self.stage, self.status())

    def left_s(self) -> int | None:
        """Seconds left, from the pace since the first unit; the time before it is start-up."""
        if self.units <= self.first_units:
            return None
        pace = (time.monotonic() - self.first_at) / (self.units - self.first_units)
        return int(pace * (self.total - self.units))

    def status(self) -> str:
        """One line: finished units of all, samples, rate, rejected, time left."""
        parts = [f"{self.units:,}/{self.total:,} {self.unit}"]
        if self.samples:
            rate = self.samples / max(self.seconds, 1e-9)
            parts += [f"{self.samples:,} samples", f"{rate:,.0f} samples/s"]
        if self.rejected:
            parts.append(f"{self.rejected:,} rejected")
        if (left := self.left_s()) is not None:
            parts.append(f"{left // 60}:{left % 60:02d} left")
        return ", ".join(parts)
