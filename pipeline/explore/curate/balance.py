"""Command balance: at most so many samples of each cluster.

reads   embeddings/, assignments/, network/
writes  curation/balance-kept/{number}.parquet   KEPT      the chosen, in the order of their choice
        curation/balance/{number}.parquet        REMOVED   all others: what write.exclude takes

`random`: those whose sample_id has the least hash with the seed. `confident`: those of most
confidence, of equal ones the nearest to their prototype. `coding-rate`: of a random sample of the
members (four times as many as wanted, CANDIDATES at least) those whose features span the most
(`mcr2.selection`). A task that spills parts keeps of each cluster no more than may be chosen.
"""

import hashlib
from dataclasses import dataclass
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import torch

from pipeline.artifacts import layout, outputs
from pipeline.explore.curate import lists, shuffle
from pipeline.explore.curate.shuffle import Chunk, Spilled
from pipeline.mcr2.diverse_subset import most_spread
from pipeline.mcr2.network import Network
from pipeline.mcr2.threads import one_thread
from pipeline.runtime.config import setting
from pipeline.runtime.errors import UserError
from pipeline.runtime.progress import StageProgress
from pipeline.select_k.assign_parts import load_network
from pipeline.store import tables

CANDIDATES = 4096  # of a cluster for `coding-rate`, at least
TIMES = 4  # as many candidates as are wanted
GROUP_ROWS = 2**17  # of whole clusters, chosen from in one task
HOW = ("random", "confident", "coding-rate")
KEPT = pa.schema(
    [
        *lists.LISTED,
        ("rank", pa.int32()),  # 0 was chosen first
        ("gain_nats", pa.float64()),  # what it added to log det; null but for `coding-rate`
    ]
)
REMOVED = pa.schema([*lists.LISTED, ("cluster_size", pa.int64()), ("per_cluster", pa.int64())])


@dataclass(frozen=True, kw_only=True)
class Config:
    """How many of each cluster, and which."""

    per_cluster: int = setting(0, "samples of each cluster that are kept, at most")
    how: str = setting("random", "random, confident or coding-rate")
    seed: int = setting(0, "of what is random")

    def __post_init__(self) -> None:
        if self.per_cluster < 1:
            raise UserError(f"--per-cluster {self.per_cluster}: give 1 or more")
        if self.how not in HOW:
            raise UserError(f"--how {self.how}: give one of {', '.join(HOW)}")

    @property
    def most(self) -> int:
        """Candidates of a cluster."""
        spread = self.how == "coding-rate"
        return max(TIMES * self.per_cluster, CANDIDATES) if spread else self.per_cluster

    @property
    def columns(self) -> list[str]:
        """Of the assignments."""
        return ["cluster_id", *(["confidence", "outlier_score"] if self.how == "confident" else [])]

    @property
    def order(self) -> list[tuple[str, str]]:
        """In which candidates are taken; no two samples are equal in it."""
        by = [("hash", "ascending")]
        if self.how == "confident":
            by = [("confidence", "descending"), ("outlier_score", "ascending")]
        return [("cluster_id", "ascending"), *by, ("sample_id", "ascending")]


def hashes(ids: list[str], seed: int) -> np.ndarray:
    """A number for each sample, the same in any run, as good as random."""
    key = str(seed).encode()
    digests = [hashlib.blake2b(i.encode(), digest_size=8, key=key).digest() for i in ids]
    return np.frombuffer(b"".join(digests), np.uint64)


def first_of_each(rows: pa.Table, order: list[tuple[str, str]], most: int) -> pa.Table:
    """The first `most` rows of each cluster."""
    rows = rows.combine_chunks()
    rows = rows.take(pc.sort_indices(rows, order))
    clusters = rows["cluster_id"].to_numpy()
    rank = np.arange(len(clusters)) - np.searchsorted(clusters, clusters)
    return rows.filter(pa.array(rank < most))


def spill(
    chunk: Chunk, url: str, made_of: str, paths: layout.RunPaths, cfg: Config, k: int
) -> None:
    """Spill the candidates of some parts."""
    found = []
    for stem in chunk.stems:
        embedded = ["embedding"] if cfg.how == "coding-rate" else []
        rows = lists.members([stem], paths, cfg.columns, embedded)
        if cfg.how != "confident":
            rows = rows.append_column(
                "hash", pa.array(hashes(rows["sample_id"].to_pylist(), cfg.seed))
            )
        found.append(first_of_each(rows, cfg.order, cfg.most))
    shuffle.spill(url, first_of_each(pa.concat_tables(found), cfg.order, cfg.most), k, made_of)


