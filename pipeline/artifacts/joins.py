"""Rows of several tables of one shard, side by side."""

from collections.abc import Sequence

import pyarrow as pa

from pipeline.artifacts.layout import RunPaths
from pipeline.store import tables


def read_joined(
    stem: str, paths: RunPaths, embedded: Sequence[str], assigned: Sequence[str]
) -> pa.Table:
    """One row per embedded sample of a shard, in the order of the tar.

    The columns are `sample_id`, then columns of the embeddings, then columns of the assignments.
    RuntimeError where the two parts do not hold the same samples in the same order.
    """
    name = f"{stem}.parquet"
    rows = tables.read(paths.embeddings.file(name), ["sample_id", *embedded])
    others = tables.read(paths.assignments.file(name), ["sample_id", *assigned])
    if not rows["sample_id"].equals(others["sample_id"]):
        raise RuntimeError(f"{stem}: embeddings and assignments hold different samples")
    for column in assigned:
        rows = rows.append_column(column, others[column])
    return rows.replace_schema_metadata()  # the footer of the embeddings says nothing of these rows
