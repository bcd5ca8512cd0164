"""Lists of samples, each with the reason why it is listed.

reads   embeddings/, assignments/
writes  curation/{name}/{number}.parquet   sample_id, reason, cluster_id, and more columns
        curation/{name}/manifest.json      counts; `lists` says `removed` or `kept`

The setting `write.exclude` takes lists of removed samples.
"""

import logging
from collections.abc import Callable, Sequence
from typing import Any

import pyarrow as pa

from pipeline.artifacts import layout, outputs
from pipeline.artifacts.joins import read_joined
from pipeline.explore.curate import shuffle
from pipeline.explore.curate.shuffle import Chunk
from pipeline.runtime import config, tasks
from pipeline.runtime.progress import StageProgress
from pipeline.store import tables
from pipeline.store.storage import Folder

log = logging.getLogger(__name__)
MOST_PARTS = 128  # of a list that is written part by part
LISTED = [("sample_id", pa.string()), ("reason", pa.string()), ("cluster_id", pa.int32())]


def folder(paths: layout.RunPaths, name: str) -> Folder:
    """The folder of a list."""
    return paths.folder(f"curation/{name}")


def chunks(made: outputs.Manifests) -> list[Chunk]:
    """The shards of a run, in one chunk for each part of a list."""
    return shuffle.cut_shards(made, MOST_PARTS)


def members(
    chunk: Chunk, paths: layout.RunPaths, assigned: Sequence[str], embedded: Sequence[str] = ()
) -> pa.Table:
    """One row per sample of some shards: columns of the assignments, and of the embeddings."""

    def of_shard(stem: str) -> pa.Table:
        if embedded:
            return read_joined(stem, paths, embedded, assigned)
        rows = tables.read(paths.assignments.file(f"{stem}.parquet"), ["sample_id", *assigned])
        return rows.replace_schema_metadata()

    return pa.concat_tables(map(of_shard, chunk.items))


def expected(
    name: str, cfg: Any, made: outputs.Manifests, parts: int, paths: layout.RunPaths
) -> outputs.ExpectedOutputs:
    """The files of a list with so many parts."""
    target = folder(paths, name)
    files = {target: [f"{number:05d}.parquet" for number in range(parts)]}
    made_of = config.fingerprint(cfg, name, made["clusters"]["fingerprint"])
    return outputs.ExpectedOutputs(name, target, made_of, cfg, files)


def missing(
    want: outputs.ExpectedOutputs, items: Sequence[Any], progress: StageProgress
) -> list[Any]:
    """The items whose parts, {item.name}.parquet, must be made.

    Deletes all other files, except those of `shuffle`.
    """
    done = want.parts(want.folder)
    others = want.folder.names() - {f"{name}.parquet" for name in done}
    want.folder.remove({name for name in others if not name.startswith(shuffle.PREFIX)})
    left = [item for item in items if item.name not in done]
    progress.advance(len(items) - len(left))
    return left


def write(
    want: outputs.ExpectedOutputs,
    made: outputs.Manifests,
    chunks: list[Chunk],
    progress: StageProgress,
    make: Callable[..., pa.Table],
    *shared: object,
    **facts: object,
) -> dict[str, Any]:
    """Commit the missing parts, then the manifest with counts and `facts`; returns it.

    `make(chunk, *shared)` returns the rows of a part.
    """
    left = missing(want, chunks, progress)
    for _ in tasks.results(_write_part, left, make, want.folder, want.made_of, *shared):
        progress.advance()
    parts = want.parts(want.folder)
    if absent := {chunk.name for chunk in chunks} - parts:
        raise RuntimeError(f"{want.folder.url}: {len(absent)} parts are missing: run again")
    known = outputs.part_facts(want.folder, parts)
    manifest = {
        "upstream": made["clusters"]["fingerprint"],
        "config": config.facts(want.cfg),
        "samples": sum(part["rows"] for part in known.values()),
        "of": made["embeddings"]["embedded"],
        "lists": "removed",
        **facts,
    }
    want.folder.finish(want.made_of, **manifest)
    log.info("%s: %d of %d samples", want.stage, manifest["samples"], manifest["of"])
    return want.folder.manifest()


def _write_part(
    chunk: Chunk, make: Callable[..., pa.Table], target: Folder, made_of: str, *shared: object
) -> None:
    rows = make(chunk, *shared)
    tables.write(target.file(f"{chunk.name}.parquet"), rows, made_of=made_of, rows=rows.num_rows)
