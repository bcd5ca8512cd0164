"""The two-headed network of CPP [Chu et al. 2024, section 4]: features and cluster head.

n samples, D input dimensions, h hidden, d features.
"""

from collections.abc import Callable

import torch
from torch import Tensor, nn
from torch.nn.functional import normalize

Gather = Callable[[Tensor], Tensor]  # (b, ...) of this worker -> (W·b, ...) of all, with gradients


def alone(x: Tensor) -> Tensor:
    """The gather of a single worker."""
    return x


class GlobalBatchNorm(nn.Module):
    """BatchNorm1d whose statistics are those of the global batch, whatever worker holds it.

    (torch's SyncBatchNorm needs CUDA.) In training `gather` brings mean and variance of every
    worker's equal share together, with gradients; in evaluation the running statistics serve. The
    running variance is that of the batch, as training divides by; torch's is n/(n−1) times as much.
    """

    mean: Tensor
    var: Tensor

    def __init__(self, width: int, momentum: float = 0.1, eps: float = 1e-5) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.ones(width))
        self.bias = nn.Parameter(torch.zeros(width))
        self.register_buffer("mean", torch.zeros(width))
        self.register_buffer("var", torch.ones(width))
        self.momentum, self.eps = momentum, eps
        self.gather: Gather = alone

    def forward(self, x: Tensor) -> Tensor:
        """(b, h) -> (b, h)."""
        if not self.training:
            return self._scale(x, self.mean, self.var)
        moments = torch.stack([x.mean(0), x.var(0, correction=0)])[None]  # (1, 2, h)
        means, variances = self.gather(moments).unbind(1)  # (W, h)
        mean = means.mean(0)
        var = variances.mean(0) + means.var(0, correction=0)  # within workers and between them
        with torch.no_grad():
            self.mean.lerp_(mean, self.momentum)
            self.var.lerp_(var, self.momentum)
        return self._scale(x, mean, var)

    def _scale(self, x: Tensor, mean: Tensor, var: Tensor) -> Tensor:
        return (x - mean) * (var + self.eps).rsqrt() * self.weight + self.bias


class Network(nn.Module):
    """Linear D→h, BatchNorm, ReLU, Linear h→h, ReLU, then two linear heads h→d."""

    def __init__(self, input_dim: int, hidden_dim: int, feature_dim: int) -> None:
        super().__init__()
        self.trunk = nn.Sequential(
            nn.Linear(input_dim, hidden_dim),
            GlobalBatchNorm(hidden_dim),
            nn.ReLU(),
            nn.Linear(hidden_dim, hidden_dim),
            nn.ReLU(),
        )
        self.feature = nn.Linear(hidden_dim, feature_dim)
        self.cluster = nn.Linear(hidden_dim, feature_dim)

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
        """(n, D) -> features Z and cluster codes C, both (n, d) with unit rows."""
        hidden = self.trunk(x)
        return normalize(self.feature(hidden), dim=1), normalize(self.cluster(hidden), dim=1)

    def gather_with(self, gather: Gather) -> None:
        """Let BatchNorm see the global batch."""
        for module in self.modules():
            if isinstance(module, GlobalBatchNorm):
                module.gather = gather

    def start_cluster_head(self) -> None:
        """Copy the feature head into the cluster head, as CPP does after the warm-up."""
        self.cluster.load_state_dict(self.feature.state_dict())

    @torch.inference_mode()
    def features(self, x: Tensor) -> Tensor:
        """(n, D) -> Z (n, d), with the running statistics: a row depends on no other row."""
        assert not self.training, "call .eval() first: BatchNorm would mix the rows of a batch"
        return normalize(self.feature(self.trunk(x)), dim=1)
