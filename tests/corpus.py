"""Shards as the web, a broken disk or an attacker makes them: seeded, small, made when asked for.

Everything is data: generators give (name of the file in the tar, bytes), tars give bytes. Bombs are
small here and large once decoded; nothing here decodes them.
"""

import io
import json
import pickle
import random
import struct
import tarfile
import zipfile
import zlib
from collections.abc import Iterator
from pathlib import Path

import numpy as np
from PIL import Image, ImageChops, ImageCms

from pipeline.artifacts import schemas
from pipeline.store.shards import ShardReader
from tests.store.tars import special, tar_of

BUNDLED = Path(__file__).parents[1] / "examples" / "noto-emoji"
FORMATS = ("jpg", "png", "webp", "gif", "bmp", "tiff")  # that the reader takes for images
PIL_NAMES = {"jpg": "JPEG", "tiff": "TIFF"} | {f: f.upper() for f in ("png", "webp", "gif", "bmp")}
Files = Iterator[tuple[str, bytes]]

# ---- pictures


def emoji(count: int) -> list[Image.Image]:
    """The first of the bundled pictures."""
    with (BUNDLED / "00000.tar").open("rb") as stream:
        samples = [s for s, _ in zip(ShardReader(stream, None), range(count), strict=False)]
    return [Image.open(io.BytesIO(s.image().data)).convert("RGB") for s in samples]


def photograph(seed: int, side: int = 32) -> Image.Image:
    """An emoji before a sky, with the noise of a camera."""
    rng = np.random.default_rng(seed)
    sky = np.linspace((90, 140, 220), (230, 220, 200), side)[:, None].repeat(side, 1)
    grain = np.clip(sky + rng.normal(0, 9, sky.shape), 0, 255).astype(np.uint8)
    return ImageChops.multiply(Image.fromarray(grain), emoji(8)[seed % 8].resize((side, side)))


def saved(image: Image.Image, suffix: str, **options: object) -> bytes:
    file = io.BytesIO()
    image.save(file, PIL_NAMES[suffix], **options)
    return file.getvalue()


def real_images(seed: int = 0) -> dict[str, bytes]:
    """A photograph in every format, and in the ways that a format has of being coded."""
    image = photograph(seed)
    found = {suffix: saved(image, suffix) for suffix in FORMATS}
    found["progressive.jpg"] = saved(image, "jpg", progressive=True)
    found["lossless.webp"] = saved(image, "webp", lossless=True)
    for compression in ("tiff_lzw", "tiff_adobe_deflate", "jpeg"):
        found[f"{compression}.tiff"] = saved(image, "tiff", compression=compression)
    return found


def truncated(step: int = 10) -> Files:
    """Each real image, ended at every tenth byte."""
    for kind, data in real_images().items():
        for end in range(0, len(data), step):
            yield f"cut-{kind.replace('.', '-')}-{end}.{kind.rpartition('.')[2]}", data[:end]


def mutants(count: int = 2000, seed: int = 1) -> Files:
    """Real images with one to sixteen flipped bits, half of them in the header."""
    rng = random.Random(seed)
    originals = [(kind, data) for i in range(4) for kind, data in real_images(i).items()]
    for number in range(count):
        kind, data = originals[number % len(originals)]
        broken = bytearray(data)
        for _ in range(rng.choice((1, 1, 2, 4, 16))):
            place = rng.randrange(len(data) if rng.random() < 0.5 else min(len(data), 100))
            broken[place] ^= 1 << rng.randrange(8)
        yield f"flip-{number}-{kind.replace('.', '-')}.{kind.rpartition('.')[2]}", bytes(broken)


def png(width: int, height: int, rows: bytes = b"") -> bytes:
    """A PNG of 8-bit RGB that declares a size; its rows are made by hand, if at all."""

    def chunk(name: bytes, body: bytes) -> bytes:
        return (
            struct.pack(">I", len(body)) + name + body + struct.pack(">I", zlib.crc32(name + body))
        )

    header = struct.pack(">IIBBBBB", width, height, 8, 2, 0, 0, 0)
    data = chunk(b"IHDR", header) + chunk(b"IDAT", rows) + chunk(b"IEND", b"")
    return b"\x89PNG\r\n\x1a\n" + data


