"""The number of clusters: by coding length, modularity, stability and silhouette together.

Coding length alone prefers too few clusters where they overlap: on unions of 10 subspaces with
noise it has its minimum at 2, where the other three agree on 10.

m landmarks, d dimensions, p leaves, N samples.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Protocol

import numpy as np
import torch
from scipy.stats import rankdata
from sklearn.metrics import adjusted_rand_score, silhouette_score
from torch import Tensor

from pipeline.mcr2 import assignment, coding_rate, cut, spectral, tree

COMPONENTS = 64  # eigenvectors of the graph for the over-segmentation
RESAMPLES = 20  # bootstraps of the landmarks, for the band of the curve
FLAT = 0.005  # share of the bits that clustering saves: a k that loses less is as good as the best
BAND = (0.05, 0.95)  # quantiles over resamples
COMPARED = 3_000  # least landmarks that the ks are compared on, if there are so many
MEMBERS = 20  # least landmarks per cluster, on average
STEP = 1.15  # from one k to the next
HALVES = 4  # random halves of the landmarks, for stability
FITS = 2  # of k-means
SILHOUETTE = 1_500  # landmarks of the silhouette
FINE = 8  # most ks that are compared on each side of the best of the grid


class Limits(Protocol):
    """Between which numbers of clusters to choose; the settings of select_k, fitted."""

    @property
    def k_min(self) -> int: ...
    @property
    def k_max(self) -> int: ...
    @property
    def leaves(self) -> int: ...  # small groups that clusters are merged from
    @property
    def eps_sq(self) -> float: ...  # ε², squared distortion per unit-norm feature
    @property
    def seed(self) -> int: ...


@dataclass(frozen=True)
class Choice:
    """The chosen k, and how certain it is."""

    k: int  # of the best mean rank in bits and `measures`, unless the user gave it
    k_best: int  # the k of fewest bits
    k_low: int  # 5th and 95th percentile of k_best over resamples
    k_high: int
    flat_from: int  # the ks around k_best that are as good (FLAT)
    flat_to: int
    bits: np.ndarray  # (p,) of the cuts into 1, 2, … p clusters
    bands: np.ndarray  # (2, p): BAND of the bits over resamples
    ks: np.ndarray  # (g,) that were compared
    measures: np.ndarray  # (3, g): modularity, stability, silhouette of the cuts into ks


def over_segment(z: Tensor, limits: Limits) -> Tensor:
    """Mean directions of small groups of landmarks z (m, d): (p, d) unit rows."""
    graph = spectral.shared_neighbours(cut.neighbours(z))
    most = min(COMPONENTS, len(z) - 1, limits.leaves)
    vectors = spectral.embedding(graph, most, limits.seed)
    labels = torch.from_numpy(spectral.over_segment(vectors, limits.leaves, limits.seed))
    _, labels = labels.unique(return_inverse=True)
    return assignment.mean_directions(z, labels, int(labels.max()) + 1)


def grid(low: int, high: int) -> list[int]:
    """The ks from low to high that are compared: all small ones, then STEP times the one before."""
    ks = [low]
    while (larger := max(ks[-1] + 1, round(ks[-1] * STEP))) <= high:
        ks.append(larger)
    return ks


class _Comparison:
    """How well numbers of clusters fit some landmarks z (m, d).

    modularity  share of the graph's weight within clusters, less that expected [Newman 2006]
    stability   mean adjusted Rand index to the cuts of HALVES random halves [Ben-Hur et al. 2002]
    silhouette  of the rows that k-means has cut, by cosines [Rousseeuw 1987]
    """

    def __init__(self, z: Tensor, ks: Sequence[int], seed: int) -> None:
        generator, self.seed = np.random.default_rng(seed), seed
        self.whole = _Rows(z, ks)
        self.halves = [np.sort(generator.permutation(len(z))[: len(z) // 2]) for _ in range(HALVES)]
        self.rows = [_Rows(z[torch.from_numpy(half)], ks, self.whole.along) for half in self.halves]

    def measure(self, k: int) -> list[float]:
        """Modularity, stability and silhouette of the cut into k; more is better."""
        labels = self.whole.cut(k, self.seed)
        stability = [
            adjusted_rand_score(labels[half], rows.cut(k, self.seed))
            for half, rows in zip(self.halves, self.rows, strict=True)
        ]
        return [
            spectral.modularity(labels, self.whole.graph),
            float(np.mean(stability)),
            self.whole.silhouette(labels, k),
        ]


class _Rows:
    """Landmarks as rows for k-means: smoothed, or, if that is more informative, eigenvectors."""

    def __init__(self, z: Tensor, ks: Sequence[int], along: bool | None = None) -> None:
        self.index = cut.neighbours(z)
        self.graph = spectral.shared_neighbours(self.index)
        self.smooth = spectral.smooth(z, self.graph)
        self.vectors = np.zeros((len(z), 0))  # eigenvectors, where a cut is made from them
        if along is not False:
            most = min(max(ks), cut.LARGEST_ALONG, len(z) - 1)
            vectors = spectral.embedding(self.graph, most, 0)
            if along or self._follows_the_graph(vectors, ks):
                self.vectors = vectors
        self.along = self.vectors.shape[1] > 0

    def _follows_the_graph(self, vectors: np.ndarray, ks: Sequence[int]) -> bool:
        """Whether eigenvectors give more informative cuts than smoothed rows, for most ks."""
        some = [k for k in ks if k <= vectors.shape[1]]
        wins = 0
        for k in some:
            along, smooth = (
                spectral.information(spectral.kmeans(rows, k, 1, 0), self.index)
                for rows in (vectors[:, :k], self.smooth)
            )
            wins += along > cut.CLEARLY * smooth
        return wins > len(some) / 2

    def rows(self, k: int) -> np.ndarray:
        """What a cut into k is made from, (m, c)."""
        return self.vectors[:, :k] if k <= self.vectors.shape[1] else self.smooth

    def cut(self, k: int, seed: int) -> np.ndarray:
        """Labels (m,) of k clusters."""
        return spectral.kmeans(self.rows(k), k, FITS, seed)

    def silhouette(self, labels: np.ndarray, k: int) -> float:
        """Of the cut into k with these labels; −1 where there is one cluster only."""
        if len(np.unique(labels)) < 2:
            return -1.0
        size = min(SILHOUETTE, len(labels))
        return float(
            silhouette_score(
                self.rows(k), labels, metric="cosine", sample_size=size, random_state=0
            )
        )


def best_of(measures: Mapping[int, Sequence[float]]) -> int:
    """The k of the best mean rank over its measures; the smaller of two that tie."""
    ranks = rankdata(-np.array(list(measures.values())), axis=0).mean(axis=1)
    return min(zip(ranks, measures, strict=True))[1]


def choose_from_curve(
    bits: Tensor, resampled: Tensor, k: int, measures: Mapping[int, list[float]], limits: Limits
) -> Choice:
    """The choice of k by its measures, with a description of the curve of bits.

    bits (p,) of every cut, entry i for i + 1 clusters; resampled (b, p) over bootstraps.
    """
    high = min(limits.k_max, len(bits))
    low = min(limits.k_min, high)
    window = bits[low - 1 : high]
    best = int(window.argmin()) + low
    tolerance = FLAT * (bits[0] - window.min()).clamp(min=0)
    worse = (window > window.min() + tolerance).nonzero()[:, 0] + low
    flat_from = max([low, *(k + 1 for k in worse.tolist() if k < best)])
    flat_to = min([high, *(k - 1 for k in worse.tolist() if k > best)])
    levels = torch.tensor(BAND, dtype=torch.float64)
    shifted = resampled - resampled.mean(dim=0) + bits  # the spread, around the curve itself
    bests = shifted[:, low - 1 : high].argmin(dim=1).double() + low
    bands = shifted.quantile(levels, dim=0).numpy()
    k_low, k_high = bests.quantile(levels).round().int().tolist()
    ks = sorted(measures)
    table = np.array([measures[each] for each in ks]).reshape(-1, 3).T
    numbers = (k, best, k_low, k_high, flat_from, flat_to)
    return Choice(*numbers, bits.numpy(), bands, np.array(ks, np.int64), table)


def resample(
    z: Tensor, table: Tensor, merges: list[tree.Merge], samples: float, limits: Limits
) -> Tensor:
    """Bits (b, p) of every cut over RESAMPLES bootstraps of the landmarks, scaled to N samples."""
    labels = assignment.nearest(z, table)
    generator = torch.Generator().manual_seed(limits.seed)
    curves = []
    for _ in range(RESAMPLES):
        rows = torch.randint(len(z), (len(z),), generator=generator)
        count, _, gram = coding_rate.statistics(z[rows], labels[rows], len(table))
        scale = samples / len(z)
        curves.append(tree.lengths_bits(merges, count * scale, gram.mul_(scale), limits.eps_sq))
    return torch.stack(curves)


def choose_k(z: Tensor, leaves: Tensor, stats: coding_rate.Statistics, limits: Limits) -> Choice:
    """Choose k from landmarks z (m, d), the leaves (p, d) and their statistics over all samples.

    Leaves without samples are dropped.
    """
    if not (used := stats[0] > 0).all():  # otherwise no copy is needed, which would be large
        leaves, stats = leaves[used], (stats[0][used], stats[1][used], stats[2][used])
    count, total, gram = stats
    merges = tree.grow(count, total, gram, limits.eps_sq)
    bits = tree.lengths_bits(merges, count, gram, limits.eps_sq)
    resampled = resample(z, leaves, merges, float(count.sum()), limits)
    k, measures = compare_ks(z, bits, limits)
    return choose_from_curve(bits, resampled, k, measures, limits)


def compare_ks(z: Tensor, bits: Tensor, limits: Limits) -> tuple[int, dict[int, list[float]]]:
    """The k that fits landmarks z (m, d) best, and the measures of all ks that were compared.

    First those of `grid`, then those around the best of it. bits (p,) of the cuts into 1 to p.
    """
    most = min(limits.k_max, len(bits))
    rows = min(len(z), max(COMPARED, MEMBERS * most))
    generator = torch.Generator().manual_seed(limits.seed)
    some = z[torch.randperm(len(z), generator=generator)[:rows].sort().values]
    high = max(1, min(most, rows // MEMBERS))
    ks = grid(min(limits.k_min, high), high)
    if len(ks) == 1:
        return ks[0], {}
    comparison = _Comparison(some, ks, limits.seed)

    def best(measures: Mapping[int, list[float]]) -> int:
        return best_of({k: [*own, -float(bits[k - 1])] for k, own in measures.items()})

    found = {k: comparison.measure(k) for k in ks}
    place = ks.index(best(found))
    below, middle, above = ks[max(0, place - 1)], ks[place], ks[min(place + 1, len(ks) - 1)]
    fine = {*np.linspace(below, middle, FINE, dtype=int)}
    fine |= {*np.linspace(middle, above, FINE, dtype=int)}
    near = {int(k): found.get(int(k)) or comparison.measure(int(k)) for k in sorted(fine)}
    return best(near), {**found, **near}
