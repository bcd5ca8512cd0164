"""Command duplicates: list near-duplicates within clusters.

reads   curation/similarity/
writes  curation/duplicates/{number}.parquet   DUPLICATES   samples to remove

Of each group, the sample farthest from the centre of the cluster is kept (see `similarity`).
"""

from dataclasses import dataclass
from typing import Any

import pyarrow as pa
import pyarrow.compute as pc

from pipeline.artifacts import layout, outputs
from pipeline.explore.curate import lists, shuffle, similarity
from pipeline.explore.curate.shuffle import Chunk
from pipeline.runtime.config import setting
from pipeline.runtime.errors import UserError
from pipeline.runtime.progress import StageProgress
from pipeline.store import tables
from pipeline.store.storage import Folder

DUPLICATES = pa.schema(
    [
        *lists.LISTED,
        ("duplicate_of", pa.string()),  # the most similar sample that comes before it
        ("similarity", pa.float32()),  # their cosine
        ("threshold", pa.float64()),
    ]
)


@dataclass(frozen=True, kw_only=True)
class Config:
    """When two samples are duplicates."""

    threshold: float = setting(0.95, "cosine over which a pair are duplicates: 1 − ε of SemDeDup")

    def __post_init__(self) -> None:
        if not similarity.FLOOR <= self.threshold < 1:
            raise UserError(
                f"--threshold {self.threshold}: give {similarity.FLOOR} or more, below 1"
            )


def part(chunk: Chunk, source: Folder, threshold: float) -> pa.Table:
    """DUPLICATES of some parts of curation/similarity/."""
    found = [tables.read(source.file(f"{stem}.parquet")) for stem in chunk.items]
    rows = pa.concat_tables([similarity.SIMILAR.empty_table(), *found])
    rows = rows.filter(pc.greater(rows["similarity"].cast(pa.float64()), threshold))
    reasons = [
        f"duplicate: cosine {row['similarity']:.4f} to {row['duplicate_of']}"
        for row in rows.to_pylist()
    ]
    columns = [rows["sample_id"], reasons, rows["cluster_id"], rows["duplicate_of"]]
    columns += [rows["similarity"], [threshold] * len(reasons)]
    return pa.table(columns, schema=DUPLICATES)


def run(cfg: Config, paths: layout.RunPaths) -> dict[str, Any]:
    """Compare all samples, then list those over the threshold.

    Returns counts, and for each of THRESHOLDS how many samples it would remove.
    """
    made = outputs.upstream(paths, "clusters")
    compared = similarity.run(made, paths)
    source = lists.folder(paths, "similarity")
    names = [unit.name for unit in similarity.units(made["clusters"]["sizes"])]
    chunks = shuffle.cut(names, lists.MOST_PARTS)
    want = lists.expected("duplicates", cfg, made, len(chunks), paths)
    if (manifest := want.if_done()) is None:
        with StageProgress("duplicates", len(chunks), "parts") as progress:
            shared = (source, cfg.threshold)
            manifest = lists.write(want, made, chunks, progress, part, *shared)
    return {
        "list": want.folder.url,
        "threshold": cfg.threshold,
        "samples": manifest["samples"],
        "of": compared["samples"],
        "effect": dict(zip(similarity.THRESHOLDS, compared["removed"], strict=True)),
    }


def text(found: dict[str, Any]) -> str:
    """A table of what each threshold would remove, and where the list is."""
    lines = ["threshold      removed   of all"]
    for threshold, removed in found["effect"].items():
        lines.append(f"{threshold:<9} {removed:>12,} {removed / found['of']:>8.2%}")
    lines.append(f"{found['samples']:,} over {found['threshold']} are listed in {found['list']}")
    return "\n".join(lines)
