"""The losses of a training step: as the paper writes them, and by the pipeline.

n samples, d dimensions, m columns of Π.
"""

from collections.abc import Callable
from dataclasses import replace
from functools import partial

import torch
from torch import Tensor

from benchmarks.mcr2.measuring import Cost, alternating, fresh, line, mixture, relative_error, title
from pipeline.mcr2 import coding_rate, objective, sinkhorn
from pipeline.mcr2.network import Gather, alone

EPS_SQ, ETA = 0.1, 0.1
BATCH, FEATURES, COLUMNS = 1024, 128, 64
HALF = "plain, half of the columns"
Loss = Callable[[Tensor], Tensor]


def plain_rate(z: Tensor) -> Tensor:
    """R as the paper writes it."""
    n, d = z.shape
    return 0.5 * torch.logdet(torch.eye(d, dtype=z.dtype) + d / (n * EPS_SQ) * z.T @ z)


def plain_compression(z: Tensor, pi: Tensor) -> Tensor:
    """R_c as the paper writes it: Zᵀ Π_j of every j at once, (m, d, n)."""
    n, d = z.shape
    t = pi.sum(0)
    grams = (pi.T[:, None, :] * z.T) @ z  # (m, d, n) @ (n, d)
    matrices = torch.eye(d, dtype=z.dtype) + (d / (t * EPS_SQ))[:, None, None] * grams
    return (t / (2 * n) * torch.logdet(matrices)).sum()


def plain_loss(columns: int, z: Tensor) -> Tensor:
    """−R + R_c, its gradients left to autograd; R_c of the first columns of Π."""
    pi, _ = sinkhorn.membership(objective.affinity(z), ETA, objective.HALF_STEPS)
    return plain_compression(z, pi[:, :columns]) - plain_rate(z)


def our_terms(z: Tensor, columns: Tensor, gather: Gather = alone) -> objective.Terms:
    """The same by the pipeline, with some columns of Π."""
    return objective.rate_reduction(z, columns, EPS_SQ, ETA, gather)


def our_loss(columns: Tensor, z: Tensor) -> Tensor:
    """Its loss."""
    return our_terms(z, columns).loss


def features(n: int, d: int, noise: float = 1.0) -> Tensor:
    """Z, that wants a gradient."""
    return mixture(n, d, noise).requires_grad_()


def step(loss: Loss, z: Tensor) -> Tensor:
    """One training step of the losses: membership, R and R_c, and back to Z."""
    return torch.autograd.grad(loss(z), z)[0]


def variants(n: int) -> dict[str, Loss]:
    """What is compared."""
    some = torch.randperm(n, generator=torch.Generator().manual_seed(0))[:COLUMNS]
    return {
        "plain": partial(plain_loss, n),
        "exact": partial(our_loss, torch.arange(n)),
        f"{COLUMNS} columns": partial(our_loss, some),
        HALF: partial(plain_loss, n // 2),
    }


def make_step(name: str, n: int, d: int) -> Callable[[], None]:
    """One step of a variant, for a process of its own; a small one before it warms torch up."""
    step(variants(COLUMNS)[name], features(COLUMNS, 8))
    z = features(n, d)

    def call() -> None:
        step(variants(n)[name], z)

    return call


def exactness() -> None:
    """Value and gradients against the plain formula in float64."""
    title("R_c and its gradients: error relative to the plain formula in float64 (norms)")
    ours = partial(coding_rate.compression, eps_sq=EPS_SQ)
    for n, d in ((512, 128), (256, 256)):
        for noise in (10.0, 1.0, 0.3):
            expected = with_gradients(plain_compression, n, d, noise, torch.float64)
            for name, formula, dtype, bar in (
                ("ours, float64", ours, torch.float64, 1e-10),
                ("ours, float32", ours, torch.float32, 1e-5),
                ("plain, float32", plain_compression, torch.float32, None),
            ):
                found = with_gradients(formula, n, d, noise, dtype)
                errors = list(map(relative_error, found, expected))
                line(
                    f"{name}, {n} × {d}, noise {noise:g}: R_c; by Z, Π, scores",
                    " ".join(f"{error:.0e}" for error in errors),
                    f"≤ {bar:g}" if bar else "",
                    max(errors) <= bar if bar else None,
                )


def with_gradients(
    formula: Callable[[Tensor, Tensor], Tensor], n: int, d: int, noise: float, dtype: torch.dtype
) -> list[Tensor]:
    """R_c; its gradients with respect to Z, Π and, through Sinkhorn, the scores."""
    z = mixture(n, d, noise).to(dtype).requires_grad_()
    scores = objective.affinity(z.detach()).requires_grad_()
    pi, _ = sinkhorn.membership(scores, ETA, objective.HALF_STEPS)
    value = formula(z, pi)
    return [value.detach(), *torch.autograd.grad(value, (z, pi, scores))]


def small_step() -> None:
    """The setting of CIFAR, in turns."""
    title(f"a training step of the losses, n = {BATCH}, d = {FEATURES}; 3 rounds in turns")
    z = features(BATCH, FEATURES)
    compared = {name: loss for name, loss in variants(BATCH).items() if name != HALF}
    calls = [partial(step, loss, z) for loss in compared.values()]
    seconds = dict(zip(compared, alternating(calls, 3), strict=True))
    costs = {name: fresh(make_step, name, BATCH, FEATURES) for name in compared}
    _print_steps(seconds, costs, exact_bar=5, sampled_bar=20)


def large_step() -> None:
    """The setting of ImageNet: each once, in a process of its own."""
    title(f"a training step of the losses, n = {BATCH}, d = {BATCH}; once")
    names = ("exact", f"{COLUMNS} columns", HALF)
    costs = {name: fresh(make_step, name, BATCH, BATCH) for name in names}
    half = costs[HALF]
    line(HALF, f"{half.cpu_s:.3f} s, {half.peak_mb:.0f} MB")
    print("  plain with all of them would take 25 GB: TWICE THE HALF, not measured, stands for it")
    costs["plain"] = replace(half, cpu_s=2 * half.cpu_s, peak_mb=2 * half.peak_mb)
    seconds = {name: cost.cpu_s for name, cost in costs.items() if name != HALF}
    _print_steps(seconds, costs, exact_bar=4, sampled_bar=50)
    whole = costs["exact"].process_mb
    line("exact: peak of the whole process", f"{whole:.0f} MB", "≤ 2048 MB", whole <= 2048)


def _print_steps(
    seconds: dict[str, float], costs: dict[str, Cost], exact_bar: int, sampled_bar: int
) -> None:
    for name in seconds:
        line(name, f"{seconds[name]:.3f} s, {costs[name].peak_mb:.0f} MB")
    for name, bar in (("exact", exact_bar), (f"{COLUMNS} columns", sampled_bar)):
        faster = seconds["plain"] / seconds[name]
        share = costs[name].peak_mb / costs["plain"].peak_mb
        line(f"{name}: times faster than plain", f"{faster:.1f}", f"≥ {bar}", faster >= bar)
        line(f"{name}: share of plain's memory", f"{share:.3f}", "≤ 0.1", share <= 0.1)
