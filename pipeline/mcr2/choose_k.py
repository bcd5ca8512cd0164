"""The number of clusters by coding length: over-segment, merge, take the k of fewest bits.

m landmarks, d dimensions, p leaves, N samples.
"""

from dataclasses import dataclass
from typing import Protocol

import numpy as np
import torch
from torch import Tensor

from pipeline.mcr2 import assignment, coding_rate, cut, spectral, tree

COMPONENTS = 64  # eigenvectors of the graph for the over-segmentation
RESAMPLES = 20  # bootstraps of the landmarks, for the band of the curve
FLAT = 0.005  # share of the bits that clustering saves: a k that loses less is as good as the best
BAND = (0.05, 0.95)  # quantiles over resamples


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

    k: int  # flat_from, unless the user gave it
    k_best: int  # the k of fewest bits
    k_low: int  # 5th and 95th percentile of k_best over resamples
    k_high: int
    flat_from: int  # the ks around k_best that are as good (FLAT)
    flat_to: int
    bits: np.ndarray  # (p,) of the cuts into 1, 2, … p clusters
    bands: np.ndarray  # (2, p): BAND of the bits over resamples


def over_segment(z: Tensor, limits: Limits) -> Tensor:
    """Mean directions of small groups of landmarks z (m, d): (p, d) unit rows."""
    graph = spectral.shared_neighbours(cut.neighbours(z))
    most = min(COMPONENTS, len(z) - 1, limits.leaves)
    vectors = spectral.embedding(graph, most, limits.seed)
    labels = torch.from_numpy(spectral.over_segment(vectors, limits.leaves, limits.seed))
    _, labels = labels.unique(return_inverse=True)
    return assignment.mean_directions(z, labels, int(labels.max()) + 1)


def choose_from_curve(bits: Tensor, resampled: Tensor, limits: Limits) -> Choice:
    """Choose k from the bits of every cut: bits (p,), entry i for i + 1 clusters; resampled (b, p).

    It is the smallest k of the limits that is as good as the k of fewest bits.
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
    return Choice(flat_from, best, k_low, k_high, flat_from, flat_to, bits.numpy(), bands)


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
    return choose_from_curve(bits, resampled, limits)
