"""Streams for one pass: remote files are read ahead, and a stream that ends too early raises."""

import io
from collections import deque
from concurrent.futures import Future, ThreadPoolExecutor
from typing import IO, Any

from fsspec.spec import AbstractBufferedFile

from pipeline.store.retry import ChangedError, retry

BLOCK_BYTES = 4 << 20  # of one range request
AHEAD = 4  # range requests in flight for each open file


class Ahead(io.RawIOBase):
    """A remote file, read forward with AHEAD blocks in flight.

    Not fsspec's `background` cache: it has one block in flight, keeps 32, and joins a short block
    to the next.
    """

    def __init__(self, file: AbstractBufferedFile, size: int, url: str) -> None:
        self.file, self.size, self.url = file, size, url
        self.starts = iter(range(0, size, BLOCK_BYTES))
        self.pool = ThreadPoolExecutor(AHEAD, thread_name_prefix="ahead")
        self.coming: deque[Future[bytes]] = deque()
        self.block = memoryview(b"")  # the unread rest of the current block
        for _ in range(AHEAD):
            self._ask()

    def _ask(self) -> None:
        if (start := next(self.starts, None)) is not None:
            self.coming.append(self.pool.submit(self._fetch, start))

    def _fetch(self, start: int) -> bytes:
        end = min(start + BLOCK_BYTES, self.size)

        def load() -> bytes:
            try:
                data = bytes(self.file._fetch_range(start, end))  # as fsspec's caches do
            except OSError as error:
                if type(error).__name__ == "FileExpired":  # s3fs: the ETag is different
                    raise ChangedError(
                        f"{self.url} has changed since it was listed; run again"
                    ) from None
                raise
            if len(data) != end - start:
                raise _cut_short(self.url, start + len(data), self.size)
            return data

        return retry(load, self.url)

    def readable(self) -> bool:
        return True

    def readinto(self, buffer: Any) -> int:
        if not self.block and self.coming:
            self.block = memoryview(self.coming.popleft().result())
            self._ask()
        count = min(len(buffer), len(self.block))
        buffer[:count] = self.block[:count]
        self.block = self.block[count:]
        return count

    def close(self) -> None:
        self.pool.shutdown(wait=False, cancel_futures=True)
        self.file.close()
        super().close()


class Sized(io.RawIOBase):
    """A stream that must not end before `size` bytes."""

    def __init__(self, stream: IO[bytes], size: int, url: str) -> None:
        self.stream, self.size, self.url, self.seen = stream, size, url, 0

    def read(self, size: int = -1) -> bytes:
        data = self.stream.read(size)
        self.seen += len(data)
        if size and not data and self.seen < self.size:
            raise _cut_short(self.url, self.seen, self.size)
        return data

    def close(self) -> None:
        self.stream.close()
        super().close()


def _cut_short(url: str, seen: int, size: int) -> OSError:
    return OSError(
        f"{url} ended after {seen} of {size} bytes: the store cut it short, or it has changed "
        "since it was listed; run again"
    )
