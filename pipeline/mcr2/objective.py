"""The training objective over a global batch that W workers share.

Every worker holds b of the n = W·b rows. `gather` collects the Z of all, with gradients. Each
worker computes its own columns of R_c. The mean over workers of `loss` is the objective, so that
averaged gradients are those of one worker with all n rows.
"""

from dataclasses import dataclass

import torch
from torch import Tensor

from pipeline.mcr2 import coding_rate, sinkhorn
from pipeline.mcr2.network import Gather
from pipeline.mcr2.precision import full_precision

HALF_STEPS = 5  # row and column normalisations of the membership, rows first and last
SELF = -1.0  # affinity of a sample to itself, where others have 0 to 1


@dataclass(frozen=True)
class Terms:
    """The terms of one step in nats; only `loss` has gradients."""

    loss: Tensor
    expansion: Tensor  # R(Z), of the global batch
    compression: Tensor  # R_c(Z, Π), this worker's columns times W: its mean over workers is R_c
    residual: Tensor  # of Sinkhorn


@full_precision
def affinity(Z: Tensor) -> Tensor:
    """Scores (n, n) of the membership: the positive part of the cosines, and SELF on the diagonal.

    CPP takes |cos|, which puts opposite features together. Its diagonal is 1, the largest score, so
    that every sample can become a cluster of its own.
    """
    own = torch.eye(len(Z), dtype=torch.bool, device=Z.device)
    return (Z @ Z.T).clamp(min=0).masked_fill(own, SELF)


def rate_reduction(Z: Tensor, columns: Tensor, eps_sq: float, eta: float, gather: Gather) -> Terms:
    """−R(Z) + R_c(Z, Π), in nats [Chu et al. 2024, section 4, with γ = 1].

    Z (b, d) are this worker's features, `columns` (m,) its columns of Π. `eps_sq` is ε², the
    squared distortion per unit-norm feature; `eta` is η, the temperature of the membership. All
    workers have equally many columns. Together they are a sample of the n columns. R_c is scaled by
    n over their number: exact if they are all columns, unbiased otherwise.
    """
    Z = gather(Z)  # (n, d)
    Pi, residual = sinkhorn.membership(affinity(Z), eta, HALF_STEPS)
    R = coding_rate.rate(Z, eps_sq)
    sampled = Pi.index_select(1, columns)  # (n, m)
    share = coding_rate.compression(Z, sampled, eps_sq) * (len(Z) / len(columns))
    return Terms(share - R, R.detach(), share.detach(), residual)
