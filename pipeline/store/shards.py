"""Reads webdataset shards: tars whose neighbouring members with the same key are one sample.

`a/7.jpg`, `a/7.txt`, `a/7.json` are `jpg`, `txt` and `json` of the key `a/7`. webdataset's own
reader gives no offsets, unpickles members and stops at damage. Here damage becomes a row.
"""

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
CUT_OFF = Reason.CUT_OFF.because("the shard is damaged inside it")
MAX_TEXT_BYTES = 1 << 20  # a longer json is ignored, a longer caption is cut
ANY_BYTES = "surrogateescape"  # keeps names that are not UTF-8
BLOCK = 512  # bytes of a tar's blocks


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
        """The text of the txt member, else the `caption` of the json, else None.

        In a txt, bytes that are not UTF-8 become U+FFFD, and NUL is dropped.
        """
        member = self._first("txt")
        if member is None:
            text = (self.values or {}).get("caption")
            return text if isinstance(text, str) else None
        return member.data[:MAX_TEXT_BYTES].decode("utf-8", "replace").replace("\0", "")

    @cached_property
    def values(self) -> dict[str, Any] | None:
        """The object in the json member; None without one, or if it is no UTF-8, long or deep."""
        member = self._first("json")
        if member is None or member.size > MAX_TEXT_BYTES:
            return None
        try:
            text = member.data.decode("utf-8")
            value = json.loads(text)
        except (ValueError, RecursionError):
            return None
        if not isinstance(value, dict) or not _is_shallow(value):
            return None
        return columns.storable_object(value, text)

    def json_text(self) -> str | None:
        """The unchanged text of the json member; None where `values` is."""
        member = self._first("json")
        return None if member is None or self.values is None else member.data.decode()

    def _first(self, suffix: str) -> Member | None:
        return next((m for m in self.members if m.suffix == suffix and m.whole), None)


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

    Files that would make a sample exceed `max_sample_bytes` are not read. Errors of the store are
    raised unchanged. Without an end-of-archive marker the last sample may lack members.
    """

    def __init__(self, stream: IO[bytes], max_sample_bytes: int | None) -> None:
        self.end = ""  # once read: complete, no end-of-archive marker, or damaged at byte N: ...
        self._source = TarStream(stream)
        self._limit = max_sample_bytes
        self._tar: tarfile.TarFile | None = None
        self._ids = UniqueIds()

    def __iter__(self) -> Iterator[Sample]:
        draft: _Draft | None = None
        index = 0
        while (header := self._next()) is not None:
            if (split := split_name(header.name)) is None or header.isdir():
                continue
            if draft is None or draft.key != split[0]:
                if draft is not None:
                    yield draft.sample(index)
                    index += 1
                draft = self._begin(split[0], header.name)
            draft.add(*self._member(header, split[1], draft.bytes))
        if draft is not None:
            if self.end.startswith("damaged"):
                draft.cut_off(self._source.position)
            yield draft.sample(index)

    def _begin(self, key: str, name: str) -> _Draft:
        id, repeated = self._ids.of(key, to_text(key))
        problem = Reason.DUPLICATE_KEY.because() if repeated else None
        if is_unsafe(name):
            problem = Reason.UNSAFE_NAME.because(to_text(name))
        return _Draft(key, id, problem)

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
        if header is None:
            block = self._source.last  # the reason why tarfile found no further header
            if not block:
                self.end = "no end-of-archive marker"
            elif len(block) < BLOCK:
                self._damaged("the shard ends inside a header")
            elif any(block):
                self._damaged("bad header")
            else:
                self.end = "complete"
        return header

    def _damaged(self, why: str) -> None:
        start = self._source.position - len(self._source.last)
        self.end = f"damaged at byte {start}: {printable(why)[:200]}"

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
                self.end = f"damaged at byte {self._source.position}: the shard ends inside a file"
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
