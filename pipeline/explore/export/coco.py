"""`export coco`: one json file in the format of COCO instances, with a category for each cluster.

reads   labels/{stem}.parquet, twice; clusters.parquet
writes  {out}  info, licenses, categories, images, annotations

Each image has one annotation, whose box and polygon cover the whole image, so every reader of COCO
(pycocotools, torchvision, FiftyOne) accepts it. Ids start at 1, also those of categories, since
some readers take 0 as the background. `file_name` is the path below data/ of `export fiftyone`.
"""

import json
import logging
from collections.abc import Callable
from typing import IO, Any

from pipeline.artifacts import layout
from pipeline.explore.export import common_layout
from pipeline.runtime import console
from pipeline.runtime.errors import UserError
from pipeline.runtime.progress import StageProgress
from pipeline.store import storage

log = logging.getLogger(__name__)
NAME = "coco"
SOURCE = ("sample_id", "index", "image_member", "image_width", "image_height")
COLUMNS = (*SOURCE, "cluster_id", "confidence", "caption")
HEAD = '{"info": '
HEAD_BYTES = 1 << 16  # of an existing file, to identify it

Entry = Callable[[int, str, dict[str, Any]], dict[str, Any]]


def run(paths: layout.RunPaths, out: str) -> None:
    """Stream the file: images in one pass over the shards, annotations in a second."""
    source, url = common_layout.open_run(paths, NAME), storage.absolute(out)
    if not url.endswith(".json"):
        raise UserError(f"--out {out}: give the name of a file, such as {url}/coco.json")
    info = {
        "description": f"clusters of {paths.root}, by ratecluster",
        "ratecluster": source.made_of(NAME),
    }
    if storage.exists(url):
        if not _is(url, info["ratecluster"]):
            raise UserError(
                f"{out} exists and is no COCO export of {paths.root} as it is now; delete it, "
                "or choose another --out"
            )
        console.log_already_done(log, f"export {NAME}", url)
        return
    storage.check_writable(url.rpartition("/")[0])
    with (
        StageProgress(f"export {NAME}", 2 * len(source.shards), "parts") as progress,
        storage.commit(url) as file,
    ):
        _write(file, f'{HEAD}{json.dumps(info)},\n"licenses": [],\n"categories": [\n')
        _write(file, ",\n".join(map(json.dumps, categories(source))))
        _write(file, '],\n"images": [\n')
        samples = _write_entries(file, source, image, progress)
        _write(file, '],\n"annotations": [\n')
        _write_entries(file, source, annotation, progress)
        _write(file, "]}\n")
    console.log_finished(log, f"export {NAME}", progress.seconds, f"{samples:,} samples", url)


def categories(source: common_layout.ExportedRun) -> list[dict[str, Any]]:
    """A category for each cluster."""
    return [
        {"id": row["cluster_id"] + 1, "name": row["name"], "supercategory": "cluster"}
        | {"cluster_id": row["cluster_id"]}
        for row in source.clusters
    ]


def image(number: int, stem: str, row: dict[str, Any]) -> dict[str, Any]:
    """The entry of a sample in images."""
    found = {
        "id": number,
        "file_name": common_layout.file_name(stem, row["index"], row["image_member"]),
        "width": row["image_width"],
        "height": row["image_height"],
        "sample_id": row["sample_id"],
        "caption": row["caption"],
    }
    return found | ({"coco_url": row["url"]} if isinstance(row.get("url"), str) else {})


def annotation(number: int, _: str, row: dict[str, Any]) -> dict[str, Any]:
    """The entry of a sample in annotations."""
    w, h = row["image_width"], row["image_height"]
    return {
        "id": number,
        "image_id": number,
        "category_id": row["cluster_id"] + 1,
        "bbox": [0, 0, w, h],
        "segmentation": [[0, 0, w, 0, w, h, 0, h]],
        "area": w * h,
        "iscrowd": 0,
        "score": round(row["confidence"], 6),
    }


def _write_entries(
    file: IO[bytes], source: common_layout.ExportedRun, entry: Entry, progress: StageProgress
) -> int:
    """Write the entries of all samples, numbered from 1; returns how many there are."""
    wanted = [*COLUMNS, *({"url"} & set(source.originals))]
    number = 0
    stems = [shard["stem"] for shard in source.shards]
    parts = common_layout.in_order(lambda stem: source.rows(stem, wanted), stems)
    for stem, table in zip(stems, parts, strict=True):
        for row in table.to_pylist():
            number += 1
            text = json.dumps(entry(number, stem, row), allow_nan=False)
            _write(file, text if number == 1 else f",\n{text}")
        progress.advance(1, table.num_rows)
    return number


def _write(file: IO[bytes], text: str) -> None:
    file.write(text.encode())


def _is(url: str, made_of: str) -> bool:
    """Whether the file is the export with this fingerprint."""
    head = storage.read_range(url, 0, HEAD_BYTES).decode("utf-8", "replace")
    try:
        info, _ = json.JSONDecoder().raw_decode(head, len(HEAD))
        return head.startswith(HEAD) and bool(info["ratecluster"] == made_of)
    except (ValueError, KeyError, TypeError, IndexError):
        return False
