"""The choice of k: over-segment the landmarks, merge, pick k by coding length. No Ray, no files."""

from dataclasses import dataclass, replace

import numpy as np
import pyarrow as pa
import torch
from torch import Tensor

from pipeline.artifacts import schemas
from pipeline.mcr2 import assignment, coding_rate, spectral, tree
from pipeline.mcr2.assignment import Prototypes
from pipeline.runtime.errors import UserError
from pipeline.select_k.settings import Config

NEIGHBOURS = 20  # of each landmark in the graph
ETA = 0.1  # η, temperature of the weights of the graph: exp((cos − 1) / η)
COMPONENTS = 64  # eigenvectors of the graph for the over-segmentation
RESAMPLES = 20  # bootstraps of the landmarks, for the band of the curve
LARGEST_ALONG = 64  # clusters: a spectral cut takes as many eigenvectors
PARTS = 20  # of a cluster, on average, where it has more than one prototype
CLEARLY = 1.05  # times the information: a cut along the graph is judged by what it was made from
FLAT = 0.005  # of the bits that clustering saves: a k that loses no more is as good as the best
BAND = (0.05, 0.95)  # quantiles over resamples


def neighbours(z: Tensor) -> tuple[Tensor, Tensor]:
    """`spectral.neighbours` of landmarks z (m, d): similarities and indices, both (m, q)."""
    return spectral.neighbours(z, min(NEIGHBOURS, len(z) - 1))


def over_segment(z: Tensor, cfg: Config) -> Tensor:
    """Mean directions of small groups of landmarks z (m, d): (p, d) unit rows."""
    graph = spectral.graph_of(*neighbours(z), ETA)
    most = min(COMPONENTS, len(z) - 1, cfg.leaves)
    vectors = spectral.embedding(graph, most, cfg.seed)
    labels = torch.from_numpy(spectral.over_segment(vectors, cfg.leaves, cfg.seed))
    _, labels = labels.unique(return_inverse=True)
    return assignment.directions(z, labels, int(labels.max()) + 1)


@dataclass(frozen=True)
class Choice:
    """The outcome for k."""

    k: int  # the knee, flat_from; or as given
    k_best: int  # of fewest bits
    k_low: int  # band of k_best over resamples
    k_high: int
    flat_from: int  # ks around k_best whose bits are within FLAT of the saving
    flat_to: int
    curve: pa.Table  # CURVE


def choose(bits: Tensor, resampled: Tensor, cfg: Config) -> Choice:
    """k from the bits of every cut: bits (p,), entry i for i + 1 clusters; resampled (b, p).

    The smallest k as good as that of fewest bits, between k_min and k_max; `cfg.k` overrides.
    """
    high = min(cfg.k_max, len(bits))
    low = min(cfg.k_min, high)
    window = bits[low - 1 : high]
    best = int(window.argmin()) + low
    tolerance = FLAT * (bits[0] - window.min()).clamp(min=0)
    worse = (window > window.min() + tolerance).nonzero()[:, 0] + low
    flat_from = max([low, *(k + 1 for k in worse.tolist() if k < best)])
    flat_to = min([high, *(k - 1 for k in worse.tolist() if k > best)])
    levels = torch.tensor(BAND, dtype=torch.float64)
    shifted = resampled - resampled.mean(dim=0) + bits  # the spread, around the curve itself
    bests = shifted[:, low - 1 : high].argmin(dim=1).double() + low
    bands = shifted.quantile(levels, dim=0)
    columns = [range(1, len(bits) + 1), bits.tolist(), bands[0].tolist(), bands[1].tolist()]
    curve = pa.table(
        dict(zip(schemas.CURVE.names, map(list, columns), strict=True)), schema=schemas.CURVE
    )
    k_low, k_high = bests.quantile(levels).round().int().tolist()
    return Choice(cfg.k or flat_from, best, k_low, k_high, flat_from, flat_to, curve)


