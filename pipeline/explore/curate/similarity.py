"""For every sample, find the most similar sample of its cluster that comes before it.

reads   embeddings/, assignments/
writes  curation/similarity/{clusters}.parquet  SIMILAR  samples with a cosine over FLOOR
        curation/similarity/effect.parquet      EFFECT   what each threshold would remove
        curation/similarity/manifest.json

SemDeDup (Abbas et al. 2023, arXiv:2303.09540) sorts the members of a cluster, the farthest from its
centre first. It removes a member whose cosine to any earlier member is over 1 − ε. So the largest
cosine to an earlier member shows which thresholds remove a sample. Cosines are of CLIP embeddings;
the distance from the centre is `outlier_score`; ties are sorted by sample_id.

A task compares one block of a cluster, or several whole clusters, with all blocks of the same
clusters. It holds two blocks of BLOCK_ROWS at a time.
n rows in a block, m in another, D dimensions.
"""

import logging
import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import torch
from torch import Tensor
from torch.nn.functional import normalize

from pipeline.artifacts import layout, outputs
from pipeline.explore.curate import lists, shuffle
from pipeline.explore.curate.shuffle import Chunk, Spilled
from pipeline.runtime import config, console, tasks
from pipeline.runtime.progress import StageProgress
from pipeline.store import tables
from pipeline.store.storage import Folder

log = logging.getLogger(__name__)
FLOOR = 0.8  # smaller cosines are between different images, and far more frequent
THRESHOLDS = (0.8, 0.85, 0.9, 0.92, 0.94, 0.95, 0.96, 0.97, 0.98, 0.99, 0.995, 0.999)
BLOCK_ROWS = 2**17  # 128 MiB of 512 float16 each
TILE = (1024, 2048)  # rows and columns of one matrix of cosines: 8 MiB
GRAIN = 2.0**-20  # cosines are rounded to multiples, so that they do not depend on the blocks
SIMILAR = pa.schema(
    [
        ("sample_id", pa.string()),
        ("cluster_id", pa.int32()),
        ("similarity", pa.float32()),  # the largest cosine to an earlier member
        ("duplicate_of", pa.string()),  # that member; the first, if several
    ]
)
EFFECT = pa.schema(
    [
        ("threshold", pa.float64()),
        ("removed", pa.int64()),  # samples with a similarity over it
        ("share", pa.float64()),  # of all samples
    ]
)
ORDER = [("cluster_id", "ascending"), ("outlier_score", "descending"), ("sample_id", "ascending")]
COLUMNS = [name for name, _ in ORDER]


@dataclass(frozen=True)
class Unit:
    """Whole clusters, or one block of a single one."""

    clusters: range
    block: int = 0
    blocks: int = 1

    def rows(self, block: int) -> range:
        """The rows of a block, counted from the first row of the first cluster."""
        return range(block * BLOCK_ROWS, (block + 1) * BLOCK_ROWS)

    @property
    def name(self) -> str:
        """The stem of its file."""
        return f"{self.clusters.start:06d}-{self.block:05d}"

    def __str__(self) -> str:
        return f"clusters {self.clusters.start} to {self.clusters.stop - 1}, block {self.block}"


def units(sizes: Sequence[int]) -> list[Unit]:
    """Clusters, or blocks of large ones, one for each task."""
    found = []
    for clusters in shuffle.pack(sizes, BLOCK_ROWS):
        blocks = math.ceil(sum(sizes[c] for c in clusters) / BLOCK_ROWS)
        found += [Unit(clusters, block, blocks) for block in range(blocks)]
    return found


def most_similar_before(
    x: Tensor, rank: Tensor, y: Tensor, other: Tensor
) -> tuple[np.ndarray, np.ndarray]:
    """For each row of x (n, D), the largest cosine to a row of y (m, D) of lower rank.

    Returns cosines (n,) and indices into y (n,), the first if several are equal; −inf and −1 if
    there is none. `rank` (n,) and `other` (m,) ascend.
    """
    best = torch.full((len(x),), -torch.inf)
    index = torch.full((len(x),), -1, dtype=torch.int64)
    before = torch.searchsorted(other, rank)  # (n,) how many rows of y have a lower rank
    for start in range(0, len(x), TILE[0]):
        rows = slice(start, start + TILE[0])
        own = normalize(x[rows].float(), dim=1)
        for first in range(0, int(before[rows][-1]), TILE[1]):
            others = normalize(y[first : first + TILE[1]].float(), dim=1)
            cosines = (own @ others.T).mul_(1 / GRAIN).round_()
            if (stop := first + len(others)) > before[start]:  # some do not come before every row
                cosines[torch.arange(first, stop) >= before[rows, None]] = -torch.inf
            found, where = cosines.max(1)
            found *= GRAIN
            better = found > best[rows]
            index[rows][better] = where[better] + first
            best[rows][better] = found[better]
    return best.numpy(), index.numpy()


