"""Every sample to a cluster, from a table of prototypes: bounded memory, one row at a time.

n samples, d dimensions, k clusters with a prototype each.
"""

import math
from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn.functional import normalize

ETA_LEAST, ETA_MOST = 1e-3, 10.0
BISECTIONS = 30


@dataclass(frozen=True)
class Assignment:
    """Of n samples; all on the CPU."""

    cluster: Tensor  # (n,) of the nearest prototype
    confidence: Tensor  # (n,) share of that cluster, 0 to 1
    margin: Tensor  # (n,) confidence less the best other share, −1 to 1
    outlier_score: Tensor  # (n,) 1 − cosine to the nearest prototype, 0 to 2
    top_clusters: Tensor  # (n, t), by share, its own first
    top_shares: Tensor  # (n, t)


def prototypes(Z: Tensor, labels: Tensor, k: int) -> Tensor:
    """Mean directions of k groups, (k, d) with unit rows; every group must have a member."""
    total = Z.new_zeros(k, Z.shape[1]).index_add_(0, labels, Z)
    return normalize(total, dim=1)


def nearest(Z: Tensor, table: Tensor) -> Tensor:
    """Index of the prototype of largest cosine, (n,); the first of several."""
    return (Z @ table.T).argmax(dim=1)


def assign(Z: Tensor, table: Tensor, eta: float, top: int) -> Assignment:
    """Z (n, d) to the clusters of a table (k, d): the nearest; shares are softmax(cos / η)."""
    similarity = Z @ table.T  # (n, k)
    found = similarity.topk(min(top, len(table)), dim=1)  # before softmax, where small shares tie
    shares = torch.softmax(similarity / eta, dim=1).gather(1, found.indices)
    own = shares[:, 0]
    second = shares[:, 1] if shares.shape[1] > 1 else torch.zeros_like(own)
    return Assignment(
        found.indices[:, 0], own, own - second, 1 - found.values[:, 0], found.indices, shares
    )


def calibrated(Z: Tensor, table: Tensor, agreement: float) -> float:
    """The η at which the mean confidence of Z (m, d) is `agreement`: bisection on a log scale.

    With `agreement` the share of neighbours in one cluster, a confidence of 0.8 says that about 8
    of 10 samples like this one's neighbours are where it is. Between ETA_LEAST and ETA_MOST.
    """
    similarity = Z @ table.T
    low, high = math.log(ETA_LEAST), math.log(ETA_MOST)
    for _ in range(BISECTIONS):
        middle = (low + high) / 2
        confidence = torch.softmax(similarity / math.exp(middle), dim=1).amax(1).mean()
        low, high = (middle, high) if confidence > agreement else (low, middle)
    return math.exp(low)
