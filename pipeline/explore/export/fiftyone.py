"""`export fiftyone`: a folder that `fiftyone.Dataset.from_dir` imports as a FiftyOneDataset.

reads   labels/{stem}.parquet, clusters.parquet, the images in the input shards
writes  {out}/data/{stem}/{index}.{suffix}  the images, byte for byte
        {out}/samples.json                  a sample with its labels for each image
        {out}/metadata.json                 the classes

samples.json has no database version, so FiftyOne infers the fields of the samples. FiftyOne reads
the whole file into memory.
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
PLAIN = re.compile(r"[A-Za-z]\w*", re.ASCII)  # MongoDB gives `.` and `$` a meaning
PIECE = 1 << 20  # bytes between images that are skipped at once


def run(paths: layout.RunPaths, out: str, truth: str | None) -> None:
    """Write the images and samples.json shard by shard, then the manifest.

    The json column `truth`, if given, becomes the field ground_truth.
    """
    source, folder = common_layout.open_run(paths), Folder(storage.absolute(out))
    if storage.local_path(folder.url) is None:
        raise UserError(f"{out}: FiftyOne reads only local folders; choose one as --out")
    if truth and truth not in source.originals:
        listed = ", ".join(map(printable, source.originals)) or "none"
        raise UserError(f"--label {truth} is not a json column of the labels; these are: {listed}")
    made_of = source.made_of(NAME, truth=truth)
    if not common_layout.begin(folder, NAME, made_of, paths.root):
        return
    kept = [name for name in source.originals if PLAIN.fullmatch(name)]
    if left := len(source.originals) - len(kept):
        log.warning("export %s: %d json columns are ignored because of their names", NAME, left)
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
    """Commit the missing images of a shard; returns its samples as json."""
    originals = [*kept, *([truth] if truth else [])]
    rows = source.rows(shard["stem"], [*SOURCE, *OURS, "confidence", *dict.fromkeys(originals)])
    samples, found = [], rows.to_pylist()
    for row in found:
        row["file"] = common_layout.file_name(shard["stem"], row["index"], row["image_member"])
        sample = as_sample(row, source.clusters[row["cluster_id"]]["name"], kept, truth)
        samples.append(json.dumps(sample, allow_nan=False))
    there = Folder(folder.file(f"data/{shard['stem']}")).names()
    missing = [row for row in found if row["file"].rpartition("/")[2] not in there]
    copy_images(shard, missing, folder)
    return samples


def as_sample(
    row: dict[str, Any], cluster: str, kept: list[str], truth: str | None
) -> dict[str, Any]:
    """A sample in the json of FiftyOne."""
    known = {"_cls": "ImageMetadata", "size_bytes": row["tar_size"]}
    known |= {"width": row["image_width"], "height": row["image_height"]}
    sample = {"filepath": f"data/{row['file']}", "tags": [], "metadata": known}
    label = {"_cls": "Classification", "label": cluster, "confidence": row["confidence"]}
    sample |= {"cluster": label, **{name: row[name] for name in OURS}}
    if truth and row[truth] is not None:
        sample["ground_truth"] = {"_cls": "Classification", "label": str(row[truth])}
    return sample | {"original": {name: _finite(row[name]) for name in kept}}


def _finite(value: Any) -> Any:
    """None for NaN and infinity, which JSON lacks."""
    return None if isinstance(value, float) and not math.isfinite(value) else value


def copy_images(shard: dict[str, Any], rows: list[dict[str, Any]], folder: Folder) -> None:
    """Commit the images of rows, which are in tar order, in one pass over the shard."""
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
                    f"{row['tar_offset']} there is no longer an image"
                )
            storage.write_bytes(folder.file(f"data/{row['file']}"), data)


def _skip(stream: IO[bytes], size: int) -> None:
    while size > 0:
        size -= len(stream.read(min(size, PIECE))) or size