def png_bomb(side: int = 50_000) -> bytes:
    """side × side pixels of nothing: a complete PNG, compressed a row at a time."""
    squeeze = zlib.compressobj(9)
    row = b"\0" * (1 + 3 * side)
    rows = b"".join(squeeze.compress(row) for _ in range(side // 100)) + squeeze.flush()
    return png(side, side, rows)


def gif_of_frames(count: int = 100_000) -> bytes:
    """Frames of one pixel, all alike but the first, which is a picture."""
    first = saved(photograph(0, 16).quantize(16), "gif")
    frame = b"\x2c" + struct.pack("<HHHHB", 0, 0, 1, 1, 0) + b"\x02\x02\x44\x01\x00"
    return first[:-1] + frame * count + b"\x3b"


def gif_of_comments(size: int = 16_000_000) -> bytes:
    """A comment that is longer than the picture."""
    data = saved(photograph(0, 16).quantize(16), "gif")
    start = 13 + 3 * 2 ** ((data[10] & 7) + 1)
    comment = b"\x21\xfe" + (b"\xff" + b"x" * 255) * (size // 256) + b"\0"
    return data[:start] + comment + data[start:]


def jpeg_of_scans(side: int = 6000, count: int = 2000) -> bytes:
    """A progressive JPEG whose last refinement comes again and again: small, and slow to decode."""
    data = saved(Image.new("L", (side, side)), "jpg", progressive=True, quality=10)
    scan = data[data.rindex(b"\xff\xda") : -2]
    return data[:-2] + scan * count + b"\xff\xd9"


def exif_of_copies(size: int = 20_000_000, tags: int = 5000) -> bytes:
    """A JPEG whose EXIF has thousands of tags that all mean the same megabytes."""
    blob = size - 10 - 12 * tags
    entries = b"".join(struct.pack("<HHII", 1000 + i, 7, blob, 0) for i in range(tags))
    exif = b"II*\0" + struct.pack("<IH", 8, tags) + entries + b"\0" * blob
    parts = [b"Exif\0\0" + exif[i : i + 60_000] for i in range(0, len(exif), 60_000)]
    data = saved(photograph(0), "jpg")
    segments = b"".join(b"\xff\xe1" + struct.pack(">H", len(p) + 2) + p for p in parts)
    return data[:2] + segments + data[2:]


def webp_canvas(side: int = 16_383) -> bytes:
    """A WebP of 32 pixels a side on a canvas of 16,383."""
    inner = saved(photograph(0), "webp", lossless=True)[12:]
    edge = (side - 1).to_bytes(3, "little")
    body = b"WEBPVP8X" + struct.pack("<I", 10) + bytes(4) + edge + edge + inner
    return b"RIFF" + struct.pack("<I", len(body)) + body


BOMBS = {  # name -> maker and the codes that may come of it; None where it is a picture
    "square.png": (png_bomb, {"too_large"}),
    "frames.gif": (gif_of_frames, {None}),
    "comments.gif": (gif_of_comments, {None}),
    "copies.jpg": (exif_of_copies, {None}),
    "canvas.webp": (webp_canvas, {"too_large", "corrupt"}),
    "scans.jpg": (jpeg_of_scans, {"decode_timeout"}),
}


def odd_images() -> dict[str, tuple[bytes, str | None]]:
    """Name -> image and the code that it must be rejected with; None where it must be read."""
    rgb = photograph(0)
    frames = {"save_all": True, "append_images": [photograph(1), photograph(2)]}
    wide = Image.fromarray(np.arange(1024, dtype=np.uint16).reshape(32, 32) * 64)
    clear = rgb.convert("RGBA")
    clear.putalpha(Image.linear_gradient("L").resize(rgb.size))
    srgb = ImageCms.ImageCmsProfile(ImageCms.createProfile("sRGB")).tobytes()
    read = {
        "one-pixel.png": saved(rgb.resize((1, 1)), "png"),
        "animated.gif": saved(rgb, "gif", **frames),
        "animated.webp": saved(rgb, "webp", **frames),
        "cmyk.jpg": saved(rgb.convert("CMYK"), "jpg"),
        "cmyk.tiff": saved(rgb.convert("CMYK"), "tiff"),
        "sixteen.png": saved(wide, "png"),
        "sixteen.tiff": saved(wide, "tiff"),
        "palette.png": saved(rgb.quantize(9), "png"),
        "palette.bmp": saved(rgb.quantize(9), "bmp"),
        "alpha.png": saved(clear, "png"),
        "exif-junk.jpg": saved(rgb, "jpg", exif=b"Exif\0\0junk"),
        "exif-far.jpg": saved(rgb, "jpg", exif=b"Exif\0\0II*\0\xff\xff\xff\xff"),
        "exif-short.webp": saved(rgb, "webp", exif=b"Exif\0\0MM\0*\0\0\0\x08\xff"),
        "exif-none.png": saved(rgb, "png", exif=b"junk"),
        "icc-good.jpg": saved(rgb, "jpg", icc_profile=srgb),
        "icc-junk.jpg": saved(rgb, "jpg", icc_profile=b"junk" * 999),
        "icc-short.png": saved(rgb, "png", icc_profile=srgb[:100]),
        "not-what-it-says.png": saved(rgb, "jpg"),
    }
    refused = {
        "line.png": (saved(Image.new("RGB", (1, 20_000)), "png"), "too_elongated"),
        "nothing.jpg": (b"", "empty"),
        "text.jpg": (b"404 Not Found\n", "not_an_image"),
        "zip.jpg": (zip_file(), "not_an_image"),
        "svg.jpg": (b"<svg xmlns='http://www.w3.org/2000/svg' onload='alert(1)'/>", "not_an_image"),
        "pdf.jpg": (b"%PDF-1.7\n1 0 obj<</OpenAction<</S/JavaScript>>>>", "not_an_image"),
        "half.png": (png(32, 32, zlib.compress(bytes(500))), "truncated"),
    }
    return {name: (data, None) for name, data in read.items()} | refused


def zip_file() -> bytes:
    file = io.BytesIO()
    with zipfile.ZipFile(file, "w") as archive:
        archive.writestr("../../escaped", "x")
    return file.getvalue()


# ---- texts, json and code

EXECUTED = "EXECUTED"  # what a payload makes of the title of the page in which it runs
PAYLOADS = (
    f"<script>document.title='{EXECUTED}'</script>",
    f"<img src=x onerror=\"document.title='{EXECUTED}'\">",
    f"\"'><svg onload=\"document.title='{EXECUTED}'\">",
    f"</title></style></textarea><script>document.title='{EXECUTED}'</script>",
)
CAPTIONS = {
    "nul": "a\0cat\0",
    "rtl": "cat \u202egpj.exe\u2066 \u200f",
    "emoji": "👩‍👩‍👧‍👦 🏳️‍🌈 \U0001f9ff",
    "long": "cat " * 250_000,  # 1 MB
    "formula": "=cmd|'/c calc'!A1",
    "formula-at": "@SUM(1+1)*cmd|'/c calc'!A0",
    "ansi": "\x1b[2J\x1b]0;owned\x07\x9b31mcat\r\n\x08",
    "lines": "cat\u2028\u2029\x85\x0b",
    "surrogates": "cat",  # its bytes are those of half a pair
    **{f"html-{i}": payload for i, payload in enumerate(PAYLOADS)},
}


def jsons() -> dict[str, tuple[bytes, bool]]:
    """Name -> bytes of a json member, and whether it is an object that is kept."""
    ours = [name for name, _ in (*schemas.IDENTITY, *schemas.LABEL)]
    ours += ["json", "embedding", "reason", "ratecluster", "input_key", "input_input_key"]
    good = {
        "nan": b'{"score": NaN, "most": Infinity, "least": -Infinity}',
        "ours": json.dumps(dict.fromkeys(ours, "\x1b[31mtheirs")).encode(),
        "ours-otherwise": json.dumps({name: [1, {"a": None}] for name in ours}).encode(),
        "half-pair": b'{"title": "cat \\ud83d", "\\udc00": 1}',
        "numbers": b'{"big": 99999999999999999999999, "float": 1e999, "tiny": 5e-324}',
        "names": b'{"": 1, "\\u0000": 2, "a\\u001b[31m": 3, "=cmd|x": 4, "__proto__": 5}',
        "names-otherwise": b'{"a\\u001b[31m": "text"}',
        "twice": b'{"a": 1, "a": "two"}',
        "utf16": '{"a": 1}'.encode("utf-16"),
        "mark": b'\xef\xbb\xbf{"a": 1}',
        "long-name": json.dumps({"n" * 100_000: 1}).encode(),
    }
    bad = {
        "list": b'[{"a": 1}]',
        "not-utf8": b'{"a": "\xff\xfe"}',
        "deep": b'{"a":' + b"[" * 100_000 + b"]" * 100_000 + b"}",
        "digits": b'{"a": ' + b"9" * 100_000 + b"}",
        "nothing": b"",
        "cut": b'{"a": ',
        "two": b"{} {}",
    }
    return {n: (d, True) for n, d in good.items()} | {n: (d, False) for n, d in bad.items()}


def nested_json(size: int = 100_000_000) -> bytes:
    """Lists in lists, without end."""
    return b'{"a":' + b"[" * size


class Trap:
    """Unpickled, it makes a file."""

    def __init__(self, canary: Path) -> None:
        self.canary = canary

    def __reduce__(self) -> tuple[object, ...]:
        return Path.touch, (self.canary,)


# ---- samples and tars


def samples(canary: Path) -> Files:
    """Everything that one tar can hold without being broken itself."""
    good = saved(photograph(3), "jpg")
    for name, (data, _) in odd_images().items():
        yield name, data
    for name, text in CAPTIONS.items():
        yield f"caption-{name}.jpg", good
        yield f"caption-{name}.txt", b"cat \xed\xa0\xbd" if name == "surrogates" else text.encode()
    for name, (data, _) in jsons().items():
        yield f"json-{name}.jpg", good
        yield f"json-{name}.json", data
    for suffix in ("pyd", "pickle", "pkl", "pt", "pth", "npy", "cls", "jpg"):
        yield f"code-{suffix}.png", saved(photograph(4), "png")
        yield f"code-{suffix}.{suffix}", pickle.dumps(Trap(canary))
    yield "UPPER.JPG", good
    yield "UPPER.Txt", b"upper case"
    yield "v1.2/dotted.seg.jpg", good
    yield "only.txt", b"no image"
    yield "only-json.json", b"{}"
    yield "two.left.jpg", good
    yield "two.right.jpg", good


def named(canary: Path) -> bytes:
    """A tar of names, types and orders that no careful writer makes."""
    good = saved(photograph(5), "png")
    sparse = tarfile.TarInfo("sparse.jpg")
    sparse.pax_headers = {"GNU.sparse.map": "0,1", "GNU.sparse.size": str(1 << 40)}
    terminal = tarfile.TarInfo("\x1b[2J\x1b]0;owned\x07.jpg")
    return tar_of(
        ("a.png", good), ("b.png", good), ("a.png", good), ("a.json", b"{}"),
        ("twice.jpg", good), ("twice.JPG", good),
        (f"{canary}.jpg", good), (f"../{canary.name}.jpg", good), ("x/../../y.jpg", good),
        special("link.jpg", tarfile.SYMTYPE, "/etc/passwd"),
        special("hard.jpg", tarfile.LNKTYPE, "a.png"),
        special("device.jpg", tarfile.CHRTYPE), special("pipe.jpg", tarfile.FIFOTYPE),
        special("folder.jpg", tarfile.DIRTYPE), sparse, terminal,
        ("l" * 300 + ".jpg", good), ("é" * 200 + "/" + "ü" * 90 + ".jpg", good),
        (".hidden", b"-"), ("README", b"-"), *((f"{p}.jpg", b"") for p in PAYLOADS),
        ("last.png", good),
    )  # fmt: skip


def gnu_names() -> bytes:
    """The same long names as GNU tar writes them."""
    file = io.BytesIO()
    with tarfile.open(fileobj=file, mode="w", format=tarfile.GNU_FORMAT) as tar:
        for name in ("l" * 300 + ".png", "d/" * 120 + "deep.png"):
            header = tarfile.TarInfo(name)
            data = saved(photograph(6), "png")
            header.size = len(data)
            tar.addfile(header, io.BytesIO(data))
    return file.getvalue()


def broken_tars() -> Iterator[tuple[str, bytes]]:
    """Tars cut, prolonged, empty, or none at all."""
    data = saved(photograph(7), "png")
    three = [(f"{i}.{s}", d) for i in range(3) for s, d in (("png", data), ("txt", b"cat"))]
    whole = tar_of(*three)
    second = whole.index(b"1.png")
    member = second + 512 + len(data) // 2
    boundary = second + 512 + -(-len(data) // 512) * 512
    yield "whole", whole
    yield "cut-in-header", whole[: second + 100]
    yield "cut-in-member", whole[:member]
    yield "cut-at-boundary", whole[:boundary]
    yield "cut-before-end", whole[: len(whole.rstrip(b"\0")) // 512 * 512 + 512]
    yield "garbage-after", whole + random.Random(2).randbytes(5000)
    yield "garbage-instead", whole[:boundary] + random.Random(3).randbytes(5000)
    yield "two-in-one", whole + tar_of(("again.png", data))
    yield "no-samples", tar_of()
    yield "no-bytes", b""
    yield "text", b"<html>503</html>" * 100
    yield "image", data


def many(stream: io.BufferedWriter, count: int = 100_000) -> None:
    """A shard of `count` samples of one byte each."""
    header = tarfile.TarInfo("0")
    header.size = 1
    for i in range(count):
        header.name = f"{i:06d}.jpg"
        stream.write(header.tobuf(tarfile.USTAR_FORMAT) + b"x" + bytes(511))
    stream.write(bytes(1024))


def write(folder: Path, canary: Path) -> None:
    """All shards but the largest; the bombs are made where they are measured."""
    (folder / "samples.tar").write_bytes(tar_of(*samples(canary)))
    (folder / "truncated.tar").write_bytes(tar_of(*truncated()))
    (folder / "mutants.tar").write_bytes(tar_of(*mutants()))
    (folder / "named.tar").write_bytes(named(canary))
    (folder / "gnu.tar").write_bytes(gnu_names())
    for name, data in broken_tars():
        (folder / f"tar-{name}.tar").write_bytes(data)
