"""Lists the shards, or other files, that a pattern matches, on any store."""

import posixpath
from collections.abc import Callable, Mapping
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from functools import partial
from typing import Any

from braceexpand import braceexpand
from fsspec.implementations.local import LocalFileSystem

from pipeline.runtime.errors import UserError
from pipeline.runtime.redaction import HTTP
from pipeline.store.retry import retry
from pipeline.store.storage import locate, read_bytes, up_to_date

VERSION_FIELDS = ("ETag", "etag", "mtime", "LastModified", "last_modified", "updated", "created")
COMPRESSED = (".tar.gz", ".tgz")
STATS_AT_ONCE = 16  # requests in flight where folders cannot be listed

Details = dict[str, dict[str, Any]]  # URL -> details from the store; size None where unknown


@dataclass(frozen=True)
class Shard:
    """One input file: a tar, or a file of embeddings."""

    stem: str  # unique in a run
    url: str
    size: int  # bytes; 0 if unknown
    version: str  # changes with the content: the ETag, else the modification time, else ""


@dataclass(frozen=True)
class Paired(Shard):
    """A tar, and the file with the embeddings of its samples."""

    file_url: str
    file_size: int
    file_version: str


def shard_of(facts: Mapping[str, Any]) -> Shard:
    """The shard that `dataclasses.asdict` made these facts of."""
    return Paired(**facts) if "file_url" in facts else Shard(**facts)


@dataclass(frozen=True)
class Kind:
    """A kind of input files, as messages call it."""

    suffixes: tuple[str, ...]
    what: str
    option: str  # of the command line
    remedy: str  # for files of another kind


TARS = Kind((".tar",), "shard", "--shards", "pack images into shards with `ratecluster shards`")


def list_shards(pattern: str) -> list[Shard]:
    """The shards of a pattern, sorted by URL; UserError if there are none or some are missing.

    A pattern is a brace pattern, a glob, a folder, one .tar, or a list file (.txt, .list, .lst)
    with one path or pattern per line, relative to the folder of the list.
    """
    return list_files(pattern, TARS)


def list_files(pattern: str, wanted: Kind) -> list[Shard]:
    """The files of one kind that a pattern as in `list_shards` matches; UserError as there."""
    kind, entries = _meaning(pattern, wanted)
    searched = {e for e in entries if kind == "a folder" or _is_glob(e)}
    found: Details = {}
    for entry in sorted(searched):
        if not (files := _search(entry)):
            raise UserError(
                f"no {wanted.what} matches {entry} (taken as {kind}); correct {wanted.option}"
            )
        found |= files
    named = [_canonical(entry) for entry in entries if entry not in searched]
    found = _ask(found | _look_up(named))
    if missing := sorted(set(named) - found.keys()):
        raise UserError(
            f"{len(missing)} of {len(set(named))} {wanted.what}s of {pattern} (taken as {kind}) "
            f"are missing, the first: {', '.join(missing[:3])}; correct {wanted.option}"
        )
    urls = sorted(url for url in found if _path(url).endswith(wanted.suffixes))
    if wrong := sorted(set(named).difference(urls)) or ([] if urls else sorted(found)):
        why = f"{wrong[0]} is not a {' or '.join(wanted.suffixes)}; {wanted.remedy}"
        if packed := [url for url in wrong if _path(url).endswith(COMPRESSED)]:
            why = f"{packed[0]} is compressed, which is not supported; unpack it to .tar"
        raise UserError(f"{pattern} (taken as {kind}): {why}")
    stems = _stems(urls, wanted.suffixes)
    return [_shard(stem, url, found[url]) for stem, url in zip(stems, urls, strict=True)]


def _meaning(pattern: str, wanted: Kind) -> tuple[str, list[str]]:
    """The kind of a pattern, and its paths, globs or folder."""
    if "{" in pattern:
        return "a brace pattern", _expand(pattern)
    if _is_glob(pattern):
        return "a glob", [pattern]
    if _path(pattern).endswith((".txt", ".list", ".lst")):
        lines = _lines(pattern, wanted)
        return "a list file", [path for line in lines for path in _expand(line)]
    if _path(pattern).endswith((*wanted.suffixes, *COMPRESSED)):
        return f"one {wanted.what}", [pattern]
    return "a folder", [pattern]


def _is_glob(pattern: str) -> bool:
    return any(c in pattern for c in ("*[" if pattern.startswith(HTTP) else "*?["))


def _expand(pattern: str) -> list[str]:
    """Braces as webdataset expands them, by the same package.

    Not its `expand_urls`: that cuts fsspec's chained URLs at "::", and takes ${NAME} for itself.
    """
    try:
        return list(braceexpand(pattern, escape=False))
    except ValueError:
        raise UserError(f"{pattern}: braces do not match; write it as {{00000..00012}}") from None


