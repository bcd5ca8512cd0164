"""Every sample to a cluster, from a table of prototypes: bounded memory, one row at a time.

n samples, d dimensions, p prototypes, k clusters.
"""

from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn.functional import normalize


@dataclass(frozen=True)
class Assignment:
    """Of n samples; all on the CPU."""

    cluster: Tensor  # (n,) of the nearest prototype
    confidence: Tensor  # (n,) share of that cluster, 0 to 1
    margin: Tensor  # (n,) confidence less the best other share, −1 to 1
    outlier_score: Tensor  # (n,) 1 − cosine to the nearest prototype, 0 to 2
    top_clusters: Tensor  # (n, t), its own first, then by share
    top_shares: Tensor  # (n, t)


def prototypes(Z: Tensor, labels: Tensor, k: int) -> Tensor:
    """Mean directions of k groups, (k, d) with unit rows; every group must have a member."""
    total = Z.new_zeros(k, Z.shape[1]).index_add_(0, labels, Z)
    return normalize(total, dim=1)


def nearest(Z: Tensor, table: Tensor) -> Tensor:
    """Index of the prototype of largest cosine, (n,); the first of several."""
    return (Z @ table.T).argmax(dim=1)


def assign(Z: Tensor, table: Tensor, cluster_of: Tensor, eta: float, top: int) -> Assignment:
    """Z (n, d) to the clusters of a table (p, d) whose row r belongs to cluster `cluster_of[r]`.

    A sample's cluster is that of its nearest prototype. Its shares are softmax(cos / η) summed
    within clusters: a sample between prototypes of one cluster is still sure of the cluster.
    """
    similarity = Z @ table.T  # (n, p)
    best, index = similarity.max(dim=1)
    k = int(cluster_of.max()) + 1
    weights = torch.softmax(similarity / eta, dim=1)
    shares = weights.new_zeros(len(Z), k).index_add_(1, cluster_of, weights)
    cluster = cluster_of[index]
    own = shares.gather(1, cluster[:, None])[:, 0]
    ranked = shares.scatter(1, cluster[:, None], 2.0)  # its own cluster first, whatever its share
    t = min(top, k)
    top_clusters = ranked.topk(t, dim=1).indices
    top_shares = shares.gather(1, top_clusters)
    second = top_shares[:, 1] if t > 1 else torch.zeros_like(own)
    return Assignment(cluster, own, own - second, 1 - best, top_clusters, top_shares)
