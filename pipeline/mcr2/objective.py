"""The training objective over a global batch, whoever holds its rows.

Every worker holds b of the n = W·b rows. `gather` brings the Z of all together with gradients; each
worker computes its own share of the columns of R_c. The sum over workers of `loss` is W times the
objective, so that gradients averaged over workers are those of one worker with all n rows.
"""

from dataclasses import dataclass

import torch
from torch import Tensor

from pipeline.mcr2 import coding_rate, sinkhorn
from pipeline.mcr2.network import Gather
from pipeline.mcr2.precision import full_precision

SELF = -1.0  # affinity of a sample to itself, where others have 0 to 1


@dataclass(frozen=True, kw_only=True)
class Weights:
    """Constants of −R(Z) + R_c(Z, Π) [Chu et al. 2024, section 4, with γ = 1]."""

    eps_sq: float  # ε², distortion allowed per unit-norm feature
    eta: float  # η, temperature of the Sinkhorn membership
    half_steps: int  # of Sinkhorn


@dataclass(frozen=True)
class Terms:
    """What one step computed: `loss` has gradients; the rest are this worker's numbers."""

    loss: Tensor
    expansion: Tensor  # R(Z), of the global batch
    compression: Tensor  # R_c(Z, Π), this worker's columns times W: its mean over workers is R_c
    residual: Tensor  # of Sinkhorn


@full_precision
def affinity(Z: Tensor) -> Tensor:
    """Scores of the membership, (n, n): positive part of the cosines, a sample's own below all.

    CPP takes |cos|, which joins what points opposite ways, and leaves the own at 1, the largest, so
    that every sample can become a cluster of itself.
    """
    own = torch.eye(len(Z), dtype=torch.bool, device=Z.device)
    return (Z @ Z.T).clamp(min=0).masked_fill(own, SELF)


def rate_reduction(Z: Tensor, columns: Tensor, weights: Weights, gather: Gather) -> Terms:
    """−R + R_c. Z is (b, d) of this worker; `columns` (m,) are its columns of Π.

    All workers' `columns` together, equally many each, are a sample of the n columns; R_c is scaled
    by n over their number, which is exact when they are all of them and unbiased otherwise.
    """
    Z = gather(Z)  # (n, d)
    Pi, residual = sinkhorn.membership(affinity(Z), weights.eta, weights.half_steps)
    R = coding_rate.rate(Z, weights.eps_sq)
    sampled = Pi.index_select(1, columns)  # (n, m)
    share = coding_rate.compression(Z, sampled, weights.eps_sq) * (len(Z) / len(columns))
    return Terms(share - R, R.detach(), share.detach(), residual)
