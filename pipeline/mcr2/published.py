"""The published recipe of CPP: two heads, a warm-up, |cos|, and a penalty on the membership.

Chu, Tong, Ding, Dai, Haeffele, Vidal, Ma: "Image clustering via the principle of rate reduction in
the age of pretrained models", ICLR 2024, section 4 and the table of hyper-parameters. The ways in
which `network` and `objective` differ from it are in docs/decisions/train.md.

n samples of a global batch, b of this worker, D input dimensions, h hidden, d features.
"""

from collections.abc import Sequence

import torch
from torch import Tensor, nn
from torch.nn.functional import normalize

from pipeline.mcr2 import coding_rate, sinkhorn
from pipeline.mcr2.network import FeatureNetwork, Gather, GlobalBatchNorm
from pipeline.mcr2.objective import HALF_STEPS, Terms
from pipeline.mcr2.precision import full_precision

MOMENTUM, DECAY, CLUSTER_DECAY = 0.9, 1e-4, 5e-3  # of SGD; CLUSTER_DECAY of the cluster head
PENALTY = 0.05  # of ‖Π‖²_F / 2


class TwoHeads(FeatureNetwork):
    """Linear D→h, BatchNorm, ReLU, Linear h→h, ReLU, then two linear heads h→d with unit rows.

    The head `feature` makes Z, the head `cluster` makes the codes C, from which clusters are cut.
    """

    def __init__(self, input_dims: Sequence[int], hidden_dim: int, feature_dim: int) -> None:
        super().__init__()
        self.input_dims = list(input_dims)
        self.shape = {"input_dims": self.input_dims, "hidden_dim": hidden_dim}
        self.shape |= {"feature_dim": feature_dim, "heads": 2}
        self.trunk = nn.Sequential(
            nn.Linear(sum(input_dims), hidden_dim),
            GlobalBatchNorm(hidden_dim),
            nn.ReLU(),
            nn.Linear(hidden_dim, hidden_dim),
            nn.ReLU(),
        )
        self.feature = nn.Linear(hidden_dim, feature_dim)
        self.cluster = nn.Linear(hidden_dim, feature_dim)

    def heads(self, x: Tensor) -> tuple[Tensor, Tensor]:
        """(n, D) -> features Z and codes C, both (n, d)."""
        hidden = self.trunk(x)
        return normalize(self.feature(hidden), dim=1), normalize(self.cluster(hidden), dim=1)

    def forward(self, x: Tensor) -> Tensor:
        """(n, D) -> codes C (n, d)."""
        return self.heads(x)[1]

    def views(self, x: Tensor) -> Tensor:
        """(n, D) -> (n, D) with unit rows: what the network sees."""
        return normalize(x, dim=1)

    def optimizer(self, learning_rate: float) -> torch.optim.SGD:
        """SGD; the cluster head has its own weight decay."""
        cluster = {"params": list(self.cluster.parameters()), "weight_decay": CLUSTER_DECAY}
        rest = [*self.trunk.parameters(), *self.feature.parameters()]
        groups = [{"params": rest, "weight_decay": DECAY}, cluster]
        return torch.optim.SGD(groups, lr=learning_rate, momentum=MOMENTUM)


def warm_up(Z: Tensor, eps_sq: float, gather: Gather) -> Terms:
    """−R(Z), in nats, of this worker's features Z (b, d) and those of all others."""
    R = coding_rate.rate(gather(Z), eps_sq)
    none = torch.zeros((), device=Z.device)
    return Terms(-R, R.detach(), none, none)


def rate_reduction(
    Z: Tensor, C: Tensor, columns: Tensor, eps_sq: float, eta: float, gather: Gather
) -> Terms:
    """−R(Z) + R_c(Z, Π) + PENALTY/2 ‖Π‖²_F, Π = n · Sinkhorn(|C Cᵀ| / η), in nats.

    Z and C (b, d) are this worker's, `columns` (m,) its columns of Π, as in `objective`.
    """
    Z, C = gather(Z), gather(C)  # (n, d)
    Pi, residual = sinkhorn.membership(_scores(C), eta, HALF_STEPS)
    R = coding_rate.rate(Z, eps_sq)
    sampled = Pi.index_select(1, columns)
    share = coding_rate.compression(Z, sampled, eps_sq) * (len(Z) / len(columns))
    loss = share - R + PENALTY / 2 * Pi.square().sum()
    return Terms(loss, R.detach(), share.detach(), residual)


@full_precision
def _scores(C: Tensor) -> Tensor:
    return (C @ C.T).abs()
