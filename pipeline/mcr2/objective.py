"""The training objective of CPP over a global batch, whoever holds its rows.

Every worker holds b of the n = W·b rows. `gather` brings Z and C of all together with gradients;
each worker computes its own share of the columns of R_c. The sum over workers of `loss` is W times
the objective, so that gradients averaged over workers are those of one worker with all n rows.
"""

from dataclasses import dataclass

import torch
from torch import Tensor

from pipeline.mcr2 import coding_rate, sinkhorn
from pipeline.mcr2.network import Gather


@dataclass(frozen=True, kw_only=True)
class Weights:
    """Constants of −R(Z) + γ R_c(Z, Π) + λ/2 ‖Π‖²_F [Chu et al. 2024, eq. of section 4]."""

    eps_sq: float  # ε², distortion allowed per unit-norm feature
    eta: float  # η, temperature of the Sinkhorn membership
    gamma: float  # γ, weight of the compression
    regularizer: float  # λ
    half_steps: int  # of Sinkhorn


@dataclass(frozen=True)
class Terms:
    """What one step computed: `loss` has gradients; the rest are this worker's numbers."""

    loss: Tensor
    expansion: Tensor  # R(Z), of the global batch
    compression: Tensor  # R_c(Z, Π), this worker's columns times W: its mean over workers is R_c
    regularizer: Tensor  # ‖Π‖²_F / 2
    residual: Tensor  # of Sinkhorn


def expand(Z: Tensor, eps_sq: float, gather: Gather) -> Terms:
    """The warm-up: −R(Z) alone."""
    R = coding_rate.rate(gather(Z), eps_sq)
    zero = torch.zeros_like(R).detach()
    return Terms(-R, R.detach(), zero, zero, zero)


def cluster(Z: Tensor, C: Tensor, columns: Tensor, weights: Weights, gather: Gather) -> Terms:
    """The whole objective. Z and C are (b, d) of this worker; `columns` (m,) are its columns of Π.

    All workers' `columns` together, equally many each, are a sample of the n columns; R_c is scaled
    by n over their number, which is exact when they are all of them and unbiased otherwise.
    """
    Z, C = gather(Z), gather(C)  # (n, d)
    Pi, residual = sinkhorn.membership((C @ C.T).abs(), weights.eta, weights.half_steps)
    R = coding_rate.rate(Z, weights.eps_sq)
    share = coding_rate.compression(Z, Pi[:, columns], weights.eps_sq) * (len(Z) / len(columns))
    size = 0.5 * (Pi * Pi).sum()
    loss = -R + weights.gamma * share + weights.regularizer * size
    return Terms(loss, R.detach(), share.detach(), size.detach(), residual)
