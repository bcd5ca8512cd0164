"""Stage 0, shards: packs a folder of images into shards of the format of img2dataset.

reads   FOLDER/class/.../*.jpg   images of IMAGE_SUFFIXES, a caption in a .txt of the same name
writes  {shard:05d}.tar          {key}.jpg (the unchanged bytes of the file), .txt, .json
        {shard:05d}.parquet      RECORD, the same facts as the json members
        {shard:05d}_stats.json   counts; written last: a shard that has it is complete
"""

import hashlib
import io
import json
import logging
import os
import random
import time
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
from PIL import Image

from pipeline.prepare.settings import Config
from pipeline.runtime import console, tasks
from pipeline.runtime.errors import UserError
from pipeline.store import storage
from pipeline.store.shards import IMAGE_SUFFIXES

log = logging.getLogger(__name__)
CIFAR = ("cifar10", "cifar100")  # once packed by this command
RECORD = pa.schema(
    [(name, pa.string()) for name in ("key", "caption", "sha256", "status")]
    + [("error_message", pa.null()), ("width", pa.int64()), ("height", pa.int64())]
    + [(name, pa.string()) for name in ("label", "source")]
)


Record = dict[str, Any]  # of RECORD, and more texts
Members = list[tuple[str, bytes]]  # suffix and data


@dataclass(frozen=True)
class Picture:
    """An image file to pack."""

    source: str  # its path below FOLDER
    label: str | None  # the class folder; None directly below FOLDER
    path: Path


@dataclass(frozen=True)
class ShardPlan:
    """The images of one shard, in their order."""

    number: int
    pictures: tuple[Picture, ...]

    @property
    def stem(self) -> str:
        return f"{self.number:05d}"


def folder_pictures(folder: str) -> tuple[list[Picture], int]:
    """The images below a folder, sorted by path, and the number of other files.

    Hidden files and linked folders are skipped. A linked file is packed if its target is inside
    the folder. Raises UserError where there is no image.
    """
    root = Path(folder).resolve()
    if not root.is_dir():
        if folder in CIFAR:
            raise UserError(
                f"--from {folder}: CIFAR is now packed in a clone of the repository, by "
                f"`python -m benchmarks.cifar --set {folder} --split train --out DIR`"
            )
        raise UserError(f"--from {folder}: no such folder; give a folder of images")
    found, left_out = [], 0
    for place, _, names in os.walk(root):
        images = [name for name in names if _is_image(name) and _inside(Path(place, name), root)]
        captions = {f"{Path(name).stem}.txt" for name in images}.intersection(names)
        found += [Path(place, name) for name in images]
        left_out += len(names) - len(images) - len(captions)
    if not found:
        kinds = ", ".join(IMAGE_SUFFIXES)
        raise UserError(f"--from {folder}: no images ({kinds}) among {left_out} files")
    return [_file_picture(path, root) for path in sorted(found)], left_out


def _is_image(name: str) -> bool:
    return not name.startswith(".") and Path(name).suffix[1:].lower() in IMAGE_SUFFIXES


def _inside(path: Path, root: Path) -> bool:
    return path.is_file() and path.resolve().is_relative_to(root)


def _file_picture(path: Path, root: Path) -> Picture:
    below = path.relative_to(root)
    parts = [os.fsencode(part).decode("utf-8", "backslashreplace") for part in below.parts]
    return Picture("/".join(parts), parts[0] if len(parts) > 1 else None, path)


def plan(pictures: Sequence[Picture], cfg: Config) -> list[ShardPlan]:
    """Shuffle the pictures by the seed, then cut them into shards; the same on every run."""
    order = list(pictures)
    random.Random(cfg.shuffle_seed).shuffle(order)
    cuts = range(0, len(order), cfg.samples_per_shard)
    parts = [tuple(order[cut : cut + cfg.samples_per_shard]) for cut in cuts]
    return [ShardPlan(number, part) for number, part in enumerate(parts)]


def pack_shard(shard: ShardPlan, out: str) -> int:
    """Write the three files of a shard of image files; returns the number of images."""
    return write_shard(
        f"{out}/{shard.stem}",
        (
            sample(
                f"{shard.stem}{place:04d}",
                picture.path.suffix[1:].lower(),
                picture.path.read_bytes(),
                caption=_caption(picture.path, picture.source),
                label=picture.label,
                source=picture.source,
            )
            for place, picture in enumerate(shard.pictures)
        ),
    )


