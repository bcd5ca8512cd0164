"""webdataset shards: list, read, write. Nothing is decoded, unpickled or unpacked to disk.

A shard is a tar. Neighbouring members are one sample where their paths agree up to the first dot
of the file name: `a/7.jpg`, `a/7.txt`, `a/7.json` are `jpg`, `txt` and `json` of the key `a/7`.
"""

import io
import json
import posixpath
import re
import tarfile
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from typing import IO, Any

from braceexpand import braceexpand
from fsspec.core import url_to_fs

from pipeline.errors import UserError
from pipeline.store.storage import read_bytes, retry

IMAGE_SUFFIXES = ("jpg", "jpeg", "png", "webp", "gif", "bmp", "tif", "tiff")
VERSION_FIELDS = ("ETag", "etag", "mtime", "LastModified", "last_modified", "updated", "created")
HTTP = ("http://", "https://")
COMPRESSED = (".tar.gz", ".tgz")
STATS_AT_ONCE = 16  # requests under way where folders cannot be listed
CUT_OFF = "cut_off: shard ends inside it"
ANY_BYTES = "surrogateescape"  # so that names which are not UTF-8 survive
BLOCK = 512  # bytes; a tar is made of these
READ_BYTES = 1 << 20  # at most, in one call of the stream
EXTENDED_HEADER_BYTES = 1 << 20  # at most; a longer one is damage

Details = dict[str, dict[str, Any]]  # URL -> what the store tells; size None where it was not asked


@dataclass(frozen=True)
class Shard:
    """One input tar."""

    stem: str  # unique in a run
    url: str
    size: int  # bytes; 0 where the store does not tell
    version: str  # changes with the content: the etag, else the time of change, else ""


def list_shards(pattern: str) -> list[Shard]:
    """The shards that a pattern means, sorted by URL; UserError if there are none or some lack.

    A pattern is a brace pattern, a glob, a folder, one .tar, or a list file (.txt, .list, .lst)
    with one path or pattern per line, relative to the folder of the list.
    """
    kind, entries = _meaning(pattern)
    searched = {e for e in entries if kind == "a folder" or _is_glob(e)}
    found: Details = {}
    for entry in sorted(searched):
        if not (files := _search(entry)):
            raise UserError(f"no shard matches {entry} (taken as {kind}); correct --shards")
        found |= files
    named = [_canonical(entry) for entry in entries if entry not in searched]
    found = _ask(found | _look_up(named))
    if missing := sorted(set(named) - found.keys()):
        raise UserError(
            f"{len(missing)} of {len(set(named))} shards of {pattern} (taken as {kind}) are "
            f"missing, the first: {', '.join(missing[:3])}; correct --shards"
        )
    urls = sorted(url for url in found if _path(url).endswith(".tar"))
    if wrong := sorted(set(named).difference(urls)) or ([] if urls else sorted(found)):
        raise UserError(f"{pattern} (taken as {kind}): {_unfit(wrong)}")
    return [_shard(stem, url, found[url]) for stem, url in zip(_stems(urls), urls, strict=True)]


def _unfit(urls: list[str]) -> str:
    """Why files that are no .tar cannot be used."""
    if packed := [url for url in urls if _path(url).endswith(COMPRESSED)]:
        return f"{packed[0]} is compressed, which is not supported; unpack it to .tar"
    return f"{urls[0]} is not a .tar; pack images into shards with `ratecluster shards`"


def _meaning(pattern: str) -> tuple[str, list[str]]:
    """What a pattern is taken as, and the paths, globs or the folder it stands for."""
    if "{" in pattern:
        return "a brace pattern", _expand(pattern)
    if _is_glob(pattern):
        return "a glob", [pattern]
    if pattern.endswith((".txt", ".list", ".lst")):
        return "a list file", [path for line in _lines(pattern) for path in _expand(line)]
    if _path(pattern).endswith((".tar", *COMPRESSED)):
        return "one shard", [pattern]
    return "a folder", [pattern]


def _is_glob(pattern: str) -> bool:
    return any(c in pattern for c in ("*[" if pattern.startswith(HTTP) else "*?["))


