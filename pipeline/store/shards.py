"""Reads webdataset shards: tars whose neighbouring members with the same key are one sample.

`a/7.jpg`, `a/7.txt`, `a/7.json` are `jpg`, `txt` and `json` of the key `a/7`. webdataset's own
reader gives no offsets, unpickles members and stops at damage. Here damage becomes a row.
"""

import tarfile
from collections.abc import Iterator
from dataclasses import replace
from typing import IO

from pipeline.runtime.reject_reasons import Reason, printable
from pipeline.store.samples import Member, Sample, is_unsafe, split_name, to_text
from pipeline.store.tar_stream import BoundedHeader, TarStream

DAMAGED = "damaged at byte "
DUPLICATE_KEY = Reason.DUPLICATE_KEY.because()
APART = "its files are apart in the tar; pack the shard again with tar --sort=name"
CUT_OFF = Reason.CUT_OFF.because("the shard is damaged inside it")
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
        before = self._suffixes.setdefault(draft.key, draft.suffixes)
        if draft.problem == DUPLICATE_KEY and before.isdisjoint(draft.suffixes):
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
        if damage := self._source.damage:
            how = f"{DAMAGED}{self._source.position}: {printable(damage)[:200]}"
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
