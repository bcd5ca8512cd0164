"""`export fiftyone`: a folder that `fiftyone.Dataset.from_dir` imports as a FiftyOneDataset.

reads   labels/{stem}.parquet, clusters.parquet, the pictures in the input shards
writes  {out}/data/{stem}/{index}.{suffix}  the pictures, their bytes as in the shard
        {out}/samples.json                  a sample for each, with its labels
        {out}/metadata.json                 the classes

samples.json is of the form without a database version, whose samples FiftyOne reads one by one and
whose fields it infers. It holds all of samples.json in memory: what is exported should fit there.
"""

import json
import logging
import math
import re
from typing import IO, Any

from pipeline.artifacts import layout
from pipeline.explore.export import common_layout
from pipeline.runtime.errors import UserError
from pipeline.runtime.progress import StageProgress
from pipeline.runtime.reject_reasons import printable
from pipeline.store import storage
from pipeline.store.storage import Folder
from pipeline.vision import images

log = logging.getLogger(__name__)
NAME = "fiftyone"
SOURCE = ("index", "image_member", "tar_offset", "tar_size", "image_width", "image_height")
OURS = ("sample_id", "shard", "key", "caption", "cluster_id", "margin", "outlier_score")
PLAIN = re.compile(r"[A-Za-z]\w*", re.ASCII)  # a dot or $ means something to its database
PIECE = 1 << 20  # bytes between pictures that are read at once

Row = dict[str, Any]


def run(paths: layout.RunPaths, out: str, truth: str | None) -> None:
    """Pictures part by part, and beside them samples.json, streamed; then the manifest.

    The json column `truth`, if given, becomes the field ground_truth.
    """
    source, folder = common_layout.finished(paths), Folder(storage.absolute(out))
    if storage.local_path(folder.url) is None:
        raise UserError(f"{out}: FiftyOne reads local folders alone; choose one as --out")
    if truth and truth not in source.originals:
        listed = ", ".join(map(printable, source.originals)) or "none"
        raise UserError(f"--label {truth} is no json column of the labels; there are: {listed}")
    made_of = source.made_of(NAME, truth=truth)
    if not common_layout.begin(folder, NAME, made_of, paths.root):
        return
    kept = [name for name in source.originals if PLAIN.fullmatch(name)]
    if left := len(source.originals) - len(kept):
        log.warning("export %s: %d json columns are left out for their names", NAME, left)
    samples = 0
    with (
        StageProgress(f"export {NAME}", len(source.shards), "parts") as progress,
        storage.commit(folder.file("samples.json")) as file,
    ):
        file.write(b'{"samples": [\n')
        parts = common_layout.in_order(
            lambda s: part(s, source, folder, kept, truth), source.shards
        )
        for texts in parts:
            file.write(",\n".join(["", *texts] if samples else texts).encode())
            samples += len(texts)
            progress.advance(1, len(texts))
        file.write(b"]}\n")
    info = {"run": paths.root, "classes": {"cluster": [row["name"] for row in source.clusters]}}
    text = json.dumps({"media_type": "image", "info": info}, indent=1)
    storage.write_bytes(folder.file("metadata.json"), text.encode())
    common_layout.finish(folder, NAME, made_of, samples, progress.seconds)


def part(
    shard: dict[str, Any],
    source: common_layout.ExportedRun,
    folder: Folder,
    kept: list[str],
    truth: str | None,
) -> list[str]:
    """Commit the pictures of a part that are not there; returns its samples as json."""
    originals = [*kept, *([truth] if truth else [])]
    rows = source.rows(shard["stem"], [*SOURCE, *OURS, "confidence", *dict.fromkeys(originals)])
    samples, found = [], rows.to_pylist()
    for row in found:
        row["file"] = common_layout.file_name(shard["stem"], row["index"], row["image_member"])
        sample = described(row, source.clusters[row["cluster_id"]]["name"], kept, truth)
        samples.append(json.dumps(sample, allow_nan=False))
    there = Folder(folder.file(f"data/{shard['stem']}")).names()
    missing = [row for row in found if row["file"].rpartition("/")[2] not in there]
    copy_pictures(shard, missing, folder)
    return samples


def described(row: Row, cluster: str, kept: list[str], truth: str | None) -> Row:
    """A sample as FiftyOne has it in json."""
    known = {"_cls": "ImageMetadata", "size_bytes": row["tar_size"]}
    known |= {"width": row["image_width"], "height": row["image_height"]}
    sample = {"filepath": f"data/{row['file']}", "tags": [], "metadata": known}
    label = {"_cls": "Classification", "label": cluster, "confidence": row["confidence"]}
    sample |= {"cluster": label, **{name: row[name] for name in OURS}}
    if truth and row[truth] is not None:
        sample["ground_truth"] = {"_cls": "Classification", "label": str(row[truth])}
    return sample | {"original": {name: _finite(row[name]) for name in kept}}


def _finite(value: Any) -> Any:
    """JSON has no NaN, though samples' json may."""
    return None if isinstance(value, float) and not math.isfinite(value) else value


def copy_pictures(shard: dict[str, Any], rows: list[Row], folder: Folder) -> None:
    """Commit the pictures of rows, which are in the order of the shard, in one pass over it."""
    if not rows:
        return
    with storage.open_read(shard["url"], shard["size"], shard["version"]) as stream:
        position = 0
        for row in rows:
            _skip(stream, row["tar_offset"] - position)
            data = stream.read(row["tar_size"])
            position = row["tar_offset"] + row["tar_size"]
            if len(data) < row["tar_size"] or images.format_class(data) is None:
                raise RuntimeError(
                    f"export: {shard['url']} changed since it was embedded: at byte "
                    f"{row['tar_offset']} there is no picture any more"
                )
            storage.write_bytes(folder.file(f"data/{row['file']}"), data)


def _skip(stream: IO[bytes], size: int) -> None:
    while size > 0:
        size -= len(stream.read(min(size, PIECE))) or size