def _expand(pattern: str) -> list[str]:
    try:
        return list(braceexpand(pattern, escape=False))
    except ValueError:
        raise UserError(f"{pattern}: braces do not match; write it as {{00000..00012}}") from None


def _lines(url: str) -> list[str]:
    """The entries of a list file, made absolute."""
    try:
        lines = [line.strip() for line in read_bytes(url).decode("utf-8-sig").splitlines()]
    except (OSError, UnicodeDecodeError) as error:
        raise UserError(f"list file {url} cannot be read ({error}); correct --shards") from None
    entries = [line for line in lines if line and not line.startswith("#")]
    if not entries:
        raise UserError(f"list file {url} names no shard; write one path per line")
    folder = posixpath.dirname(_canonical(url))
    return [
        entry if "://" in entry or entry.startswith("/") else f"{folder}/{entry.removeprefix('./')}"
        for entry in entries
    ]


def _is(fs: Any, protocol: str) -> bool:
    return protocol in ((fs.protocol,) if isinstance(fs.protocol, str) else fs.protocol)


def _prefix(url: str) -> str:
    """What stands before a path in the store of `url` to make it a URL; nothing on a local disk."""
    fs, path = url_to_fs(url)
    if _is(fs, "file"):
        return ""
    return url.removesuffix(path) if url.endswith(path) else f"{fs.unstrip_protocol('')}"


def _canonical(url: str) -> str:
    """The same place spelt as a listing spells it: absolute, without `file://`."""
    url = url.rstrip("/")
    return _prefix(url) + str(url_to_fs(url)[1])


def _path(url: str) -> str:
    """The URL without the query that HTTP allows."""
    return url.partition("?")[0] if url.startswith(HTTP) else url


def _search(pattern: str) -> Details:
    """The files of a folder, or those that a glob matches, but for hidden ones."""
    pattern = pattern.rstrip("/")
    fs, path = url_to_fs(pattern)
    fs.invalidate_cache()
    try:
        if _is_glob(pattern):
            entries = list(retry(lambda: fs.glob(path, detail=True)).values())
        else:
            entries = retry(lambda: fs.ls(path, detail=True)) if fs.isdir(path) else []
    except FileNotFoundError:
        return {}
    prefix = _prefix(pattern)
    files = {prefix + entry["name"]: entry for entry in entries if entry["type"] != "directory"}
    return {url: e for url, e in files.items() if not posixpath.basename(url).startswith(".")}


def _look_up(urls: list[str]) -> Details:
    """Details of the files that exist among `urls`, from one listing of each folder."""
    folders: dict[tuple[Any, str], list[str]] = {}
    for url in urls:
        fs, path = url_to_fs(url)
        folders.setdefault((fs, fs._parent(path)), []).append(url)
    found: Details = {}
    for (fs, folder), members in folders.items():
        listing = _listing(fs, folder)
        for url in members:
            name = posixpath.basename(url)
            if listing is None:
                found[url] = {"size": None}
            elif name in listing:
                found[url] = listing[name]
    return found


def _listing(fs: Any, folder: str) -> Details | None:
    """File name -> details; None where folders cannot be listed."""
    if _is(fs, "http"):
        return None
    fs.invalidate_cache()
    try:
        entries = retry(lambda: fs.ls(folder, detail=True))
    except (FileNotFoundError, NotADirectoryError):
        return {}
    except PermissionError:  # a bucket may allow to read what it does not allow to list
        return None
    return {posixpath.basename(e["name"]): e for e in entries if e["type"] != "directory"}


def _ask(found: Details) -> Details:
    """`found` with the sizes that no listing gave; files that are missing drop out."""

    def details(url: str) -> dict[str, Any] | None:
        fs, path = url_to_fs(url)
        try:
            return dict(retry(lambda: fs.info(path)))
        except FileNotFoundError:
            return None

    unknown = [url for url, entry in found.items() if entry.get("size") is None]
    with ThreadPoolExecutor(STATS_AT_ONCE) as pool:
        answers = dict(zip(unknown, pool.map(details, unknown), strict=True))
    return {url: entry for url, old in found.items() if (entry := answers.get(url, old))}


def _shard(stem: str, url: str, entry: dict[str, Any]) -> Shard:
    version = next((str(entry[f]) for f in VERSION_FIELDS if entry.get(f)), "")
    return Shard(stem, url, int(entry.get("size") or 0), version.strip('"'))


