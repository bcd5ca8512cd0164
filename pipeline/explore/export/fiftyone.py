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
from typing import Any

from pipeline.artifacts import layout
from pipeline.explore.export import common_layout
from pipeline.runtime.errors import UserError
from pipeline.runtime.progress import StageProgress
from pipeline.runtime.reject_reasons import printable
from pipeline.store import compressed, storage
from pipeline.store.listing import version_now
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
    source, folder = common_layout.open_run(paths, NAME), Folder(storage.absolute(out))
    if storage.local_path(folder.url) is None:
        raise UserError(f"{out}: FiftyOne reads only local folders; choose one as --out")
    if truth and truth not in source.originals:
        listed = ", ".join(map(printable, source.originals)) or "none"
        raise UserError(f"--label {truth} is not a json column of the labels; these are: {listed}")

    def write(progress: StageProgress) -> None:
        kept = [name for name in source.originals if PLAIN.fullmatch(name)]
        if left := len(source.originals) - len(kept):
            log.warning("export %s: %d json columns are ignored because of their names", NAME, left)
        parts = common_layout.in_order(
            lambda shard: part(shard, source, folder, kept, truth), source.shards
        )
        with storage.commit(folder.file("samples.json")) as file:
            file.write(b'{"samples": [\n')
            for texts in parts:
                file.write(",\n".join(["", *texts] if progress.samples else texts).encode())
                progress.advance(1, len(texts))
            file.write(b"]}\n")
        info = {"run": paths.root, "classes": {"cluster": [row["name"] for row in source.clusters]}}
        text = json.dumps({"media_type": "image", "info": info}, indent=1)
        storage.write_bytes(folder.file("metadata.json"), text.encode())

    common_layout.write_folder(source, folder, NAME, write, truth=truth)


def part(
    shard: dict[str, Any],
    source: common_layout.ExportedRun,
    folder: Folder,
    kept: list[str],
    truth: str | None,
) -> list[str]:
    """Commit the missing images of a shard; returns its samples as json."""
    originals = [*kept, *([truth] if truth else [])]
    columns = [*SOURCE, *OURS, "confidence", *dict.fromkeys(originals)]
    there = Folder(folder.file(f"data/{shard['stem']}")).names()
    samples, missing = [], []
    for row in source.rows(shard["stem"], columns).to_pylist():
        row["file"] = common_layout.file_name(shard["stem"], row["index"], row["image_member"])
        sample = as_sample(row, source.clusters[row["cluster_id"]]["name"], kept, truth)
        samples.append(json.dumps(sample, allow_nan=False))
        if row["file"].rpartition("/")[2] not in there:
            missing.append(row)
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
    original = {name: row[name] for name in kept}
    for name, value in original.items():
        if isinstance(value, float) and not math.isfinite(value):  # JSON lacks NaN and infinity
            original[name] = None
    return sample | {"original": original}


def copy_images(shard: dict[str, Any], rows: list[dict[str, Any]], folder: Folder) -> None:
    """Commit the images of rows, which are in tar order, in one pass over the shard."""
    if not rows:
        return
    places = [(row["tar_offset"], row["tar_size"]) for row in rows]
    stream = compressed.open_tar(shard["url"], shard["size"], version_now(shard))
    with stream:
        for row, data in zip(rows, compressed.pieces(stream, places), strict=True):
            if len(data) < row["tar_size"] or images.format_class(data) is None:
                raise RuntimeError(
                    f"export: {shard['url']} changed since it was embedded: at byte "
                    f"{row['tar_offset']} there is no longer an image"
                )
            storage.write_bytes(folder.file(f"data/{row['file']}"), data)
