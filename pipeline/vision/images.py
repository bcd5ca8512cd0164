"""Decodes the bytes of an image file to an upright RGB image, or raises `BadImage`.

The first bytes, not the name, decide between the formats. HEIC and JPEG XL need the packages
pillow-heif and pillow-jxl-plugin (`pip install "ratecluster[heic]"`).

PIL's file classes are called directly, not through `Image.open`, whose limit against decompression
bombs is a global that is not safe to change while other threads decode. The limit here is
`max_pixels`, checked after the header and before any pixel. (PIL also rejects a WebP, a TIFF tile
or a GIF frame above 179 million pixels.) All threads of a process together decode no more than
DECODE_BYTES at once.
"""

import io
import threading
from collections import deque
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from importlib import import_module

import numpy as np
from PIL import ExifTags, Image
from PIL.AvifImagePlugin import AvifImageFile
from PIL.BmpImagePlugin import BmpImageFile
from PIL.GifImagePlugin import GifImageFile
from PIL.ImageFile import ImageFile
from PIL.Jpeg2KImagePlugin import Jpeg2KImageFile
from PIL.JpegImagePlugin import JpegImageFile
from PIL.PngImagePlugin import PngImageFile
from PIL.TiffImagePlugin import TiffImageFile
from PIL.WebPImagePlugin import WebPImageFile

from pipeline.runtime.reject_reasons import Reason

# Encoders resize the short side to a fixed length: an image of 1 × 60,000 pixels would become
# gigabytes.
MAX_ASPECT = 100

DECODE_BYTES = 1 << 30  # of a process at once
WAIT_S = 60.0  # for memory that other threads hold
PIXEL_BYTES = 16  # at most, while a pixel is decoded and becomes RGB
Waiting = Callable[[], AbstractContextManager[None]]

_TIFF_MAGICS = (b"II*\0", b"MM\0*", b"MM*\0", b"II\0*", b"MM\0+", b"II+\0")

_JPEG_2000_MAGICS = (b"\0\0\0\x0cjP  \r\n\x87\n", b"\xff\x4f\xff\x51")
_JPEG_XL_MAGICS = (b"\0\0\0\x0cJXL \r\n\x87\n", b"\xff\x0a")
_HEIC_BRANDS = (b"heic", b"heix", b"hevc", b"hevx", b"heim", b"heis", b"mif1", b"msf1")
GREY_WHITES = (255, 1023, 4095, 16383, 65535)  # of 8, 10, 12, 14 and 16 bits

_UPRIGHT = {  # EXIF orientation → what undoes it; 1 is upright already
    2: Image.Transpose.FLIP_LEFT_RIGHT,
    3: Image.Transpose.ROTATE_180,
    4: Image.Transpose.FLIP_TOP_BOTTOM,
    5: Image.Transpose.TRANSPOSE,
    6: Image.Transpose.ROTATE_270,
    7: Image.Transpose.TRANSVERSE,
    8: Image.Transpose.ROTATE_90,
}


class BadImage(Exception):  # noqa: N818 - a property of a sample, no program error
    """An image that cannot be used; `reason` is one line that begins with the code."""

    def __init__(self, code: Reason, detail: str = "") -> None:
        self.reason = code.because(detail)
        super().__init__(self.reason)


class _Bytes(io.BytesIO):
    """The bytes of an image; reading raises once the decoding has timed out."""

    def __init__(self, data: bytes, timed_out: Callable[[], bool]) -> None:
        super().__init__(data)
        self._timed_out = timed_out

    def read(self, size: int | None = -1, /) -> bytes:
        if self._timed_out():
            raise BadImage(Reason.DECODE_TIMEOUT)
        return super().read(size)


def decode(
    data: bytes,
    max_pixels: int,
    timed_out: Callable[[], bool] = lambda: False,
    waiting: Waiting = nullcontext,
) -> Image.Image:
    """The first frame of an image file of the formats of `format_class`, upright, in mode RGB.

    Transparent pixels become white, 16 bits become 8 (`_to_eight_bits`). Raises only `BadImage`,
    whatever the bytes, and MemoryError. Thread-safe. Once `timed_out`, it ends at PIL's next read
    of 64 KB. `waiting` is entered while it waits for memory that other threads use.
    """
    try:
        return _decode(_Bytes(data, timed_out), max_pixels, waiting)
    except (BadImage, MemoryError):  # too little memory is no fault of the image
        raise
    except (Image.DecompressionBombError, Image.DecompressionBombWarning) as error:
        raise BadImage(Reason.TOO_LARGE, _one_line(error)) from error
    except Exception as error:  # PIL's errors have no common base class
        code = Reason.TRUNCATED if _is_truncation(error) else Reason.CORRUPT
        raise BadImage(code, f"{type(error).__name__}: {_one_line(error)}") from error


class Memory:
    """A number of bytes that threads share; they get them in the order in which they ask."""

    def __init__(self, size: int) -> None:
        self.size = self.free = size
        self._queue: deque[object] = deque()  # threads that wait
        self._changed = threading.Condition()

    @contextmanager
    def held(self, size: int, waiting: Waiting) -> Iterator[None]:
        """Hold `size` bytes, or all where that is more; `waiting` is entered until they are free.

        After WAIT_S it goes on without: a thread that hangs in a decoder gives nothing back.
        """
        size = min(size, self.size)
        with self._changed:
            if self._queue or self.free < size:
                with waiting():
                    self._wait(size)
            self.free -= size
        try:
            yield
        finally:
            with self._changed:
                self.free += size
                if self._queue:
                    self._changed.notify_all()

    def _wait(self, size: int) -> None:
        """Wait until all that asked before have had their turn, and `size` bytes are free."""
        me = object()
        self._queue.append(me)
        self._changed.wait_for(lambda: self._queue[0] is me and self.free >= size, WAIT_S)
        self._queue.remove(me)
        self._changed.notify_all()


