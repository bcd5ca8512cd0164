"""Pictures out of input shards, made small: by where their bytes lie, never by a tar's names."""

import base64
import io
import logging
from concurrent.futures import ThreadPoolExecutor
from typing import NamedTuple

from PIL import Image

from pipeline.store import storage
from pipeline.vision import images

log = logging.getLogger(__name__)
READERS = 8  # pictures read and decoded at once
QUALITY = 78  # of WebP thumbnails, 0 to 100


class Place(NamedTuple):
    """Where the bytes of a picture lie."""

    url: str
    offset: int
    size: int


class Reader:
    """Pictures made small, at most `side` pixels each way, and how many could not be read."""

    def __init__(self, max_pixels: int, side: int, kind: str = "WEBP") -> None:
        self.max_pixels, self.side, self.kind = max_pixels, side, kind
        self.asked, self.missing = 0, 0
        self._gone: dict[str, str] = {}  # URL, or URL and offset -> why

    def images(self, places: list[Place]) -> list[bytes | None]:
        """Each as an image file; None where it cannot be read any more.

        Read in the order in which they lie in the shards. A shard that cannot be read is tried
        once.
        """
        order = sorted(set(places))
        with ThreadPoolExecutor(READERS) as pool:
            found = dict(zip(order, pool.map(self._load, order), strict=True))
        self.asked += len(found)
        self.missing += sum(image is None for image in found.values())
        return [found[place] for place in places]

    def _load(self, place: Place) -> bytes | None:
        if place.url in self._gone:
            return None
        try:
            return thumbnail(storage.read_range(*place), self.max_pixels, self.side, self.kind)
        except images.BadImage as bad:
            self._gone[f"{place.url} at byte {place.offset}"] = bad.reason
        except Exception as error:  # stores raise anything, and a page without it is still a page
            self._gone[place.url] = f"{type(error).__name__}: {error}"
        return None

    def warn_missing(self) -> int:
        """How many could not be read: in one warning, if any."""
        if self.missing:
            url, why = min(self._gone.items())
            log.warning(
                "%d of %d pictures cannot be read any more and are left blank; first: %r, %r",
                *(self.missing, self.asked, url, why),
            )
        return self.missing


def thumbnails(
    places: list[Place], max_pixels: int, side: int, kind: str = "WEBP"
) -> list[str | None]:
    """Each picture made small, as a data: URI; None where it cannot be read any more."""
    reader = Reader(max_pixels, side, kind)
    found = reader.images(places)
    reader.warn_missing()
    return [data_uri(f"image/{kind.lower()}", image) if image else None for image in found]


def thumbnail(data: bytes, max_pixels: int, side: int, kind: str = "WEBP") -> bytes:
    """An image file as a WEBP or JPEG of at most `side` pixels each way; raises BadImage."""
    image = images.decode(data, max_pixels)
    image.thumbnail((side, side), Image.Resampling.LANCZOS)
    return _file(image, kind)


def strip(found: list[bytes | None], tiles: int, side: int) -> bytes:
    """Pictures one below the other, each in the middle of a square tile, as one WebP."""
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
