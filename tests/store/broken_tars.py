"""Tars with zeros, holes, junk and further archives, and what must be read of each.

`python -m tests.store.broken_tars FOLDER` writes them.
"""

import bz2
import gzip
import io
import sys
import tarfile
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

from PIL import Image

BLOCK, RECORD = 512, 10_240
HOLE = EXCESS = "zeros from byte "
CUT = "damaged at byte "


@dataclass(frozen=True)
class Broken:
    """A tar, the keys of the samples whose bytes are whole, and how its `end` begins."""

    data: bytes
    keys: tuple[str, ...]
    end: str = "complete"


def picture(number: int) -> bytes:
    """A small JPEG of its own colours for every number."""
    buffer = io.BytesIO()
    image = Image.radial_gradient("L").resize((24, 24)).convert("RGB")
    shades = [(31 * number) % 256, (97 * number) % 256, (57 * number) % 256]
    Image.blend(image, Image.new("RGB", image.size, tuple(shades)), 0.5).save(buffer, "JPEG")
    return buffer.getvalue()


def members(first: int, count: int) -> list[tuple[str, bytes]]:
    """The files of samples: an image, a caption and a json each."""
    return [
        pair
        for i in range(first, first + count)
        for pair in (
            (f"{i:05d}.jpg", picture(i)),
            (f"{i:05d}.txt", f"picture {i}".encode()),
            (f"{i:05d}.json", b'{"number": %d}' % i),
        )
    ]


def bare(pairs: list[tuple[str, bytes]], form: int = tarfile.USTAR_FORMAT) -> bytes:
    """A tar without its end-of-archive marker."""
    buffer = io.BytesIO()
    with tarfile.open(fileobj=buffer, mode="w", format=form) as tar:
        for name, data in pairs:
            header = tarfile.TarInfo(name)
            header.size = len(data)
            tar.addfile(header, io.BytesIO(data))
        return buffer.getvalue()


def padded(data: bytes) -> bytes:
    """With the marker, and zeros to the end of the record."""
    data += b"\0" * 2 * BLOCK
    return data + b"\0" * (-len(data) % RECORD)


def keys(first: int, count: int) -> tuple[str, ...]:
    return tuple(f"{i:05d}" for i in range(first, first + count))


def starts(data: bytes) -> list[int]:
    """Bytes at which the samples of a tar of `members` begin."""
    return [data.index(b"%05d.jpg\0" % i) for i in range(6)]


def tars() -> dict[str, Broken]:
    """Name -> tar."""
    return dict(_zeros()) | dict(_second_archives()) | dict(_junk()) | dict(_cuts())


def _zeros() -> Iterator[tuple[str, Broken]]:
    one, six, every = bare(members(0, 3)), bare(members(0, 6)), keys(0, 6)
    more = bare(members(3, 3))
    for blocks in (1, 2, 3, 15, 20, 21, 22):
        yield f"end-of-{blocks}-blocks", Broken(six + bytes(blocks * BLOCK), every)
    yield "end-of-no-block", Broken(six, every, "no end-of-archive marker")
    for blocks in (23, 40, 4000):
        yield f"end-of-{blocks}-blocks", Broken(six + bytes(blocks * BLOCK), every, EXCESS)
    yield "end-not-of-whole-blocks", Broken(six + bytes(2 * BLOCK + 100), every)
    for blocks in (1, 2, 19, 20, 40, 4000):
        zeros = bytes(blocks * BLOCK)
        yield f"middle-of-{blocks}-blocks", Broken(padded(one + zeros + more), every, HOLE)
        yield f"start-of-{blocks}-blocks", Broken(padded(zeros + six), every, HOLE)
        parts = b"".join(bare(members(i, 1)) + zeros for i in range(6))
        yield f"between-all-{blocks}-blocks", Broken(parts, every, HOLE)
    at = starts(six)
    for first, last in ((0, 1), (2, 3), (1, 4), (0, 5)):
        whole = six[: at[first]] + bytes(at[last] - at[first]) + six[at[last] :]
        lost = set(keys(first, last - first))
        left = tuple(key for key in every if key not in lost)
        yield f"hole-of-samples-{first}-to-{last}", Broken(padded(whole), left, HOLE)
    tail = six[: at[4]] + bytes(len(six) - at[4])
    yield "zeros-for-the-last-samples", Broken(tail + bytes(RECORD), keys(0, 4), EXCESS)
    for shift in (BLOCK, 2 * BLOCK):  # into the data of an image: its header is gone
        whole = six[: at[3]] + bytes(shift) + six[at[3] + shift :]
        yield f"hole-of-header-{shift}", Broken(padded(whole), keys(0, 3), CUT)
    yield "nothing-but-zeros", Broken(bytes(4 * RECORD), (), EXCESS)
    yield "nothing-but-a-marker", Broken(bytes(RECORD), ())
    yield "nothing", Broken(b"", (), CUT)