def _stems(urls: list[str]) -> list[str]:
    """File names without .tar; where two are the same, paths below the deepest common folder."""
    parts = [_path(url).removesuffix(".tar").split("/") for url in urls]
    stems = [part[-1] for part in parts]
    if len(set(stems)) < len(urls):
        low, high = min(parts), max(parts)
        same = next(
            (i for i, pair in enumerate(zip(low, high, strict=False)) if pair[0] != pair[1]), 0
        )
        stems = ["__".join(part[same:]) for part in parts]
    if len(set(stems)) < len(urls):
        twice = next(stem for stem in stems if stems.count(stem) > 1)
        raise UserError(f"two shards would both be called {twice}; rename one of them")
    return stems


@dataclass(frozen=True)
class Member:
    """One file of a sample."""

    name: str  # as in the tar; bytes that are not UTF-8 are spelt `\\xff`
    suffix: str  # lower case; what follows the first dot of the file name: `jpg`, `seg.jpg`
    offset: int  # byte at which the data begins in the tar
    size: int  # bytes
    data: bytes  # b"" if not whole
    whole: bool = True  # False where it was not read: too large, cut off, a link
    exact_name: str | None = None  # the name with its surrogates, where it is not UTF-8

    @property
    def tar_name(self) -> str:
        """The name to give it in another tar."""
        return self.exact_name or self.name


class MissingImage(Exception):  # noqa: N818 - it reads as what happened
    """A sample that has no image, or several that could be it; the text is the reason."""


@dataclass(frozen=True)
class Sample:
    """Neighbouring members with the same key."""

    key: str  # as webdataset has it; bytes that are not UTF-8 are spelt `\\xff`
    id: str  # unique in the shard: the key, or `key#2`, `key#3` for one that came before
    index: int  # position in the shard, from 0
    members: tuple[Member, ...]  # in the order of the tar
    problem: str | None  # why it may not be used, `duplicate_key` for example

    def image(self) -> Member:
        """The image: `7.jpg`, else the only one with a longer suffix, such as `7.seg.jpg`."""
        for member in self.members:
            if member.suffix in IMAGE_SUFFIXES:
                return member
        dotted = [m for m in self.members if m.suffix.rpartition(".")[2] in IMAGE_SUFFIXES]
        if not dotted:
            raise MissingImage("missing_image")
        if len(dotted) > 1:
            raise MissingImage(f"ambiguous_image: {', '.join(m.suffix for m in dotted)}")
        return dotted[0]

    def caption(self) -> str | None:
        """The text of the txt member; bytes that are not UTF-8 become U+FFFD, NUL is dropped."""
        member = self._first("txt")
        return None if member is None else member.data.decode("utf-8", "replace").replace("\0", "")

    def json_text(self) -> str | None:
        """The json member as it stands, if it is UTF-8 and holds one object."""
        member = self._first("json")
        if member is None:
            return None
        try:
            text = member.data.decode("utf-8")
            return text if isinstance(json.loads(text), dict) else None
        except (ValueError, RecursionError):
            return None

    def has_bad_json(self) -> bool:
        """Whether there is a json member of which nothing can be made."""
        return self._first("json") is not None and self.json_text() is None

    def _first(self, suffix: str) -> Member | None:
        return next((m for m in self.members if m.suffix == suffix and m.whole), None)


class _Source(io.RawIOBase):
    """Makes of a stream, read onward only, what TarFile wants; remembers its failure."""

    def __init__(self, stream: IO[bytes]) -> None:
        self.stream = stream
        self.position = 0
        self.last = b""  # what the last read gave
        self.failure: Exception | None = None  # an error of the store, not of the archive

    def tell(self) -> int:
        return self.position

    def read(self, size: int = -1) -> bytes:
        """`size` bytes, fewer only at the end of the stream."""
        pieces, left = [], size
        try:
            while left > 0 and (piece := self.stream.read(min(left, READ_BYTES))):
                pieces.append(piece)
                left -= len(piece)
        except Exception as error:
            self.failure = error
            raise
        self.last = pieces[0] if len(pieces) == 1 else b"".join(pieces)
        self.position += len(self.last)
        return self.last

    def seek(self, target: int, whence: int = io.SEEK_SET) -> int:
        """Skip to `target`, which lies ahead, or to the end of the stream if that comes first."""
        if target < self.position:
            raise tarfile.ReadError("a header points backwards")
        while target > self.position and self.read(min(target - self.position, READ_BYTES)):
            pass
        return self.position