def write_shard(base: str, samples: Iterable[tuple[Record, Members]]) -> int:
    """Write {base}.tar, {base}.parquet and, last, {base}_stats.json; returns the sample count.

    The bytes depend on the samples only. Members keep their order, so there is one call of the
    writer for each: it would sort those of one call.
    """
    from webdataset import TarWriter  # imports torch, so where it is needed

    records = []
    owner = {"user": "", "group": "", "mode": 0o644, "mtime": 0}
    with storage.commit(f"{base}.tar") as file, TarWriter(file, encoder=False, **owner) as tar:
        for record, members in samples:
            records.append(record)
            for suffix, data in members:
                tar.write({"__key__": record["key"], suffix: data})
    more = [(name, pa.string()) for name in records[0] if name not in RECORD.names]
    with storage.commit(f"{base}.parquet") as file:
        pq.write_table(pa.Table.from_pylist(records, pa.schema([*RECORD, *more])), file)
    count = len(records)
    stats = {"count": count, "successes": count, "failed_to_download": 0, "failed_to_resize": 0}
    storage.write_bytes(f"{base}_stats.json", json.dumps(stats).encode())
    return count


def sample(
    key: str, suffix: str, data: bytes, caption: str | None, **facts: str | None
) -> tuple[Record, Members]:
    """The record of an image, and its members: the image, .txt where it has a caption, .json."""
    width, height = dimensions(data)
    record = {
        "key": key,
        "caption": caption,
        "sha256": hashlib.sha256(data).hexdigest(),
        "status": "success",
        "error_message": None,
        "width": width,
        "height": height,
        **facts,
    }
    text = [("txt", caption.encode())] if caption is not None else []
    return record, [(suffix, data), *text, ("json", json.dumps(record).encode())]


def _caption(image: Path, source: str) -> str | None:
    """The text of the image's .txt file; None where there is none or it is empty."""
    path = image.with_suffix(".txt")
    root = image.parents[source.count("/")]
    if not _inside(path, root):
        return None
    return path.read_bytes().decode("utf-8", "replace").replace("\0", "").strip() or None


def dimensions(data: bytes) -> tuple[int | None, int | None]:
    """Width and height from the header of an image; None twice if it cannot be read."""
    try:
        with Image.open(io.BytesIO(data)) as image:
            return image.size
    except MemoryError:
        raise
    except Exception:  # what Pillow raises for a broken header depends on the format
        return None, None


def complete(shards: Sequence[ShardPlan], out: str) -> set[str]:
    """Stems of the shards that are already there; UserError if `out` has other shards."""
    names = storage.Folder(out).names()
    stems = {shard.stem for shard in shards}
    others = sorted(n for n in names if n.endswith(".tar") and n[:-4] not in stems)
    done = [s for s in shards if {f"{s.stem}.tar", f"{s.stem}_stats.json"} <= names]
    others += [f"{s.stem}.tar" for s in done if _sources(s, out) != [p.source for p in s.pictures]]
    if others:
        raise UserError(
            f"--out {out} has {len(others)} shards of other images or settings ({others[0]}); "
            "choose an empty folder"
        )
    return {shard.stem for shard in done}


def _sources(shard: ShardPlan, out: str) -> list[str] | None:
    """The sources of the images in a shard; None where this command did not write it."""
    try:
        data = storage.read_bytes(f"{out}/{shard.stem}.parquet")
        return pq.read_table(io.BytesIO(data), columns=["source"])["source"].to_pylist()
    except (FileNotFoundError, pa.ArrowInvalid, KeyError):
        return None


def run(cfg: Config, source: str, out: str) -> dict[str, int]:
    """Pack the folder `source` into shards below `out`, one Ray task for each shard."""
    started = time.perf_counter()
    out = storage.absolute(out)
    pictures, left_out = folder_pictures(source)
    shards = plan(pictures, cfg)
    there = complete(shards, out)
    missing = [shard for shard in shards if shard.stem not in there]
    log.info("shards: %d images of %s, %d other files left out", len(pictures), source, left_out)
    packed = sum(tasks.results(pack_shard, missing, out))
    seconds = time.perf_counter() - started
    console.log_finished(log, "shards", seconds, f"{len(missing):,} of {len(shards):,} made", out)
    counts = {"shards": len(shards), "shards_made": len(missing), "samples": len(pictures)}
    return {**counts, "samples_packed": packed, "files_left_out": left_out}
