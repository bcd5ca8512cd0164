"""Cut landmarks into k clusters along their neighbour graph.

m landmarks, d dimensions, q neighbours, k clusters.
"""

from dataclasses import replace

import numpy as np
import torch
from torch import Tensor

from pipeline.mcr2 import assignment, spectral
from pipeline.mcr2.assignment import Prototypes

NEIGHBOURS = 20  # of each landmark in the graph
LARGEST_ALONG = 64  # most clusters of a spectral cut, which needs as many eigenvectors
PARTS = 100  # most prototypes per cluster, on average
PART_ROWS = 10  # least landmarks per prototype, on average
LEAST_PART = 5  # landmarks of a part; a prototype of fewer would make outliers look typical
CLEARLY = 1.05  # factor by which a spectral cut, made from the graph, must be more informative


def neighbours(z: Tensor) -> Tensor:
    """`spectral.neighbours` of landmarks z (m, d): (m, q)."""
    return spectral.neighbours(z, min(NEIGHBOURS, len(z) - 1))


def cut(z: Tensor, k: int, seed: int, index: Tensor | None = None) -> Prototypes:
    """k clusters of landmarks z (m, d), unit rows; the largest is the first.

    Two cuts are compared. One is k-means of the landmarks smoothed along their graph. The other,
    for up to LARGEST_ALONG clusters, is the spectral cut of the graph; it is taken if it is more
    informative by CLEARLY. Clusters are represented by the mean directions of their parts. index
    (m, q) are the `neighbours` of z, if they are known. ValueError for fewer than k different rows.
    """
    if len(z.unique(dim=0)) < k:
        raise ValueError(f"{k} clusters of fewer different rows")
    index = neighbours(z) if index is None else index
    graph = spectral.shared_neighbours(index)
    labels = spectral.partition(spectral.smooth(z, graph), index, k, seed)
    parts = int(np.clip(len(z) // (k * PART_ROWS), 1, PARTS))
    best = _make_prototypes(z, labels, parts)
    if 1 < k <= min(LARGEST_ALONG, len(z) - 1):
        along = spectral.partition(spectral.embedding(graph, k, seed), index, k, seed)
        other = _make_prototypes(z, along, parts)
        if _information(other, z, index) > CLEARLY * _information(best, z, index):
            best = other
    own = best.nearest(z)
    agreement = float((own[index] == own[:, None]).float().mean())
    return replace(best, eta=assignment.calibrate_eta(best.similarity(z), agreement))


def _make_prototypes(z: Tensor, labels: np.ndarray, parts: int) -> Prototypes:
    """Prototypes of clusters `labels` (m,), about `parts` each; the largest cluster is the first.

    Parts of less than LEAST_PART rows are dropped where the cluster has larger ones, and clusters
    whose prototypes are nearest to no row.
    """
    part_of = torch.from_numpy(
        labels if parts == 1 else spectral.split_clusters(z, labels, parts, 0)
    )
    clusters = torch.from_numpy(labels)
    sizes = torch.bincount(part_of)
    table = assignment.mean_directions(z, part_of, len(sizes))
    cluster_of = torch.zeros(len(table), dtype=torch.int64).scatter_(0, part_of, clusters)
    largest = torch.zeros(int(clusters.max()) + 1, dtype=torch.int64)
    largest = largest.scatter_reduce(0, cluster_of, sizes, "amax")
    kept = sizes >= largest[cluster_of].clamp(max=LEAST_PART)
    table, cluster_of = table[kept], cluster_of[kept]
    nearest = Prototypes(table, cluster_of, 1.0).nearest(z)
    sizes = torch.bincount(nearest, minlength=int(clusters.max()) + 1)
    rank = sizes.argsort(descending=True, stable=True).argsort()[cluster_of]
    order = rank.argsort(stable=True)[: int((sizes[cluster_of] > 0).sum())]  # empty ones are last
    return Prototypes(table[order], rank[order], 1.0)


def _information(prototypes: Prototypes, z: Tensor, index: Tensor) -> float:
    return spectral.information(prototypes.nearest(z).numpy(), index)
