"""Files and folders on any fsspec store.

A file is seen whole or not at all. A folder is done when its manifest is there, and the manifest is
written last.
"""

import errno
import io
import json
import os
import shutil
import tempfile
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path
from typing import IO, Any, TypeVar, cast
from uuid import uuid4

from fsspec.core import url_to_fs
from fsspec.implementations.local import LocalFileSystem

from pipeline.errors import UserError
from pipeline.redaction import harmless, redacted, resolved

T = TypeVar("T")
ATTEMPTS = 4  # of one storage operation; the waits between them are 1, 2 and 4 seconds
FINAL = (FileNotFoundError, PermissionError, FileExistsError, IsADirectoryError, NotADirectoryError)
CLIENTS = ("botocore", "aiobotocore", "aiohttp", "urllib3", "requests", "gcsfs", "httpx")
PARTIAL = ".partial-"  # in the names of temporary files beside their targets
FULL = (errno.ENOSPC, errno.EDQUOT, errno.EROFS)


class DamagedError(OSError):
    """What a store gives is not what was written, however often it is read."""


def retry(operation: Callable[[], T]) -> T:
    """Run `operation`; an error of the store that may pass is tried again, with longer waits.

    What is raised tells no secret, though clients quote the URL they asked for.
    """
    for attempt in range(ATTEMPTS):
        try:
            return operation()
        except Exception as error:
            final = isinstance(error, FINAL) or not _may_pass(error)
            if final or attempt == ATTEMPTS - 1:
                if (told := harmless(error)) is not error:
                    raise told from None
                raise
            time.sleep(2**attempt)
    raise AssertionError("unreachable")


def locate(url: str) -> tuple[Any, str]:
    """The filesystem of a URL and its path there; UserError where fsspec has no such store.

    The path may hold secrets that the URL only names.
    """
    whole = resolved(url)
    try:
        return url_to_fs(whole)
    except (ValueError, ImportError) as error:  # an unknown protocol; its package is not installed
        raise UserError(redacted(f"{url}: {error}")) from None


def _may_pass(error: Exception) -> bool:
    """Errors of the network are OSErrors, or of the clients' own kinds."""
    if isinstance(error, OSError):
        return error.errno not in FULL
    return type(error).__module__.partition(".")[0] in CLIENTS


@contextmanager
def commit(url: str) -> Iterator[IO[bytes]]:
    """Open `url` for writing; it appears, whole, only if the block ends without an error.

    Local disk: a temporary file beside it, fsync, rename. Elsewhere: a local temporary file, then
    one put (s3fs completes a multipart upload only when all its parts are there).
    Not `with fs.open(url, "wb")`: on an error that closes the file, and so publishes half of it.
    Not `fs.transaction`: it belongs to the filesystem object, which fsspec shares between threads.
    """
    fs, path = locate(url)
    local = isinstance(fs, LocalFileSystem)
    if local:
        Path(path).parent.mkdir(parents=True, exist_ok=True)
        partial = Path(path).parent / f".{Path(path).name}{PARTIAL}{uuid4().hex}"
    else:
        partial = Path(tempfile.gettempdir()) / f"ratecluster-{uuid4().hex}"
    try:
        with partial.open("wb") as file:
            yield file
            file.flush()
            if local:
                os.fsync(file.fileno())
        if local:
            partial.replace(path)
            _sync_folder(Path(path).parent)
        else:
            retry(lambda: fs.put_file(str(partial), path))
    finally:
        with suppress(FileNotFoundError):
            partial.unlink()


def _sync_folder(folder: Path) -> None:
    handle = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)


def write_bytes(url: str, data: bytes) -> None:
    """Commit `data` as the file `url`."""
    with commit(url) as file:
        file.write(data)


def read_bytes(url: str) -> bytes:
    """The whole file."""
    fs, path = locate(url)
    return retry(lambda: bytes(fs.cat_file(path)))


def read_range(url: str, offset: int, size: int) -> bytes:
    """`size` bytes of the file from `offset`."""
    fs, path = locate(url)
    return retry(lambda: bytes(fs.cat_file(path, start=offset, end=offset + size)))


def open_read(url: str, size: int = 0) -> IO[bytes]:
    """The file as a stream, for one pass from its start to its end.

    Where its `size` is known, reading raises OSError if it ends before: a stream that the store cut
    short looks like a shorter file.
    """
    fs, path = locate(url)
    if isinstance(fs, LocalFileSystem):
        stream: IO[bytes] = Path(path).open("rb")  # noqa: SIM115 - the caller closes it
    else:
        stream = retry(lambda: fs.open(path, "rb", block_size=8 << 20, cache_type="readahead"))
    return cast(IO[bytes], _Sized(stream, size, url)) if size else stream


