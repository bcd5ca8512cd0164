"""What every contender is given: the same shards, the same weights in a file."""

import io
from collections.abc import Iterator
from dataclasses import dataclass
from itertools import islice
from pathlib import Path

import numpy as np
import open_clip
import torch
from PIL import Image
from safetensors.torch import save_file

import pipeline
from pipeline.store import storage
from pipeline.store.listing import list_shards
from pipeline.store.shard_writer import ShardWriter
from pipeline.store.shards import ShardReader
from pipeline.vision import images

MAX_PIXELS = 2**28
SIDES = (128, 512)  # pixels, of a photo
TILES = (40, 120)  # pixels, of the pictures it is tiled with
QUALITY = (85, 92)  # of its JPEG
SOURCES = 500  # pictures to tile with
SHARDS = 4  # at least as many as threads that decode: some peers read a shard in one worker
FEW = 16  # images of the shards by which a contender's start is timed

PICO = Path(pipeline.__file__).parent / "vision" / "assets" / "pico-clip"


@dataclass(frozen=True)
class Model:
    """An open_clip architecture and the file of its weights."""

    name: str
    weights: Path
    config: Path | None = None  # of an architecture that open_clip does not know


def vit(folder: Path) -> Model:
    """ViT-B-32 with random weights, the same each time."""
    path = folder / "ViT-B-32.safetensors"
    if not path.exists():
        torch.manual_seed(0)
        save_file(open_clip.create_model("ViT-B-32").state_dict(), path)
    return Model("ViT-B-32", path)


def pico() -> Model:
    """The bundled model."""
    return Model("pico-clip", PICO / "open_clip_model.safetensors", PICO / "pico-clip.json")


def photos(folder: Path, source: str, count: int) -> Path:
    """Shards of JPEGs of random sizes, each tiled with resized pictures of `source`."""
    if folder.exists():
        return folder
    draw = np.random.default_rng(0)
    pictures = [images.decode(data, MAX_PIXELS) for _, data in islice(_images(source), SOURCES)]
    return _write(folder, ((f"{k:09}.jpg", _photo(pictures, draw)) for k in range(count)), count)


def first(folder: Path, source: Path, count: int) -> Path:
    """Shards of the first images of `source`."""
    return folder if folder.exists() else _write(folder, _images(str(source)), count)


def count(shards: Path) -> int:
    """Samples of the shards."""
    return sum(1 for _ in _images(str(shards)))


def suffix(shards: Path) -> str:
    """Of the images, without the dot."""
    return next(_images(str(shards)))[0].rpartition(".")[2]


def _images(source: str) -> Iterator[tuple[str, bytes]]:
    for shard in list_shards(source):
        with storage.open_read(shard.url) as stream:
            for sample in ShardReader(stream, None):
                yield sample.image().name, sample.image().data


def _write(folder: Path, members: Iterator[tuple[str, bytes]], count: int) -> Path:
    """The first `count` of the members, in SHARDS shards."""
    folder.mkdir(parents=True)
    for number in range(SHARDS):
        with (folder / f"{number:05}.tar").open("wb") as stream, ShardWriter(stream) as writer:
            for name, data in islice(members, count // SHARDS):
                writer.add(name, data)
    return folder


def _photo(pictures: list[Image.Image], draw: np.random.Generator) -> bytes:
    """A JPEG with about as many bytes per pixel as a camera's."""
    width, height = (int(side) for side in draw.integers(*SIDES, 2, endpoint=True))
    tile = int(draw.integers(*TILES, endpoint=True))
    canvas = Image.new("RGB", (width, height))
    for x in range(0, width, tile):
        for y in range(0, height, tile):
            picture = pictures[draw.integers(len(pictures))]
            canvas.paste(picture.resize((tile, tile), Image.Resampling.BICUBIC), (x, y))
    file = io.BytesIO()
    canvas.save(file, "JPEG", quality=int(draw.integers(*QUALITY, endpoint=True)))
    return file.getvalue()