def resample(
    z: Tensor, table: Tensor, merges: list[tree.Merge], samples: float, cfg: Config
) -> Tensor:
    """Bits of every cut over RESAMPLES bootstraps of the landmarks, scaled to N; (b, p)."""
    labels = assignment.nearest(z, table)
    generator = torch.Generator().manual_seed(cfg.seed)
    curves = []
    for _ in range(RESAMPLES):
        rows = torch.randint(len(z), (len(z),), generator=generator)
        count, _, gram = coding_rate.statistics(z[rows], labels[rows], len(table))
        scale = samples / len(z)
        curves.append(tree.lengths_bits(merges, count * scale, gram.mul_(scale), cfg.eps_sq))
    return torch.stack(curves)


def choose_k(z: Tensor, leaves: Tensor, stats: coding_rate.Statistics, cfg: Config) -> Choice:
    """k from landmarks z (m, d), the leaves (p, d) and their statistics over all samples.

    Leaves that no sample is nearest to are dropped.
    """
    if not (used := stats[0] > 0).all():  # where all are, no copy is made of much memory
        leaves, stats = leaves[used], (stats[0][used], stats[1][used], stats[2][used])
    count, total, gram = stats
    merges = tree.grow(count, total, gram, cfg.eps_sq)
    bits = tree.lengths_bits(merges, count, gram, cfg.eps_sq)
    return choose(bits, resample(z, leaves, merges, float(count.sum()), cfg), cfg)


def cut(z: Tensor, k: int, cfg: Config) -> Prototypes:
    """k clusters of landmarks z (m, d), the largest first.

    k-means of the landmarks smoothed along their graph, with one prototype for each cluster; or,
    up to LARGEST_ALONG of them, the spectral cut of the graph, with PARTS on average, where its
    neighbours agree clearly more on what the prototypes say.
    Raises UserError if the landmarks do not hold k different features.
    """
    if (found := len(z.unique(dim=0))) < k:
        raise UserError(
            f"select_k.k = {k}, but the samples it is chosen from have {found} different features "
            "only: give a smaller k"
        )
    similarity, index = neighbours(z)
    graph = spectral.graph_of(similarity, index, ETA)
    along = None
    if 1 < k <= min(LARGEST_ALONG, len(z) - 1):
        along = spectral.partition(spectral.embedding(graph, k, cfg.seed), index, k, cfg.seed)
    smooth = spectral.partition(spectral.smoothed(z, graph), index, k, cfg.seed, along)
    best = _prototypes(z, smooth, 1)
    if along is not None:
        other = _prototypes(z, along, PARTS)
        if _told(other, z, index) > CLEARLY * _told(best, z, index):
            best = other
    own = best.nearest(z)
    agreement = float((own[index] == own[:, None]).float().mean())
    return replace(best, eta=assignment.calibrated(best.similarity(z), agreement))


def _prototypes(z: Tensor, labels: np.ndarray, parts: int) -> Prototypes:
    """Of clusters `labels` (m,), in about so many parts each; the largest is the first.

    Clusters that no row is nearest to are left out.
    """
    part_of = torch.from_numpy(labels if parts == 1 else spectral.parted(z, labels, parts, 0))
    clusters = torch.from_numpy(labels)
    table = assignment.directions(z, part_of, int(part_of.max()) + 1)
    cluster_of = torch.zeros(len(table), dtype=torch.int64).scatter_(0, part_of, clusters)
    nearest = Prototypes(table, cluster_of, 1.0).nearest(z)
    sizes = torch.bincount(nearest, minlength=int(clusters.max()) + 1)
    rank = sizes.argsort(descending=True, stable=True).argsort()[cluster_of]
    order = rank.argsort(stable=True)[: int((sizes[cluster_of] > 0).sum())]  # the empty come last
    return Prototypes(table[order], rank[order], 1.0)


def _told(prototypes: Prototypes, z: Tensor, index: Tensor) -> float:
    return spectral.information(prototypes.nearest(z).numpy(), index)
