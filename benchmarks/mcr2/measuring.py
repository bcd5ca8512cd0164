"""How it is measured: on one thread, in seconds of the processor, and growth of the peak memory.

On a quiet machine those are the seconds of the clock; on a busy one they stay nearly the same.
"""

import os
import re
import statistics
import time
from collections.abc import Callable, Sequence
from concurrent.futures import ProcessPoolExecutor
from dataclasses import dataclass
from multiprocessing import get_context
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.nn.functional import normalize

from pipeline.mcr2.threads import one_thread

WIDTH = 64


@dataclass(frozen=True)
class Cost:
    """Of one call in a process of its own."""

    wall_s: float
    cpu_s: float
    peak_mb: float  # above what the process held before the call
    process_mb: float  # peak of the whole process, Python and torch included
    result: Any


def measured(make: Callable[..., Callable[[], Any]], *args: Any) -> Cost:
    """Cost of `make(*args)()`, what `make` does not counted; Linux only (/proc)."""
    with one_thread():
        call = make(*args)
        Path("/proc/self/clear_refs").write_text("5")  # the peak is what is held now
        before = _peak_mb()
        cpu, started = time.process_time(), time.perf_counter()
        result = call()
        wall, cpu = time.perf_counter() - started, time.process_time() - cpu
    return Cost(wall, cpu, _peak_mb() - before, _peak_mb(), result)


def fresh(make: Callable[..., Callable[[], Any]], *args: Any) -> Cost:
    """`measured` in a new process."""
    with ProcessPoolExecutor(1, mp_context=get_context("spawn")) as pool:
        return pool.submit(measured, make, *args).result()


def alternating(calls: Sequence[Callable[[], Any]], rounds: int) -> list[float]:
    """Median processor seconds of each, called in turns after a round that is not counted."""
    taken: list[list[float]] = [[] for _ in calls]
    for _ in range(rounds + 1):
        for call, seconds in zip(calls, taken, strict=True):
            started = time.process_time()
            call()
            seconds.append(time.process_time() - started)
    return [statistics.median(seconds[1:]) for seconds in taken]


def mixture(n: int, d: int, noise: float, seed: int = 0, k: int = 50) -> Tensor:
    """n unit rows around k directions; `noise` is its norm relative to theirs, 1."""
    generator = torch.Generator().manual_seed(seed)
    centres = normalize(torch.randn(k, d, generator=generator), dim=1)
    rows = centres[torch.randint(k, (n,), generator=generator)]
    return normalize(rows + noise * torch.randn(n, d, generator=generator) / d**0.5, dim=1)


def relative_error(found: Tensor, expected: Tensor) -> float:
    """Norm of the difference, relative to the norm expected."""
    expected = expected.double()
    return float((found.double() - expected).norm() / expected.norm())


def title(text: str) -> None:
    """A section's first line."""
    print(f"\n{text}", flush=True)


def line(what: str, found: str, bar: str = "", met: bool | None = None) -> None:
    """A figure, and the bar beside it."""
    verdict = "" if met is None else "met" if met else "NOT MET"
    print(f"  {what:<{WIDTH}} {found:>26}   {bar:<12} {verdict}".rstrip(), flush=True)


def machine() -> str:
    """Processor, cores, memory, torch."""
    model = re.search(r"model name\s*:\s*(.*)", Path("/proc/cpuinfo").read_text())
    memory = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES") / 2**30
    return (
        f"{model[1] if model else 'unknown processor'}, {os.cpu_count()} cores, {memory:.0f} GiB, "
        f"torch {torch.__version__}"
    )


def _peak_mb() -> float:
    found = re.search(r"VmHWM:\s*(\d+)", Path("/proc/self/status").read_text())
    assert found, "a kernel without VmHWM"
    return int(found[1]) / 1024
