"""Command outliers: list the samples farthest from every cluster.

reads   assignments/
writes  curation/{name}/{number}.parquet   OUTLIERS   samples to remove

`outlier_score` is 1 − cosine to the nearest prototype. Its quantile over all samples is exact.
Non-negative float32 numbers sort like their bits. So one pass counts the upper 16 bits, and a
second pass counts the lower 16 bits of the numbers whose upper half is that of the quantile.
"""

import math
from dataclasses import dataclass
from fractions import Fraction
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc

from pipeline.artifacts import layout, outputs
from pipeline.explore.curate import lists
from pipeline.explore.curate.shuffle import Chunk
from pipeline.runtime import tasks
from pipeline.runtime.config import setting
from pipeline.runtime.errors import UserError
from pipeline.runtime.progress import StageProgress
from pipeline.store import tables

HALF = 16  # bits
OUTLIERS = pa.schema([*lists.LISTED, ("outlier_score", pa.float32()), ("threshold", pa.float64())])


@dataclass(frozen=True, kw_only=True)
class Config:
    """When a sample is an outlier; give one of the two."""

    quantile: float | None = setting(None, "quantile of outlier_score; samples above it are listed")
    score: float | None = setting(None, "outlier_score, 0 to 2; samples above it are listed")

    def __post_init__(self) -> None:
        if (self.quantile is None) == (self.score is None):
            raise UserError("give one of --quantile and --score")
        if self.quantile is not None and not 0 < self.quantile < 1:
            raise UserError(f"--quantile {self.quantile}: give more than 0 and less than 1")
        if self.score is not None and not 0 <= self.score <= 2:
            raise UserError(f"--score {self.score}: give 0 to 2, the range of 1 − cosine")


def histogram(chunk: Chunk, paths: layout.RunPaths, upper: int | None) -> np.ndarray:
    """Counts (65536,) of the upper halves of scores, or of the lower halves that follow `upper`."""
    counts = np.zeros(1 << HALF, np.int64)
    for stem in chunk.items:
        scores = tables.read(paths.assignments.file(f"{stem}.parquet"), ["outlier_score"])
        bits = np.maximum(scores["outlier_score"].to_numpy(), 0).view(np.uint32) & 0x7FFFFFFF
        high, low = bits >> HALF, bits & ((1 << HALF) - 1)
        found = high if upper is None else low[high == upper]
        counts += np.bincount(found, minlength=1 << HALF)
    return counts


def quantile(share: float, made: outputs.Manifests, paths: layout.RunPaths) -> float:
    """The smallest score that at least `share` of all samples do not exceed."""
    chunks = lists.chunks(made)
    left = math.ceil(Fraction(str(share)) * made["embeddings"]["embedded"])
    bits, upper = 0, None
    with StageProgress("quantile", 2 * len(chunks), "chunks") as progress:
        for shift in (HALF, 0):
            counts = np.zeros(1 << HALF, np.int64)
            for more in tasks.results(histogram, chunks, paths, upper):
                counts += more
                progress.advance()
            upper = int(np.searchsorted(counts.cumsum(), left))
            left -= int(counts[:upper].sum())
            bits |= upper << shift
    return float(np.uint32(bits).view(np.float32))


def part(chunk: Chunk, paths: layout.RunPaths, code: str, threshold: float) -> pa.Table:
    """OUTLIERS of some shards."""
    rows = lists.members(chunk, paths, ["cluster_id", "outlier_score"])
    over = pa.scalar(threshold, pa.float32())  # the type of the scores, so that 0.3 is not over 0.3
    rows = rows.filter(pc.greater(rows["outlier_score"], over))
    scores = rows["outlier_score"].to_pylist()
    reasons = [f"{code}: score {score:.4f} over {threshold:.4f}" for score in scores]
    columns = [rows["sample_id"], reasons, rows["cluster_id"], rows["outlier_score"]]
    return pa.table([*columns, [threshold] * len(reasons)], schema=OUTLIERS)


def run(
    cfg: Config,
    paths: layout.RunPaths,
    name: str = "outliers",
    code: str = "outlier",
    of: layout.RunPaths | None = None,
) -> dict[str, Any]:
    """List the outliers; returns the manifest, with the `threshold`.

    The quantile is that of the run `of`, by default the same run.
    """
    made = outputs.upstream(paths, "clusters")
    chunks = lists.chunks(made)
    want = lists.expected(name, cfg, made, len(chunks), paths)
    if manifest := want.if_done():
        return manifest
    threshold = cfg.score
    if cfg.quantile is not None:
        whose = of or paths
        threshold = quantile(cfg.quantile, outputs.upstream(whose, "clusters"), whose)
    with StageProgress(name, len(chunks), "chunks") as progress:
        shared = (paths, code, threshold)
        return lists.write(want, made, chunks, progress, part, *shared, threshold=threshold)
