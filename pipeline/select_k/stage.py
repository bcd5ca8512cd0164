"""Stage 3, select_k: the number of clusters that codes all features in few bits.

reads   network/…                        network and landmarks, from train
        embeddings/{stem}.parquet        all of them, twice
writes  clusters/curve.parquet           CURVE       bits for every k, with a band
        clusters/tree.parquet            TREE        every merge of the clusters, k to one
        clusters/prototypes.parquet      prototypes_schema
        clusters/exemplars.parquet       EXEMPLARS   typical, borderline and odd members
        assignments/{stem}.parquet       ASSIGNMENTS one row per embedded sample
        clusters/manifest.json           names k

Landmarks are over-segmented once (spectral embedding of their neighbour graph); one pass over all
parts gives each small group's additive statistics; merging them by coding length gives the bits of
every k. The landmarks are then cut into the chosen k (`spectral.partition`), and a second pass
assigns every sample to the nearest cluster. N samples, m landmarks, d dimensions, p leaves.
Core: `over_segment`, `chosen`, `cut`, `assigning` (no Ray). Shell: `passes`, `run`. What an
interrupted run has chosen and summed lies in clusters/unfinished-… until the stage is done.
"""

import logging
import math
from dataclasses import dataclass, fields, replace
from typing import Any

import numpy as np
import pyarrow as pa
import torch
from torch import Tensor

from pipeline.artifacts import outputs as artifacts
from pipeline.mcr2 import assignment, coding_rate, spectral, tree
from pipeline.mcr2.assignment import Prototypes
from pipeline.mcr2.network import Network
from pipeline.mcr2.threads import one_thread
from pipeline.runtime import config, console
from pipeline.runtime.config import setting
from pipeline.runtime.errors import UserError
from pipeline.runtime.progress import StageProgress
from pipeline.select_k.assign_parts import Assigner, load_network
from pipeline.select_k.full_passes import Parts, all_statistics, assign_all
from pipeline.store import partial_sums, tables
from pipeline.store.partial_sums import Arrays, Unfinished

log = logging.getLogger(__name__)
FILES = ("curve.parquet", "tree.parquet", "prototypes.parquet", "exemplars.parquet")
DRIVER_TIMES = 4  # the sum, what is added, and what the tree changes: measured
LARGEST_ALONG = 64  # clusters: a spectral cut takes as many eigenvectors
PARTS = 20  # of a cluster, on average, where it has more than one prototype
CLEARLY = 1.05  # times the information: a cut along the graph is judged by what it was made from
FLAT = 0.005  # of the bits that clustering saves: a k that loses no more is as good as the best
BAND = (0.05, 0.95)  # quantiles over resamples


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
    eta: float = setting(0.1, "η, temperature of the weights of the graph")
    resamples: int = setting(20, "of the landmarks, for the band of the curve")
    statistics_bytes: int = setting(
        2**30, "of the leaves' statistics, dimensions² × 8 each: bounds the leaves that fit"
    )
    seed: int = setting(0, "of the over-segmentation and the resamples")

    def __post_init__(self) -> None:
        for name in ("k", "k_max", "leaves"):
            if getattr(self, name) < 0:
                raise UserError(f"select_k.{name} = {getattr(self, name)}: give 0 (fit) or more")
        positive = ("k_min", "eps_sq", "neighbours", "components", "eta", "resamples")
        for name in (*positive, "statistics_bytes"):
            if getattr(self, name) <= 0:
                raise UserError(f"select_k.{name} = {getattr(self, name)}: give a positive number")
        if self.k_max and self.k_max < self.k_min:
            raise UserError(f"select_k.k_max = {self.k_max} is below select_k.k_min = {self.k_min}")


