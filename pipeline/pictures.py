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


def thumbnails(places: list[Place], max_pixels: int, side: int) -> list[str | None]:
    """Each picture made small, as a data: URI; None where it cannot be read any more.

    Read in the order in which they lie in the shards. A shard that cannot be read is tried once.
    """
    gone: dict[str, str] = {}  # URL, or URL and offset -> why

    def load(place: Place) -> str | None:
        if place.url in gone:
            return None
        try:
            return thumbnail(storage.read_range(*place), max_pixels, side)
        except images.BadImage as bad:
            gone[f"{place.url} at byte {place.offset}"] = bad.reason
        except Exception as error:  # stores raise anything, and a page without it is still a page
            gone[place.url] = f"{type(error).__name__}: {error}"
        return None

    order = sorted(set(places))
    with ThreadPoolExecutor(READERS) as pool:
        found = dict(zip(order, pool.map(load, order), strict=True))
    if missing := sum(uri is None for uri in found.values()):
        url, why = min(gone.items())
        log.warning(
            "%d of %d pictures cannot be read any more and are left blank; first: %r, %r",
            *(missing, len(found), url, why),
        )
    return [found[place] for place in places]


def thumbnail(data: bytes, max_pixels: int, side: int) -> str:
    """An image file as a WebP of at most `side` pixels each way; raises BadImage."""
    image = images.decode(data, max_pixels)
    image.thumbnail((side, side), Image.Resampling.LANCZOS)
    out = io.BytesIO()
    image.save(out, "WEBP", quality=QUALITY, method=4)
    return data_uri("image/webp", out.getvalue())


def data_uri(kind: str, data: bytes) -> str:
    """The bytes as a data: URI."""
    return f"data:{kind};base64,{base64.b64encode(data).decode()}"
