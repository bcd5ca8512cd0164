"""`export clip-retrieval`: the layout that clip-retrieval's inference writes.

reads   embeddings/{stem}.parquet, labels/{stem}.parquet
writes  {out}/img_emb/img_emb_{i}.npy            (n, D) float16, as in embeddings/
        {out}/metadata/metadata_{i}.parquet      the same n rows

`i` is the number of the shard. clip-retrieval pairs the files of the two folders by their order and
ignores an .npy without rows, so a shard without rows gets neither file.
"""

import numpy as np
import pyarrow.compute as pc

from pipeline.artifacts import layout
from pipeline.explore.export import common_layout
from pipeline.runtime.progress import StageProgress
from pipeline.store import storage, tables
from pipeline.store.storage import Folder

NAME = "clip-retrieval"
OURS = ("sample_id", "caption", "cluster_id", "cluster_caption", "confidence")
TAKEN = {"image_path", "metadata"}  # names that clip-retrieval does not take from json


def run(paths: layout.RunPaths, out: str) -> None:
    """Write the missing files of every shard, then the manifest."""
    source, folder = common_layout.open_run(paths), Folder(storage.absolute(out))

    def write(progress: StageProgress) -> None:
        done = Folder(folder.file("metadata")).names()
        numbers = range(len(source.shards))
        for rows in common_layout.in_order(lambda i: write_part(i, source, folder, done), numbers):
            progress.advance(1, rows)

    common_layout.write_folder(source, folder, NAME, write)


def write_part(i: int, source: common_layout.ExportedRun, folder: Folder, done: set[str]) -> int:
    """Write the two files of a shard, metadata last, unless it is in `done`; returns its rows."""
    stem, suffix = source.shards[i]["stem"], number(i, len(source.shards))
    name = f"metadata_{suffix}.parquet"
    originals = [column for column in source.originals if column not in TAKEN]
    rows = source.rows(stem, ["key", *OURS, *originals])
    if not rows.num_rows or name in done:
        return int(rows.num_rows)
    url = source.paths.embeddings.file(f"{stem}.parquet")
    part = tables.read(url, ["sample_id", "embedding"])
    part = part.filter(pc.is_in(part["sample_id"], rows["sample_id"].combine_chunks()))
    if not part["sample_id"].equals(rows["sample_id"]):
        raise RuntimeError(f"export: {stem}: embeddings and labels hold different samples")
    with storage.commit(folder.file(f"img_emb/img_emb_{suffix}.npy")) as file:
        np.save(file, tables.to_matrix(part["embedding"]), allow_pickle=False)
    rows = rows.rename_columns(["image_path", *OURS, *originals])
    tables.write(folder.file(f"metadata/{name}"), rows)
    return int(rows.num_rows)


def number(i: int, parts: int) -> str:
    """The number of a shard, padded so that names sort in the order of shards."""
    return f"{i:0{len(str(parts - 1))}d}"