def choose(
    chunk: Chunk, spilled: Spilled, cfg: Config, network: Network, eps_sq: float
) -> pa.Table:
    """KEPT of the clusters whose numbers the chunk has."""
    clusters = range(int(chunk.stems[0]), int(chunk.stems[-1]) + 1)
    held: list[pa.Table] = []
    for piece in spilled.pieces(clusters, _columns(cfg)):
        held.append(piece.replace_schema_metadata())
        if sum(rows.num_rows for rows in held) > 2 * GROUP_ROWS:
            held = [first_of_each(pa.concat_tables(held), cfg.order, cfg.most)]
    if not held:
        return KEPT.empty_table()
    best = first_of_each(pa.concat_tables(held), cfg.order, cfg.most)
    of_each = [best.filter(pc.equal(best["cluster_id"], cluster)) for cluster in clusters]
    return pa.concat_tables([_chosen(rows, cfg, network, eps_sq) for rows in of_each])


def _columns(cfg: Config) -> list[str]:
    spread = cfg.how == "coding-rate"
    return [*(name for name, _ in cfg.order), *(["embedding"] if spread else [])]


def _chosen(rows: pa.Table, cfg: Config, network: Network, eps_sq: float) -> pa.Table:
    """KEPT of one cluster; `rows` are in cfg.order."""
    gains: list[float | None] = [None] * cfg.per_cluster
    if cfg.how == "coding-rate" and rows.num_rows:
        x = torch.from_numpy(tables.to_matrix(rows["embedding"]).astype(np.float32))
        with one_thread():
            taken, gained = most_spread(network.features(x), cfg.per_cluster, eps_sq)
        rows, gains = rows.take(pa.array(taken.numpy())), gained.tolist()
    rows = rows.slice(0, cfg.per_cluster)
    n = rows.num_rows
    columns = [rows["sample_id"], [f"kept: {cfg.how}"] * n, rows["cluster_id"], range(n), gains[:n]]
    return pa.table(dict(zip(KEPT.names, columns, strict=True)), schema=KEPT)


def removed(
    chunk: Chunk, kept: list[str], paths: layout.RunPaths, cfg: Config, sizes: list[int]
) -> pa.Table:
    """REMOVED: the samples of some parts that no file of `kept` has; it is read file by file."""
    rows = lists.members(list(chunk.stems), paths, ["cluster_id"], [])
    left = np.ones(rows.num_rows, bool)
    for url in kept:
        ids = tables.read(url, ["sample_id"])["sample_id"]
        left &= ~pc.is_in(rows["sample_id"], ids.combine_chunks()).to_numpy()
    rows = rows.filter(pa.array(left))
    own = [sizes[cluster] for cluster in rows["cluster_id"].to_pylist()]
    reason = f"balance: not among the {cfg.per_cluster} kept of its cluster, {cfg.how}"
    n = rows.num_rows
    columns = [rows["sample_id"], [reason] * n, rows["cluster_id"], own, [cfg.per_cluster] * n]
    return pa.table(dict(zip(REMOVED.names, columns, strict=True)), schema=REMOVED)


def run(cfg: Config, paths: layout.RunPaths) -> dict[str, Any]:
    """Choose, then list all others; the manifest of these."""
    made = outputs.upstream(paths, "clusters")
    sizes = made["clusters"]["sizes"]
    held = [min(size, cfg.most) for size in sizes]
    groups = [
        Chunk(number, [str(cluster) for cluster in clusters])
        for number, clusters in enumerate(shuffle.packed(held, GROUP_ROWS))
    ]
    chunks = shuffle.cut(lists.stems_of(made), lists.MOST_PARTS)
    kept = lists.wanted("balance-kept", cfg, made, len(groups), paths)
    want = lists.wanted("balance", cfg, made, len(chunks), paths)
    if (manifest := want.if_done()) and kept.if_done():
        return manifest
    with StageProgress("balance", len(chunks) + len(groups), "parts") as progress:
        if not kept.if_done():
            _choose_all(kept, groups, cfg, made, paths, progress)
            lists.finish(kept, made, lists="kept")
        urls = [kept.folder.file(name) for name in kept.files[kept.folder]]
        lists.write(want, chunks, removed, progress, urls, paths, cfg, sizes)
    manifest = lists.finish(want, made, lists="removed")
    if manifest["samples"] != sum(max(0, size - cfg.per_cluster) for size in sizes):
        raise RuntimeError("balance: kept and removed are not all samples: run again")
    return manifest


def _choose_all(
    kept: outputs.ExpectedOutputs,
    groups: list[Chunk],
    cfg: Config,
    made: outputs.Manifests,
    paths: layout.RunPaths,
    progress: StageProgress,
) -> None:
    """Spill the candidates beside the list, choose, forget them."""
    sizes, beside = made["clusters"]["sizes"], lists.folder(paths, "candidates")
    chunks = shuffle.cut(lists.stems_of(made), shuffle.most_tasks(sum(sizes)))
    progress.total += sum(len(chunk.stems) for chunk in chunks)
    given = (beside, kept.made_of, progress, paths, cfg, len(sizes))
    spilled = shuffle.all_spilled(spill, chunks, *given)
    eps_sq = made["clusters"]["config"]["eps_sq"]
    lists.write(kept, groups, choose, progress, spilled, cfg, load_network(paths), eps_sq)
    beside.clear()