class _Sized(io.RawIOBase):
    """A stream that must not end before `size` bytes."""

    def __init__(self, stream: IO[bytes], size: int, url: str) -> None:
        self.stream, self.size, self.url, self.seen = stream, size, url, 0

    def read(self, size: int = -1) -> bytes:
        data = self.stream.read(size)
        self.seen += len(data)
        if size and not data and self.seen < self.size:
            raise OSError(
                f"{self.url} ended after {self.seen} of {self.size} bytes: the store cut it short, "
                "or it has changed since it was listed; run again"
            )
        return data

    def close(self) -> None:
        self.stream.close()
        super().close()


def absolute(url: str) -> str:
    """The URL, or the absolute path of a local one: workers have folders of their own."""
    return url.rstrip("/") if "://" in url else str(Path(url).expanduser().absolute())


def local_path(url: str) -> Path | None:
    """Where it lies on this machine's disks; None in a store that all machines reach."""
    fs, path = locate(url)
    return Path(path) if isinstance(fs, LocalFileSystem) else None


def exists(url: str) -> bool:
    """Whether the file is there."""
    fs, path = locate(url)
    return retry(lambda: bool(fs.exists(path)))


def check_writable(url: str) -> None:
    """Raise UserError unless a file can be made below the folder `url`; leaves nothing behind."""
    fs, path = locate(url)
    local = [Path(path), *Path(path).parents] if isinstance(fs, LocalFileSystem) else []
    missing = [folder for folder in local if not folder.exists()]
    probe = f"{url.rstrip('/')}/.ratecluster-probe-{uuid4().hex}"
    try:
        write_bytes(probe, b"")
        fs.rm_file(locate(probe)[1])
    except Exception as error:  # what a store raises without access depends on the store
        reason = getattr(error, "strerror", None) or " ".join(str(error).split())
        raise UserError(f"{url} cannot be written: {reason}; choose another folder") from None
    finally:
        with suppress(OSError):
            for folder in missing:
                folder.rmdir()


@dataclass(frozen=True)
class Folder:
    """What one stage leaves behind."""

    url: str

    def file(self, name: str) -> str:
        """The URL of a file in it."""
        return f"{self.url}/{name}"

    def names(self) -> set[str]:
        """Names of the files that lie in it; empty if there is no such folder."""
        fs, path = locate(self.url)
        try:
            fs.invalidate_cache(path)
            found = retry(lambda: fs.ls(path, detail=False))
        except (FileNotFoundError, NotADirectoryError):
            return set()
        return {str(name).rstrip("/").rpartition("/")[2] for name in found}

    def manifest(self) -> dict[str, Any]:
        """The facts of the finished stage; UserError if it is not finished."""
        if (manifest := self.peek()) is None:
            stage = self.url.rpartition("/")[2]
            raise UserError(f"{self.url} is not finished: run the stage that makes {stage} first")
        return manifest

    def peek(self) -> dict[str, Any] | None:
        """The manifest, or None where the stage has not finished."""
        url = self.file("manifest.json")

        def load() -> dict[str, Any]:
            data = read_bytes(url)
            try:
                return dict(json.loads(data))
            except (ValueError, TypeError) as error:  # a read may have been cut short
                raise DamagedError(
                    f"{url} cannot be read ({error}): if it is damaged, delete it and run again"
                ) from None

        try:
            return retry(load)
        except FileNotFoundError:
            return None

    def finish(self, fingerprint: str, **facts: object) -> None:
        """Write the manifest: from here on the stage is done. Killed writers' leavings go."""
        self.sweep()
        manifest = {"fingerprint": fingerprint, **facts}
        text = json.dumps(manifest, indent=1, sort_keys=True, ensure_ascii=False)
        write_bytes(self.file("manifest.json"), text.encode())

    def sweep(self) -> None:
        """Delete the temporary files of writers that were killed."""
        self.remove({name for name in self.names() if name.startswith(".") and PARTIAL in name})

    def remove(self, names: set[str]) -> None:
        """Delete files of it, the manifest first."""
        fs, _ = locate(self.url)
        for name in sorted(names, key=lambda name: name != "manifest.json"):
            _, path = locate(self.file(name))
            with suppress(FileNotFoundError):
                fs.rm(path, recursive=True)

    def clear(self) -> None:
        """Delete everything in it, the manifest first."""
        fs, path = locate(self.url)
        self.remove({"manifest.json"} & self.names())
        if isinstance(fs, LocalFileSystem):
            shutil.rmtree(path, ignore_errors=True)
        else:
            self.remove(self.names())
