"""A global batch over W gloo processes of one thread each: same gradients, less work each."""

import os
import statistics
import tempfile
from collections.abc import Callable
from concurrent.futures import ProcessPoolExecutor
from multiprocessing import get_context

import torch
import torch.distributed as dist
from torch import Tensor

from benchmarks.mcr2 import losses
from benchmarks.mcr2.measuring import Cost, line, measured, title
from pipeline.mcr2.collectives import Collectives

ROUNDS = 3


def make_share(rank: int, size: int, store: str) -> Callable[[], Tensor]:
    """A worker's share of an exact step; gives the gradient of its rows of Z, (n/W, d)."""
    if size > 1:
        dist.init_process_group("gloo", init_method=f"file://{store}", rank=rank, world_size=size)
    workers = Collectives.join(rank, size)
    losses.step(losses.variants(64)["exact"], losses.features(64, 8))  # warm
    n = losses.BATCH
    rows = torch.arange(n).chunk(size)[rank]
    z = losses.features(n, losses.FEATURES).detach()[rows].requires_grad_()

    def call() -> Tensor:
        terms = losses.our_terms(z, rows, workers.gather)
        return torch.autograd.grad(terms.loss, z)[0] / size

    if size > 1:
        dist.barrier()
    return call


def shares(size: int) -> list[Cost]:
    """What every worker measured, by rank."""
    with (
        tempfile.TemporaryDirectory() as folder,
        ProcessPoolExecutor(size, mp_context=get_context("spawn")) as pool,
    ):
        store = f"{folder}/store"
        tasks = [pool.submit(measured, make_share, rank, size, store) for rank in range(size)]
        return [task.result() for task in tasks]


def workers() -> None:
    """W = 1, 2, 4."""
    title(
        f"an exact step over W workers, n = {losses.BATCH}, d = {losses.FEATURES}, "
        f"{os.cpu_count()} cores for all"
    )
    whole = None
    for size in (1, 2, 4):
        rounds = [shares(size) for _ in range(ROUNDS)]
        grads = torch.cat([cost.result for cost in rounds[0]])
        whole = grads if whole is None else whole
        error = float((grads - whole).abs().max() / whole.abs().max())
        line(
            f"W = {size}: largest difference of a gradient", f"{error:.0e}", "≤ 1e-5", error <= 1e-5
        )
        wall, cpu, peak = (
            statistics.median(max(getattr(cost, of) for cost in costs) for costs in rounds)
            for of in ("wall_s", "cpu_s", "peak_mb")
        )
        line(
            f"W = {size}: per worker, wall, processor, peak",
            f"{wall:.2f} s, {cpu:.2f} s, {peak:.0f} MB",
        )
