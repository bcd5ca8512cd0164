"""Command shards: a folder of images, packed as img2dataset would have packed it.

reads   FOLDER/.../class/*.jpg   images of IMAGE_SUFFIXES, a caption in a .txt of the same name
writes  {shard:05d}.tar          {key}.jpg (the file's own bytes), .txt, .json
        {shard:05d}.parquet      RECORD, the same facts as the json members
        {shard:05d}_stats.json   counts; written last, so a shard that has it is done

Core: `plan`, `pack_shard` (no Ray). Shell: `run`.
"""

import hashlib
import io
import json
import logging
import os
import random
import time
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import webdataset as wds
from PIL import Image

from pipeline.prepare.settings import Config
from pipeline.runtime import console, tasks
from pipeline.runtime.errors import UserError
from pipeline.store import storage
from pipeline.store.samples import IMAGE_SUFFIXES, decoded

log = logging.getLogger(__name__)
CACHES = {"@eaDir", "#recycle", "#snapshot", "__MACOSX", "thumbnails", "Thumbnails", "lost+found"}
LISTED = 10  # suffixes in a message
RECORD = pa.schema(
    [(name, pa.string()) for name in ("key", "caption", "sha256", "status")]
    + [("error_message", pa.null()), ("width", pa.int64()), ("height", pa.int64())]
    + [(name, pa.string()) for name in ("label", "source")]
)


@dataclass(frozen=True)
class Picture:
    """One image to be packed."""

    source: str  # its path below FOLDER
    label: str | None  # the folder of the file; None directly below FOLDER
    path: Path


@dataclass(frozen=True)
class ShardPlan:
    """The pictures of one shard, in order."""

    number: int
    pictures: tuple[Picture, ...]

    @property
    def stem(self) -> str:
        return f"{self.number:05d}"


def folder_pictures(folder: str) -> tuple[list[Picture], Counter[str]]:
    """The images below a folder, sorted by path, and the numbers of other files by suffix.

    Links to folders are not followed. Links to files are followed if their target is inside the
    folder. Hidden files, hidden folders and those of CACHES are left out. Raises UserError without
    a folder or images.
    """
    root = Path(folder).resolve()
    if not root.is_dir():
        raise UserError(f"--from {folder}: no such folder; name a folder of images")
    found: list[Path] = []
    left_out: Counter[str] = Counter()  # by suffix
    for place, folders, names in os.walk(root):
        hidden = [name for name in folders if name.startswith(".") or name in CACHES]
        folders[:] = [name for name in folders if name not in hidden]
        left_out.update(f"{name}/" for name in hidden)
        images = [name for name in names if _is_image(name) and _inside(Path(place, name), root)]
        stems = {Path(name).stem for name in images}
        captions = {n for n in names if Path(n).suffix.lower() == ".txt" and Path(n).stem in stems}
        found += [Path(place, name) for name in images]
        others = [n for n in names if n not in captions and n not in set(images)]
        left_out.update(Path(name).suffix.lower() or "no suffix" for name in others)
    if not found:
        kinds = ", ".join(IMAGE_SUFFIXES)
        raise UserError(
            f"--from {folder}: no images ({kinds}) among {left_out.total()} files"
            + (f": {_counted(left_out)}" if left_out else "")
        )
    return [_file_picture(path, root) for path in sorted(found)], left_out


def _counted(left_out: Counter[str]) -> str:
    """Numbers of files by suffix, the most frequent first."""
    return ", ".join(f"{count:,} {suffix}" for suffix, count in left_out.most_common(LISTED))


def _is_image(name: str) -> bool:
    return not name.startswith(".") and Path(name).suffix[1:].lower() in IMAGE_SUFFIXES


def _inside(path: Path, root: Path) -> bool:
    return path.is_file() and path.resolve().is_relative_to(root)


def _file_picture(path: Path, root: Path) -> Picture:
    below = path.relative_to(root)
    parts = [os.fsencode(part).decode("utf-8", "backslashreplace") for part in below.parts]
    return Picture("/".join(parts), parts[-2] if len(parts) > 1 else None, path)