class _Header(tarfile.TarInfo):
    """A header that may not ask for endless memory."""

    @classmethod
    def frombuf(cls, buf: bytes | bytearray, encoding: str, errors: str) -> "_Header":
        header = super().frombuf(buf, encoding, errors)
        extended = header.type in (b"x", b"g", b"X", b"L", b"K")
        if header.size < 0 or (extended and header.size > EXTENDED_HEADER_BYTES):
            raise tarfile.ReadError(f"a header of type {header.type!r} has {header.size} bytes")
        return header


class _Draft:
    """A sample in the making."""

    def __init__(self, key: str, id: str, problem: str | None) -> None:
        self.key, self.id, self.problem = key, id, problem
        self.members: list[Member] = []

    def add(self, member: Member, problem: str | None) -> None:
        if any(member.suffix == other.suffix for other in self.members):
            problem = problem or f"duplicate_member: {member.suffix}"
        self.problem = self.problem or problem
        self.members.append(member)

    def sample(self, index: int) -> Sample:
        return Sample(_text(self.key), self.id, index, tuple(self.members), self.problem)


class ShardReader:
    """Iterates once over the samples of a shard, holding one; damage ends it, and `end` says so.

    A member larger than `max_member_bytes` is not read. Errors of the store are raised as they are.
    Without an end-of-archive marker the last sample may lack members: nothing can tell.
    """

    def __init__(self, stream: IO[bytes], max_member_bytes: int | None) -> None:
        self.end = ""  # once read: complete, no end-of-archive marker, or damaged at byte N: ...
        self._source = _Source(stream)
        self._limit = max_member_bytes
        self._tar: tarfile.TarFile | None = None
        self._times: dict[str, int] = {}  # how often each key came
        self._ids: set[str] = set()

    def __iter__(self) -> Iterator[Sample]:
        draft: _Draft | None = None
        index = 0
        while (header := self._next()) is not None:
            if (split := _split(header.name)) is None or header.isdir():
                continue
            if draft is None or draft.key != split[0]:
                if draft is not None:
                    yield draft.sample(index)
                    index += 1
                draft = self._begin(split[0], header.name)
            draft.add(*self._member(header, split[1]))
        if draft is not None:
            if self.end.startswith("damaged"):
                draft.problem = draft.problem or CUT_OFF
            yield draft.sample(index)

    def _begin(self, key: str, name: str) -> _Draft:
        text = _text(key)
        times = self._times.get(key, 0) + 1
        problem = "duplicate_key" if times > 1 else None
        if _is_unsafe(name):
            problem = f"unsafe_name: {_text(name)}"
        id = text if times == 1 else f"{text}#{times}"
        while id in self._ids:
            times += 1
            id = f"{text}#{times}"
        self._times[key] = times
        self._ids.add(id)
        return _Draft(key, id, problem)

    def _next(self) -> tarfile.TarInfo | None:
        """The next header; None where the archive ends, after `end` has been set."""
        if self.end:
            return None
        try:
            if self._tar is None:
                self._tar = tarfile.TarFile(
                    fileobj=self._source, tarinfo=_Header, encoding="utf-8", errors=ANY_BYTES
                )
            header = self._tar.next()
            self._tar.members = []  # type: ignore[attr-defined]  # else it keeps every header
        except MemoryError:
            raise
        except Exception as error:  # a bad header makes tarfile raise nearly anything
            if self._source.failure is not None:
                raise self._source.failure from None
            self._damaged(str(error))
            return None
        if header is None:
            self._ended(self._source.last)
        return header

    def _ended(self, block: bytes) -> None:
        """Tell from the last block why tarfile found no further header: it does not say itself."""
        if not block:
            self.end = "no end-of-archive marker"
        elif len(block) < BLOCK:
            self._damaged("the shard ends inside a header")
        elif any(block):
            self._damaged("bad header")
        else:
            self.end = "complete"

    def _damaged(self, why: str) -> None:
        self.end = f"damaged at byte {self._source.position - len(self._source.last)}: {why}"

    def _member(self, header: tarfile.TarInfo, suffix: str) -> tuple[Member, str | None]:
        """The member with its data, and what is wrong with it."""
        problem, data = None, b""
        if not header.isreg():
            kind = "link" if header.issym() or header.islnk() else "special_file"
            problem = f"{kind}: {_text(header.name)}"
        elif header.issparse():
            problem = f"sparse_file: {_text(header.name)}"
        elif self._limit is not None and header.size > self._limit:
            problem = f"member_too_large: {suffix} has {header.size} bytes"
        else:
            data = self._source.read(header.size)
            if len(data) < header.size:
                self.end = f"damaged at byte {self._source.position}: the shard ends inside a file"
                problem, data = CUT_OFF, b""
        name, whole = _text(header.name), problem is None
        exact = None if name == header.name else header.name
        return Member(name, suffix, header.offset_data, header.size, data, whole, exact), problem


