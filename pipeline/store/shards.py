"""Reads webdataset shards: tars whose neighbouring members with the same key are one sample.

`a/7.jpg`, `a/7.txt`, `a/7.json` are `jpg`, `txt` and `json` of the key `a/7`. webdataset's own
reader gives no offsets, unpickles members and stops at damage. Here damage becomes a row.
"""

import codecs
import json
import re
import tarfile
from collections.abc import Iterator
from dataclasses import dataclass, replace
from functools import cached_property
from typing import IO, Any

from pipeline.runtime.reject_reasons import Reason, printable
from pipeline.store import columns
from pipeline.store.tar_stream import BoundedHeader, TarStream

IMAGE_SUFFIXES = ("jpg", "jpeg", "png", "webp", "gif", "bmp", "tif", "tiff")
JSON_DEPTH = 64  # of lists and objects in one another
TOO_DEEP = f"json: nested more than {JSON_DEPTH} times"
DAMAGED = "damaged at byte "
DUPLICATE_KEY = Reason.DUPLICATE_KEY.because()
APART = "its files are apart in the tar; pack the shard again with tar --sort=name"
CUT_OFF = Reason.CUT_OFF.because("the shard is damaged inside it")
MAX_TEXT_BYTES = 1 << 20  # a longer json is ignored, a longer caption is cut
ANY_BYTES = "surrogateescape"  # keeps names that are not UTF-8
BLOCK = 512  # bytes of a tar's blocks
MARKER = 2 * BLOCK  # zeros that end an archive
RECORD = 20 * BLOCK  # writers fill the last record of an archive with zeros
FIRST_BYTES = {  # of files that are no tar, in lower case -> what they are, and the remedy
    b"\x1f\x8b": "it is gzip data; name it .tar.gz",
    b"bzh": "it is bzip2 data; name it .tar.bz2",
    b"\x28\xb5\x2f\xfd": "it is zstd data; name it .tar.zst",
    b"version https://git-lfs": "it is a pointer of Git LFS; run `git lfs pull`",
    b"<!doctype html": "it is a web page; download the file again",
    b"<html": "it is a web page; download the file again",
    b"<?xml": "it is an XML page, perhaps an error of the store; download the file again",
    b"pk\x03\x04": "it is a zip archive; unpack it and pack it as tar",
}


@dataclass(frozen=True)
class Member:
    """One file of a sample."""

    tar_name: str  # as in the tar; bytes that are not UTF-8 are surrogates
    suffix: str  # lower case; what follows the first dot of the file name: `jpg`, `seg.jpg`
    offset: int  # byte at which the data begins in the tar
    size: int  # bytes
    data: bytes  # b"" if not whole
    whole: bool = True  # False where it was not read: too large, cut off, a link
    too_large: bool = False  # complete in the tar, but not read because of the sample's size

    @property
    def there(self) -> bool:
        """Whether all its bytes are in the tar, read or not."""
        return self.whole or self.too_large

    @property
    def name(self) -> str:
        """The name as text; bytes that are not UTF-8 are spelt `\\xff`."""
        return to_text(self.tar_name)


class MissingImage(Exception):  # noqa: N818 - it reads as what happened
    """A sample that has no image, or several that could be it; the text is the reason."""


