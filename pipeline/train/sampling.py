"""The training sample: which rows of which parts; reading them, each worker its share.

N training samples, m of them, D input dimensions, W workers.
"""

from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from itertools import pairwise
from typing import Any

import numpy as np
import pyarrow as pa
import torch
from torch import Tensor

from pipeline.artifacts import layout, views
from pipeline.mcr2.collectives import Collectives
from pipeline.store import tables

OVERREAD = 4  # rows read for each row kept of a large collection: spreads the sample
SPREAD = 200  # least blocks that the sample comes from, if there are so many
READERS = 8  # threads


@dataclass(frozen=True)
class Block:
    """`take` of the rows [start, stop) of one part, seeded by its place in the plan."""

    url: str
    start: int
    stop: int
    take: int


@dataclass(frozen=True)
class SamplePlan:
    """Where the training sample comes from: its row i is one of block searchsorted(ends, i)."""

    blocks: list[Block]
    seed: int

    @property
    def ends(self) -> np.ndarray:
        """One more than the last row of the sample in each block."""
        return np.cumsum([block.take for block in self.blocks], dtype=np.int64)

    def __len__(self) -> int:
        return sum(block.take for block in self.blocks)

    def rows_taken(self, index: int) -> np.ndarray:
        """The rows that the sample takes from a block, counted from its start."""
        block = self.blocks[index]
        rows = np.arange(block.stop - block.start)
        if block.take == len(rows):
            return rows
        rng = np.random.default_rng((self.seed, index))
        return np.sort(rng.choice(rows, block.take, replace=False))


def plan(shards: list[dict[str, Any]], paths: layout.RunPaths, most: int, seed: int) -> SamplePlan:
    """All rows if there are no more than `most`; else `most` rows from row groups of all parts.

    One row group in every `step` is drawn, and some of its rows. If shards are sorted by content, a
    few rows of many groups represent the collection better than whole groups or parts.
    """
    embedded = [s for s in shards if s["embedded"]]
    urls = [paths.embeddings.file(f"{s['shard']['stem']}.parquet") for s in embedded]
    rows = np.array([s["embedded"] for s in embedded], np.int64)
    total = int(rows.sum())
    if total <= most:
        return SamplePlan(
            [Block(u, 0, n, n) for u, n in zip(urls, rows.tolist(), strict=True)], seed
        )
    groups = -(-rows // tables.ROW_GROUP_ROWS)  # of each part
    firsts = np.cumsum(groups) - groups  # number of each part's first group
    step = int(max(1, min(total // (OVERREAD * most), groups.sum() // SPREAD)))
    drawn = np.arange(0, groups.sum(), step)
    drawn += np.random.default_rng(seed).integers(0, step, len(drawn))
    drawn = drawn[drawn < groups.sum()]
    part = np.searchsorted(firsts, drawn, side="right") - 1
    start = (drawn - firsts[part]) * tables.ROW_GROUP_ROWS
    stop = np.minimum(start + tables.ROW_GROUP_ROWS, rows[part])
    ends = np.cumsum(stop - start)
    take = np.diff(ends * min(most, ends[-1]) // ends[-1], prepend=0)  # sums to `most`
    found = zip(part.tolist(), start.tolist(), stop.tolist(), take.tolist(), strict=True)
    return SamplePlan([Block(urls[p], begin, end, n) for p, begin, end, n in found if n], seed)


def shares(rows: int, workers: int) -> list[range]:
    """The consecutive rows of the sample that each worker holds."""
    bounds = [rows * rank // workers for rank in range(workers + 1)]
    return [range(*bound) for bound in pairwise(bounds)]


def read_embeddings(source: SamplePlan, rows: range, columns: Sequence[str]) -> np.ndarray:
    """Embeddings (n, D1 + D2 + …) float16 of consecutive rows of the sample, side by side."""
    x = np.empty((0, 0), np.float16)
    for first, found in _read(source, columns, np.arange(rows.start, rows.stop)):
        block, _ = views.side_by_side(found, columns)
        if not x.size:
            x = np.empty((len(rows), block.shape[1]), np.float16)
        x[first : first + len(block)] = block
    return x


def read_ids(source: SamplePlan, rows: np.ndarray) -> list[str]:
    """The sample ids of ascending rows of the sample."""
    found = _read(source, ["sample_id"], rows)
    return [i for _, block in found for i in block["sample_id"].to_pylist()]


def _read(
    source: SamplePlan, columns: Sequence[str], rows: np.ndarray
) -> Iterator[tuple[int, pa.Table]]:
    """Ascending rows of the sample, block by block, each with where in `rows` it is."""
    ends = source.ends
    edges = np.searchsorted(rows, np.concatenate([[0], ends]))

    def read(index: int) -> tuple[int, pa.Table]:
        block, ours = source.blocks[index], rows[edges[index] : edges[index + 1]]
        table = tables.read_rows(block.url, columns, range(block.start, block.stop))
        first = ends[index] - block.take
        return int(edges[index]), table.take(source.rows_taken(index)[ours - first])

    with ThreadPoolExecutor(READERS) as pool:
        yield from pool.map(read, np.flatnonzero(np.diff(edges)).tolist())


@dataclass(frozen=True)
class Share:
    """The training samples that one worker holds, indexed by their numbers among all N."""

    held: Tensor  # (n, D)
    first: int  # number of the first
    samples: int  # N

    @classmethod
    def read(cls, source: SamplePlan, rows: range, columns: Sequence[str]) -> "Share":
        """Read the columns of them, side by side, from the parts of the embeddings."""
        held = torch.from_numpy(read_embeddings(source, rows, columns))
        return cls(held, rows.start, len(source))

    def __len__(self) -> int:
        return self.samples

    def __getitem__(self, rows: Tensor) -> Tensor:
        return self.held[rows - self.first]


def gather_rows(share: Share, rows: Tensor, workers: Collectives, device: torch.device) -> Tensor:
    """Ascending rows (m,) of the sample from the shares of all workers: (m, D), on the CPU."""
    bounds = [held.start for held in shares(len(share), workers.size)] + [len(share)]
    edges = torch.searchsorted(rows, torch.tensor(bounds))
    counts = edges.diff().tolist()
    padded = share.held.new_zeros(max(counts), share.held.shape[1])
    mine = rows[edges[workers.rank] : edges[workers.rank + 1]]
    padded[: len(mine)] = share[mine]
    blocks = workers.gather(padded.to(device)).cpu().split(len(padded))
    return torch.cat([block[:count] for block, count in zip(blocks, counts, strict=True)])
