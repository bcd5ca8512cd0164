"""The run of fake_run, with the labels that stage write makes of it."""

from pathlib import Path

import pyarrow as pa

from pipeline.artifacts import layout, schemas
from pipeline.store import tables
from pipeline.write import stage as write
from tests import fake_run, level_tables


def build(root: Path) -> layout.RunPaths:
    """The run below `root`/run, its input shards in `root`/input; two clusters share a caption."""
    paths = fake_run.build(root)
    fake_run.written(paths)
    embedded = paths.embeddings.manifest()
    captions = [fake_run.SCRIPT, "green & <b>leafy</b>", fake_run.SCRIPT]
    named = (level_tables.one(3), [captions])
    job = write.WriteJob(paths, embedded["columns"], *named, False, "labels-1", 1 << 20)
    for stem in fake_run.STEMS:
        rows = write.label_rows(stem, job)
        tables.write(paths.labels.file(f"{stem}.parquet"), rows, made_of="labels-1")
    clusters = tables.read(paths.clusters_table).to_pylist()
    for row in clusters:
        row["cluster_caption"] = captions[row["cluster_id"]]
    table = pa.Table.from_pylist(clusters, schema=schemas.CLUSTERS)
    tables.write(paths.clusters_table, table)
    return paths


def rows(paths: layout.RunPaths) -> list[dict]:
    """All labels of samples that have one, in order."""
    parts = [tables.read(paths.labels.file(f"{stem}.parquet")) for stem in fake_run.STEMS]
    return [r for part in parts for r in part.to_pylist() if r["status"] == "success"]