def _split(name: str) -> tuple[str, str] | None:
    """Key and suffix; None for what webdataset skips: no dot, hidden files, `__meta__`."""
    folder, slash, file = name.rpartition("/")
    stem, dot, suffix = file.partition(".")
    if not (stem and dot) or re.match(r"__[^/]*__($|/)", name):
        return None
    return folder + slash + stem, _text(suffix).lower()


def _is_unsafe(name: str) -> bool:
    return name.startswith("/") or ".." in name.split("/") or "\0" in name


def _text(name: str) -> str:
    """A name with its undecodable bytes spelt out, so that it can be stored as UTF-8."""
    return name.encode("utf-8", "surrogateescape").decode("utf-8", "backslashreplace")


class ShardWriter:
    """Writes a tar whose bytes depend on names and data only; `stream` stays open.

    The end-of-archive marker is written if the `with` block ends without an error.
    """

    def __init__(self, stream: IO[bytes]) -> None:
        self._tar = tarfile.TarFile(
            mode="w", fileobj=stream, format=tarfile.GNU_FORMAT, encoding="utf-8", errors=ANY_BYTES
        )

    def __enter__(self) -> "ShardWriter":
        return self

    def __exit__(self, kind: type[BaseException] | None, *error: object) -> None:
        if kind is None:
            self._tar.close()

    def add(self, name: str, data: bytes) -> None:
        """Append a file: mode 0644, no time and no owner."""
        header = tarfile.TarInfo(name)
        header.size = len(data)
        self._tar.addfile(header, io.BytesIO(data))
        self._tar.members = []  # type: ignore[attr-defined]  # else it keeps every header


def labelled(sample: Sample, label: dict[str, Any]) -> Iterator[tuple[str, bytes]]:
    """Names and bytes of the sample for the output shard: as they were, with the label added.

    It becomes the key `ratecluster` of the json member, of which no other character changes. A json
    member that is no object stays, and `{key}.ratecluster.json` is added. Members without bytes
    (links) are left out, and whole samples with unsafe names.
    """
    if any(_is_unsafe(member.tar_name) for member in sample.members):
        return
    text = sample.json_text()
    alone = json.dumps({"ratecluster": label}, sort_keys=True, ensure_ascii=False, allow_nan=False)
    added = "ratecluster.json" if sample.has_bad_json() else "json"
    pending = True
    for member in sample.members:
        if not member.whole or member.suffix == added != "json":
            continue
        if member.suffix == "json" and text is not None and pending:
            yield member.tar_name, _with_label(text, alone).encode()
            pending = False
        else:
            yield member.tar_name, member.data
    if pending:
        names = [split[0] for m in sample.members if (split := _split(m.tar_name))] or [sample.key]
        yield f"{names[0]}.{added}", alone.encode()


def _with_label(text: str, label: str) -> str:
    """Put the one key of the object `label` last into the object `text`."""
    facts = json.loads(text)
    if "ratecluster" in facts:
        del facts["ratecluster"]
        text = json.dumps(facts)
    head, brace, tail = text.rpartition("}")
    return f"{head}{', ' if facts else ''}{label[1:-1]}{brace}{tail}"
