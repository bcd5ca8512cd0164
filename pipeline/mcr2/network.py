"""The network that MCR² trains. It starts at the principal components of the embeddings.

CPP [Chu et al. 2024, section 4] trains a random network with two heads. This one has one head. Its
input is the centred embeddings of one or more encoders, and the expected words of the first. It
starts as their principal components plus a residual of zero. n samples, D input dimensions, V
words, h hidden, d features.
"""

from collections.abc import Callable, Iterator, Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.functional import normalize

BLOCK_ROWS = 4096  # samples at once, where gradients are not needed
Gather = Callable[[Tensor], Tensor]  # (b, ...) of this worker -> (W·b, ...) of all, with gradients


def alone(x: Tensor) -> Tensor:
    """The gather of a single worker."""
    return x


class GlobalBatchNorm(nn.Module):
    """BatchNorm1d with the statistics of the global batch (torch's SyncBatchNorm needs CUDA).

    In training, `gather` collects mean and variance of every worker's equal share, with gradients.
    In evaluation, the running statistics are used. The running variance divides by n, as training
    does; torch's divides by n − 1.
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


class Words(nn.Module):
    """The expected word vector of an image under the encoder's text side.

    A CLIP model gives p(word | image) = softmax over words of its logit scale times the cosine
    [Radford et al. 2021, section 2]. This module is the mean of the word vectors under p. Words in
    addition to images help clustering: Li et al., "Image clustering with external guidance" (TAC),
    ICML 2024.
    """

    table: Tensor
    scale: Tensor

    def __init__(self, words: int, dim: int) -> None:
        super().__init__()
        self.register_buffer("table", torch.zeros(words, dim))
        self.register_buffer("scale", torch.ones(()))

    def begin(self, table: Tensor, scale: float) -> None:
        """Set the words: `table` (V, D) has unit rows, `scale` is the encoder's logit scale."""
        self.table.copy_(table)
        self.scale.fill_(scale)

    def forward(self, x: Tensor) -> Tensor:
        """Unit rows (n, D) -> expected words (n, D), not of unit length."""
        return self.shares(x) @ self.table

    def shares(self, x: Tensor) -> Tensor:
        """p(word | image) of unit rows x (n, D): (n, V)."""
        return torch.softmax(self.scale * (x @ self.table.T), dim=1)


class FeatureNetwork(nn.Module):
    """Embeddings x (n, D) of one or more encoders, side by side -> features (n, d), unit rows."""

    input_dims: list[int]  # dimensions of each encoder, D = sum(input_dims)
    shape: dict[str, Any]  # the arguments of the class, by name

    def views(self, x: Tensor) -> Tensor:
        """(n, D) -> (n, width) with unit rows: what the network sees of the samples."""
        raise NotImplementedError

    def gather_with(self, gather: Gather) -> None:
        """Give `gather` to every GlobalBatchNorm."""
        for module in self.modules():
            if isinstance(module, GlobalBatchNorm):
                module.gather = gather

    @torch.inference_mode()
    def features(self, x: Tensor) -> Tensor:
        """(n, D) -> Z (n, d) with unit rows, by the running statistics: rows are independent."""
        assert not self.training, "call .eval() first: BatchNorm would mix the rows of a batch"
        return torch.cat([self(block) for block in _blocks(x)])


class Network(FeatureNetwork):
    """z = normalize(project(v) + residual(v)) of the centred, weighted views v of x.

    The views are the embeddings of each encoder, D = sum(input_dims) in all, and, after the first,
    the expected words of the first encoder if `words` > 0.
    """

    centres: Tensor
    weights: Tensor
    mean: Tensor

    def __init__(
        self, input_dims: Sequence[int], hidden_dim: int, feature_dim: int, words: int = 0
    ) -> None:
        super().__init__()
        self.shape = {"input_dims": list(input_dims), "hidden_dim": hidden_dim}
        self.shape |= {"feature_dim": feature_dim, "words": words}
        self.input_dims = list(input_dims)
        self.dims = [input_dims[0], *([input_dims[0]] if words else []), *input_dims[1:]]
        width = sum(self.dims)
        self.words = Words(words, input_dims[0])
        self.register_buffer("centres", torch.zeros(width))
        self.register_buffer("weights", torch.ones(len(self.dims)))
        self.register_buffer("mean", torch.zeros(width))
        self.project = nn.Linear(width, feature_dim, bias=False)
        self.residual = nn.Sequential(
            nn.Linear(width, hidden_dim, bias=False),  # BatchNorm has its own
            GlobalBatchNorm(hidden_dim),
            nn.ReLU(),
            nn.Linear(hidden_dim, feature_dim),
        )
        last = self.residual[-1]
        assert isinstance(last, nn.Linear)
        nn.init.zeros_(last.weight)
        nn.init.zeros_(last.bias)

    @torch.no_grad()
    def centre(self, x: Tensor, words: Tensor, scale: float) -> None:
        """Set the words, and the centres of the views, from the samples x (N, D).

        `words` (V, D1) are unit rows, `scale` is the logit scale of the first encoder.
        """
        self.words.begin(words, scale)
        sums = [torch.cat(self._raw(block), 1).sum(0, dtype=torch.float64) for block in _blocks(x)]
        self.centres.copy_(torch.stack(sums).sum(0) / len(x))

    @torch.no_grad()
    def start(self, x: Tensor, weights: Sequence[float]) -> None:
        """Set the weights of the views, and the principal components of the samples x (N, D)."""
        self.weights.copy_(torch.tensor(weights))
        total = torch.zeros_like(self.mean, dtype=torch.float64)
        outer = torch.outer(total, total)
        for block in _blocks(x):
            view = self.views(block).double()
            total += view.sum(0)
            outer += view.T @ view
        mean = total / len(x)
        self.mean.copy_(mean)
        _, vectors = torch.linalg.eigh(outer / len(x) - torch.outer(mean, mean))
        components = vectors.flip(1).T[: self.project.out_features]  # largest variance first
        peaks = components.gather(1, components.abs().argmax(1, keepdim=True))
        self.project.weight.zero_()[: len(components)] = components * peaks.sign()

    def _raw(self, x: Tensor) -> list[Tensor]:
        first, *more = x.split(self.input_dims, dim=1)
        return [first, *([self.words(first)] if self.shape["words"] else []), *more]

    def each_view(self, x: Tensor) -> list[Tensor]:
        """(n, D) -> each view (n, its dimensions): minus its centre, normalised.

        The embeddings of a CLIP model lie in a narrow cone. Centring spreads them.
        """
        pairs = zip(self._raw(x), self.centres.split(self.dims), strict=True)
        return [normalize(view - centre, dim=1) for view, centre in pairs]

    def views(self, x: Tensor) -> Tensor:
        """(n, D) -> (n, width): the views times their weights, side by side, unit rows."""
        views = [view * w for view, w in zip(self.each_view(x), self.weights, strict=True)]
        return torch.cat(views, dim=1) / self.weights.norm()

    def forward(self, x: Tensor) -> Tensor:
        """(n, D) -> features Z (n, d) with unit rows."""
        seen = self.views(x) - self.mean
        return normalize(self.project(seen) + self.residual(seen), dim=1)


def _blocks(x: Tensor) -> Iterator[Tensor]:
    return (block.float() for block in x.split(BLOCK_ROWS))
