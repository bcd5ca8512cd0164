"""Stage 3, select_k: the number of clusters that codes all features in the fewest bits.

reads   network/…                        network and landmarks, from train
        embeddings/{stem}.parquet        all of them, twice
writes  clusters/curve.parquet           CURVE       bits for every k, with a band
        clusters/tree.parquet            TREE        every merge
        clusters/prototypes.parquet      prototypes_schema
        clusters/exemplars.parquet       EXEMPLARS   typical members of each cluster
        assignments/{stem}.parquet       ASSIGNMENTS one row per embedded sample
        clusters/manifest.json           names k

Landmarks are over-segmented once (spectral embedding of their neighbour graph); one pass over all
parts gives each small group's additive statistics; merging them by coding length gives every k and
a tree; a second pass assigns every sample. N samples, m landmarks, d dimensions, p leaves.
Core: `over_segment`, `statistics`, `choose`, and `assigning` (no Ray). Shell: `run`.
"""

import logging
import math
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import pyarrow as pa
import torch
from torch import Tensor

from pipeline import artifacts, config, tasks
from pipeline.assigning import Assigner, assign_parts, load_network, most_typical, part_features
from pipeline.config import setting
from pipeline.errors import UserError
from pipeline.mcr2 import assignment, coding_rate, spectral, tree
from pipeline.mcr2.network import Network
from pipeline.mcr2.threads import one_thread
from pipeline.progress import StageProgress
from pipeline.store import tables

log = logging.getLogger(__name__)
MOST_STATISTICS = 128  # tasks: each sends p·d² numbers
MOST_TASKS = 1024
FILES = ("curve.parquet", "tree.parquet", "prototypes.parquet", "exemplars.parquet")
FLAT = 0.02  # of the bits that clustering saves: a k that loses no more is as good as the best
BAND = (0.05, 0.95)  # quantiles over resamples
ROUNDING = 1e-4  # of all samples: so many may be assigned otherwise than they were counted


@dataclass(frozen=True, kw_only=True)
class Config:
    """How k is chosen and samples are assigned. 0 where it says "fit" is chosen from the data."""

    k: int = setting(0, "clusters; 0: chosen by coding length")
    k_min: int = setting(2, "smallest number of clusters to choose from")
    k_max: int = setting(0, "largest number of clusters to choose from; 0: fit, 2√N up to 1000")
    leaves: int = setting(0, "small groups that clusters are merged from; 0: fit, 2 × k_max")
    eps_sq: float = setting(0.1, "ε², squared distortion allowed per unit-norm feature")
    neighbours: int = setting(20, "of each landmark in the graph")
    components: int = setting(64, "eigenvectors of the graph")
    eta: float = setting(0.1, "η, temperature of graph weights and of the shares of clusters")
    resamples: int = setting(20, "of the landmarks, for the band of the curve")
    seed: int = setting(0, "of the over-segmentation and the resamples")

    def __post_init__(self) -> None:
        for name in ("k", "k_max", "leaves"):
            if getattr(self, name) < 0:
                raise UserError(f"select_k.{name} = {getattr(self, name)}: give 0 (fit) or more")
        for name in ("k_min", "eps_sq", "neighbours", "components", "eta", "resamples"):
            if getattr(self, name) <= 0:
                raise UserError(f"select_k.{name} = {getattr(self, name)}: give a positive number")
        if self.k_max and self.k_max < self.k_min:
            raise UserError(f"select_k.k_max = {self.k_max} is below select_k.k_min = {self.k_min}")


