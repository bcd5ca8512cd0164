"""Communication between training workers: one gather with gradients, one average.

b rows of this worker, W workers.
"""

from dataclasses import dataclass
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn

from pipeline.mcr2.network import Gather, alone


class _GatherRows(torch.autograd.Function):
    """all_gather of (b, ...) along dim 0: (W·b, ...); all workers need the same shape.

    The gradient is the sum over workers, because the loss of each worker depends on all rows.
    """

    @staticmethod
    def forward(ctx: Any, x: Tensor) -> Tensor:
        ctx.rows = len(x)
        out = [torch.empty_like(x) for _ in range(dist.get_world_size())]
        dist.all_gather(out, x.contiguous())
        return torch.cat(out)

    @staticmethod
    def backward(ctx: Any, *grad: Tensor) -> Tensor:
        total = grad[0].contiguous()
        dist.all_reduce(total)
        start = dist.get_rank() * ctx.rows
        return total[start : start + ctx.rows]


def _gather_rows(x: Tensor) -> Tensor:
    gathered: Tensor = _GatherRows.apply(x)
    return gathered


@dataclass(frozen=True)
class Collectives:
    """Worker `rank` of `size`, over torch.distributed's default group where size > 1."""

    rank: int = 0
    size: int = 1
    gather: Gather = alone

    @classmethod
    def join(cls, rank: int, size: int) -> "Collectives":
        """Use torch.distributed's default group, which must be initialised if size > 1."""
        return cls(rank, size, _gather_rows if size > 1 else alone)

    def mean(self, value: Tensor) -> Tensor:
        """Mean over the workers, without gradients; same shape as `value`."""
        value = value.detach().clone()
        if self.size > 1:
            dist.all_reduce(value)
        return value / self.size

    def average_gradients(self, network: nn.Module) -> float:
        """Replace every gradient by its mean over the workers; returns the norm of all together.

        One all-reduce after the backward pass, which is all that training needs of DDP.
        """
        grads = [p.grad for p in network.parameters() if p.grad is not None]
        flat = torch.cat([grad.ravel() for grad in grads])
        if self.size > 1:
            dist.all_reduce(flat)
            flat /= self.size
            parts = flat.split([grad.numel() for grad in grads])
            for grad, part in zip(grads, parts, strict=True):
                grad.copy_(part.view_as(grad))
        return float(flat.norm())
