"""Bytes → RGB: every format and mode, orientation, depth; and nothing but BadImage for the rest."""

import importlib
import io
import random
import struct
import sys
import threading
import warnings
import zlib
from contextlib import contextmanager, nullcontext, suppress

import numpy as np
import pytest
from PIL import Image

from pipeline.vision import images

LIMIT = 1_000_000
FORMATS = ("JPEG", "PNG", "WEBP", "GIF", "BMP", "TIFF")


def picture(width: int = 40, height: int = 24) -> Image.Image:
    """A smooth RGB picture without symmetry."""
    y, x = np.mgrid[0:height, 0:width]
    rgb = np.stack([x * 255 // width, y * 255 // height, (x + y) * 255 // (width + height)], -1)
    return Image.fromarray(rgb.astype(np.uint8))


def saved(image: Image.Image, fmt: str, **options) -> bytes:
    file = io.BytesIO()
    image.save(file, fmt, **options)
    return file.getvalue()


def decoded(data: bytes) -> np.ndarray:
    image = images.decode(data, LIMIT)
    assert image.mode == "RGB"
    return np.asarray(image)


def reason(data: bytes, max_pixels: int = LIMIT) -> str:
    with pytest.raises(images.BadImage) as caught:
        images.decode(data, max_pixels)
    assert "\n" not in caught.value.reason
    return caught.value.reason


def png(width: int, height: int, bits: int, color: int, rows: bytes) -> bytes:
    """A PNG made by hand: what it declares need not be what it holds."""

    def chunk(name: bytes, body: bytes) -> bytes:
        return (
            struct.pack(">I", len(body)) + name + body + struct.pack(">I", zlib.crc32(name + body))
        )

    header = struct.pack(">IIBBBBB", width, height, bits, color, 0, 0, 0)
    parts = chunk(b"IHDR", header) + chunk(b"IDAT", zlib.compress(rows)) + chunk(b"IEND", b"")
    return b"\x89PNG\r\n\x1a\n" + parts


@pytest.mark.parametrize("fmt", FORMATS)
def test_every_format_as_pil_itself_reads_it(fmt):
    data = saved(picture(), fmt)
    expected = Image.open(io.BytesIO(data)).convert("RGB")
    assert np.array_equal(decoded(data), np.asarray(expected))


@pytest.mark.parametrize("options", [{"quality": 30}, {"progressive": True}, {"subsampling": 0}])
def test_jpeg_is_byte_identical_to_what_open_clip_sees(options):
    data = saved(picture(), "JPEG", **options)
    assert images.decode(data, LIMIT).tobytes() == Image.open(io.BytesIO(data)).tobytes()


@pytest.mark.parametrize("fmt", ["PNG", "TIFF"])
@pytest.mark.parametrize("mode", ["1", "L", "LA", "P", "RGB", "RGBA"])
def test_modes_without_transparent_pixels(fmt, mode):
    image = picture().convert(mode)
    assert np.array_equal(decoded(saved(image, fmt)), np.asarray(image.convert("RGB")))


@pytest.mark.parametrize("mode", ["CMYK", "L"])
def test_jpeg_modes(mode):
    data = saved(picture().convert(mode), "JPEG", quality=95)
    assert np.array_equal(decoded(data), np.asarray(Image.open(io.BytesIO(data)).convert("RGB")))
    assert np.abs(decoded(data).mean() - np.asarray(picture()).mean()) < 40  # and not inverted


@pytest.mark.parametrize("mode", ["CMYK", "LAB"])
def test_tiff_colour_spaces(mode):
    image = picture().convert("RGB")
    image = Image.merge(mode, image.split()) if mode == "LAB" else image.convert(mode)
    assert decoded(saved(image, "TIFF")).shape == (24, 40, 3)


@pytest.mark.parametrize("fmt", ["PNG", "WEBP", "TIFF"])
def test_transparent_becomes_white(fmt):
    image = picture().convert("RGBA")
    image.putalpha(Image.linear_gradient("L").resize(image.size))
    options = {"lossless": True, "exact": True} if fmt == "WEBP" else {}
    alpha = np.asarray(image)[..., 3:].astype(float) / 255
    expected = np.asarray(picture()) * alpha + 255 * (1 - alpha)
    assert np.abs(decoded(saved(image, fmt, **options)) - expected).max() <= 1


def test_transparent_grey_palette_and_colour_key_become_white():
    grey = Image.new("LA", (8, 8), (10, 0))
    assert (decoded(saved(grey, "PNG")) == 255).all()
    palette = Image.new("P", (8, 8), 1)
    palette.putpalette([0, 0, 0, 200, 10, 10])
    assert (decoded(saved(palette, "PNG", transparency=1)) == 255).all()
    assert (decoded(saved(palette, "GIF", transparency=1)) == 255).all()
    assert (decoded(saved(palette, "PNG", transparency=b"\xff\xff")) == (200, 10, 10)).all()
    key = Image.new("RGB", (8, 8), (1, 2, 3))
    assert (decoded(saved(key, "PNG", transparency=(1, 2, 3))) == 255).all()


@pytest.mark.parametrize("mode", ["La", "RGBa", "PA"])
def test_rare_alpha_modes_are_composited(mode):
    assert images._to_rgb(Image.new(mode, (4, 4))).getpixel((0, 0)) == (255, 255, 255)


def test_sixteen_bit_grey_is_scaled_not_clipped():
    values = np.array([[0, 128, 257, 32768, 65535]], np.uint16)
    expected = np.array([0, 0, 1, 128, 255])
    by_hand = png(5, 1, 16, 0, b"\0" + values.astype(">u2").tobytes())
    for data in (by_hand, saved(Image.fromarray(values), "TIFF")):
        assert np.array_equal(decoded(data)[0, :, 0], expected)


@pytest.mark.parametrize("bits", [8, 10, 12, 14, 16])
def test_greys_of_fewer_bits_are_as_bright_as_those_of_eight(bits):
    shades = np.linspace(0, 2**bits - 1, 64).astype(np.uint16)[None]
    decoded = images.decode(png(64, 1, 16, 0, b"\0" + shades.astype(">u2").tobytes()), 1000)
    grey = np.asarray(decoded)[0, :, 0].astype(int)
    assert np.abs(grey - np.linspace(0, 255, 64)).max() <= 1.1


@pytest.mark.parametrize(
    ("kind", "plugin"),
    [
        ("AVIF", None),
        ("JPEG2000", None),
        ("HEIF", "pillow_heif.as_plugin"),
        ("JXL", "pillow_jxl.JpegXLImagePlugin"),
    ],
)
def test_newer_formats_and_those_of_plugins(kind, plugin, monkeypatch):
    if plugin:
        module = importlib.import_module(plugin)
        if kind == "HEIF":
            importlib.import_module("pillow_heif").register_heif_opener()
    picture = Image.radial_gradient("L").resize((64, 48)).convert("RGB")
    buffer = io.BytesIO()
    picture.save(buffer, kind, quality=95) if kind != "JPEG2000" else picture.save(buffer, kind)
    data = buffer.getvalue()
    decoded = images.decode(data, 64 * 48)
    assert decoded.size == (64, 48) and decoded.mode == "RGB"
    assert np.abs(np.asarray(decoded).astype(int) - np.asarray(picture)).mean() < 4
    with pytest.raises(images.BadImage, match="too_large"):
        images.decode(data, 64 * 48 - 1)
    for cut in range(0, len(data), 37):
        with suppress(images.BadImage):
            assert images.decode(data[:cut], 10_000).size == (64, 48)
    if plugin:
        monkeypatch.setitem(sys.modules, plugin, None)  # as where the package is not installed
        with pytest.raises(images.BadImage, match="not_an_image: it needs the package pillow-"):
            images.decode(data, 64 * 48)
        assert module


def test_wide_integers_and_floats():
    floats = [([0, 0.5, 1], [0, 128, 255]), ([0, 100, 255], [0, 100, 255])]
    floats += [([0, 257, 65535], [0, 1, 255]), ([-5, np.nan, 1e9], [0, 0, 255])]
    for values, expected in floats:
        image = Image.fromarray(np.array([values], np.float32))
        assert decoded(saved(image, "TIFF"))[0, :, 1].tolist() == expected
    wide = Image.fromarray(np.array([[0, 65535, 131070]], np.int32))
    assert decoded(saved(wide, "TIFF"))[0, :, 2].tolist() == [0, 128, 255]


@pytest.mark.parametrize("fmt", ["JPEG", "PNG", "WEBP", "TIFF"])
@pytest.mark.parametrize("orientation", range(1, 9))
def test_exif_orientation(fmt, orientation):
    upright = np.asarray(picture())
    stored = {
        1: upright,
        2: upright[:, ::-1],
        3: upright[::-1, ::-1],
        4: upright[::-1],
        5: upright.transpose(1, 0, 2),
        6: np.rot90(upright, 1),  # to be shown, it must be turned clockwise
        7: np.rot90(upright, 2).transpose(1, 0, 2),
        8: np.rot90(upright, -1),
    }[orientation]
    exif = Image.Exif()
    exif[0x0112] = orientation
    options = {"quality": 100, "lossless": True} if fmt == "WEBP" else {}
    data = saved(Image.fromarray(np.ascontiguousarray(stored)), fmt, exif=exif, **options)
    assert decoded(data).shape == upright.shape
    assert np.abs(decoded(data).astype(int) - upright).mean() < 8  # JPEG loses a little


@pytest.mark.filterwarnings("ignore:Corrupt EXIF")
def test_broken_exif_keeps_the_image():
    for exif in (b"Exif\0\0junk", b"Exif\0\0II*\0\xff\xff\xff\xff", b"Exif\0\0MM\0*\0\0\0\x08\xff"):
        assert decoded(saved(picture(), "JPEG", exif=exif)).shape == (24, 40, 3)


@pytest.mark.parametrize("fmt", ["GIF", "WEBP", "TIFF", "PNG"])
def test_first_frame_of_many(fmt):
    red, blue = Image.new("RGB", (8, 8), "red"), Image.new("RGB", (8, 8), "blue")
    pixels = decoded(saved(red, fmt, save_all=True, append_images=[blue, red]))
    assert pixels[..., 0].mean() > 240 and pixels[..., 2].mean() < 15


@pytest.mark.parametrize("fmt", FORMATS)
@pytest.mark.filterwarnings("ignore")  # PIL's remarks on broken TIFF tags
def test_any_truncation_gives_a_picture_or_bad_image(fmt):
    data = saved(picture(), fmt)
    rejected = 0
    for length in {*range(64), *range(64, len(data), max(1, len(data) // 150))}:
        try:
            assert images.decode(data[:length], LIMIT).size == (40, 24)
        except images.BadImage:
            rejected += 1
    assert rejected > 64


@pytest.mark.parametrize("fmt", ["JPEG", "PNG", "BMP", "GIF"])
def test_half_a_file_is_truncated(fmt):
    data = saved(picture(), fmt)
    assert reason(data[: len(data) // 2]).startswith("truncated: ")


@pytest.mark.parametrize("fmt", FORMATS)
@pytest.mark.filterwarnings("ignore")
def test_any_flipped_bytes_give_a_picture_or_bad_image(fmt):
    rng = random.Random(fmt)
    data = saved(picture().convert("P" if fmt == "GIF" else "RGB"), fmt)
    for _ in range(300):
        broken = bytearray(data)
        for _ in range(rng.choice((1, 1, 3, 20))):
            broken[rng.randrange(min(len(data), rng.choice((64, len(data)))))] = rng.randrange(256)
        try:
            assert images.decode(bytes(broken), LIMIT).mode == "RGB"
        except images.BadImage as error:
            code = error.reason.split(":")[0]
            assert code in ("not_an_image", "too_large", "too_elongated", "truncated", "corrupt")


def test_what_is_no_image():
    assert reason(b"") == "empty"
    assert reason(b"<html>404</html>") == "not_an_image"
    assert reason(b"%PDF-1.7 ...") == "not_an_image"
    assert reason(saved(picture(), "PPM")) == "not_an_image"  # PIL reads it; we do not
    assert reason(saved(picture(), "ICO")) == "not_an_image"
    assert reason(b"\xff\xd8\xff").split(":")[0] in ("corrupt", "truncated")


def test_size_is_checked_before_pixels_are_made():
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert reason(png(50_000, 50_000, 8, 2, b"")) == "too_large: 50000x50000 pixels"
        assert reason(png(11_000, 11_000, 8, 2, b"")) == "too_large: 11000x11000 pixels"
    assert reason(saved(picture(), "PNG"), max_pixels=959) == "too_large: 40x24 pixels"
    images.decode(saved(picture(), "PNG"), max_pixels=960)
    assert reason(png(0, 5, 8, 2, b"")).startswith("corrupt: ")


def test_the_limit_is_ours_and_not_a_global_of_pil(monkeypatch):
    monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", 10)
    for fmt in ("JPEG", "PNG", "GIF", "BMP"):
        with warnings.catch_warnings():
            warnings.simplefilter("error")
            assert decoded(saved(picture(), fmt)).shape == (24, 40, 3)


def test_lines_are_refused():
    assert reason(saved(Image.new("RGB", (1, 101)), "PNG")) == "too_elongated: 1x101 pixels"
    images.decode(saved(Image.new("RGB", (1, 100)), "PNG"), LIMIT)


def test_threads_share_the_memory_and_none_waits_for_ever():
    memory, held, most = images.Memory(100), [], []
    lock = threading.Lock()

    def work(size: int) -> None:
        for _ in range(20):
            with memory.held(size, nullcontext):
                with lock:
                    held.append(min(size, 100))
                    most.append(sum(held))
                with lock:
                    held.remove(min(size, 100))

    threads = [threading.Thread(target=work, args=(size,)) for size in (10, 30, 60, 100, 500)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(30)
    assert not any(thread.is_alive() for thread in threads)
    assert memory.free == 100 and max(most) <= 100


def test_waiting_is_entered_only_where_there_is_none():
    memory, events = images.Memory(100), []

    @contextmanager
    def waiting():
        events.append("waits")
        free.set()
        yield
        events.append("goes on")

    free = threading.Event()
    with memory.held(60, waiting):
        thread = threading.Thread(target=lambda: memory.held(60, waiting).__enter__())
        thread.start()
        assert free.wait(10) and events == ["waits"]
    thread.join(10)
    assert events == ["waits", "goes on"]
