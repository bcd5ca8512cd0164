"""What all exports of a finished run share: what they read, and how they write a folder.

reads   labels/{stem}.parquet, clusters.parquet, the manifests
writes  {out}/export.json    first: which run and export the folder holds
        {out}/manifest.json  last

An interrupted export resumes. Rejected samples are in no export.
"""

import json
import logging
from collections import Counter, deque
from collections.abc import Callable, Iterable, Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import suppress
from dataclasses import dataclass
from typing import Any, TypeVar

import pyarrow as pa
import pyarrow.compute as pc

from pipeline.artifacts import inputs, layout, outputs, schemas
from pipeline.runtime import config, console
from pipeline.runtime.errors import UserError
from pipeline.runtime.progress import StageProgress
from pipeline.store import storage, tables
from pipeline.store.samples import IMAGE_SUFFIXES
from pipeline.store.storage import Folder

log = logging.getLogger(__name__)
T = TypeVar("T")
U = TypeVar("U")
CLAIM = "export.json"
AHEAD = 8  # shards that are read at once, since object stores answer slowly


@dataclass(frozen=True)
class ExportedRun:
    """A finished run, as exports see it."""

    paths: layout.RunPaths
    shards: list[dict[str, Any]]  # stem, url, size, version of each input shard
    originals: list[str]  # columns of the labels that come from the samples' json
    clusters: list[dict[str, Any]]  # rows of CLUSTERS, each with a unique `name`
    fingerprint: str  # of the labels

    def made_of(self, export: str, **options: object) -> str:
        """The fingerprint of an export of this run."""
        return config.digest({"export": export, **options}, self.fingerprint)

    def rows(self, stem: str, columns: Sequence[str]) -> pa.Table:
        """Columns of the labels of a shard, without rejected samples."""
        url = self.paths.labels.file(f"{stem}.parquet")
        table = tables.read(url, list(dict.fromkeys([*columns, "status"])))
        return table.filter(pc.equal(table["status"], "success")).select(list(columns))


def open_run(paths: layout.RunPaths, pictures: str = "") -> ExportedRun:
    """The run at a root; UserError if its labels are missing or out of date.

    `pictures` is the name of an export that needs them: UserError for a run without shards.
    """
    made = outputs.upstream(paths, "captions")
    if pictures:
        inputs.require_shards(made["embeddings"], f"export {pictures}")
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
        name_clusters(tables.read(paths.clusters_table).to_pylist()),
        labels["fingerprint"],
    )


def name_clusters(clusters: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """Clusters by number, each with a unique `name`: its caption, with its number if it repeats."""
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
    """The name of an exported image; only its suffix, one of IMAGE_SUFFIXES, is from the tar."""
    suffix = member.rpartition(".")[2].lower()
    if suffix not in IMAGE_SUFFIXES:
        raise RuntimeError(f"export: {stem}: sample {index} has an image of the kind {suffix!r}")
    return f"{stem}/{index:08d}.{suffix}"


def write_folder(
    source: ExportedRun,
    folder: Folder,
    export: str,
    write: Callable[[StageProgress], None],
    **options: object,
) -> None:
    """Run an export into a folder: claim the folder, call `write`, commit the manifest.

    Does nothing if the export is done. UserError if the folder holds anything else.
    """
    made_of, root, names = source.made_of(export, **options), source.paths.root, folder.names()
    claimed = None
    if CLAIM in names:
        with suppress(ValueError, KeyError, TypeError):  # another program's file of this name
            claimed = json.loads(storage.read_bytes(folder.file(CLAIM)))["made_of"]
    if names and claimed != made_of:
        raise UserError(
            f"{folder.url} is not empty and holds no {export} export of {root} as it is now; "
            "empty it, or choose another --out"
        )
    if names and folder.peek():
        console.log_already_done(log, f"export {export}", folder.url)
        return
    storage.check_writable(folder.url)
    claim = {"export": export, "made_of": made_of, "run": root}
    storage.write_bytes(folder.file(CLAIM), json.dumps(claim).encode())
    with StageProgress(f"export {export}", len(source.shards), "parts") as progress:
        write(progress)
    samples, seconds = progress.samples, progress.seconds
    folder.finish(made_of, samples=samples, seconds=round(seconds, 2))
    console.log_finished(log, f"export {export}", seconds, f"{samples:,} samples", folder.url)


def in_order(function: Callable[[T], U], items: Iterable[T]) -> Iterator[U]:
    """`function` of every item, in order; AHEAD of them run in threads."""
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
