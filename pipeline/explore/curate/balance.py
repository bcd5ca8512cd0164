"""Command balance: keep a limited number of samples of each cluster.

reads   embeddings/, assignments/, network/
writes  curation/balance-kept/{number}.parquet   KEPT      kept samples, in the order of choice
        curation/balance/{number}.parquet        REMOVED   all others, for write.exclude

`random` keeps the smallest hashes of sample_id and seed. `confident` keeps the highest confidence,
then the lowest outlier_score. `coding-rate` keeps the samples whose features span the most
(`mcr2.diverse_subset`), out of random candidates: four times as many, and at least CANDIDATES.
"""

import hashlib
from dataclasses import dataclass
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc

from pipeline.artifacts import layout, outputs
from pipeline.explore.curate import lists, shuffle
from pipeline.explore.curate.shuffle import Chunk, Spilled
from pipeline.mcr2.diverse_subset import most_spread
from pipeline.mcr2.network import FeatureNetwork
from pipeline.mcr2.threads import one_thread
from pipeline.runtime.config import setting
from pipeline.runtime.errors import UserError
from pipeline.runtime.progress import StageProgress
from pipeline.select_k.assign_parts import embedding_columns, load_network, row_features
from pipeline.store import tables

CANDIDATES = 4096  # the fewest of a cluster for `coding-rate`
TIMES = 4  # as many candidates as samples to keep
GROUP_ROWS = 2**17  # candidates of the clusters of one task
HOW = {  # how to choose -> the order in which candidates are taken
    "random": [("hash", "ascending")],
    "confident": [("confidence", "descending"), ("outlier_score", "ascending")],
    "coding-rate": [("hash", "ascending")],
}
KEPT = pa.schema(
    [
        *lists.LISTED,
        ("rank", pa.int32()),  # 0 was chosen first
        ("gain_nats", pa.float64()),  # what it added to log det, for `coding-rate`; else null
    ]
)
REMOVED = pa.schema([*lists.LISTED, ("cluster_size", pa.int64()), ("per_cluster", pa.int64())])


@dataclass(frozen=True, kw_only=True)
class Config:
    """How many samples of each cluster to keep, and which."""

    per_cluster: int = setting(0, "the most samples to keep of each cluster")
    how: str = setting("random", "random, confident or coding-rate")
    seed: int = setting(0, "seed of the random choice")

    def __post_init__(self) -> None:
        if self.per_cluster < 1:
            raise UserError(f"--per-cluster {self.per_cluster}: give 1 or more")
        if self.how not in HOW:
            raise UserError(f"--how {self.how}: give one of {', '.join(HOW)}")

    @property
    def most(self) -> int:
        """The most candidates of a cluster."""
        times = max(TIMES * self.per_cluster, CANDIDATES)
        return times if self.how == "coding-rate" else self.per_cluster

    @property
    def order(self) -> list[tuple[str, str]]:
        """The total order in which candidates are taken."""
        return [("cluster_id", "ascending"), *HOW[self.how], ("sample_id", "ascending")]


def hashes(ids: list[str], seed: int) -> np.ndarray:
    """A uint64 hash (n,) of each sample_id and the seed, the same in any run."""
    key = str(seed).encode()
    digests = [hashlib.blake2b(i.encode(), digest_size=8, key=key).digest() for i in ids]
    return np.frombuffer(b"".join(digests), np.uint64)


def first_of_each(rows: list[pa.Table], cfg: Config) -> pa.Table:
    """The first cfg.most rows of each cluster, in cfg.order."""
    table = pa.concat_tables(rows).combine_chunks()
    table = table.take(pc.sort_indices(table, cfg.order))
    clusters = table["cluster_id"].to_numpy()
    rank = np.arange(len(clusters)) - np.searchsorted(clusters, clusters)
    return table.filter(pa.array(rank < cfg.most))


def candidates(chunk: Chunk, paths: layout.RunPaths, cfg: Config, embedded: list[str]) -> pa.Table:
    """The candidates of some shards, at most cfg.most of each cluster."""
    found = []
    assigned = [name for name, _ in cfg.order if name not in ("hash", "sample_id")]
    for stem in chunk.items:
        rows = lists.members(Chunk(0, [stem]), paths, assigned, embedded)
        if cfg.how != "confident":
            keys = hashes(rows["sample_id"].to_pylist(), cfg.seed)
            rows = rows.append_column("hash", pa.array(keys))
        found.append(first_of_each([rows], cfg))
    return first_of_each(found, cfg)


