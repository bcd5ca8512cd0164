"""Files and folders on any fsspec store.

Files are committed atomically. A folder is complete when it has a manifest, which is written last.
"""

import hashlib
import io
import json
import os
import shutil
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import IO, Any, cast
from uuid import uuid4

from fsspec.core import has_magic, url_to_fs
from fsspec.implementations.local import LocalFileSystem
from fsspec.spec import AbstractBufferedFile

from pipeline.runtime.errors import UserError
from pipeline.runtime.redaction import HTTP, redacted, resolved
from pipeline.store.read_ahead import Ahead, Sized
from pipeline.store.retry import retry

MANIFEST = "manifest.json"
END_BYTES = 1 << 20  # at each end of a file, of `content`
PARTIAL = ".partial-"  # in the names of temporary files, next to their targets


class DamagedError(OSError):
    """A file does not hold what was written, however often it is read."""


def locate(url: str) -> tuple[Any, str]:
    """The filesystem of a URL and its path there; UserError where fsspec has no such store.

    The path may contain secrets that the URL only names.
    """
    whole = resolved(url)
    try:
        return url_to_fs(whole)
    except (ValueError, ImportError) as error:  # an unknown protocol; its package is not installed
        raise UserError(redacted(f"{url}: {error}")) from None


@contextmanager
def up_to_date(fs: Any) -> Iterator[None]:
    """List a store without fsspec's cache, which misses what other processes have written."""
    fs.invalidate_cache()
    try:
        yield
    finally:
        fs.invalidate_cache()


@contextmanager
def commit(url: str) -> Iterator[IO[bytes]]:
    """Open `url` for writing; the file appears only if the block ends without an error.

    Local disk: a temporary file next to it, fsync, rename. Elsewhere: a local temporary file, then
    one put (s3fs completes a multipart upload only when all its parts are there).
    Not `with fs.open(url, "wb")`, which publishes half a file on an error. Not `fs.transaction`,
    which belongs to the filesystem object that threads share.
    """
    fs, path = locate(url)
    local, target = isinstance(fs, LocalFileSystem), Path(path)
    if local:
        target.parent.mkdir(parents=True, exist_ok=True)
        temporary = target.parent / f".{target.name}{PARTIAL}{uuid4().hex}"
    else:  # stores guess the type from the suffix
        temporary = Path(tempfile.gettempdir(), f"ratecluster-{uuid4().hex}{target.suffix}")
    try:
        with temporary.open("wb") as file:
            yield file
            file.flush()
            if local:
                os.fsync(file.fileno())
        if local:
            temporary.replace(target)
            _sync_folder(target.parent)
        else:
            retry(lambda: fs.put_file(str(temporary), path), url)
    finally:
        temporary.unlink(missing_ok=True)


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


def read_bytes(url: str, start: int | None = None, end: int | None = None) -> bytes:
    """The file, or its bytes from `start` to before `end`; a negative start counts from its end."""
    fs, path = locate(url)
    return retry(lambda: bytes(fs.cat_file(path, start=start, end=end)), url)


def read_range(url: str, offset: int, size: int) -> bytes:
    """`size` bytes of the file from `offset`."""
    return read_bytes(url, offset, offset + size)


def read_tail(url: str, size: int) -> bytes:
    """The last `size` bytes of the file, or all of a shorter one."""
    return read_bytes(url, -size)[-size:]  # some stores return the whole file


def content(url: str, size: int) -> str:
    """Digest of a file's size, and of its first and last MiB."""
    ends = [read_range(url, 0, END_BYTES)]
    if size > END_BYTES:
        ends.append(read_range(url, max(END_BYTES, size - END_BYTES), END_BYTES))
    return hashlib.blake2b(b"".join([str(size).encode(), b" ", *ends]), digest_size=16).hexdigest()


def open_read(url: str, size: int = 0, version: str = "") -> IO[bytes]:
    """The file as a stream, for one pass from its start to its end.

    With a known `size`, remote files are read ahead, and a stream that ends early raises OSError.
    On S3, a file whose ETag is not `version` raises ChangedError.
    """
    fs, path = locate(url)
    if isinstance(fs, LocalFileSystem):
        stream: IO[bytes] = Path(path).open("rb")  # noqa: SIM115 - the caller closes it
    elif not size or not (fs.async_impl or "hf" in fs.protocol):  # others: one request at a time
        stream = retry(lambda: fs.open(path, "rb", block_size=8 << 20, cache_type="readahead"), url)
    else:
        known = {} if url.startswith(HTTP) else {"size": size}  # HTTP: fsspec must ask for ranges
        stream = retry(lambda: fs.open(path, "rb", cache_type="none", **known), url)
        if isinstance(stream, AbstractBufferedFile) and stream.size:  # none: HTTP without ranges
            if hasattr(stream, "read_kw"):  # S3: saves a request for the details
                stream.details = {"name": path, "size": size, "ETag": f'"{version}"'}
                stream.read_kw |= {"IfMatch": f'"{version}"'} if version else {}
            return io.BufferedReader(Ahead(stream, size, url), 1 << 20)
    return cast(IO[bytes], Sized(stream, size, url)) if size else stream