def fitted(cfg: Config, samples: int, landmarks: int) -> Config:
    """The settings that say "fit", chosen for N samples and m landmarks."""
    if cfg.k > landmarks:
        raise UserError(
            f"select_k.k = {cfg.k} is more than the {landmarks} samples it is chosen from: give a "
            "smaller k, or raise train.landmarks where there are more samples"
        )
    k_max = min(cfg.k_max or min(1000, math.ceil(2 * math.sqrt(samples))), landmarks)
    k_min = min(cfg.k_min, k_max)
    leaves = max(cfg.leaves or min(2 * k_max, landmarks // 4), cfg.k, k_min)
    return replace(
        cfg,
        k_max=k_max,
        k_min=k_min,
        leaves=min(leaves, landmarks),
        neighbours=min(cfg.neighbours, landmarks - 1),
        components=min(cfg.components, landmarks - 1, leaves),
    )


def over_segment(z: Tensor, cfg: Config) -> Tensor:
    """Mean directions of small groups of landmarks z (m, d): (p, d) unit rows."""
    graph = spectral.affinity(z, cfg.neighbours, cfg.eta)
    vectors = spectral.embedding(graph, cfg.components, cfg.seed)
    labels = torch.from_numpy(spectral.over_segment(vectors, cfg.leaves, cfg.seed))
    _, labels = labels.unique(return_inverse=True)
    return assignment.prototypes(z, labels, int(labels.max()) + 1)


def statistics(urls: list[str], network: Network, table: Tensor) -> coding_rate.Statistics:
    """Additive statistics of the leaves `table` (p, d) over all samples of some parts."""
    total = coding_rate.no_statistics(*table.shape)
    for url in urls:
        for _, z in part_features(url, network, ["embedding"]):
            coding_rate.accumulate(total, z, assignment.nearest(z, table))
    return total


@dataclass(frozen=True)
class Choice:
    """The outcome for k."""

    k: int  # of fewest bits, or as given
    k_best: int  # of fewest bits
    k_low: int  # band of k_best over resamples
    k_high: int
    flat_from: int  # ks around it whose bits are within FLAT of the saving: this is the knee
    flat_to: int
    curve: pa.Table  # CURVE


def choose(bits: Tensor, resampled: Tensor, cfg: Config) -> Choice:
    """k from the bits of every cut: bits (p,), entry i for i + 1 clusters; resampled (b, p).

    The fewest bits between k_min and k_max; `cfg.k` overrides.
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
        dict(zip(artifacts.CURVE.names, map(list, columns), strict=True)), schema=artifacts.CURVE
    )
    k_low, k_high = bests.quantile(levels).round().int().tolist()
    return Choice(cfg.k or best, best, k_low, k_high, flat_from, flat_to, curve)


def resample(
    z: Tensor, table: Tensor, merges: list[tree.Merge], samples: float, cfg: Config
) -> Tensor:
    """Bits of every cut over `cfg.resamples` bootstraps of the landmarks, scaled to N; (b, p)."""
    labels = assignment.nearest(z, table)
    generator = torch.Generator().manual_seed(cfg.seed)
    curves = []
    for _ in range(cfg.resamples):
        rows = torch.randint(len(z), (len(z),), generator=generator)
        count, _, gram = coding_rate.statistics(z[rows], labels[rows], len(table))
        scale = samples / len(z)
        curves.append(tree.lengths_bits(merges, count * scale, gram * scale, cfg.eps_sq))
    return torch.stack(curves)


def numbered(cut: list[int], count: Tensor) -> Tensor:
    """Clusters of the leaves renumbered by size, 0 the largest: (p,)."""
    groups = torch.tensor(cut)
    sizes = torch.zeros(int(groups.max()) + 1, dtype=torch.float64).index_add_(0, groups, count)
    order = sizes.argsort(descending=True, stable=True)
    return order.argsort()[groups]


def cluster_bits(stats: coding_rate.Statistics, cluster_of: Tensor, eps_sq: float) -> list[float]:
    """L(X_c) of each cluster, from the statistics of its leaves."""
    count, _, gram = stats
    k = int(cluster_of.max()) + 1
    counts = count.new_zeros(k).index_add_(0, cluster_of, count)
    grams = gram.new_zeros(k, *gram.shape[1:]).index_add_(0, cluster_of, gram)
    return [float(b) for b in coding_rate.length_bits(counts, grams, eps_sq)]


def run(cfg: Config, paths: artifacts.RunPaths) -> dict[str, Any]:
    """Choose k, assign every sample, check the counts, commit the manifest."""
    made = artifacts.upstream(paths, "network")
    embedded, trained = made["embeddings"], made["network"]
    made_of = config.fingerprint(cfg, trained["fingerprint"])
    stems = [s["shard"]["stem"] for s in embedded["shards"]]
    files = {paths.clusters: FILES, paths.assignments: [f"{stem}.parquet" for stem in stems]}
    if manifest := artifacts.finished("select_k", paths.clusters, made_of, cfg, files):
        return manifest
    for folder in (paths.clusters, paths.assignments):
        folder.clear()
    sample = tables.read(paths.network.file("sample.parquet"), ["feature"])
    z = torch.from_numpy(tables.to_matrix(sample["feature"]).copy())
    fit = fitted(cfg, embedded["embedded"], len(z))
    network = load_network(paths)
    with one_thread(), StageProgress("select_k", 2 * len(stems), "parts") as progress:
        table = over_segment(z, fit)
        table, stats = _all_statistics(stems, paths, network, table, progress)
        choice, cluster_of = _cut(z, table, stats, fit, paths)
        assigner = Assigner(network, table, cluster_of, fit.eta, made_of)
        sizes = _assign_all(stems, paths, assigner, progress)
    _check_counts(sizes, stats[0], cluster_of, embedded["embedded"])
    _write_prototypes(table, stats[0], cluster_of, paths)
    facts = {key: value for key, value in vars(choice).items() if key != "curve"}
    paths.clusters.finish(
        made_of,
        upstream=trained["fingerprint"],
        config=config.facts(cfg),
        samples=int(sizes.sum()),
        sizes=sizes.tolist(),
        cluster_bits=cluster_bits(stats, cluster_of, fit.eps_sq),
        bits=choice.curve["bits"][choice.k - 1].as_py(),
        bits_of_one=choice.curve["bits"][0].as_py(),
        seconds=round(progress.seconds, 2),
        **facts,
    )
    log.info(
        "select_k: k = %d (fewest bits at %d, band %d to %d, flat from %d to %d), %d samples, "
        "%.1f s",
        *(choice.k, choice.k_best, choice.k_low, choice.k_high, choice.flat_from, choice.flat_to),
        *(sizes.sum(), progress.seconds),
    )
    return paths.clusters.manifest()


def _all_statistics(
    stems: list[str],
    paths: artifacts.RunPaths,
    network: Network,
    table: Tensor,
    progress: StageProgress,
) -> tuple[Tensor, coding_rate.Statistics]:
    """First pass over all parts; leaves that no sample is nearest to are dropped."""
    urls = [paths.embeddings.file(f"{stem}.parquet") for stem in stems]
    chunks = tasks.chunks(urls, MOST_STATISTICS)
    total = coding_rate.no_statistics(*table.shape)
    for chunk, more in zip(chunks, tasks.results(statistics, chunks, network, table), strict=True):
        samples = int(more[0].sum())
        progress.advance(len(chunk), samples)
        for sums, summand in zip(total, more, strict=True):
            sums += summand
    used = total[0] > 0
    return table[used], (total[0][used], total[1][used], total[2][used])


def _cut(
    z: Tensor, table: Tensor, stats: coding_rate.Statistics, cfg: Config, paths: artifacts.RunPaths
) -> tuple[Choice, Tensor]:
    """Grow the tree, choose k, commit curve and tree; returns the cluster of each leaf, too."""
    count, total, gram = stats
    if cfg.k > len(table):
        raise UserError(
            f"select_k.k = {cfg.k}, but the features fall into {len(table)} distinct groups only: "
            "give a smaller k, or raise select_k.leaves"
        )
    merges = tree.grow(count, total, gram, cfg.eps_sq)
    bits = tree.lengths_bits(merges, count, gram, cfg.eps_sq)
    resampled = resample(z, table, merges, float(count.sum()), cfg)
    choice = choose(bits, resampled, cfg)
    tables.write(paths.clusters.file("curve.parquet"), choice.curve)
    rows = [{"k": len(count) - step - 1, **vars(merge)} for step, merge in enumerate(merges)]
    tables.write(
        paths.clusters.file("tree.parquet"), pa.Table.from_pylist(rows, schema=artifacts.TREE)
    )
    return choice, numbered(tree.cut(merges, len(count), choice.k), count)


def _assign_all(
    stems: list[str], paths: artifacts.RunPaths, assigner: Assigner, progress: StageProgress
) -> np.ndarray:
    """Second pass: every part's assignments, and the exemplars; returns the cluster sizes."""
    sizes = np.zeros(int(assigner.cluster_of.max()) + 1, dtype=np.int64)
    best = artifacts.EXEMPLARS.empty_table()
    chunks = tasks.chunks(stems, MOST_TASKS)
    found = tasks.results(assign_parts, chunks, paths, assigner)
    for chunk, (counts, typical) in zip(chunks, found, strict=True):
        sizes += counts
        best = most_typical(pa.concat_tables([best, typical]))
        progress.advance(len(chunk), int(counts.sum()))
    tables.write(paths.clusters.file("exemplars.parquet"), best)
    return sizes


def _check_counts(sizes: np.ndarray, count: Tensor, cluster_of: Tensor, embedded: int) -> None:
    """Every sample in exactly one cluster, and the same one in both passes.

    But for the few between two clusters, where another machine may round the other way.
    """
    expected = np.zeros_like(sizes)
    np.add.at(expected, cluster_of.numpy(), count.long().numpy())
    moved = np.abs(sizes - expected).sum()
    if sizes.sum() != embedded or moved > ROUNDING * embedded:
        raise RuntimeError(
            f"select_k: {sizes.sum()} samples assigned of {embedded} embedded, sizes "
            f"{sizes.tolist()} where the first pass counted {expected.tolist()}"
        )


def _write_prototypes(
    table: Tensor, count: Tensor, cluster_of: Tensor, paths: artifacts.RunPaths
) -> None:
    rows = pa.table(
        {
            "prototype": np.arange(len(table), dtype=np.int32),
            "cluster_id": cluster_of.int().numpy(),
            "size": count.long().numpy(),
            "vector": tables.from_matrix(table.numpy(), pa.float32()),
        },
        schema=artifacts.prototypes_schema(table.shape[1]),
    )
    tables.write(paths.clusters.file("prototypes.parquet"), rows)