def choose(
    chunk: Chunk, spilled: Spilled, cfg: Config, network: FeatureNetwork, eps_sq: float
) -> pa.Table:
    """KEPT of the clusters of the chunk, which are consecutive."""
    clusters = range(chunk.items[0], chunk.items[-1] + 1)
    embedded = embedding_columns(network) if cfg.how == "coding-rate" else []
    held: list[pa.Table] = []
    for piece in spilled.pieces(clusters, [*(name for name, _ in cfg.order), *embedded]):
        held.append(piece.replace_schema_metadata())
        if sum(rows.num_rows for rows in held) > 2 * GROUP_ROWS:
            held = [first_of_each(held, cfg)]
    if not held:
        return KEPT.empty_table()
    best = first_of_each(held, cfg)
    of_each = [best.filter(pc.equal(best["cluster_id"], cluster)) for cluster in clusters]
    return pa.concat_tables([_choose_of_cluster(rows, cfg, network, eps_sq) for rows in of_each])


def _choose_of_cluster(
    rows: pa.Table, cfg: Config, network: FeatureNetwork, eps_sq: float
) -> pa.Table:
    """KEPT of one cluster, whose candidates are in cfg.order."""
    gains: list[float | None] = [None] * cfg.per_cluster
    if cfg.how == "coding-rate" and rows.num_rows:
        with one_thread():
            z = row_features(rows, network)
            taken, gained = most_spread(z, cfg.per_cluster, eps_sq)
        rows, gains = rows.take(pa.array(taken.numpy())), gained.tolist()
    rows = rows.slice(0, cfg.per_cluster)
    n = rows.num_rows
    columns = [rows["sample_id"], [f"kept: {cfg.how}"] * n, rows["cluster_id"]]
    return pa.table([*columns, list(range(n)), gains[:n]], schema=KEPT)


def list_removed(
    chunk: Chunk, kept: list[str], paths: layout.RunPaths, cfg: Config, sizes: list[int]
) -> pa.Table:
    """REMOVED of some shards: the samples that no file of `kept` lists."""
    rows = lists.members(chunk, paths, ["cluster_id"])
    left = np.ones(rows.num_rows, bool)
    for url in kept:
        ids = tables.read(url, ["sample_id"])["sample_id"]
        left &= ~pc.is_in(rows["sample_id"], ids.combine_chunks()).to_numpy()
    rows = rows.filter(pa.array(left))
    own = [sizes[cluster] for cluster in rows["cluster_id"].to_pylist()]
    reason = f"balance: not among the {cfg.per_cluster} kept of its cluster, {cfg.how}"
    n = rows.num_rows
    columns = [rows["sample_id"], [reason] * n, rows["cluster_id"], own, [cfg.per_cluster] * n]
    return pa.table(columns, schema=REMOVED)


def run(cfg: Config, paths: layout.RunPaths) -> dict[str, Any]:
    """Choose samples, then list all others; returns the manifest of the second list."""
    made = outputs.upstream(paths, "clusters")
    sizes = made["clusters"]["sizes"]
    most = [min(size, cfg.most) for size in sizes]
    groups = [Chunk(*found) for found in enumerate(shuffle.pack(most, GROUP_ROWS))]
    chunks = lists.chunks(made)
    kept = lists.expected("balance-kept", cfg, made, len(groups), paths)
    want = lists.expected("balance", cfg, made, len(chunks), paths)
    if (manifest := want.if_done()) and kept.if_done():
        return manifest
    with StageProgress("balance", len(chunks) + len(groups), "parts") as progress:
        spills = lists.folder(paths, "candidates")
        if not kept.if_done():
            network, eps_sq = load_network(paths), made["clusters"]["config"]["eps_sq"]
            embedded = embedding_columns(network) if cfg.how == "coding-rate" else []
            to_spill = (candidates, made, spills, kept.made_of, progress, paths, cfg, embedded)
            spilled = shuffle.spill_all(*to_spill)
            to_choose = (choose, spilled, cfg, network, eps_sq)
            lists.write(kept, made, groups, progress, *to_choose, lists="kept")
        spills.clear()
        urls = [kept.folder.file(name) for name in kept.files[kept.folder]]
        to_list = (list_removed, urls, paths, cfg, sizes)
        manifest = lists.write(want, made, chunks, progress, *to_list)
    if manifest["samples"] != sum(max(0, size - cfg.per_cluster) for size in sizes):
        raise RuntimeError("balance: kept and removed are not all samples: run again")
    return manifest
