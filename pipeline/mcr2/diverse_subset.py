"""A diverse subset of features: greedy maximisation of the coding rate.

n samples, d dimensions, m selected.
"""

import torch
from torch import Tensor

GRAIN = 1e-6  # the q are compared up to this, so that rounding errors do not decide


def most_spread(Z: Tensor, m: int, eps_sq: float) -> tuple[Tensor, Tensor]:
    """Select at most m rows S of Z (n, d): their indices, in order, and the gain of each in nats.

    Greedy for f(S) = log det(I + d/(m ε²) Σ_{i in S} z_i z_iᵀ), twice the coding rate of m rows
    [Yu20, eq. 2]. Of rows with equal gains the first is taken. f is monotone and submodular, and
    f(∅) = 0, so f(S) is at least 1 − 1/e of the maximum over m rows (Nemhauser, Wolsey, Fisher, "An
    analysis of approximations for maximizing submodular set functions", 1978).

    A row adds log(1 + α q_i), q_i = z_iᵀ M⁻¹ z_i, α = d/(m ε²) (the matrix determinant lemma). When
    row s is taken, Sherman and Morrison: M⁻¹ loses α v vᵀ / (1 + α q_s), v = M⁻¹ z_s, so every q_i
    loses α (z_iᵀ v)² / (1 + α q_s). A step takes O(nd + d²).
    """
    Z = Z.double()
    n, d = Z.shape
    m = min(m, n)
    alpha = d / (max(m, 1) * eps_sq)
    inverse = torch.eye(d, dtype=torch.float64)
    q = Z.square().sum(1)
    taken, gains = torch.empty(m, dtype=torch.int64), torch.empty(m, dtype=torch.float64)
    for step in range(m):
        s = int((q / GRAIN).round().argmax())
        taken[step], gains[step] = s, torch.log1p(alpha * q[s])
        v = inverse @ Z[s]
        share = alpha / (1 + alpha * q[s])
        inverse -= share * torch.outer(v, v)
        q -= share * (Z @ v).square()
        q[s] = -torch.inf
    return taken, gains
