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
LARGEST_ALONG = 64  # most clusters of a spectral cut, which needs as many eigenvectors
PARTS = 20  # prototypes per cluster, on average, of a spectral cut
CLEARLY = 1.05  # factor by which a spectral cut, made from the graph, must be more informative
FLAT = 0.005  # share of the bits that clustering saves: a k that loses less is as good as the best
BAND = (0.05, 0.95)  # quantiles over resamples


def neighbours(z: Tensor) -> tuple[Tensor, Tensor]:
    """`spectral.neighbours` of landmarks z (m, d): similarities and indices, both (m, q)."""
    return spectral.neighbours(z, min(NEIGHBOURS, len(z) - 1))


def over_segment(z: Tensor, cfg: Config) -> Tensor:
    """Mean directions of small groups of landmarks z (m, d): (p, d) unit rows."""
    graph = spectral.build_graph(*neighbours(z), ETA)
    most = min(COMPONENTS, len(z) - 1, cfg.leaves)
    vectors = spectral.embedding(graph, most, cfg.seed)
    labels = torch.from_numpy(spectral.over_segment(vectors, cfg.leaves, cfg.seed))
    _, labels = labels.unique(return_inverse=True)
    return assignment.mean_directions(z, labels, int(labels.max()) + 1)


@dataclass(frozen=True)
class Choice:
    """The chosen k, and how certain it is."""

    k: int  # flat_from, or select_k.k
    k_best: int  # the k of fewest bits
    k_low: int  # 5th and 95th percentile of k_best over resamples
    k_high: int
    flat_from: int  # the ks around k_best that are as good (FLAT)
    flat_to: int
    curve: pa.Table  # CURVE


def choose_from_curve(bits: Tensor, resampled: Tensor, cfg: Config) -> Choice:
    """Choose k from the bits of every cut: bits (p,), entry i for i + 1 clusters; resampled (b, p).

    It is the smallest k from k_min to k_max that is as good as the k of fewest bits. `cfg.k`
    overrides it.
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
    """Bits (b, p) of every cut over RESAMPLES bootstraps of the landmarks, scaled to N samples."""
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
    """Choose k from landmarks z (m, d), the leaves (p, d) and their statistics over all samples.

    Leaves without samples are dropped.
    """
    if not (used := stats[0] > 0).all():  # otherwise no copy is needed, which would be large
        leaves, stats = leaves[used], (stats[0][used], stats[1][used], stats[2][used])
    count, total, gram = stats
    merges = tree.grow(count, total, gram, cfg.eps_sq)
    bits = tree.lengths_bits(merges, count, gram, cfg.eps_sq)
    return choose_from_curve(bits, resample(z, leaves, merges, float(count.sum()), cfg), cfg)


def cut(z: Tensor, k: int, cfg: Config) -> Prototypes:
    """Cut landmarks z (m, d) into k clusters, the largest first.

    Two cuts are compared. One is k-means of the landmarks smoothed along their graph, with one
    prototype per cluster. The other, for up to LARGEST_ALONG clusters, is the spectral cut of the
    graph, with PARTS prototypes per cluster; it is taken if it is more informative by CLEARLY.
    UserError if the landmarks have fewer than k different features.
    """
    if (found := len(z.unique(dim=0))) < k:
        raise UserError(
            f"select_k.k = {k}, but the landmarks have only {found} different features: give a "
            "smaller k"
        )
    similarity, index = neighbours(z)
    graph = spectral.build_graph(similarity, index, ETA)
    along = None
    if 1 < k <= min(LARGEST_ALONG, len(z) - 1):
        along = spectral.partition(spectral.embedding(graph, k, cfg.seed), index, k, cfg.seed)
    smooth = spectral.partition(spectral.smooth(z, graph), index, k, cfg.seed, along)
    best = _make_prototypes(z, smooth, 1)
    if along is not None:
        other = _make_prototypes(z, along, PARTS)
        if _information(other, z, index) > CLEARLY * _information(best, z, index):
            best = other
    own = best.nearest(z)
    agreement = float((own[index] == own[:, None]).float().mean())
    return replace(best, eta=assignment.calibrate_eta(best.similarity(z), agreement))


def _make_prototypes(z: Tensor, labels: np.ndarray, parts: int) -> Prototypes:
    """Prototypes of clusters `labels` (m,), about `parts` each; the largest cluster is the first.

    Clusters whose prototypes are nearest to no row are dropped.
    """
    part_of = torch.from_numpy(
        labels if parts == 1 else spectral.split_clusters(z, labels, parts, 0)
    )
    clusters = torch.from_numpy(labels)
    table = assignment.mean_directions(z, part_of, int(part_of.max()) + 1)
    cluster_of = torch.zeros(len(table), dtype=torch.int64).scatter_(0, part_of, clusters)
    nearest = Prototypes(table, cluster_of, 1.0).nearest(z)
    sizes = torch.bincount(nearest, minlength=int(clusters.max()) + 1)
    rank = sizes.argsort(descending=True, stable=True).argsort()[cluster_of]
    order = rank.argsort(stable=True)[: int((sizes[cluster_of] > 0).sum())]  # empty ones are last
    return Prototypes(table[order], rank[order], 1.0)


def _information(prototypes: Prototypes, z: Tensor, index: Tensor) -> float:
    return spectral.information(prototypes.nearest(z).numpy(), index)
