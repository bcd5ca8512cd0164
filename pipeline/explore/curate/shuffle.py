"""Sort rows by cluster, from files per shard to files that can be read by cluster.

writes  {folder}/spill-{number}.parquet  rows sorted by cluster; the footer counts each cluster

A task writes the rows of a few shards to one file. The reader of a cluster takes its range of rows
from every file. So a task holds at most SPILL_ROWS, or the rows that it reads.
f files, k clusters.
"""

import math
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import pyarrow as pa

from pipeline.artifacts import outputs
from pipeline.runtime import tasks
from pipeline.runtime.progress import StageProgress
from pipeline.store import tables
from pipeline.store.storage import Folder

PREFIX = "spill-"
SPILL_ROWS = 2**18  # rows of a file: 256 MiB of 512 float16 each


@dataclass(frozen=True)
class Chunk:
    """What one task works on."""

    number: int
    items: Sequence[Any]  # stems of shards, or numbers of clusters

    @property
    def name(self) -> str:
        """The stem of its part."""
        return f"{self.number:05d}"

    def __str__(self) -> str:
        return tasks.named(self.items)


def cut(stems: Sequence[str], most: int) -> list[Chunk]:
    """Shards in at most `most` chunks; the cut depends only on their number."""
    return [Chunk(number, list(run)) for number, run in enumerate(tasks.chunks(stems, most))]


def cut_shards(made: outputs.Manifests, most: int) -> list[Chunk]:
    """The shards of a run in at most `most` chunks."""
    return cut([facts["shard"]["stem"] for facts in made["embeddings"]["shards"]], most)


def write(url: str, rows: pa.Table, k: int, made_of: str) -> list[int]:
    """Commit rows, sorted by their `cluster_id`; returns how many each of the k clusters has."""
    clusters = rows["cluster_id"].to_numpy()
    counts = np.bincount(clusters, minlength=k).tolist()
    order = np.argsort(clusters, kind="stable")
    tables.write(url, rows.take(pa.array(order)), made_of=made_of, counts=counts)
    return counts


@dataclass(frozen=True)
class Spilled:
    """The files that the tasks wrote."""

    urls: list[str]
    counts: np.ndarray  # (f, k) rows

    def pieces(
        self, clusters: range, columns: Sequence[str], rows: range | None = None
    ) -> Iterator[pa.Table]:
        """The rows of some clusters, file by file; `rows` is a range among all of them."""
        before = self.counts[:, : clusters.start].sum(1)
        sizes = self.counts[:, clusters.start : clusters.stop].sum(1)
        ends = np.cumsum(sizes)
        rows = range(int(ends[-1])) if rows is None else rows
        for url, skipped, size, end in zip(self.urls, before, sizes, ends, strict=True):
            first, last = max(rows.start, end - size), min(rows.stop, end)
            if first < last:
                start = int(skipped + first - (end - size))
                yield tables.read_rows(url, columns, range(start, start + int(last - first)))


def spill_all(
    function: Callable[..., pa.Table],
    made: outputs.Manifests,
    folder: Folder,
    made_of: str,
    progress: StageProgress,
    *shared: object,
) -> Spilled:
    """Commit the missing files; `function(chunk, *shared)` returns the rows of one."""
    sizes = made["clusters"]["sizes"]
    cuts = cut_shards(made, math.ceil(sum(sizes) / SPILL_ROWS) or 1)
    chunks = {f"{PREFIX}{chunk.name}": chunk for chunk in cuts}
    known = outputs.part_facts(folder, chunks)
    counts = {name: f["counts"] for name, f in known.items() if f.get("made_of") == made_of}
    left = {name: chunk for name, chunk in chunks.items() if name not in counts}
    progress.total += sum(len(chunk.items) for chunk in left.values())
    given = (function, folder, made_of, len(sizes), *shared)
    found = tasks.results(_spill, list(left.values()), *given)
    for (name, chunk), counted in zip(left.items(), found, strict=True):
        counts[name] = counted
        progress.advance(len(chunk.items))
    urls = [folder.file(f"{name}.parquet") for name in chunks]
    return Spilled(urls, np.array([counts[name] for name in chunks]))


def _spill(
    chunk: Chunk,
    function: Callable[..., pa.Table],
    folder: Folder,
    made_of: str,
    k: int,
    *shared: object,
) -> list[int]:
    url = folder.file(f"{PREFIX}{chunk.name}.parquet")
    return write(url, function(chunk, *shared), k, made_of)


def pack(sizes: Sequence[int], most: int) -> list[range]:
    """Groups of consecutive clusters with at most `most` rows; a larger cluster is a group."""
    found, first, held = [], 0, 0
    for cluster, size in enumerate(sizes):
        if held and held + size > most:
            found.append(range(first, cluster))
            first, held = cluster, 0
        held += size
    return [*found, range(first, len(sizes))]