@dataclass(frozen=True)
class Sample:
    """Neighbouring members with the same key."""

    key: str  # by webdataset's rule; bytes that are not UTF-8 are spelt `\\xff`
    id: str  # unique in the shard: the key, or `key#2`, `key#3` for a repeated key
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
            raise MissingImage(Reason.MISSING_IMAGE.because())
        if len(dotted) > 1:
            named = ", ".join(m.suffix for m in dotted[:3])
            raise MissingImage(Reason.AMBIGUOUS_IMAGE.because(named))
        return dotted[0]

    def caption(self) -> str | None:
        """The text of the txt; where it is blank, the `caption` of the json, if that is text.

        In a txt, bytes that are not UTF-8 become U+FFFD, and NUL is dropped.
        """
        member = self._first("txt")
        own = None if member is None else _decoded(member.data[:MAX_TEXT_BYTES], "replace")
        if own and own.strip():
            return own.replace("\0", "")
        text = (self.values or {}).get("caption")
        return text if isinstance(text, str) else own

    @cached_property
    def values(self) -> dict[str, Any] | None:
        """The object in the json member; None without one, or where `text_problem` names it."""
        return self._json[1]

    def json_text(self) -> str | None:
        """The text of the json member, without a byte order mark; None where `values` is."""
        return self._json[0] if self.values is not None else None

    def text_problem(self) -> str | None:
        """What cannot be read of the txt and the json, such as `json: not UTF-8`; else None."""
        txt, found = self._first("txt"), []
        if txt is not None and txt.size > MAX_TEXT_BYTES:
            found.append(f"txt: cut after {MAX_TEXT_BYTES:,} bytes")
        elif txt is not None:
            try:
                _decoded(txt.data)
            except UnicodeDecodeError:
                found.append("txt: not UTF-8")
        return "; ".join([*found, *filter(None, [self._json[2]])]) or None

    @cached_property
    def _json(self) -> tuple[str, dict[str, Any] | None, str]:
        """Text, object and problem of the json member."""
        member = self._first("json")
        if member is None:
            return "", None, ""
        if member.size > MAX_TEXT_BYTES:
            return "", None, f"json: more than {MAX_TEXT_BYTES:,} bytes"
        try:
            text = _decoded(member.data)
            value = json.loads(text)
        except UnicodeDecodeError:
            return "", None, "json: not UTF-8"
        except RecursionError:
            return "", None, TOO_DEEP
        except ValueError:
            return "", None, "json: empty" if not text.strip() else "json: not valid"
        if not isinstance(value, dict):
            return "", None, "json: not an object"
        if not _is_shallow(value):
            return "", None, TOO_DEEP
        return text, columns.storable_object(value, text), ""

    def _first(self, suffix: str) -> Member | None:
        return next((m for m in self.members if m.suffix == suffix and m.whole), None)


def _decoded(data: bytes, errors: str = "strict") -> str:
    """The text of UTF-8, or of what a byte order mark names; without the mark."""
    marks = (codecs.BOM_UTF32_LE, codecs.BOM_UTF32_BE, codecs.BOM_UTF16_LE, codecs.BOM_UTF16_BE)
    names = ("utf-32", "utf-32", "utf-16", "utf-16")
    encoding = next((n for m, n in zip(marks, names, strict=True) if data.startswith(m)), "utf-8")
    return data.decode(encoding, errors).removeprefix("\ufeff")


def _is_shallow(value: object) -> bool:
    """Whether lists and objects nest no deeper than JSON_DEPTH, which every reader can parse."""
    level = [value]
    for _ in range(JSON_DEPTH):
        nested = [v for v in level if isinstance(v, (dict, list))]
        level = [each for v in nested for each in (v.values() if isinstance(v, dict) else v)]
    return not level


class _Draft:
    """A sample whose members are still being read."""

    def __init__(self, key: str, id: str, problem: str | None) -> None:
        self.key, self.id, self.problem = key, id, problem
        self.members: list[Member] = []
        self.suffixes: set[str] = set()
        self.bytes = 0  # held

    def add(self, member: Member, problem: str | None) -> None:
        if member.suffix in self.suffixes:
            problem = problem or Reason.DUPLICATE_MEMBER.because(member.suffix)
        self.problem = self.problem or problem
        self.suffixes.add(member.suffix)
        self.members.append(member)
        self.bytes += len(member.data)

    def cut_off(self, position: int) -> None:
        """The shard is damaged at `position`: a member that continues after it is not complete."""
        self.problem = self.problem or CUT_OFF
        last = self.members[-1]
        if last.offset + last.size > position:
            self.members[-1] = replace(last, too_large=False)

    def sample(self, index: int) -> Sample:
        return Sample(to_text(self.key), self.id, index, tuple(self.members), self.problem)


