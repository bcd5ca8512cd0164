"""Lists the shards, or other files, that a pattern matches, on any store."""

import logging
import posixpath
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

from braceexpand import braceexpand
from fsspec.implementations.local import LocalFileSystem

from pipeline.runtime.errors import UserError
from pipeline.runtime.redaction import HTTP
from pipeline.store import compressed, storage
from pipeline.store.retry import retry
from pipeline.store.storage import locate, read_bytes, up_to_date, without_query

log = logging.getLogger(__name__)
VERSION_FIELDS = ("ETag", "etag", "mtime", "LastModified", "last_modified", "updated", "created")
ARCHIVES = (".zip", ".7z", ".rar", ".tar.lz4", ".tar.lzma")
CHAINED = {"zip", "tar", "simplecache", "filecache", "blockcache", "cached", "dir", "reference"}
SUBFOLDERS = 20  # of a folder that are looked at for a warning
STATS_AT_ONCE = 16  # requests in flight where folders cannot be listed

Details = dict[str, dict[str, Any]]  # URL -> details from the store; size None where unknown


@dataclass(frozen=True)
class Shard:
    """One input file: a tar, or a file of embeddings."""

    stem: str  # unique in a run
    url: str
    size: int  # bytes; 0 if unknown
    version: str  # changes with the content: the ETag, else the modification time, else ""
    now: str = ""  # the version since it was moved or touched; "" where that is `version`
    content: str = ""  # digest of its ends when it was embedded; "" before


@dataclass(frozen=True, kw_only=True)
class Paired(Shard):
    """A tar, and the file with the embeddings of its samples."""

    file_url: str
    file_size: int
    file_version: str


def version_now(facts: Mapping[str, Any]) -> str:
    """The version that the file of a shard has now, by its facts."""
    return str(facts.get("now") or facts["version"])


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


TARS = Kind(
    (".tar", *compressed.SUFFIXES),
    "shard",
    "--shards",
    "pack images into shards with `ratecluster shards --from FOLDER --out FOLDER`",
)


def list_shards(patterns: str | Sequence[str], root: str = "") -> list[Shard]:
    """The shards of all patterns, sorted by URL; UserError if there are none or some are missing.

    A pattern is a brace pattern, a glob, a folder, one shard, or a list file (.txt, .list, .lst)
    with one path or pattern per line, relative to the folder of the list. What exists by the name
    of a pattern is taken as it is. `a.tar::b.tar` are two patterns, as in webdataset. Files below
    the folder `root` of the run are left out.
    """
    return list_files(patterns, TARS, root)


def list_files(patterns: str | Sequence[str], wanted: Kind, root: str = "") -> list[Shard]:
    """The files of one kind that patterns as in `list_shards` match; UserError as there."""
    given = [patterns] if isinstance(patterns, str) else patterns
    every = [part for pattern in given for part in _split(pattern, wanted)]
    if not every or not all(part.strip() for part in every):
        raise UserError(f"{wanted.option} is empty text; name a {wanted.what} or a folder")
    found: Details = {}
    for part in every:
        found |= _matches(part, wanted)
    if root and (own := [url for url in found if url.startswith(f"{_canonical(root)}/")]):
        log.info("%d %ss below the run's folder are left out: %s", len(own), wanted.what, own[0])
        found = {url: entry for url, entry in found.items() if url not in own}
        if not found:
            raise UserError(
                f"all {wanted.what}s of {', '.join(every)} lie below --root {root}; choose another "
                f"--root, or correct {wanted.option}"
            )
    urls = sorted(found)
    stems = _stems(urls, wanted.suffixes)
    return [_shard(stem, url, found[url]) for stem, url in zip(stems, urls, strict=True)]


def _split(pattern: str, wanted: Kind) -> list[str]:
    """The patterns in one that webdataset's `::` joins; fsspec's chained URLs stay whole."""
    parts = pattern.split("::")
    files = [p for p in parts if _is_wanted(p, wanted) or p.endswith(("}", "]", "*"))]
    chained = any(part.split("://")[0] in CHAINED for part in parts)
    return parts if len(files) == len(parts) and not chained else [pattern]


def _matches(pattern: str, wanted: Kind) -> Details:
    """The files of one pattern."""
    kind, entries, searched = _meaning(pattern, wanted)
    found: Details = {}
    for entry in sorted(searched):
        files, folders = _search(entry, glob=kind != "a folder")
        if kind == "a folder" and files:
            _warn_of_subfolders(entry, folders, wanted)
        if not files:
            correct = f"correct {wanted.option}"
            remedy = correct if wanted.remedy == correct else f"{correct}, or {wanted.remedy}"
            raise UserError(f"no {wanted.what} matches {entry} (taken as {kind}); {remedy}")
        found |= files
    named = [_canonical(entry) for entry in entries if entry not in searched]
    found = _ask(found | _look_up(named))
    if missing := sorted(set(named) - found.keys()):
        raise UserError(
            f"{len(missing)} of {len(set(named))} {wanted.what}s of {pattern} (taken as {kind}) "
            f"are missing, the first: {', '.join(missing[:3])}; correct {wanted.option}"
        )
    taken = {url: entry for url, entry in found.items() if _is_wanted(url, wanted)}
    if wrong := sorted(set(named).difference(taken)) or ([] if taken else sorted(found)):
        why = f"{wrong[0]} is not a {' or '.join(wanted.suffixes)}; {wanted.remedy}"
        raise UserError(f"{pattern} (taken as {kind}): {why}")
    if others := [
        url for url in found if url not in taken and without_query(url).endswith(ARCHIVES)
    ]:
        log.warning("%s: %d archives are left out: %s", pattern, len(others), others[0])
    return taken


