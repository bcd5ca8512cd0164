"""Reads a tar forward from any stream, with bounded headers."""

import io
import tarfile
from typing import IO

from pipeline.store.compressed import DamagedStream

READ_BYTES = 1 << 20  # limit of one read of the stream
EXTENDED_HEADER_BYTES = 1 << 20  # a longer one is damage


class TarStream(io.RawIOBase):
    """The file object for TarFile over a forward-only stream; keeps the stream's error."""

    def __init__(self, stream: IO[bytes]) -> None:
        self.stream = stream
        self.position = 0
        self.last = b""  # result of the last read
        self._given_back = b""
        self.failure: Exception | None = None  # an error of the store, not of the archive
        self.damage = ""  # why the compressed stream ended here

    def tell(self) -> int:
        return self.position

    def give_back(self) -> None:
        """The next read begins with the result of the last one."""
        self._given_back, self.position = self.last, self.position - len(self.last)

    def read(self, size: int = -1) -> bytes:
        """`size` bytes, fewer only at the end of the stream."""
        pieces, self._given_back = [self._given_back[:size]], self._given_back[size:]
        left = size - len(pieces[0])
        try:
            while left > 0 and (piece := self.stream.read(min(left, READ_BYTES))):
                pieces.append(piece)
                left -= len(piece)
        except DamagedStream as error:
            self.damage = str(error)
        except Exception as error:
            self.failure = error
            raise
        self.last = pieces[0] if len(pieces) == 1 else b"".join(pieces)
        self.position += len(self.last)
        return self.last

    def seek(self, target: int, whence: int = io.SEEK_SET) -> int:
        """Skip forward to `target`, or to the end of the stream."""
        if target < self.position:
            raise tarfile.ReadError("a header points backwards")
        while target > self.position and self.read(min(target - self.position, READ_BYTES)):
            pass
        return self.position


class BoundedHeader(tarfile.TarInfo):
    """A header with a limited size."""

    @classmethod
    def frombuf(cls, buf: bytes | bytearray, encoding: str, errors: str) -> "BoundedHeader":
        header = super().frombuf(buf, encoding, errors)
        extended = header.type in (b"x", b"g", b"X", b"L", b"K")
        if header.size < 0 or (extended and header.size > EXTENDED_HEADER_BYTES):
            raise tarfile.ReadError(f"a header of type {header.type!r} has {header.size} bytes")
        return header