class UniqueIds:
    """Ids of keys that may repeat: a repeated key gets #2, #3, …"""

    def __init__(self) -> None:
        self._times: dict[str, int] = {}  # occurrences of each key
        self._ids: set[str] = set()

    def of(self, key: str, text: str) -> tuple[str, bool]:
        """The id of the next key, which is its `text` if that is new; whether the key repeats."""
        repeated = key in self._times
        times = self._times.get(key, 0) + 1
        id = text if times == 1 else f"{text}#{times}"
        while id in self._ids:
            times += 1
            id = f"{text}#{times}"
        self._times[key] = times
        self._ids.add(id)
        return id, repeated


class ShardReader:
    """Iterates once over the samples of a shard; damage ends it, and `end` describes the damage.

    Zeros do not end it: files behind them are read too, as `tar --ignore-zeros` does. They may be
    of a second archive (`cat a.tar b.tar`), or the zeros may be a hole in the file, so `end` names
    them. Bytes behind the end-of-archive marker that are no file of a tar are damage.

    Files that would make a sample exceed `max_sample_bytes` are not read. Errors of the store are
    raised unchanged. Without an end-of-archive marker the last sample may lack members.
    """

    def __init__(self, stream: IO[bytes], max_sample_bytes: int | None) -> None:
        self.end = ""  # once read: `complete`, or what is wrong, for example `damaged at byte N: …`
        self._holes: list[str] = []  # places of zeros with files behind them
        self._zeros = False  # whether the last file is followed by zeros
        self._source = TarStream(stream)
        self._limit = max_sample_bytes
        self._tar: tarfile.TarFile | None = None
        self._ids = UniqueIds()
        self._suffixes: dict[str, set[str]] = {}  # key -> suffixes of its files so far

    def __iter__(self) -> Iterator[Sample]:
        draft: _Draft | None = None
        index = 0
        while (header := self._next()) is not None:
            if (split := split_name(header.name)) is None or header.isdir():
                continue
            if draft is None or draft.key != split[0]:
                if draft is not None:
                    yield self._finish(draft, index)
                    index += 1
                draft = self._begin(split[0], header.name)
            draft.add(*self._member(header, split[1], draft.bytes))
        if draft is not None:
            if DAMAGED in self.end and not self._zeros:
                draft.cut_off(self._source.position)
            yield self._finish(draft, index)

    def _begin(self, key: str, name: str) -> _Draft:
        id, repeated = self._ids.of(key, to_text(key))
        problem = DUPLICATE_KEY if repeated else None
        if is_unsafe(name):
            problem = Reason.UNSAFE_NAME.because(to_text(name))
        return _Draft(key, id, problem)

    def _finish(self, draft: _Draft, index: int) -> Sample:
        """The sample. Its tar is not sorted where an earlier one of its key has other files."""
        before = self._suffixes.setdefault(draft.key, set())
        if before and before.isdisjoint(draft.suffixes) and draft.problem == DUPLICATE_KEY:
            draft.problem = Reason.DUPLICATE_KEY.because(APART)
        before |= draft.suffixes
        return draft.sample(index)

    def _next(self) -> tarfile.TarInfo | None:
        """The next header; None where the archive ends, after `end` has been set."""
        if self.end:
            return None
        try:
            if self._tar is None:
                self._tar = tarfile.TarFile(
                    fileobj=self._source, tarinfo=BoundedHeader, encoding="utf-8", errors=ANY_BYTES
                )  # reads the first header
                header = self._tar.next() if self._tar.firstmember else None  # type: ignore[attr-defined]
            else:
                header = self._tar.next()
            self._tar.members = []  # type: ignore[attr-defined]  # else it keeps every header
        except MemoryError:
            raise
        except Exception as error:  # tarfile raises nearly anything for a bad header
            if self._source.failure is not None:
                raise self._source.failure from None
            self._damaged(str(error))
            return None
        return self._behind_zeros() if header is None else header

    def _behind_zeros(self) -> tarfile.TarInfo | None:
        """The first header behind zeros; None where there is none, after `end` has been set."""
        block = self._source.last  # the reason why tarfile found no further header
        start = self._source.position - len(block)
        while len(block) == BLOCK and not any(block):
            block = self._source.read(BLOCK)
        stop = self._source.position - (len(block) if any(block) else 0)
        self._zeros = self._zeros or stop > start
        zeros = f"zeros from byte {start} to {stop}"
        if not any(block):
            if stop - start < BLOCK:
                self._ended("no end-of-archive marker")
            elif stop - start > MARKER + RECORD:
                self._ended(f"{zeros}, more than the end of a tar has; was it fully downloaded?")
            else:
                self._ended("")
        elif len(block) < BLOCK:
            self._damaged("the shard ends inside a header")
        elif stop == start:
            self._damaged("no tar is behind the zeros" if self._zeros else "bad header")
        else:
            self._source.give_back()
            self._tar = None
            if (header := self._next()) is not None:
                self._holes.append(f"{zeros}, with more files behind: joined tars, or lost files")
                self._zeros = False
            return header
        return None

    def _ended(self, how: str) -> None:
        self.end = "; ".join([*self._holes[:3], *filter(None, [how])]) or "complete"

    def _damaged(self, why: str) -> None:
        start = self._source.position - len(self._source.last)
        if start == 0:
            head = self._source.last.lstrip().lower()
            why = next((what for first, what in FIRST_BYTES.items() if head.startswith(first)), why)
        self._ended(f"{DAMAGED}{start}: {printable(why)[:200]}")

    def _member(self, header: tarfile.TarInfo, suffix: str, held: int) -> tuple[Member, str | None]:
        """The member with its data, and its problem; the sample has `held` bytes before it."""
        problem, data, too_large = None, b"", False
        if not header.isreg():
            kind = Reason.LINK if header.issym() or header.islnk() else Reason.SPECIAL_FILE
            problem = kind.because(to_text(header.name))
        elif header.issparse():
            problem = Reason.SPARSE_FILE.because(to_text(header.name))
        elif self._limit is not None and held + header.size > self._limit:
            problem = Reason.SAMPLE_TOO_LARGE.because(f"{held + header.size} bytes with {suffix}")
            too_large = True
        else:
            data = self._source.read(header.size)
            if len(data) < header.size:
                self._ended(f"{DAMAGED}{self._source.position}: the shard ends inside a file")
                problem, data = CUT_OFF, b""
        place = (header.name, suffix, header.offset_data, header.size)
        return Member(*place, data, problem is None, too_large), problem


def split_name(name: str) -> tuple[str, str] | None:
    """Key and suffix, by webdataset's rule (`tariterators.base_plus_ext`); None for what it skips.

    It skips names without a dot, hidden files and `__meta__`. Different from webdataset, a hidden
    file in a folder is skipped too: the tar of macOS adds a `d/._7.jpg` for every `d/7.jpg`. The
    rule is repeated here because webdataset imports torch, which takes a second in every process.
    """
    folder, slash, file = name.rpartition("/")
    stem, dot, suffix = file.partition(".")
    if not (stem and dot) or re.match(r"__[^/]*__($|/)", name):
        return None
    return folder + slash + stem, to_text(suffix).lower()


def is_unsafe(name: str) -> bool:
    return name.startswith("/") or ".." in name.split("/") or "\0" in name


def to_text(name: str) -> str:
    """A name as valid UTF-8, with its undecodable bytes spelt out."""
    return name.encode("utf-8", "surrogateescape").decode("utf-8", "backslashreplace")
