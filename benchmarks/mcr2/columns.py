"""Sampled columns of Π: unbiased, and how many are enough.

Gradients are those of a step of training: of the objective with respect to a linear map x → Z.
The noise of sampled columns comes on top of that of the batch, which all columns have, too. Fewer
columns are worth it where steps are so much shorter that the time to as good a gradient, seconds
of a step × variance, is less than with all of them; a step counts the network's own time, too.
"""

import time
from pathlib import Path

import numpy as np
import torch
from torch import Tensor
from torch.nn.functional import normalize

from benchmarks.features import encoded
from benchmarks.mcr2 import losses
from benchmarks.mcr2.measuring import alternating, line, mixture, title
from pipeline.mcr2.network import Network

DRAWS, BATCHES = 60, 12
NUMBERS = (16, 32, 64, 128, 256, 512)


def emoji() -> Tensor:
    """pico-clip's embeddings of the bundled emoji, (N, 256)."""
    folder = Path(__file__).parents[2] / "examples" / "noto-emoji"
    found = encoded(str(folder), "pico-clip")
    return torch.from_numpy(np.concatenate([x for x, _ in found])).float()


def value_and_gradient(x: Tensor, w: Tensor, columns: Tensor) -> Tensor:
    """R_c, then the gradient of the objective wrt W, in one vector of float64."""
    w = w.clone().requires_grad_()
    z = normalize(x @ w, dim=1)
    terms = losses.our_terms(z, columns)
    (grad,) = torch.autograd.grad(terms.loss, w)
    return torch.cat([terms.compression.reshape(1), grad.ravel()]).double()


def spread(draws: Tensor, centre: Tensor) -> tuple[float, float]:
    """Root mean square distance from the centre, relative to it: of the value, the gradient."""
    off = draws - centre
    value = off[:, 0].square().mean().sqrt() / centre[0].abs()
    gradient = off[:, 1:].square().sum(1).mean().sqrt() / centre[1:].norm()
    return float(value), float(gradient)


def bias(draws: Tensor, exact: Tensor) -> tuple[float, float]:
    """Distance of the mean of the draws from the exact, in its standard errors."""
    value, gradient = spread(draws, exact)
    off_value, off_gradient = spread(draws.mean(0, keepdim=True), exact)
    root = len(draws) ** 0.5
    return off_value / value * root, off_gradient / gradient * root


def network_seconds(x: Tensor, d: int) -> float:
    """The rest of a training step: the network forth and back."""
    network = Network([x.shape[1]], 4 * x.shape[1], d).train()

    def step() -> None:
        network(x).sum().backward()

    return alternating([step], 3)[0]


def sampling() -> None:
    """On the emoji and on a mixture."""
    for name, x, d in (("emoji", emoji(), 32), ("mixture", mixture(8192, 256, 1.0), 128)):
        title(f"sampled columns, {name}, n = {losses.BATCH}, d = {d}: relative standard errors")
        _sampling(normalize(x - x.mean(0), dim=1), d)


def _sampling(x: Tensor, d: int) -> None:
    generator = torch.Generator().manual_seed(0)
    n = losses.BATCH
    w = torch.linalg.svd(x, full_matrices=False).Vh[:d].T  # leading directions
    batches = [x[torch.randint(len(x), (n,), generator=generator)] for _ in range(BATCHES)]
    rest = network_seconds(batches[0], d)
    started = time.process_time()
    by_batch = torch.stack([value_and_gradient(batch, w, torch.arange(n)) for batch in batches])
    seconds = (time.process_time() - started) / BATCHES + rest
    exact, (_, between) = by_batch[0], spread(by_batch, by_batch.mean(0))
    line("all columns, between batches: of the gradient; a step", f"{between:.2f}; {seconds:.3f} s")
    whole = seconds * between**2  # the time to a gradient of a given accuracy
    least = (1.0, n)
    for m in NUMBERS:
        some = [torch.randperm(n, generator=generator)[:m] for _ in range(DRAWS)]
        started = time.process_time()
        draws = torch.stack([value_and_gradient(batches[0], w, columns) for columns in some])
        seconds = (time.process_time() - started) / DRAWS + rest
        value, gradient = spread(draws, exact)
        share = seconds * (between**2 + gradient**2) / whole
        least = min(least, (share, m))
        found = f"{value:.4f}; {gradient:.2f}; {seconds:.3f} s; {share:.2f}"
        line(f"{m} columns: of R_c; of the gradient; a step; as good a gradient", found)
        off = max(bias(draws, exact))
        line(
            f"  mean of {DRAWS} draws less the exact, in its errors", f"{off:.1f}", "≤ 3", off <= 3
        )
    line("the least time to as good a gradient", f"{least[1]} columns")