def _lines(url: str, wanted: Kind) -> list[str]:
    """The entries of a list file, made absolute."""
    try:
        lines = [line.strip() for line in read_bytes(url).decode("utf-8-sig").splitlines()]
    except (OSError, UnicodeDecodeError) as error:
        raise UserError(
            f"list file {url} cannot be read ({error}); correct {wanted.option}"
        ) from None
    entries = [line for line in lines if line and not line.startswith("#")]
    if not entries:
        raise UserError(f"list file {url} names no {wanted.what}; write one path per line")
    folder = posixpath.dirname(_canonical(url))
    return [
        entry if "://" in entry or entry.startswith("/") else f"{folder}/{entry.removeprefix('./')}"
        for entry in entries
    ]


def _prefix(url: str) -> str:
    """The prefix that makes a URL of a path in the store of `url`; "" on a local disk."""
    fs, path = locate(url)
    if isinstance(fs, LocalFileSystem) or url.startswith(HTTP):
        return ""
    return url.removesuffix(path) if url.endswith(path) else f"{fs.unstrip_protocol('')}"


def _canonical(url: str) -> str:
    """The URL as listings spell it: absolute, without `file://`."""
    url = url.rstrip("/")
    if url.startswith(HTTP):
        locate(url)  # raises for secrets in it
        return url  # its path would have the values of its variables
    return _prefix(url) + str(locate(url)[1])


def _path(url: str) -> str:
    """The URL without the query that HTTP allows."""
    return url.partition("?")[0] if url.startswith(HTTP) else url


def _search(pattern: str) -> Details:
    """The files of a folder or of a glob, without hidden ones."""
    pattern = pattern.rstrip("/")
    fs, path = locate(pattern)

    def search() -> list[dict[str, Any]]:
        if _is_glob(pattern):
            return list(fs.glob(path, detail=True).values())
        return list(fs.ls(path, detail=True)) if fs.isdir(path) else []

    prefix = _prefix(pattern)
    found = {prefix + entry["name"]: entry for entry in _files(fs, search, pattern)}
    return {url: e for url, e in found.items() if not posixpath.basename(url).startswith(".")}


def _look_up(urls: list[str]) -> Details:
    """Details of the files that exist among `urls`, from one listing of each folder."""
    found: Details = {url: {"size": None} for url in urls if url.startswith(HTTP)}  # no folders
    folders: dict[tuple[Any, str], list[str]] = {}
    for url in urls:
        if url not in found:
            fs, path = locate(url)
            folders.setdefault((fs, fs._parent(path)), []).append(url)
    for (fs, folder), members in folders.items():
        try:
            entries = _files(fs, partial(fs.ls, folder, detail=True), fs.unstrip_protocol(folder))
        except PermissionError:  # a bucket may allow reading, but no listing
            found |= {url: {"size": None} for url in members}
            continue
        there = {posixpath.basename(entry["name"]): entry for entry in entries}
        names = {url: posixpath.basename(url) for url in members}
        found |= {url: there[name] for url, name in names.items() if name in there}
    return found


def _files(fs: Any, search: Callable[[], list[dict[str, Any]]], url: str) -> list[dict[str, Any]]:
    """The files that `search` finds now; none without the folder."""
    try:
        with up_to_date(fs):
            entries = retry(search, url)
    except (FileNotFoundError, NotADirectoryError):
        return []
    return [entry for entry in entries if entry["type"] != "directory"]


def _ask(found: Details) -> Details:
    """`found` with the sizes that no listing had, without missing files."""

    def details(url: str) -> dict[str, Any] | None:
        fs, path = locate(url)
        try:
            return dict(retry(lambda: fs.info(path), url))
        except FileNotFoundError:
            return None

    unknown = [url for url, entry in found.items() if entry.get("size") is None]
    with ThreadPoolExecutor(STATS_AT_ONCE) as pool:
        answers = dict(zip(unknown, pool.map(details, unknown), strict=True))
    return {url: entry for url, old in found.items() if (entry := answers.get(url, old))}


def _shard(stem: str, url: str, entry: dict[str, Any]) -> Shard:
    version = next((str(entry[f]) for f in VERSION_FIELDS if entry.get(f)), "")
    return Shard(stem, url, int(entry.get("size") or 0), version.strip('"'))


def _stems(urls: list[str], suffixes: tuple[str, ...]) -> list[str]:
    """File names without suffix; where two are the same, paths below the deepest common folder."""
    ends = {url: next(s for s in suffixes if _path(url).endswith(s)) for url in urls}
    parts = [_path(url).removesuffix(ends[url]).split("/") for url in urls]
    stems = [part[-1] for part in parts]
    if len(set(stems)) < len(urls):
        places = list(zip(min(parts), max(parts), strict=False))  # of the first URL and the last
        common = next((i for i, (one, other) in enumerate(places) if one != other), 0)
        stems = ["__".join(part[common:]) for part in parts]
    if len(set(stems)) < len(urls):
        twice = next(stem for stem in stems if stems.count(stem) > 1)
        raise UserError(f"two files would both be called {twice}; rename one of them")
    return stems


def current(url: str) -> tuple[int, str]:
    """Size and version of a shard as it is now; FileNotFoundError if it is not there."""
    found = _ask({url: {"size": None}})
    if not found:
        raise FileNotFoundError(url)
    shard = _shard("", url, found[url])
    return shard.size, shard.version