MEMORY = Memory(DECODE_BYTES)


def _decode(file: io.BytesIO, max_pixels: int, waiting: Waiting) -> Image.Image:
    data = file.getvalue()
    if not data:
        raise BadImage(Reason.EMPTY)
    reader = format_class(data)
    if reader is None:
        raise BadImage(Reason.NOT_AN_IMAGE)
    with reader(file) as image:
        _check_size(image.size, max_pixels)
        with MEMORY.held(image.width * image.height * PIXEL_BYTES, waiting):
            image.load()
            _check_size(image.size, max_pixels)  # a TIFF is turned upright, a GIF may grow
            return _to_rgb(_upright(image))


def format_class(data: bytes) -> type[ImageFile] | None:
    """PIL's class for the format of the first bytes; None for other formats."""
    if data.startswith(b"\xff\xd8\xff"):
        return JpegImageFile
    if data.startswith(b"\x89PNG\r\n\x1a\n"):
        return PngImageFile
    if data[:4] == b"RIFF" and data[8:12] == b"WEBP":
        return WebPImageFile
    if data.startswith((b"GIF87a", b"GIF89a")):
        return GifImageFile
    if data.startswith(b"BM"):
        return BmpImageFile
    if data.startswith(_TIFF_MAGICS):
        return TiffImageFile
    if data[4:8] == b"ftyp" and data[8:12] in (b"avif", b"avis"):
        return AvifImageFile
    if data.startswith(_JPEG_2000_MAGICS):
        return Jpeg2KImageFile
    return _of_a_plugin(data)


def _of_a_plugin(data: bytes) -> type[ImageFile] | None:
    """The class of a package for HEIC or JPEG XL; None for other formats."""
    if data[4:8] == b"ftyp" and data[8:12] in _HEIC_BRANDS:
        name, module, kind = "pillow-heif", "pillow_heif.as_plugin", "HeifImageFile"
    elif data.startswith(_JPEG_XL_MAGICS):
        name, module, kind = "pillow-jxl-plugin", "pillow_jxl.JpegXLImagePlugin", "JXLImageFile"
    else:
        return None
    try:
        found: type[ImageFile] = getattr(import_module(module), kind)
    except ImportError:
        raise BadImage(Reason.NOT_AN_IMAGE, f"it needs the package {name}") from None
    return found


def _check_size(size: tuple[int, int], max_pixels: int) -> None:
    width, height = size
    if width <= 0 or height <= 0:
        raise BadImage(Reason.CORRUPT, f"{width}x{height} pixels")
    if width * height > max_pixels:
        raise BadImage(Reason.TOO_LARGE, f"{width}x{height} pixels")
    if max(width, height) > MAX_ASPECT * min(width, height):
        raise BadImage(Reason.TOO_ELONGATED, f"{width}x{height} pixels")


def _upright(image: Image.Image) -> Image.Image:
    """The image turned by its EXIF orientation; unchanged where that cannot be read.

    Not `ImageOps.exif_transpose`, which rewrites the EXIF and fails on other broken tags.
    """
    try:
        method = _UPRIGHT.get(image.getexif().get(ExifTags.Base.Orientation, 1))
    except Exception:  # broken EXIF; the pixels are usable
        return image
    return image if method is None else image.transpose(method)


def _to_rgb(image: Image.Image) -> Image.Image:
    if image.mode == "F" or image.mode.startswith("I"):
        return _to_eight_bits(np.asarray(image)).convert("RGB")
    if not image.has_transparency_data:
        return image.convert("RGB")
    if image.mode == "La":  # premultiplied grey has no direct way to RGBA
        image = image.convert("LA")
    rgba = image if image.mode == "RGBA" else image.convert("RGBA")
    canvas = Image.new("RGBA", rgba.size, "white")
    canvas.alpha_composite(rgba)
    return canvas.convert("RGB")


def _to_eight_bits(values: np.ndarray) -> Image.Image:
    """Grey values (h, w) of 16 or 32 bits or floats → mode L.

    White is the least of GREY_WHITES that no value exceeds: cameras and scanners store 10 to 14
    bits as they are in 16, which would be nearly black. Of floats, it is the least of 1, 255 and
    65,535, else the largest value. Negative and non-finite values are black.
    """
    whites = (1.0, 255.0, 65535.0) if values.dtype.kind == "f" else GREY_WHITES
    grey = np.where(np.isfinite(values), values, 0).astype(np.float32)  # in place from here on
    top = float(np.clip(grey, 0, None, out=grey).max())
    white = next((w for w in whites if top <= w), top)
    grey *= 255 / white
    return Image.fromarray(np.rint(grey, out=grey).astype(np.uint8))


def _is_truncation(error: Exception) -> bool:
    words = ("truncated", "unexpected end", "not enough image data")
    return isinstance(error, EOFError) or any(word in str(error).lower() for word in words)


def _one_line(error: Exception) -> str:
    return " ".join(str(error).split())[:200]
