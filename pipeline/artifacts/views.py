"""The views of the samples: a column of embeddings by each encoder, in the order of the settings.

n samples, D1, D2, … dimensions of the encoders.
"""

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
import pyarrow as pa

from pipeline.store import tables


def column(place: int) -> str:
    """Name of the column of an encoder: embedding of the first, then embedding_2, embedding_3, …"""
    return f"embedding_{place + 1}" if place else "embedding"


def columns(count: int) -> list[str]:
    """Names of the columns of the first `count` encoders."""
    return [column(place) for place in range(count)]


def names(manifest: Mapping[str, Any]) -> list[str]:
    """Names of the embedding columns of a run, from the manifest of embeddings/."""
    made_with = manifest["config"]
    return columns(len(made_with.get("columns", ())) or 1 + len(made_with.get("also", ())))


def side_by_side(rows: pa.Table, names: Sequence[str]) -> tuple[np.ndarray, list[int]]:
    """The vectors of these columns as (n, D1 + D2 + …) float16, and [D1, D2, …].

    Every view has rows of unit length: the matrix has not.
    """
    matrices = [tables.to_matrix(rows[name]) for name in names]
    together = np.concatenate(matrices, axis=1) if len(matrices) > 1 else matrices[0]
    return together, [matrix.shape[1] for matrix in matrices]
