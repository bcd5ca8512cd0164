"""Accounts for every byte of a shard, without tarfile and without the reader of the stages.

A tar is blocks of 512 bytes: a header with a checksum, then the bytes of its file, filled up with
zeros. Two blocks of zeros end it (POSIX 1003.1, pax Interchange Format). The walk goes on behind
zeros and behind damage, at the next block that is a header.
"""

import re
from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import IO

from pipeline.store import compressed

BLOCK = 512
MOST_ZEROS = 22 * BLOCK  # two blocks of the marker, and the rest of a record of 20
EXTENDED_BYTES = 1 << 20  # a longer name or pax header is damage
PIECE_BYTES = 1 << 20  # of one read
WITH_DATA = b"0\x007S"  # types of files whose bytes follow: two spellings, contiguous, sparse
KEY = re.compile(r"(?s)((?:.*/)?[^./]+)[.][^/]*")  # of webdataset's samples; no hidden files
META = re.compile(r"__[^/]*__($|/)")  # files that webdataset skips


@dataclass(frozen=True)
class File:
    """A file of the tar, or what takes the place of one: a folder, a link, a device."""

    name: str  # bytes that are not UTF-8 are surrogates
    kind: bytes  # the type in its header
    offset: int  # byte at which its data begins
    size: int  # bytes

    @property
    def key(self) -> str | None:
        """The key of its sample, by webdataset's rule; None for a file of no sample."""
        found = KEY.fullmatch(self.name)
        return found[1] if found and self.kind != b"5" and not META.match(self.name) else None


@dataclass
class Walk:
    """What lies where in a tar."""

    files: list[File] = field(default_factory=list)
    gaps: list[tuple[int, int]] = field(default_factory=list)  # bytes [from, to) that are no file


def walk(stream: IO[bytes]) -> Walk:
    """Read a tar to its last byte. Errors of the store are raised."""
    found = Walk()
    blocks = _Blocks(stream)
    zeros = unknown = None  # where such bytes began
    names: dict[str, str] = {}  # of the next file, from the headers before it
    while block := blocks.take(BLOCK):
        start = blocks.position - len(block)
        if not any(block):
            zeros = start if zeros is None else zeros
            continue
        header = _header(block)
        if zeros is not None:  # not at the end
            found.gaps.append((zeros, start))
            zeros = None
        if header is None:
            unknown = start if unknown is None else unknown
            continue
        if unknown is not None:
            found.gaps.append((unknown, start))
            unknown = None
        name, kind, size = header
        if kind in b"xgLKX":
            body = blocks.take(size) if size <= EXTENDED_BYTES else b""
            blocks.skip(-size % BLOCK)
            names |= _extended(kind, body)
            continue
        more = kind == b"S" and block[482]
        while more:  # of the map of a sparse file
            block = blocks.take(BLOCK)
            more = len(block) == BLOCK and block[504]
        size = int(names.get("size") or size)
        found.files.append(File(names.get("path") or name, kind, blocks.position, size))
        names = {}
        if kind in WITH_DATA:
            wanted = blocks.position + size
            blocks.skip(size + -size % BLOCK)
            if blocks.position < wanted:  # the tar ends inside the file
                found.gaps.append((found.files[-1].offset, blocks.position))
    if unknown is not None:
        found.gaps.append((unknown, blocks.position))
    if blocks.damaged:
        found.gaps.append((blocks.position, blocks.position))
    if zeros is not None and blocks.position - zeros > MOST_ZEROS:
        found.gaps.append((zeros, blocks.position))
    return found


def losses(found: Walk, keys: set[str], end: str) -> Iterator[str]:
    """What a run lacks of a tar: files of no sample that it has, and bytes that `end` conceals.

    `keys` are those of its rows, of all statuses. Behind damage that `end` names, nothing is read.
    """
    damage = re.search(r"damaged at byte (\d+)", end)
    read_to = int(damage[1]) if damage else None
    for file in found.files:
        if read_to is not None and file.offset > read_to:
            break
        if file.key is not None and _text(file.key) not in keys:
            yield f"has no row for {_text(file.name)} at byte {file.offset} of the input"
    for start, stop in found.gaps:
        if not re.search(r"(damaged at|zeros from) byte", end):
            yield f"bytes {start} to {stop} of the input are no files, and no row names them"


class _Blocks:
    """Bytes of a stream, in the pieces that are asked for."""

    def __init__(self, stream: IO[bytes]) -> None:
        self.stream, self.position = stream, 0
        self.damaged = False  # the compressed data end here

    def take(self, size: int) -> bytes:
        """`size` bytes, fewer only at the end."""
        try:
            found = compressed.take(self.stream, size)
        except compressed.DamagedStream:
            found, self.damaged = b"", True
        self.position += len(found)
        return found

    def skip(self, size: int) -> None:
        while size > 0 and (piece := self.take(min(size, PIECE_BYTES))):
            size -= len(piece)


def _header(block: bytes) -> tuple[str, bytes, int] | None:
    """Name, type and size in a header; None where the checksum or a number is wrong."""
    if len(block) < BLOCK:
        return None
    try:
        wanted = _number(block[148:156])
        size = _number(block[124:136])
    except ValueError:
        return None
    rest = block[:148] + b" " * 8 + block[156:]
    signed = sum(byte - 256 if byte > 127 else byte for byte in rest)
    if wanted not in (sum(rest), signed) or size < 0:
        return None
    name = block[:100].partition(b"\0")[0]
    folder = block[345:500].partition(b"\0")[0] if block[257:263] == b"ustar\0" else b""
    return _name(folder + b"/" + name if folder else name), block[156:157], size


def _number(text: bytes) -> int:
    """An octal number, or a large one in base 256 as GNU tar writes it."""
    if text[0] == 0x80:
        return int.from_bytes(text[1:], "big")
    return int(text.partition(b"\0")[0].strip() or b"0", 8)


def _extended(kind: bytes, body: bytes) -> dict[str, str]:
    """Path and size of the next file from a header before it."""
    if kind == b"L":
        return {"path": _name(body.partition(b"\0")[0])}
    found: dict[str, str] = {}
    while kind in b"xX" and (length := re.match(rb"(\d+) ", body)):
        record, body = body[: int(length[1])], body[int(length[1]) :]
        name, _, value = record[length.end() :].rstrip(b"\n").partition(b"=")
        if name in (b"path", b"size", b"GNU.sparse.name"):
            key = "size" if name == b"size" else "path"
            found[key] = _name(value)
        if not record:
            break
    return found


def _name(name: bytes) -> str:
    return name.decode("utf-8", "surrogateescape")


def _text(name: str) -> str:
    """As rows spell it: bytes that are not UTF-8 are `\\xff`."""
    return name.encode("utf-8", "surrogateescape").decode("utf-8", "backslashreplace")
