"""How far a stage is: a live bar on a terminal, a plain line now and then elsewhere."""

import logging
import sys
import time
from types import TracebackType

from rich.console import Console
from rich.progress import BarColumn, Progress, TaskID, TextColumn

log = logging.getLogger(__name__)
EVERY_S = 10.0  # seconds between plain lines


class StageProgress:
    """Counts units (shards, steps), samples and rejects of one stage; a context manager."""

    def __init__(self, stage: str, total: int, unit: str) -> None:
        self.stage, self.total, self.unit = stage, total, unit
        self.units = self.samples = self.rejected = 0
        self.started = self.printed = self.first_at = time.monotonic()
        self.first_units = 0
        self._bar: Progress | None = None
        self._task = TaskID(0)

    def __enter__(self) -> "StageProgress":
        console = Console(file=sys.stderr)
        if console.is_terminal:
            columns = (
                TextColumn("{task.description}"),
                BarColumn(),
                TextColumn("{task.fields[s]}"),
            )
            self._bar = Progress(*columns, console=console, transient=True)
            self._task = self._bar.add_task(self.stage, total=self.total, s="")
            self._bar.start()
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        if self._bar:
            self._bar.stop()

    @property
    def seconds(self) -> float:
        """Since the stage began."""
        return time.monotonic() - self.started

    def advance(self, units: int = 1, samples: int = 0, rejected: int = 0) -> None:
        """Count what has just been done."""
        if not self.units:
            self.first_units, self.first_at = units, time.monotonic()
        self.units += units
        self.samples += samples
        self.rejected += rejected
        if self._bar:
            self._bar.update(self._task, completed=self.units, s=self.status())
        elif time.monotonic() - self.printed > EVERY_S:
            self.printed = time.monotonic()
            log.info("%s: %s", self.stage, self.status())

    def status(self) -> str:
        """One line: done of all, samples, rate, rejected, time left."""
        parts = [f"{self.units:,}/{self.total:,} {self.unit}"]
        if self.samples:
            rate = self.samples / max(self.seconds, 1e-9)
            parts += [f"{self.samples:,} samples", f"{rate:,.0f} samples/s"]
        if self.rejected:
            parts.append(f"{self.rejected:,} rejected")
        if self.units > self.first_units:  # what came before the first unit was starting up
            pace = (time.monotonic() - self.first_at) / (self.units - self.first_units)
            left = pace * (self.total - self.units)
            parts.append(f"{int(left // 60)}:{int(left % 60):02d} left")
        return ", ".join(parts)
