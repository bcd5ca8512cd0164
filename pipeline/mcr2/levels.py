"""Levels: the chosen clusters, coarser ones that merge them, and finer ones that split them.

All levels are cuts of one tree, so they are nested. The leaves of the tree are small groups, into
which each cluster is split. Groups of one cluster merge first, by Ward's criterion (1963), then
the clusters do, by coding length (`tree`). Coding length does not serve for groups of a few
samples: see docs/decisions/levels.md.
m landmarks, d dimensions, k clusters, g groups, L levels.
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch
from sklearn.metrics import adjusted_rand_score
from torch import Tensor

from pipeline.mcr2 import assignment, choose_k, coding_rate, spectral, tree
from pipeline.mcr2.assignment import Prototypes
from pipeline.mcr2.tree import Merge

EACH_WAY = 2  # most levels that are coarser than the clusters, and most that are finer
APART = (3, 8)  # factors between the numbers of clusters of one level and the next
SPLIT = 32  # most groups of a cluster, on average
GROUP_ROWS = 10  # least landmarks of a group, on average
MOST = 1000  # groups
RESAMPLES = 5
FEWEST = 3  # clusters of a level


@dataclass(frozen=True)
class Groups:
    """The small groups that the clusters are split into."""

    table: Tensor  # (g, d) unit rows: their mean directions
    cluster_of: Tensor  # (g,) the cluster of each, ascending from 0 without gaps

    @property
    def k(self) -> int:
        """Number of clusters."""
        return int(self.cluster_of[-1]) + 1

    def nearest(self, Z: Tensor, clusters: Tensor) -> Tensor:
        """The nearest group (n,) of rows Z (n, d) among those of their `clusters` (n,)."""
        others = self.cluster_of != clusters[:, None]
        return (Z @ self.table.T).masked_fill(others, -math.inf).argmax(dim=1)


@dataclass(frozen=True)
class Landmarks:
    """Landmarks with their clusters."""

    z: Tensor  # (m, d) unit rows
    rows: np.ndarray  # (m, c) the same, smoothed along their graph: what k-means splits
    clusters: Tensor  # (m,)

    @classmethod
    def of(cls, z: Tensor, prototypes: Prototypes, index: Tensor) -> "Landmarks":
        """Landmarks z (m, d) in the clusters of these prototypes; index are `cut.neighbours`."""
        graph = spectral.shared_neighbours(index)
        return cls(z, spectral.smooth(z, graph), prototypes.nearest(z))

    def resample(self, generator: np.random.Generator) -> "Landmarks":
        """As many landmarks of each cluster, drawn with replacement."""
        drawn = np.empty(len(self.z), np.int64)
        for cluster in self.clusters.unique().tolist():
            members = (self.clusters == cluster).nonzero()[:, 0].numpy()
            drawn[members] = generator.choice(members, len(members))
        kept = torch.from_numpy(drawn)
        return Landmarks(self.z[kept], self.rows[drawn], self.clusters[kept])


def split(marks: Landmarks, most: int, seed: int) -> Groups:
    """Split each cluster by k-means; about `most` groups at most, unless there are more clusters.

    Larger clusters have more groups. Groups to which no landmark is nearest are left out.
    """
    z, clusters, k = marks.z, marks.clusters, int(marks.clusters.max()) + 1
    each = min(SPLIT, min(most, MOST) // k, len(z) // (GROUP_ROWS * k))
    own = clusters
    if each > 1:
        rows = torch.from_numpy(marks.rows)
        own = torch.from_numpy(spectral.split_clusters(rows, clusters.numpy(), each, seed))
    cluster_of = torch.zeros(int(own.max()) + 1, dtype=torch.int64).scatter_(0, own, clusters)
    groups = Groups(assignment.mean_directions(z, own, len(cluster_of)), cluster_of)
    used = torch.bincount(groups.nearest(z, clusters), minlength=len(cluster_of)) > 0
    return Groups(groups.table[used], cluster_of[used])


class _Tree:
    """The merges of groups: those of one cluster first, then those of the clusters.

    It is made from the landmarks `marks`, and cuts the landmarks `every` (m,).
    """

    def __init__(
        self, marks: Landmarks, groups: Groups, merges: Sequence[Merge], every: Landmarks
    ) -> None:
        own = groups.nearest(marks.z, marks.clusters)
        self.groups = own if every is marks else groups.nearest(every.z, every.clusters)  # (m,)
        self.count = len(groups.table)
        sizes = torch.bincount(own, minlength=self.count).double().numpy()
        first = torch.searchsorted(groups.cluster_of, torch.arange(groups.k)).tolist()
        between = [Merge(first[m.kept], first[m.merged], m.bits_saved) for m in merges]
        self.merges = [*_within(groups, sizes), *between]

    def cut(self, k: int) -> np.ndarray:
        """The cluster of each group, (g,), when k clusters are left."""
        return np.array(tree.cut(self.merges, self.count, k))

    def labels(self, k: int) -> np.ndarray:
        """The same of each landmark (m,)."""
        return self.cut(k)[self.groups.numpy()]

    def jump(self, k: int) -> float:
        """How much more the merge after k clusters costs than the one before, −1 to 1."""
        place = self.count - k
        before, after = (-self.merges[i].bits_saved for i in (place - 1, place))
        return (after - before) / max(abs(after) + abs(before), 1e-9)


def _within(groups: Groups, sizes: np.ndarray) -> list[Merge]:
    """The merges of the groups of each cluster into one; those that cost least come first.

    The cost of a merge is Ward's, n·m / (n + m) times the squared distance of the means of n and m
    landmarks; sizes (g,). It stands in place of bits.
    """
    found = []
    for cluster in range(groups.k):
        members = (groups.cluster_of == cluster).nonzero()[:, 0].numpy()
        means, weights = groups.table.double().numpy()[members], sizes[members]
        alive = list(range(len(members)))
        while len(alive) > 1:
            n, x = weights[alive], means[alive]
            squares = ((x[:, None] - x[None]) ** 2).sum(axis=2)
            costs = np.outer(n, n) / np.maximum(n[:, None] + n, 1) * squares
            np.fill_diagonal(costs, np.inf)
            one, other = (alive[i] for i in sorted(divmod(int(costs.argmin()), len(alive))))
            found.append(Merge(int(members[one]), int(members[other]), -float(costs.min())))
            both = weights[one] + weights[other]
            means[one] = (weights[one] * means[one] + weights[other] * means[other]) / max(both, 1)
            weights[one] = both
            alive.remove(other)
    return sorted(found, key=lambda merge: -merge.bits_saved)


def find(
    marks: Landmarks, groups: Groups, merges: Sequence[Merge], sizes: Tensor, eps_sq: float
) -> np.ndarray:
    """The cluster of each group at each level, from coarse to fine: (L, g) int64.

    `merges` are those of the k clusters, sizes (g,) are of all samples. Cluster 0 of a level is its
    largest, but the level of the k clusters has their numbers.
    The next coarser level of k clusters has k/8 to k/3 of them, the next finer one 3 k to 8 k, and
    so on. Of these numbers, that with the best mean rank in two measures is taken: the agreement
    with the trees of RESAMPLES resamples of the landmarks, and the jump, by which the next merge
    costs more than the one before.
    """
    grown, generator = _Tree(marks, groups, merges, marks), np.random.default_rng(0)
    others = []
    for seed in range(RESAMPLES):
        drawn = marks.resample(generator)
        stats = coding_rate.statistics(drawn.z, drawn.clusters, groups.k)
        own = split(drawn, len(groups.table), seed)
        others.append(_Tree(drawn, own, tree.grow(*stats, eps_sq), marks))

    def best(low: float, high: float) -> list[int]:
        least, most = max(FEWEST, math.ceil(low)), min(len(groups.table) // 2, math.floor(high))
        if least > most:
            return []
        ks = choose_k.grid(least, most)
        measures = {k: [_agreement(grown, others, k), grown.jump(k)] for k in ks}
        return [choose_k.best_of(measures)]

    ks = [groups.k]
    for _ in range(EACH_WAY):
        ks = best(ks[0] / APART[1], ks[0] / APART[0]) + ks
        ks = ks + best(ks[-1] * APART[0], ks[-1] * APART[1])
    cuts = [_by_size(grown.cut(k), sizes.numpy()) for k in ks if k != groups.k]
    cuts.insert(ks.index(groups.k), groups.cluster_of.numpy())
    return np.stack(cuts)


def _agreement(grown: _Tree, others: Sequence[_Tree], k: int) -> float:
    """Mean adjusted Rand index of the cut into k with those of the other trees."""
    labels = grown.labels(k)
    return float(np.mean([adjusted_rand_score(labels, other.labels(k)) for other in others]))


def _by_size(clusters: np.ndarray, sizes: np.ndarray) -> np.ndarray:
    """The clusters of groups of these sizes, numbered anew: 0 has most samples."""
    totals = np.bincount(clusters, weights=sizes)
    ranks = np.empty(len(totals), np.int64)
    ranks[np.argsort(-totals, kind="stable")] = np.arange(len(totals))
    return ranks[clusters]