def _second_archives() -> Iterator[tuple[str, Broken]]:
    every = keys(0, 6)
    for name, form in (
        ("ustar", tarfile.USTAR_FORMAT),
        ("gnu", tarfile.GNU_FORMAT),
        ("pax", tarfile.PAX_FORMAT),
    ):
        both = padded(bare(members(0, 3), form)) + padded(bare(members(3, 3), form))
        yield f"joined-{name}", Broken(both, every, HOLE)
    three = b"".join(padded(bare(members(i, 2))) for i in (0, 2, 4))
    yield "joined-three", Broken(three, every, HOLE)
    yield "joined-four-with-an-empty-one", Broken(three + bytes(RECORD), every, HOLE)
    again = padded(bare(members(0, 6)))
    yield "joined-with-itself", Broken(again + again, every, HOLE)
    yield "without-markers", Broken(padded(bare(members(0, 3)) + bare(members(3, 3))), every)
    cut = padded(bare(members(0, 3))) + bare(members(3, 3))[:-1200]
    yield "joined-and-cut", Broken(cut, keys(0, 5), HOLE)


def _junk() -> Iterator[tuple[str, Broken]]:
    six, every = padded(bare(members(0, 6))), keys(0, 6)
    for name, junk in (
        ("text", b"not a tar " * 100),
        ("ones", b"\xff" * 2048),
        ("half-a-block", b"junk" * 20),
        ("a-page", b"<html>404</html>" + bytes(496)),
        ("a-picture", picture(1)),
        ("gzip", gzip.compress(six)),
    ):
        yield f"junk-{name}-behind-the-end", Broken(six + junk, every, CUT)
    yield "junk-behind-more-zeros", Broken(six + bytes(RECORD) + b"x" * BLOCK, every, CUT)
    at = starts(six)[3]
    yield "junk-for-a-header", Broken(six[:at] + b"j" * BLOCK + six[at + BLOCK :], keys(0, 2), CUT)
    yield "junk-first", Broken(b"j" * BLOCK + six, (), CUT)
    for name, data in (
        ("gzip", gzip.compress(six)),
        ("bzip2", bz2.compress(six)),
        ("zstd", b"\x28\xb5\x2f\xfd" + bytes(range(200))),
        ("zip", b"PK\x03\x04" + bytes(range(100)) * 6),
        ("lfs", b"version https://git-lfs.github.com/spec/v1\noid sha256:0\nsize 9\n"),
        ("html", b"<!DOCTYPE html><html><body>Access denied</body></html>" * 20),
        ("xml", b'<?xml version="1.0"?><Error><Code>AccessDenied</Code></Error>'),
    ):
        yield f"is-{name}", Broken(data, (), f"{CUT}0: it is ")


def _cuts() -> Iterator[tuple[str, Broken]]:
    six = padded(bare(members(0, 6)))
    at = starts(six)
    yield "cut-between-samples", Broken(six[: at[3]], keys(0, 3), "no end-of-archive marker")
    yield "cut-in-a-header", Broken(six[: at[3] + 100], keys(0, 2), CUT)
    yield "cut-in-an-image", Broken(six[: at[3] + BLOCK + 100], keys(0, 3), CUT)
    yield "cut-in-a-name", Broken(six[: at[3] + 3], keys(0, 2), CUT)
    yield "block-lost", Broken(six[: at[3] + BLOCK] + six[at[3] + 2 * BLOCK :], keys(0, 3), CUT)
    twice = six[: at[3] + BLOCK] + six[at[3] : at[3] + BLOCK] + six[at[3] + BLOCK :]
    yield "block-twice", Broken(twice, keys(0, 3), CUT)


if __name__ == "__main__":
    for title, broken in tars().items():
        Path(sys.argv[1], f"{title}.tar").write_bytes(broken.data)
