"""Shards as tars: those with a suffix such as .tar.gz are unpacked while they are read.

A byte of a compressed shard is a byte of the tar in it.
"""

import bz2
import gzip
import io
import lzma
from collections.abc import Iterable, Iterator
from typing import IO, Any, cast

import pyarrow as pa

from pipeline.store import storage

SUFFIXES = {  # of compressed shards -> format
    ".tar.gz": "gzip",
    ".tgz": "gzip",
    ".tar.bz2": "bz2",
    ".tbz2": "bz2",
    ".tar.xz": "xz",
    ".txz": "xz",
    ".tar.zst": "zstd",
    ".tzst": "zstd",
}
PIECE_BYTES = 1 << 20


class DamagedStream(Exception):  # noqa: N818 - it is what tar_stream calls damage
    """The compressed data cannot be unpacked any further."""


def format_of(url: str) -> str | None:
    """The compression of a shard by its name; None for a plain tar."""
    path = storage.without_query(url).lower()
    return next((kind for suffix, kind in SUFFIXES.items() if path.endswith(suffix)), None)


def open_tar(url: str, size: int = 0, version: str = "") -> IO[bytes]:
    """`storage.open_read` of a shard, unpacked. Reading raises DamagedStream where that fails."""
    stream = storage.open_read(url, size, version)
    kind = format_of(url)
    return cast(IO[bytes], _Unpacked(stream, kind)) if kind else stream


def read_ranges(url: str, places: Iterable[tuple[int, int]]) -> Iterator[bytes]:
    """Bytes at (offset, size) of a shard; of a compressed one in one pass, in rising order."""
    if format_of(url) is None:
        for offset, size in places:
            yield storage.read_range(url, offset, size)
        return
    with open_tar(url) as stream:
        yield from pieces(stream, places)


def pieces(stream: IO[bytes], places: Iterable[tuple[int, int]]) -> Iterator[bytes]:
    """Bytes at (offset, size) of a stream that begins at byte 0, in rising order."""
    position = 0
    for offset, size in places:
        skip(stream, offset - position)
        yield take(stream, size)
        position = offset + size


def read_range(url: str, offset: int, size: int) -> bytes:
    """`size` bytes of a shard from `offset`."""
    return next(read_ranges(url, [(offset, size)]))


def take(stream: IO[bytes], size: int) -> bytes:
    """The next `size` bytes, fewer only at the end."""
    pieces = []
    while size > 0 and (piece := stream.read(min(size, PIECE_BYTES))):
        pieces.append(piece)
        size -= len(piece)
    return b"".join(pieces)


def skip(stream: IO[bytes], size: int) -> None:
    """Move on by `size` bytes."""
    if isinstance(stream, io.FileIO | io.BufferedReader) and stream.seekable():
        stream.seek(size, io.SEEK_CUR)
        return
    while size > 0 and (piece := stream.read(min(size, PIECE_BYTES))):
        size -= len(piece)


class _Source(io.RawIOBase):
    """The compressed stream; keeps an error of the store, which is no damage."""

    def __init__(self, stream: IO[bytes]) -> None:
        self.stream = stream
        self.failure: Exception | None = None

    def readable(self) -> bool:
        return True

    def readinto(self, buffer: Any) -> int:
        try:
            data = self.stream.read(len(buffer))
        except Exception as error:
            self.failure = error
            raise
        buffer[: len(data)] = data
        return len(data)


class _Unpacked(io.RawIOBase):
    """The unpacked stream."""

    def __init__(self, stream: IO[bytes], kind: str) -> None:
        self.source = _Source(stream)
        buffered = io.BufferedReader(self.source, PIECE_BYTES)
        self.stream: Any
        if kind == "gzip":
            self.stream = gzip.GzipFile(fileobj=buffered)
        elif kind == "zstd":
            self.stream = pa.CompressedInputStream(pa.PythonFile(buffered, mode="r"), "zstd")
        else:
            self.stream = (bz2.BZ2File if kind == "bz2" else lzma.LZMAFile)(buffered)

    def readable(self) -> bool:
        return True

    def read(self, size: int = -1) -> bytes:
        try:
            return bytes(self.stream.read(size)) if size else b""
        except Exception as error:  # each format has errors of its own
            if self.source.failure is not None:
                raise self.source.failure from None
            raise DamagedStream(f"its compressed data: {error}") from None

    def close(self) -> None:
        self.source.stream.close()
        super().close()
