"""Which rows of which parts the network is trained on, and reading them.

N training samples, D input dimensions.
"""

from dataclasses import dataclass, replace
from typing import Any

import numpy as np

from pipeline import artifacts
from pipeline.store import tables

OVERREAD = 4  # rows read for each row kept, where not all are: spreads the sample over more parts
SPREAD = 200  # parts that the sample comes from at least, where there are so many


@dataclass(frozen=True)
class Part:
    """Rows to read of one part: `take` of its `rows`, seeded by its place in the list."""

    url: str
    rows: int
    take: int


def plan(shards: list[dict[str, Any]], paths: artifacts.RunPaths, max_samples: int) -> list[Part]:
    """Which rows of which parts make the training sample: all, or `max_samples` spread evenly."""
    parts = [
        Part(paths.embeddings.file(f"{s['shard']['stem']}.parquet"), s["embedded"], s["embedded"])
        for s in shards
        if s["embedded"]
    ]
    total = sum(part.rows for part in parts)
    if total <= max_samples:
        return parts
    step = max(1, min(total // (OVERREAD * max_samples), len(parts) // SPREAD))
    chosen = parts[::step]
    ends = np.cumsum([part.rows for part in chosen])
    kept = np.diff(ends * min(max_samples, ends[-1]) // ends[-1], prepend=0)  # sums to max_samples
    return [replace(part, take=int(n)) for part, n in zip(chosen, kept, strict=True) if n]


def read_sample(parts: list[Part], seed: int) -> tuple[list[str], np.ndarray]:
    """(sample ids, (N, D) float16) of the planned rows, in the order of the parts."""
    ids: list[str] = []
    blocks = []
    for index, part in enumerate(parts):
        table = tables.read(part.url, ["sample_id", "embedding"])
        if part.take < part.rows:
            rng = np.random.default_rng((seed, index))
            table = table.take(np.sort(rng.choice(part.rows, part.take, replace=False)))
        ids += table["sample_id"].to_pylist()
        blocks.append(tables.to_matrix(table["embedding"]))
    return ids, np.concatenate(blocks)