def fitted(cfg: Config, samples: int, landmarks: int, dim: int) -> Config:
    """The settings that say "fit", chosen for N samples and m landmarks of `dim` features.

    UserError where what is given would take more memory than `cfg.statistics_bytes`.
    """
    if cfg.k > landmarks:
        raise UserError(
            f"select_k.k = {cfg.k} is more than the {landmarks} samples it is chosen from: give a "
            "smaller k, or raise train.landmarks where there are more samples"
        )
    k_max = min(cfg.k_max or min(1000, math.ceil(2 * math.sqrt(samples))), landmarks)
    k_min = min(cfg.k_min, k_max)
    most = cfg.statistics_bytes // (8 * dim**2)
    free = min(2 * k_max, landmarks // 4)
    leaves = min(max(cfg.leaves or min(free, most), cfg.k, k_min), landmarks)
    if leaves > most:
        need = 8 * leaves * dim**2
        raise UserError(
            f"select_k: the statistics of {leaves:,} leaves of {dim:,} dimensions take "
            f"{need / 2**30:.1f} GiB in every task, {DRIVER_TIMES} times that where they are "
            f"summed up: lower select_k.leaves (k, k_min) or train.feature_dim, or set "
            f"select_k.statistics_bytes = {need} where there is so much memory"
        )
    if not cfg.leaves and leaves < free:
        log.warning(
            "select_k: %d leaves, and k no larger, instead of %d: of %d dimensions more would "
            "take over select_k.statistics_bytes = %d",
            *(leaves, free, dim, cfg.statistics_bytes),
        )
    return replace(
        cfg,
        k_max=k_max,
        k_min=k_min,
        leaves=leaves,
        neighbours=min(cfg.neighbours, landmarks - 1),
        components=min(cfg.components, landmarks - 1, leaves),
    )


def over_segment(z: Tensor, cfg: Config) -> Tensor:
    """Mean directions of small groups of landmarks z (m, d): (p, d) unit rows."""
    graph = spectral.affinity(z, cfg.neighbours, cfg.eta)
    vectors = spectral.embedding(graph, cfg.components, cfg.seed)
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
        dict(zip(artifacts.CURVE.names, map(list, columns), strict=True)), schema=artifacts.CURVE
    )
    k_low, k_high = bests.quantile(levels).round().int().tolist()
    return Choice(cfg.k or flat_from, best, k_low, k_high, flat_from, flat_to, curve)


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
        curves.append(tree.lengths_bits(merges, count * scale, gram.mul_(scale), cfg.eps_sq))
    return torch.stack(curves)


def chosen(z: Tensor, leaves: Tensor, stats: coding_rate.Statistics, cfg: Config) -> Choice:
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
    similarity, index = spectral.neighbours(z, cfg.neighbours)
    graph = spectral.graph_of(similarity, index, cfg.eta)
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


def wanted(cfg: Config, made: artifacts.Made, paths: artifacts.RunPaths) -> artifacts.Wanted:
    """What clustering with this network is to leave."""
    made_of = config.fingerprint(cfg, made["network"]["fingerprint"])
    parts = [f"{s['shard']['stem']}.parquet" for s in made["embeddings"]["shards"]]
    files = {paths.clusters: FILES, paths.assignments: parts}
    return artifacts.Wanted("select_k", paths.clusters, made_of, cfg, files)


def _choose(
    z: Tensor, fit: Config, parts: Parts, network: Network, progress: StageProgress
) -> Choice:
    """First pass; its statistics are forgotten before the second."""
    leaves, stats = all_statistics(parts, network, lambda: over_segment(z, fit), progress)
    return chosen(z, leaves, stats, fit)


