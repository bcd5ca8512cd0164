"""Thumbnails of images in the input shards, read by byte range."""

import base64
import io
import logging
from concurrent.futures import ThreadPoolExecutor
from itertools import chain
from typing import NamedTuple

from PIL import Image

from pipeline.store import compressed
from pipeline.vision import images

log = logging.getLogger(__name__)
READERS = 8  # images read and decoded at once
QUALITY = 78  # of WebP thumbnails, 0 to 100


class Place(NamedTuple):
    """The byte range of an image in a shard."""

    url: str
    offset: int
    size: int


class Reader:
    """Reads thumbnails of at most `side` pixels in width and height; counts unreadable images."""

    def __init__(self, max_pixels: int, side: int, kind: str = "WEBP") -> None:
        self.max_pixels, self.side, self.kind = max_pixels, side, kind
        self.asked, self.missing = 0, 0
        self._gone: dict[str, str] = {}  # URL, or URL and offset -> why

    def images(self, places: list[Place]) -> list[bytes | None]:
        """Each as an image file; None where it cannot be read.

        Images are read in the order of the shards, those of a compressed shard in one pass. A shard
        that cannot be read is tried once.
        """
        order = sorted(set(places))
        passes: dict[str | Place, list[Place]] = {}
        for place in order:
            of_one = place.url if compressed.format_of(place.url) else place
            passes.setdefault(of_one, []).append(place)
        with ThreadPoolExecutor(READERS) as pool:
            loaded = chain.from_iterable(pool.map(self._load, passes.values()))
            found = dict(zip(chain.from_iterable(passes.values()), loaded, strict=True))
        self.asked += len(found)
        self.missing += sum(image is None for image in found.values())
        return [found[place] for place in places]

    def _load(self, places: list[Place]) -> list[bytes | None]:
        """The images at places of one shard."""
        url, found = places[0].url, list[bytes | None]()
        if url in self._gone:
            return [None] * len(places)
        try:
            for data in compressed.read_ranges(url, [(p.offset, p.size) for p in places]):
                found.append(self._thumbnail(data, places[len(found)]))
        except Exception as error:  # any error of a store; the page is useful without the image
            self._gone[url] = f"{type(error).__name__}: {error}"
        return found + [None] * (len(places) - len(found))

    def _thumbnail(self, data: bytes, place: Place) -> bytes | None:
        try:
            return thumbnail(data, self.max_pixels, self.side, self.kind)
        except images.BadImage as bad:
            self._gone[f"{place.url} at byte {place.offset}"] = bad.reason
            return None

    def warn_missing(self) -> int:
        """Log one warning if images could not be read; returns their number."""
        if self.missing:
            url, why = min(self._gone.items())
            log.warning(
                "%d of %d images cannot be read and are left blank; the first: %r, %r",
                *(self.missing, self.asked, url, why),
            )
        return self.missing


def thumbnails(
    places: list[Place], max_pixels: int, side: int, kind: str = "WEBP"
) -> list[str | None]:
    """Each thumbnail as a data: URI; None where the image cannot be read."""
    reader = Reader(max_pixels, side, kind)
    found = reader.images(places)
    reader.warn_missing()
    return [data_uri(f"image/{kind.lower()}", image) if image else None for image in found]


def thumbnail(data: bytes, max_pixels: int, side: int, kind: str = "WEBP") -> bytes:
    """The image as WEBP or JPEG of at most `side` pixels in width and height; raises BadImage."""
    image = images.decode(data, max_pixels)
    image.thumbnail((side, side), Image.Resampling.LANCZOS)
    return _file(image, kind)


def strip(found: list[bytes | None], tiles: int, side: int) -> bytes:
    """One WebP of images one below the other, each centred in a square tile."""
    whole = Image.new("RGBA", (side, side * tiles))
    for tile, data in enumerate(found):
        if data:
            image = Image.open(io.BytesIO(data))
            left, top = (side - image.width) // 2, (side - image.height) // 2
            whole.paste(image, (left, tile * side + top))
    return _file(whole, "WEBP")


def _file(image: Image.Image, kind: str) -> bytes:
    out = io.BytesIO()
    image.save(out, kind, quality=QUALITY, **({"method": 4} if kind == "WEBP" else {}))
    return out.getvalue()


def data_uri(kind: str, data: bytes) -> str:
    """The bytes as a data: URI."""
    return f"data:{kind};base64,{base64.b64encode(data).decode()}"
