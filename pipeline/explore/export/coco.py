"""`export coco`: one json file as of COCO's instances, a category for each cluster.

reads   labels/{stem}.parquet, twice; clusters.parquet
writes  {out}  info, licenses, categories, images, annotations

A sample is an image with one annotation, whose box and polygon are the whole image: so the readers
of COCO (pycocotools, torchvision, FiftyOne, detectors) take it without a special case. Ids count
from 1, of categories too (`cluster_id` stands beside), as some readers take 0 for the background.
`file_name` is what `export fiftyone` calls the picture below its data/.
"""

import json
import logging
from collections.abc import Callable, Iterator
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
HEAD_BYTES = 1 << 16  # of a file that is there, to see what it is

Entry = Callable[[int, str, dict[str, Any]], dict[str, Any]]


def run(paths: layout.RunPaths, out: str) -> None:
    """Stream the file: images in one pass over the parts, annotations in a second."""
    source, url = common_layout.finished(paths), storage.absolute(out)
    if not url.endswith(".json"):
        raise UserError(f"--out {out}: give the name of the file, such as {url}/coco.json")
    info = {
        "description": f"clusters of {paths.root}, by ratecluster",
        "ratecluster": source.made_of(NAME),
    }
    if storage.exists(url):
        if not _is(url, info["ratecluster"]):
            raise UserError(
                f"{out} is there and is no COCO export of {paths.root} as it is now; delete it, "
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
        samples = _stream(file, _entries(source, image, progress))
        _write(file, '],\n"annotations": [\n')
        _stream(file, _entries(source, annotation, progress))
        _write(file, "]}\n")
    common_layout.said(NAME, samples, progress.seconds, url)


def categories(source: common_layout.ExportedRun) -> list[dict[str, Any]]:
    """One for each cluster."""
    return [
        {"id": row["cluster_id"] + 1, "name": row["name"], "supercategory": "cluster"}
        | {"cluster_id": row["cluster_id"]}
        for row in source.clusters
    ]


def image(number: int, stem: str, row: dict[str, Any]) -> dict[str, Any]:
    """The entry of a sample, whose id is its number, among images."""
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
    """The entry of a sample among annotations."""
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


def _entries(
    source: common_layout.ExportedRun, entry: Entry, progress: StageProgress
) -> Iterator[str]:
    """The entries of all samples, numbered through, as json."""
    wanted = [*COLUMNS, *({"url"} & set(source.originals))]
    number = 0
    parts = common_layout.in_order(lambda stem: source.rows(stem, wanted), source.stems())
    for stem, table in zip(source.stems(), parts, strict=True):
        for row in table.to_pylist():
            number += 1
            yield json.dumps(entry(number, stem, row), allow_nan=False)
        progress.advance(1, table.num_rows)


def _stream(file: IO[bytes], entries: Iterator[str]) -> int:
    """Write the items of a list; returns how many they are."""
    count = 0
    for count, text in enumerate(entries, start=1):
        _write(file, text if count == 1 else f",\n{text}")
    return count


def _write(file: IO[bytes], text: str) -> None:
    file.write(text.encode())


def _is(url: str, made_of: str) -> bool:
    """Whether the file is the export of this fingerprint."""
    head = storage.read_range(url, 0, HEAD_BYTES).decode("utf-8", "replace")
    try:
        info, _ = json.JSONDecoder().raw_decode(head, len(HEAD))
        return head.startswith(HEAD) and bool(info["ratecluster"] == made_of)
    except (ValueError, KeyError, TypeError, IndexError):
        return False