class Block:
    """Rows of some clusters, in ORDER, and the most similar earlier row of each."""

    def __init__(self, rows: pa.Table) -> None:
        rows = rows.combine_chunks()
        order = pc.sort_indices(rows, ORDER)
        self.keys = rows.select(COLUMNS).take(order)
        vectors = tables.to_matrix(rows["embedding"])[order.to_numpy()]
        self.vectors = torch.from_numpy(vectors)
        self.similarity = np.full(len(order), -np.inf, np.float32)
        # −outlier_score and sample_id of each:
        self.partner: list[tuple[float, str] | None] = [None] * len(order)

    def meet(self, other: "Block") -> None:
        """Compare with another block of the same clusters, or with itself."""
        own, others = (b.keys["cluster_id"].to_numpy() for b in (self, other))
        rank, other_rank = (torch.from_numpy(ranks) for ranks in _ranks(self, other))
        for cluster in np.unique(own).tolist():
            a, b = (slice(*np.searchsorted(of, [cluster, cluster + 1])) for of in (own, others))
            found, index = most_similar_before(
                self.vectors[a], rank[a], other.vectors[b], other_rank[b]
            )
            self._keep(a.start, found, index + b.start * (index >= 0), other)

    def _keep(self, start: int, found: np.ndarray, index: np.ndarray, other: "Block") -> None:
        """Keep pairs that are more similar than earlier ones, or equal and earlier in ORDER."""
        close = np.flatnonzero((found > FLOOR) & (found >= self.similarity[start:][: len(found)]))
        keys = other.keys.select(["outlier_score", "sample_id"]).take(pa.array(index[close]))
        scores, ids = (column.to_pylist() for column in keys.columns)
        for row, score, sample_id in zip((close + start).tolist(), scores, ids, strict=True):
            key, before = (-score, sample_id), self.partner[row]
            cosine = found[row - start]
            if before is None or cosine > self.similarity[row] or key < before:
                self.similarity[row], self.partner[row] = cosine, key

    def similar(self) -> pa.Table:
        """SIMILAR: the rows with a similar earlier row."""
        close = np.flatnonzero(self.similarity > FLOOR)
        keys = self.keys.take(pa.array(close))
        partners = [self.partner[row] for row in close.tolist()]
        columns = [keys["sample_id"], keys["cluster_id"], self.similarity[close]]
        columns.append([partner[1] for partner in partners if partner])
        return pa.table(columns, schema=SIMILAR)


def _ranks(own: Block, other: Block) -> tuple[np.ndarray, np.ndarray]:
    """Ranks (n,) and (m,) of the rows of two blocks, among all of them in ORDER."""
    n = own.keys.num_rows
    if own is other:
        return np.arange(n), np.arange(n)
    both = pa.concat_tables([own.keys, other.keys])
    rank = np.argsort(pc.sort_indices(both, ORDER).to_numpy())
    return rank[:n], rank[n:]


def members(chunk: Chunk, paths: layout.RunPaths) -> pa.Table:
    """The rows of some shards: COLUMNS and `embedding`."""
    return lists.members(chunk, paths, ["cluster_id", "outlier_score"], ["embedding"])


def compare(unit: Unit, spilled: Spilled, folder: Folder, made_of: str) -> int:
    """Commit the part of one unit; returns how many rows it has."""

    def block(number: int) -> Block:
        pieces = spilled.pieces(unit.clusters, [*COLUMNS, "embedding"], unit.rows(number))
        return Block(pa.concat_tables([p.replace_schema_metadata() for p in pieces]))

    own = block(unit.block)
    for number in range(unit.blocks):
        own.meet(own if number == unit.block else block(number))
    rows = own.similar()
    cosines = rows["similarity"].to_numpy().astype(np.float64)
    counts = [int((cosines > threshold).sum()) for threshold in THRESHOLDS]
    url = folder.file(f"{unit.name}.parquet")
    tables.write(url, rows, made_of=made_of, counts=counts, rows=own.keys.num_rows)
    return own.keys.num_rows


def expected(made: outputs.Manifests, paths: layout.RunPaths) -> outputs.ExpectedOutputs:
    """A part for every unit."""
    target = lists.folder(paths, "similarity")
    made_of = config.digest({"floor": FLOOR}, THRESHOLDS, made["clusters"]["fingerprint"])
    names = [f"{unit.name}.parquet" for unit in units(made["clusters"]["sizes"])]
    return outputs.ExpectedOutputs("similarity", target, made_of, None, {target: names})


def run(made: outputs.Manifests, paths: layout.RunPaths) -> dict[str, Any]:
    """Compare all units that are not done; returns the manifest."""
    want = expected(made, paths)
    if manifest := want.if_done():
        return manifest
    sizes, made_of, target = made["clusters"]["sizes"], want.made_of, want.folder
    todo = units(sizes)
    with StageProgress("similarity", len(todo), "parts") as progress:
        if left := lists.missing(want, todo, progress):
            spilled = shuffle.spill_all(members, made, target, made_of, progress, paths)
            for rows in tasks.results(compare, left, spilled, target, made_of):
                progress.advance(samples=rows)
    known = outputs.part_facts(target, want.parts(target))
    compared = sum(facts["rows"] for facts in known.values())
    if compared != sum(sizes):
        raise RuntimeError(f"similarity: {compared} of {sum(sizes)} samples compared: run again")
    removed = np.sum([facts["counts"] for facts in known.values()], axis=0).tolist()
    shares = [count / compared for count in removed]
    table = pa.table([THRESHOLDS, removed, shares], schema=EFFECT)
    tables.write(target.file("effect.parquet"), table)
    target.finish(
        made_of,
        upstream=made["clusters"]["fingerprint"],
        lists="similar",
        samples=compared,
        removed=removed,
        seconds=round(progress.seconds, 2),
    )
    target.remove({name for name in target.names() if name.startswith(shuffle.PREFIX)})
    console.log_finished(log, "similarity", progress.seconds, f"{compared:,} samples")
    return target.manifest()