def _warn_of_subfolders(folder: str, below: list[str], wanted: Kind) -> None:
    """Log that a folder has files of this kind in folders of its own, which are not searched."""
    fs, _ = locate(folder)
    for name in sorted(below)[:SUBFOLDERS]:
        files = [n for n in fs.ls(name, detail=False) if _is_wanted(n, wanted)]
        if files:
            log.warning(
                "%s: its %d sub-folders are not searched, and %s has %d %ss; give %s/**/*%s",
                *(folder, len(below), name, len(files), wanted.what, folder.rstrip("/")),
                wanted.suffixes[0],
            )
            return


def _is_wanted(url: str, wanted: Kind) -> bool:
    return without_query(url).lower().endswith(wanted.suffixes)


def _meaning(pattern: str, wanted: Kind) -> tuple[str, list[str], set[str]]:
    """The kind of a pattern, its paths, globs or folder, and those of them to be searched."""
    special = "{" in pattern or _is_glob(pattern)
    if special and not pattern.startswith(HTTP) and storage.exists(pattern):
        special = False
    if special and "{" in pattern:
        entries = _expand(pattern)
        return "a brace pattern", entries, set(filter(_is_glob, entries))
    if special:
        return "a glob", [pattern], {pattern}
    if without_query(pattern).endswith((".txt", ".list", ".lst")):
        entries = [path for line in _lines(pattern, wanted) for path in _expand(line)]
        return "a list file", entries, set(filter(_is_glob, entries))
    if _is_wanted(pattern, wanted):
        return f"one {wanted.what}", [pattern], set()
    return "a folder", [pattern], {pattern}


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


def _search(pattern: str, glob: bool) -> tuple[Details, list[str]]:
    """The files of a glob or of a folder, without hidden ones; and the paths of its folders."""
    pattern = pattern.rstrip("/")
    fs, path = locate(pattern)

    def search() -> list[dict[str, Any]]:
        if glob:
            return list(fs.glob(path, detail=True).values())
        return list(fs.ls(path, detail=True)) if fs.isdir(path) else []

    prefix = _prefix(pattern)
    found: Details = {}
    folders = []
    for entry in _entries(fs, search, pattern):
        if entry["type"] == "directory":
            folders.append(str(entry["name"]))
        elif not posixpath.basename(entry["name"]).startswith("."):
            found[prefix + entry["name"]] = entry
    return found, folders


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
            entries = _entries(fs, partial(fs.ls, folder, detail=True), fs.unstrip_protocol(folder))
        except PermissionError:  # a bucket may allow reading, but no listing
            found |= {url: {"size": None} for url in members}
            continue
        files = [entry for entry in entries if entry["type"] != "directory"]
        there = {posixpath.basename(entry["name"]): entry for entry in files}
        names = {url: posixpath.basename(url) for url in members}
        found |= {url: there[name] for url, name in names.items() if name in there}
    return found


def _entries(fs: Any, search: Callable[[], list[dict[str, Any]]], url: str) -> list[dict[str, Any]]:
    """What `search` finds now; nothing without the folder."""
    try:
        with up_to_date(fs):
            entries = retry(search, url)
    except (FileNotFoundError, NotADirectoryError):
        return []
    return [_followed(fs, entry) for entry in entries]


def _followed(fs: Any, entry: dict[str, Any]) -> dict[str, Any]:
    """The entry; of a link on a local disk with the size and time of what it leads to."""
    if not isinstance(fs, LocalFileSystem) or not entry.get("islink"):
        return entry
    try:
        target = Path(entry["name"]).stat()
    except OSError as error:
        raise UserError(
            f"{entry['name']} is a link to {Path(entry['name']).readlink()}, which cannot be read "
            f"({error.strerror}); restore the file or remove the link"
        ) from None
    return {**entry, "size": target.st_size, "mtime": target.st_mtime}


def _ask(found: Details) -> Details:
    """`found` with the sizes that no listing had, without missing files."""

    def details(url: str) -> dict[str, Any] | None:
        fs, path = locate(url)
        try:
            return _followed(fs, dict(retry(lambda: fs.info(path), url)))
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
    ends = {
        url: next(s for s in suffixes if without_query(url).lower().endswith(s)) for url in urls
    }
    parts = [without_query(url)[: -len(ends[url])].split("/") for url in urls]
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
