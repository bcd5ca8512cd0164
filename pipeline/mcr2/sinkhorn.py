"""Sinkhorn's iteration: affinities to a nearly doubly stochastic membership."""

import torch
from torch import Tensor

from pipeline.mcr2.precision import full_precision


@full_precision
def membership(scores: Tensor, eta: float, half_steps: int) -> tuple[Tensor, Tensor]:
    """Π = n · Sinkhorn(scores / η) [CPP, Chu et al. 2024, with scores |CᵀC|] and its residual.

    `scores` is (n, n), and so is Π. Rows and columns of exp(scores / η) are normalised in turn,
    `half_steps` times, rows first. The log domain prevents underflow with a small η. Π has entries
    ≥ 0; after an odd number of half steps its rows sum to 1. The residual is the largest |sum − 1|
    of the other side. Gradients are exact for these steps.
    """
    log_Pi = scores / eta
    for step in range(half_steps):
        log_Pi = log_Pi - log_Pi.logsumexp(dim=1 - step % 2, keepdim=True)
    Pi = log_Pi.exp()
    with torch.no_grad():
        inexact = 1 - half_steps % 2  # the dimension summed over: rows came last if this is odd
        residual = (Pi.sum(dim=inexact) - 1).abs().max()
    return Pi, residual
