"""Assign samples to clusters by a table of prototypes; each row is independent of the others.

n samples, d dimensions, p prototypes, k clusters.
"""

import math
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor
from torch.nn.functional import normalize

ETA_LEAST, ETA_MOST = 1e-3, 10.0
BISECTIONS = 30


@dataclass(frozen=True)
class Assignment:
    """The assignment of n samples; all tensors are on the CPU."""

    cluster: Tensor  # (n,) the cluster of the nearest prototype
    confidence: Tensor  # (n,) share of that cluster, 0 to 1
    margin: Tensor  # (n,) confidence minus the best other share, −1 to 1
    outlier_score: Tensor  # (n,) 1 − cosine to the nearest prototype, 0 to 2
    top_clusters: Tensor  # (n, t) the clusters of largest share, its own first
    top_shares: Tensor  # (n, t)


def mean_directions(Z: Tensor, labels: Tensor, k: int) -> Tensor:
    """Mean directions (k, d), unit rows, of k groups `labels` (n,); none may be empty."""
    total = Z.new_zeros(k, Z.shape[1]).index_add_(0, labels, Z)
    return normalize(total, dim=1)


def nearest(Z: Tensor, table: Tensor) -> Tensor:
    """Index (n,) of the prototype in `table` (p, d) of largest cosine; the first of several."""
    return (Z @ table.T).argmax(dim=1)


def similarity(vectors: np.ndarray, cluster_of: np.ndarray) -> np.ndarray:
    """Cosines of the nearest prototypes of each two clusters, (k, k).

    Prototypes (p, d) are unit rows, `cluster_of` (p,) as in `Prototypes`.
    """
    _, first = np.unique(cluster_of, return_index=True)
    cosines = np.maximum.reduceat(vectors @ vectors.T, first, axis=1)
    found: np.ndarray = np.maximum.reduceat(cosines, first, axis=0)
    return found


def nearest_clusters(vectors: np.ndarray, cluster_of: np.ndarray, most: int) -> list[list[int]]:
    """At most `most` other clusters for each cluster, nearest first by `similarity`."""
    cosines = similarity(vectors, cluster_of)
    np.fill_diagonal(cosines, -np.inf)
    order = np.argsort(-cosines, axis=1, kind="stable")
    return [row[: min(most, len(cosines) - 1)].tolist() for row in order]


@dataclass(frozen=True)
class Prototypes:
    """The directions that represent the clusters, one or more for each."""

    table: Tensor  # (p, d) unit rows
    cluster_of: Tensor  # (p,) cluster of each prototype, ascending from 0 without gaps
    eta: float  # temperature of the shares

    @property
    def k(self) -> int:
        """Number of clusters."""
        return int(self.cluster_of[-1]) + 1

    @property
    def centres(self) -> Tensor:
        """The mean direction of each cluster's prototypes, (k, d) unit rows."""
        return mean_directions(self.table, self.cluster_of, self.k)

    def similarity(self, Z: Tensor) -> Tensor:
        """Cosines of Z (n, d) to the nearest prototype of each cluster, (n, k)."""
        cosines = Z @ self.table.T
        if self.k == len(self.table):
            return cosines
        least = cosines.new_full((len(Z), self.k), -1)
        return least.scatter_reduce(1, self.cluster_of.expand(len(Z), -1), cosines, "amax")

    def nearest(self, Z: Tensor) -> Tensor:
        """The cluster of each row of Z (n, d)."""
        return self.similarity(Z).argmax(dim=1)


def assign(Z: Tensor, prototypes: Prototypes, top: int) -> Assignment:
    """Assign Z (n, d) to the clusters of the nearest prototypes; shares are softmax(cos / η).

    `top` is how many clusters to name for each row.
    """
    similarity = prototypes.similarity(Z)
    found = similarity.topk(min(top, prototypes.k), dim=1)  # of cosines: small shares tie
    shares = torch.softmax(similarity / prototypes.eta, dim=1).gather(1, found.indices)
    own = shares[:, 0]
    second = shares[:, 1] if shares.shape[1] > 1 else torch.zeros_like(own)
    return Assignment(
        found.indices[:, 0], own, own - second, 1 - found.values[:, 0], found.indices, shares
    )


def calibrate_eta(similarity: Tensor, agreement: float) -> float:
    """The η at which the mean confidence is `agreement`, by bisection on a log scale.

    similarity (m, k) is that of `Prototypes`; `agreement` is the share of neighbours that are in
    the sample's own cluster. A confidence of 0.8 then means: 8 of 10 neighbours of such samples are
    in their cluster. η is between ETA_LEAST and ETA_MOST.
    """
    low, high = math.log(ETA_LEAST), math.log(ETA_MOST)
    for _ in range(BISECTIONS):
        middle = (low + high) / 2
        confidence = torch.softmax(similarity / math.exp(middle), dim=1).amax(1).mean()
        low, high = (middle, high) if confidence > agreement else (low, middle)
    return math.exp(low)