def plan(pictures: Sequence[Picture], cfg: Config) -> list[ShardPlan]:
    """Shuffle the images by the seed and cut them into shards; the same on every run."""
    order = list(pictures)
    random.Random(cfg.shuffle_seed).shuffle(order)
    cuts = range(0, len(order), cfg.samples_per_shard)
    parts = [tuple(order[cut : cut + cfg.samples_per_shard]) for cut in cuts]
    return [ShardPlan(number, part) for number, part in enumerate(parts)]


def pack_shard(shard: ShardPlan, out: str) -> int:
    """Write the three files of a shard, the stats last; returns the number of images."""
    records = []
    with (
        storage.commit(f"{out}/{shard.stem}.tar") as file,
        wds.TarWriter(file, encoder=False, mtime=0, user="", group="", mode=0o644) as writer,
    ):
        for place, picture in enumerate(shard.pictures):
            record, members = sample(picture, f"{shard.stem}{place:04d}")
            records.append(record)
            for suffix, data in members.items():  # one by one: TarWriter sorts those of a call
                writer.write({"__key__": record["key"], suffix: data})
    with storage.commit(f"{out}/{shard.stem}.parquet") as file:
        pq.write_table(pa.Table.from_pylist(records, RECORD), file)
    count = len(records)
    stats = {"count": count, "successes": count, "failed_to_download": 0, "failed_to_resize": 0}
    storage.write_bytes(f"{out}/{shard.stem}_stats.json", json.dumps(stats).encode())
    return count


def sample(picture: Picture, key: str) -> tuple[dict[str, Any], dict[str, bytes]]:
    """The record of an image, and its members by suffix."""
    data, caption = picture.path.read_bytes(), _caption(picture.path, picture.source)
    width, height = dimensions(data)
    record = {
        "key": key,
        "caption": caption,
        "sha256": hashlib.sha256(data).hexdigest(),
        "status": "success",
        "error_message": None,
        "width": width,
        "height": height,
        "label": picture.label,
        "source": picture.source,
    }
    text = {"txt": caption.encode()} if caption is not None else {}
    suffix = picture.path.suffix[1:].lower()
    return record, {suffix: data, **text, "json": json.dumps(record).encode()}


def _caption(image: Path, source: str) -> str | None:
    """The text of the .txt next to an image; None where it is absent or empty."""
    root = image.parents[source.count("/")]
    for suffix in (".txt", ".TXT", ".Txt"):
        if _inside(path := image.with_suffix(suffix), root):
            return decoded(path.read_bytes(), "replace").replace("\0", "").strip() or None
    return None


def dimensions(data: bytes) -> tuple[int | None, int | None]:
    """Width and height from the header of an image; None twice if it cannot be read."""
    try:
        with Image.open(io.BytesIO(data)) as image:
            return image.size
    except MemoryError:
        raise
    except Exception:  # Pillow's error for a broken header depends on the format
        return None, None


def find_done(shards: Sequence[ShardPlan], out: str) -> set[str]:
    """Stems of the finished shards in `out`; UserError if it has others."""
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
    """Sources of the images in a shard; None if this command did not write it."""
    try:
        data = storage.read_bytes(f"{out}/{shard.stem}.parquet")
        return pq.read_table(io.BytesIO(data), columns=["source"])["source"].to_pylist()
    except (FileNotFoundError, pa.ArrowInvalid, KeyError):
        return None


def run(cfg: Config, source: str, out: str) -> dict[str, int]:
    """Pack a folder of images into shards below `out`, one Ray task for each shard."""
    started = time.perf_counter()
    out = storage.absolute(out)
    pictures, left_out = folder_pictures(source)
    shards = plan(pictures, cfg)
    there = find_done(shards, out)
    missing = [shard for shard in shards if shard.stem not in there]
    others = f", left out: {_counted(left_out)}" if left_out else ""
    log.info("shards: %d images of %s%s", len(pictures), source, others)
    packed = sum(tasks.results(pack_shard, missing, out))
    seconds = time.perf_counter() - started
    console.log_finished(log, "shards", seconds, f"{len(missing):,} of {len(shards):,} made", out)
    counts = {"shards": len(shards), "shards_made": len(missing), "samples": len(pictures)}
    return {**counts, "samples_packed": packed, "files_left_out": left_out.total()}
