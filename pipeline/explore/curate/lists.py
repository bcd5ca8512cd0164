"""What curation leaves: lists of samples, each with the reason why it is in it.

reads   embeddings/, assignments/
writes  curation/{name}/{number}.parquet   sample_id, reason, cluster_id, and what explains it
        curation/{name}/manifest.json      counts; `lists`: what is `removed`, or `kept`

A list of what is removed is what `write.exclude` takes.
"""

import logging
from collections.abc import Callable
from typing import Any

import pyarrow as pa

from pipeline.artifacts import layout, outputs
from pipeline.explore.curate.shuffle import Chunk
from pipeline.runtime import config, tasks
from pipeline.runtime.progress import StageProgress
from pipeline.store import tables
from pipeline.store.storage import Folder

log = logging.getLogger(__name__)
MOST_PARTS = 128  # of a list that is made part by part
LISTED = [("sample_id", pa.string()), ("reason", pa.string()), ("cluster_id", pa.int32())]


def folder(paths: layout.RunPaths, name: str) -> Folder:
    """Where a list lies."""
    return paths.folder(f"curation/{name}")


def stems_of(made: outputs.Manifests) -> list[str]:
    """Of all shards."""
    return [facts["shard"]["stem"] for facts in made["embeddings"]["shards"]]


def members(
    stems: list[str], paths: layout.RunPaths, assigned: list[str], embedded: list[str]
) -> pa.Table:
    """Rows of some parts: columns of the assignments, and beside them of the embeddings."""
    found = []
    for stem in stems:
        rows = tables.read(paths.assignments.file(f"{stem}.parquet"), ["sample_id", *assigned])
        if embedded:
            other = tables.read(paths.embeddings.file(f"{stem}.parquet"), ["sample_id", *embedded])
            if not other["sample_id"].equals(rows["sample_id"]):
                raise RuntimeError(f"{stem}: embeddings and assignments hold different samples")
            for name in embedded:
                rows = rows.append_column(name, other[name])
        found.append(rows.replace_schema_metadata())
    return pa.concat_tables(found)


def wanted(
    name: str, cfg: Any, made: outputs.Manifests, parts: int, paths: layout.RunPaths
) -> outputs.ExpectedOutputs:
    """A list of so many parts."""
    target = folder(paths, name)
    files = {target: [f"{number:05d}.parquet" for number in range(parts)]}
    made_of = config.fingerprint(cfg, name, made["clusters"]["fingerprint"])
    return outputs.ExpectedOutputs(name, target, made_of, cfg, files)


def write(
    want: outputs.ExpectedOutputs,
    chunks: list[Chunk],
    make: Callable[..., pa.Table],
    progress: StageProgress,
    *shared: object,
) -> None:
    """Commit the parts that are missing: `make(chunk, *shared)` gives the rows of one."""
    done = want.parts(want.folder)
    keep = {f"{stem}.parquet" for stem in done}
    want.folder.remove(want.folder.names() - keep)
    left = [chunk for chunk in chunks if f"{chunk.number:05d}" not in done]
    progress.advance(len(chunks) - len(left))
    found = tasks.results(_write_part, left, make, want.folder, want.made_of, *shared)
    for _ in found:
        progress.advance()


def _write_part(
    chunk: Chunk, make: Callable[..., pa.Table], target: Folder, made_of: str, *shared: object
) -> None:
    rows = make(chunk, *shared)
    url = target.file(f"{chunk.number:05d}.parquet")
    tables.write(url, rows, made_of=made_of, rows=rows.num_rows)


def finish(
    want: outputs.ExpectedOutputs, made: outputs.Manifests, **facts: object
) -> dict[str, Any]:
    """Count the parts, commit the manifest."""
    parts = want.parts(want.folder)
    names = {name.removesuffix(".parquet") for name in want.files[want.folder]}
    if parts != names:
        raise RuntimeError(f"{want.folder.url}: {len(names - parts)} parts went missing: run again")
    known = outputs.part_facts(want.folder, parts)
    manifest = {
        "upstream": made["clusters"]["fingerprint"],
        "config": config.facts(want.cfg),
        "samples": sum(part["rows"] for part in known.values()),
        "of": made["embeddings"]["embedded"],
        **facts,
    }
    want.folder.finish(want.made_of, **manifest)
    log.info("%s: %d of %d samples", want.stage, manifest["samples"], manifest["of"])
    return want.folder.manifest()
