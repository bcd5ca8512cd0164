"""What exports of a finished run have in common: what they read, where they write.

reads   labels/{stem}.parquet, clusters.parquet, the manifests
writes  {out}/export.json    of what it is an export, first: another one is refused
        {out}/manifest.json  last

An export goes on where it was interrupted. Rejected samples are in none: there is no picture of
them, no embedding, no cluster.
"""

import json
import logging
from collections import Counter, deque
from collections.abc import Callable, Iterable, Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass
from typing import Any, TypeVar

import pyarrow as pa
import pyarrow.compute as pc

from pipeline.artifacts import layout, outputs, schemas
from pipeline.runtime import config, console
from pipeline.runtime.errors import UserError
from pipeline.store import storage, tables
from pipeline.store.shards import IMAGE_SUFFIXES
from pipeline.store.storage import Folder

log = logging.getLogger(__name__)
T = TypeVar("T")
U = TypeVar("U")
CLAIM = "export.json"
AHEAD = 8  # parts under way at once, and held: stores answer slowly, and many at a time


@dataclass(frozen=True)
class ExportedRun:
    """A finished run, as exports see it."""

    paths: layout.RunPaths
    shards: list[dict[str, Any]]  # stem, url, size, version of each input shard
    originals: list[str]  # the columns of labels that come from the samples' json
    clusters: list[dict[str, Any]]  # rows of CLUSTERS, and a `name` that no other cluster has
    fingerprint: str  # of the labels

    def stems(self) -> list[str]:
        """Of the parts, in order."""
        return [shard["stem"] for shard in self.shards]

    def made_of(self, export: str, **options: object) -> str:
        """The fingerprint of an export of this run."""
        return config.digest({"export": export, **options}, self.fingerprint)

    def rows(self, stem: str, columns: Sequence[str]) -> pa.Table:
        """Columns of the labels of a part, of the samples that have one."""
        url = self.paths.labels.file(f"{stem}.parquet")
        table = tables.read(url, list(dict.fromkeys([*columns, "status"])))
        return table.filter(pc.equal(table["status"], "success")).select(list(columns))


def finished(paths: layout.RunPaths) -> ExportedRun:
    """The run at a root; UserError where its labels are not written, or made of something older."""
    made = outputs.upstream(paths, "captions")
    labels = paths.labels.manifest()
    if labels["upstream"] != made["captions"]["fingerprint"]:
        raise UserError(
            f"{paths.root}: the input of the labels has changed since; run "
            "`ratecluster write` again first"
        )
    embedded = made["embeddings"]
    return ExportedRun(
        paths,
        [fact["shard"] for fact in embedded["shards"]],
        sorted(schemas.label_names(embedded["columns"]).values()),
        named(tables.read(paths.clusters_table).to_pylist()),
        labels["fingerprint"],
    )


def named(clusters: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """Clusters by number, with names: the caption, and the number where another has the same."""
    captions = [row["cluster_caption"] or "cluster" for row in clusters]
    times, taken = Counter(captions), set(captions)
    rows = []
    for row, name in zip(clusters, captions, strict=True):
        if times[name] > 1:
            while name in taken:
                name += f" ({row['cluster_id']})"
            taken.add(name)
        rows.append({**row, "name": name})
    return sorted(rows, key=lambda row: row["cluster_id"])


def file_name(stem: str, index: int, member: str) -> str:
    """What the picture of a sample is called outside its shard: nothing of it comes from the tar.

    But for the suffix, which is one of IMAGE_SUFFIXES.
    """
    suffix = member.rpartition(".")[2].lower()
    if suffix not in IMAGE_SUFFIXES:
        raise RuntimeError(f"export: {stem}: sample {index} has a picture of the kind {suffix!r}")
    return f"{stem}/{index:08d}.{suffix}"


def begin(folder: Folder, export: str, made_of: str, root: str) -> bool:
    """Whether there is something left to do; UserError where anything else lies in the folder."""
    names = folder.names()
    if names and _claim(folder, names) != made_of:
        raise UserError(
            f"{folder.url} is not empty and holds no {export} export of {root} as it is now; "
            "empty it, or choose another --out"
        )
    if names and folder.peek():
        console.log_already_done(log, f"export {export}", folder.url)
        return False
    storage.check_writable(folder.url)
    claim = {"export": export, "made_of": made_of, "run": root}
    storage.write_bytes(folder.file(CLAIM), json.dumps(claim).encode())
    return True


def finish(folder: Folder, export: str, made_of: str, samples: int, seconds: float) -> None:
    """Write the manifest, and say what there is."""
    folder.finish(made_of, samples=samples, seconds=round(seconds, 2))
    said(export, samples, seconds, folder.url)


def said(export: str, samples: int, seconds: float, url: str) -> None:
    """The line at the end."""
    console.log_finished(log, f"export {export}", seconds, f"{samples:,} samples", url)


def _claim(folder: Folder, names: set[str]) -> str | None:
    """What made an export there, finished or not; None where none is."""
    if CLAIM not in names:
        return None
    try:
        return str(json.loads(storage.read_bytes(folder.file(CLAIM)))["made_of"])
    except (ValueError, KeyError, TypeError):  # a file of this name that is not ours
        return None


def in_order(function: Callable[[T], U], items: Iterable[T]) -> Iterator[U]:
    """`function` of every item, in their order; AHEAD of them in threads, no more are held."""
    with ThreadPoolExecutor(AHEAD) as pool:
        running: deque[Future[U]] = deque()
        try:
            for item in items:
                running.append(pool.submit(function, item))
                if len(running) == AHEAD:
                    yield running.popleft().result()
            while running:
                yield running.popleft().result()
        finally:
            for future in running:
                future.cancel()
