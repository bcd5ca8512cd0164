"""clusters/levels.parquet and captions/levels.parquet of runs that tests make by hand."""

from collections.abc import Sequence
from typing import Any

import numpy as np
import pyarrow as pa

from pipeline.artifacts import layout, schemas
from pipeline.artifacts.levels import Levels
from pipeline.store import tables


def write(
    paths: layout.RunPaths, vectors: np.ndarray, levels: Sequence[Sequence[int]] | None = None
) -> None:
    """A small group (k, d) for each cluster; `levels` of each group, else that of the clusters."""
    k = len(vectors)
    clusters = [[c] for c in range(k)] if levels is None else [list(each) for each in levels]
    columns = {
        "cluster_id": pa.array(range(k), pa.int32()),
        "levels": pa.array(clusters, pa.list_(pa.int32())),
        "vector": tables.from_matrix(np.asarray(vectors, np.float32), pa.float32()),
    }
    table = pa.table(columns, schema=schemas.levels_schema(vectors.shape[1]))
    tables.write(paths.clusters.file("levels.parquet"), table)


def captions(paths: layout.RunPaths, rows: Sequence[dict[str, Any]] = ()) -> None:
    """The captions of the other levels."""
    table = pa.Table.from_pylist(list(rows), schema=schemas.LEVEL_CAPTIONS)
    tables.write(paths.captions.file("levels.parquet"), table)


def one(k: int) -> Levels:
    """Levels of k clusters, one small group each, and no other level."""
    return Levels(np.arange(k), np.arange(k)[:, None], np.eye(k))