def open_pieces(url: str) -> IO[bytes]:
    """The file for random reads; each fetches only its own bytes."""
    fs, path = locate(url)
    if isinstance(fs, LocalFileSystem):
        return Path(path).open("rb")
    return cast(IO[bytes], retry(lambda: fs.open(path, "rb", cache_type="none"), url))


def without_query(url: str) -> str:
    """The URL without the query that HTTP allows."""
    return url.partition("?")[0] if url.startswith(HTTP) else url


def absolute(url: str) -> str:
    """The URL, or the absolute path of a local one: workers have other working folders."""
    return url.rstrip("/") if "://" in url else str(Path(url).expanduser().absolute())


def local_path(url: str) -> Path | None:
    """The path on a local disk; None in a remote store."""
    fs, path = locate(url)
    return Path(path) if isinstance(fs, LocalFileSystem) else None


def exists(url: str) -> bool:
    """Whether the file is there."""
    fs, path = locate(url)
    return retry(lambda: bool(fs.exists(path)), url)


def check_writable(url: str) -> None:
    """Raise UserError unless a file can be created in the folder `url`; leaves nothing there."""
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
    """The output folder of a stage."""

    url: str

    def file(self, name: str) -> str:
        """The URL of a file in it."""
        return f"{self.url}/{name}"

    def names(self) -> set[str]:
        """The names of its files; empty without the folder."""
        fs, path = locate(self.url)
        try:
            with up_to_date(fs):
                found = retry(lambda: fs.ls(path, detail=False), self.url)
        except (FileNotFoundError, NotADirectoryError):
            return set()
        return {str(name).rstrip("/").rpartition("/")[2] for name in found}

    def stems(self) -> list[str]:
        """The names of its Parquet files, without the suffix."""
        return [n.removesuffix(".parquet") for n in self.names() if n.endswith(".parquet")]

    def manifest(self) -> dict[str, Any]:
        """The manifest of the finished stage; UserError if it is not finished."""
        if (manifest := self.peek()) is None:
            stage = self.url.rpartition("/")[2]
            raise UserError(f"{self.url} is not finished: run the stage that makes {stage} first")
        return manifest

    def peek(self, name: str = MANIFEST) -> dict[str, Any] | None:
        """The manifest, or None where the stage has not finished."""
        url = self.file(name)

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
        """Write the manifest, which completes the stage, after deleting temporary files."""
        self.sweep()
        manifest = {"fingerprint": fingerprint, **facts}
        text = json.dumps(manifest, indent=1, sort_keys=True, ensure_ascii=False)
        write_bytes(self.file(MANIFEST), text.encode())

    def sweep(self) -> None:
        """Delete the temporary files of writers that were killed."""
        self.remove({name for name in self.names() if name.startswith(".") and PARTIAL in name})

    def remove(self, names: set[str]) -> None:
        """Delete some of its files, the manifest first."""
        fs, _ = locate(self.url)
        for some in ({MANIFEST} & names, names - {MANIFEST}):
            if not isinstance(fs, LocalFileSystem):
                retry(partial(self._remove_remote, some), self.url)
                continue
            for name in some:
                with suppress(FileNotFoundError):
                    fs.rm(locate(self.file(name))[1], recursive=True)

    def _remove_remote(self, names: set[str]) -> None:
        """Delete many files; s3fs deletes 1,000 per request and ignores the answer."""
        if not names or not (there := sorted(names & self.names())):
            return
        fs, _ = locate(self.url)
        paths = [locate(self.file(name))[1] for name in there]
        # fsspec takes a list of paths as patterns; only asynchronous clients accept a list
        plain = [path for path in paths if fs.async_impl and not has_magic(path)]
        with suppress(FileNotFoundError):
            for path in sorted(set(paths).difference(plain)):
                fs.rm_file(path)
            if plain:
                fs.rm(plain)
        if left := sorted(names & self.names()):
            raise OSError(
                f"{self.url}: {len(left)} of {len(there)} files could not be deleted, the "
                f"first: {left[0]}; check that deleting is allowed there"
            )

    def clear(self) -> None:
        """Delete everything in it, the manifest first."""
        fs, path = locate(self.url)
        if isinstance(fs, LocalFileSystem):
            self.remove({MANIFEST} & self.names())
            shutil.rmtree(path, ignore_errors=True)
        else:
            self.remove(self.names())
