"""Command outliers: the samples farthest from every cluster.

reads   assignments/
writes  curation/{name}/{number}.parquet   OUTLIERS   what is to be removed

`outlier_score` is 1 − cosine to the nearest prototype. Its quantile over all samples is exact: the
bits of a float32 that is not negative order as it does, so one pass counts their upper half, a
second the lower half of those that may be it.
"""

import math
from dataclasses import dataclass
from fractions import Fraction
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc

from pipeline.artifacts import layout, outputs
from pipeline.explore.curate import lists, shuffle
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
    """What counts as an outlier: one of the two."""

    quantile: float | None = setting(None, "share of samples, 0 to 1, that are none")
    score: float | None = setting(None, "outlier_score, 0 to 2, over which a sample is one")

    def __post_init__(self) -> None:
        if (self.quantile is None) == (self.score is None):
            raise UserError("give one of --quantile and --score")
        if self.quantile is not None and not 0 < self.quantile < 1:
            raise UserError(f"--quantile {self.quantile}: give more than 0 and less than 1")
        if self.score is not None and not 0 <= self.score <= 2:
            raise UserError(f"--score {self.score}: give 0 to 2, as 1 − cosine is")


def histogram(chunk: Chunk, paths: layout.RunPaths, upper: int | None) -> np.ndarray:
    """How many scores of some parts have each upper half, or each lower half after that upper."""
    counts = np.zeros(1 << HALF, np.int64)
    for stem in chunk.stems:
        scores = tables.read(paths.assignments.file(f"{stem}.parquet"), ["outlier_score"])
        bits = np.maximum(scores["outlier_score"].to_numpy(), 0).view(np.uint32) & 0x7FFFFFFF
        high, low = bits >> HALF, bits & ((1 << HALF) - 1)
        found = high if upper is None else low[high == upper]
        counts += np.bincount(found, minlength=1 << HALF)
    return counts


def quantile(share: float, made: outputs.Manifests, paths: layout.RunPaths) -> float:
    """The least score that at least `share` of all samples do not exceed."""
    chunks = shuffle.cut(lists.stems_of(made), lists.MOST_PARTS)
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
    """OUTLIERS of some parts."""
    rows = lists.members(list(chunk.stems), paths, ["cluster_id", "outlier_score"], [])
    over = pa.scalar(threshold, pa.float32())  # as the scores are: 0.3 is not over 0.3
    rows = rows.filter(pc.greater(rows["outlier_score"], over))
    scores = rows["outlier_score"].to_pylist()
    reasons = [f"{code}: score {score:.4f} over {threshold:.4f}" for score in scores]
    columns = [rows["sample_id"], reasons, rows["cluster_id"], rows["outlier_score"]]
    columns.append([threshold] * len(reasons))
    return pa.table(dict(zip(OUTLIERS.names, columns, strict=True)), schema=OUTLIERS)


def run(
    cfg: Config,
    paths: layout.RunPaths,
    name: str = "outliers",
    code: str = "outlier",
    of: layout.RunPaths | None = None,
) -> dict[str, Any]:
    """List them; the manifest, which has the `threshold`. The quantile is of the run `of`."""
    made = outputs.upstream(paths, "clusters")
    chunks = shuffle.cut(lists.stems_of(made), lists.MOST_PARTS)
    want = lists.wanted(name, cfg, made, len(chunks), paths)
    if manifest := want.if_done():
        return manifest
    threshold = cfg.score
    if cfg.quantile is not None:
        whose = of or paths
        threshold = quantile(cfg.quantile, outputs.upstream(whose, "clusters"), whose)
    with StageProgress(name, len(chunks), "chunks") as progress:
        lists.write(want, chunks, part, progress, paths, code, threshold)
    return lists.finish(want, made, lists="removed", threshold=threshold)
