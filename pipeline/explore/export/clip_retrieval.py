"""`export clip-retrieval`: the layout that clip-retrieval's inference writes.

reads   embeddings/{stem}.parquet, labels/{stem}.parquet
writes  {out}/img_emb/img_emb_{i}.npy            (n, d) float16, as they are in embeddings/
        {out}/metadata/metadata_{i}.parquet      the same n rows

`i` is the number of the part. Its readers pair the files of the two folders by their order, and
leave out an .npy without rows, so a part without rows has neither.
"""

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc

from pipeline.artifacts import layout
from pipeline.explore.export import common_layout
from pipeline.runtime.progress import StageProgress
from pipeline.store import storage, tables
from pipeline.store.storage import Folder

NAME = "clip-retrieval"
OURS = ("sample_id", "caption", "cluster_id", "cluster_caption", "confidence")
TAKEN = {"image_path", "metadata"}  # what clip-retrieval, too, takes from no json


def run(paths: layout.RunPaths, out: str) -> None:
    """Write what is missing of the parts, then the manifest."""
    source, folder = common_layout.finished(paths), Folder(storage.absolute(out))
    made_of = source.made_of(NAME)
    if not common_layout.begin(folder, NAME, made_of, paths.root):
        return
    numbers, done = range(len(source.shards)), Folder(folder.file("metadata")).names()
    with StageProgress(f"export {NAME}", len(numbers), "parts") as progress:
        samples = 0
        for rows in common_layout.in_order(lambda i: write_part(i, source, folder, done), numbers):
            samples += rows
            progress.advance(1, rows)
    common_layout.finish(folder, NAME, made_of, samples, progress.seconds)


def write_part(i: int, source: common_layout.ExportedRun, folder: Folder, done: set[str]) -> int:
    """The two files of a part, metadata last, unless it is among `done`; returns its rows."""
    stem, suffix = source.shards[i]["stem"], number(i, len(source.shards))
    name = f"metadata_{suffix}.parquet"
    rows = metadata(source, stem)
    if not rows.num_rows or name in done:
        return int(rows.num_rows)
    url = source.paths.embeddings.file(f"{stem}.parquet")
    part = tables.read(url, ["sample_id", "embedding"])
    part = part.filter(pc.is_in(part["sample_id"], rows["sample_id"].combine_chunks()))
    if not part["sample_id"].equals(rows["sample_id"]):
        raise RuntimeError(f"export: {stem}: embeddings and labels hold different samples")
    with storage.commit(folder.file(f"img_emb/img_emb_{suffix}.npy")) as file:
        np.save(file, tables.to_matrix(part["embedding"]), allow_pickle=False)
    tables.write(folder.file(f"metadata/{name}"), rows)
    return int(rows.num_rows)


def number(i: int, parts: int) -> str:
    """Of a part, so that names sort in the order of the parts."""
    return f"{i:0{len(str(parts - 1))}d}"


def metadata(source: common_layout.ExportedRun, stem: str) -> pa.Table:
    """`image_path` is the key, as clip-retrieval has it of shards; then OURS, then the json's."""
    originals = [name for name in source.originals if name not in TAKEN]
    table = source.rows(stem, ["key", *OURS, *originals])
    return table.rename_columns(["image_path", *OURS, *originals])