def run(cfg: Config, paths: artifacts.RunPaths) -> dict[str, Any]:
    """Choose k, assign every sample, check the counts, commit the manifest."""
    made = artifacts.upstream(paths, "network")
    embedded, trained = made["embeddings"], made["network"]
    want = wanted(cfg, made, paths)
    if manifest := want.finished():
        partial_sums.finished(paths.clusters)
        return manifest
    made_of, stems = want.made_of, [s["shard"]["stem"] for s in embedded["shards"]]
    paths.clusters.remove({*FILES, "manifest.json"})
    sample = tables.read(paths.network.file("sample.parquet"), ["feature"])
    z = torch.from_numpy(tables.to_matrix(sample["feature"]).copy())
    fit = fitted(cfg, embedded["embedded"], *z.shape)
    network = load_network(paths)
    parts = Parts(paths, stems, made_of)
    with one_thread(), StageProgress("select_k", 2 * len(stems), "parts") as progress:
        decided = Unfinished(paths.clusters, "choice", made_of)
        if found := decided.load():
            choice, prototypes = _from_arrays(found)
            progress.advance(len(stems))
        else:
            choice = _choose(z, fit, parts, network, progress)
            prototypes = cut(z, choice.k, fit)
            decided.save(_as_arrays(choice, prototypes))
        assigner = Assigner(network, prototypes, made_of)
        count, total, gram = assign_all(parts, assigner, progress)
    sizes = count.long()
    if sizes.sum() != embedded["embedded"]:
        raise RuntimeError(f"select_k: {sizes.sum()} assigned of {embedded['embedded']} embedded")
    if want.parts(paths.assignments) != set(stems):
        raise RuntimeError("select_k: parts of assignments/ were changed meanwhile: run again")
    if prototypes.k < choice.k:
        log.warning(
            "select_k: %d clusters instead of %d: the others would be of samples all alike",
            *(prototypes.k, choice.k),
        )
    merges = tree.grow(count, total, gram, fit.eps_sq)
    _write_clusters(choice, prototypes, merges, paths)
    cluster_bits = coding_rate.length_bits(count, gram, fit.eps_sq)
    choice = replace(choice, k=prototypes.k)
    facts = {key: value for key, value in vars(choice).items() if key != "curve"}
    paths.assignments.sweep()
    paths.clusters.finish(
        made_of,
        upstream=trained["fingerprint"],
        config=config.facts(cfg),
        samples=int(sizes.sum()),
        sizes=sizes.tolist(),
        cluster_bits=cluster_bits.tolist(),
        share_eta=prototypes.eta,
        bits=float((cluster_bits + coding_rate.name_bits(count, count.sum())).sum()),
        bits_of_one=choice.curve["bits"][0].as_py(),
        seconds=round(progress.seconds, 2),
        **facts,
    )
    partial_sums.finished(paths.clusters)
    console.finished(
        *(log, "select_k", progress.seconds, f"k = {choice.k}"),
        f"fewest bits at {choice.k_best} (band {choice.k_low} to {choice.k_high})",
        f"flat from {choice.flat_from} to {choice.flat_to}",
        f"{sizes.sum():,} samples",
    )
    return paths.clusters.manifest()


def _as_arrays(choice: Choice, prototypes: Prototypes) -> Arrays:
    """What the second pass and the tables are made of."""
    facts = {name: np.int64(value) for name, value in vars(choice).items() if name != "curve"}
    curve = {f"curve.{name}": choice.curve[name].to_numpy() for name in artifacts.CURVE.names}
    where = {"table": prototypes.table.numpy(), "cluster_of": prototypes.cluster_of.numpy()}
    return {**facts, **curve, **where, "eta": np.float64(prototypes.eta)}


def _from_arrays(found: Arrays) -> tuple[Choice, Prototypes]:
    columns = {name: found[f"curve.{name}"] for name in artifacts.CURVE.names}
    curve = pa.table(columns, schema=artifacts.CURVE)
    facts = {f.name: int(found[f.name]) for f in fields(Choice) if f.name != "curve"}
    table, cluster_of = (torch.from_numpy(found[name]) for name in ("table", "cluster_of"))
    return Choice(**facts, curve=curve), Prototypes(table, cluster_of, float(found["eta"]))


def _write_clusters(
    choice: Choice,
    prototypes: Prototypes,
    merges: list[tree.Merge],
    paths: artifacts.RunPaths,
) -> None:
    tables.write(paths.clusters.file("curve.parquet"), choice.curve)
    rows = [{"k": prototypes.k - step - 1, **vars(merge)} for step, merge in enumerate(merges)]
    merged = pa.Table.from_pylist(rows, schema=artifacts.TREE)
    tables.write(paths.clusters.file("tree.parquet"), merged)
    table = pa.table(
        {
            "cluster_id": prototypes.cluster_of.int().numpy(),
            "vector": tables.from_matrix(prototypes.table.numpy(), pa.float32()),
        },
        schema=artifacts.prototypes_schema(prototypes.table.shape[1]),
    )
    tables.write(paths.clusters.file("prototypes.parquet"), table)
