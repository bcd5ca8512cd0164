"""Samples of webdataset shards: their files, and what is read of the texts among these."""

import codecs
import json
import re
from collections.abc import Collection
from dataclasses import dataclass
from functools import cached_property
from typing import Any

from pipeline.runtime.reject_reasons import Reason
from pipeline.store import columns

IMAGE_SUFFIXES = (
    *("jpg", "jpeg", "jpe", "jfif", "png", "webp", "gif", "bmp", "tif", "tiff", "avif"),
    *("jp2", "j2k", "heic", "heif", "jxl"),
)
CAPTION_SUFFIXES = ("txt",)
JSON_DEPTH = 64  # of lists and objects in one another
TOO_DEEP = f"json: nested more than {JSON_DEPTH} times"
MARKS = [  # of the encodings that name themselves; the longer ones first
    (codecs.BOM_UTF32_LE, "utf-32"),
    (codecs.BOM_UTF32_BE, "utf-32"),
    (codecs.BOM_UTF16_LE, "utf-16"),
    (codecs.BOM_UTF16_BE, "utf-16"),
]
MAX_TEXT_BYTES = 1 << 20  # a longer json is ignored, a longer caption is cut


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

    def image(self, more: Collection[str] = ()) -> Member:
        """The image: `7.jpg`, else the only one with a longer suffix, such as `7.seg.jpg`.

        `more` are suffixes of images beside IMAGE_SUFFIXES.
        """
        suffixes = {*IMAGE_SUFFIXES, *more}
        for member in self.members:
            if member.suffix in suffixes:
                return member
        dotted = [m for m in self.members if m.suffix.rpartition(".")[2] in suffixes]
        if not dotted:
            named = ", ".join(m.suffix for m in self.members[:5])
            raise MissingImage(Reason.MISSING_IMAGE.because(f"only {named}"))
        if len(dotted) > 1:
            named = ", ".join(m.suffix for m in dotted[:3])
            raise MissingImage(Reason.AMBIGUOUS_IMAGE.because(named))
        return dotted[0]

    def caption(self, more: Collection[str] = ()) -> str | None:
        """The text of the txt; where it is blank, the `caption` of the json, if that is text.

        In a txt, bytes that are not UTF-8 become U+FFFD, and NUL is dropped. `more` are suffixes
        of captions beside CAPTION_SUFFIXES.
        """
        member = self._text(more)
        own = None if member is None else decoded(member.data[:MAX_TEXT_BYTES], "replace")
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

    def class_text(self) -> str | None:
        """The text of the cls member, without white space around it; None without one."""
        member = self._first("cls")
        if member is None or member.size > MAX_TEXT_BYTES:
            return None
        return decoded(member.data, "replace").replace("\0", "").strip() or None

    def text_problem(self, more: Collection[str] = ()) -> str | None:
        """What cannot be read of the txt and the json, such as `json: not UTF-8`; else None."""
        txt, found = self._text(more), []
        if txt is not None and txt.size > MAX_TEXT_BYTES:
            found.append(f"txt: cut after {MAX_TEXT_BYTES:,} bytes")
        elif txt is not None and not txt.data.isascii():
            try:
                decoded(txt.data)
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
            text = decoded(member.data)
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

    def _text(self, more: Collection[str]) -> Member | None:
        found = (self._first(suffix) for suffix in (*CAPTION_SUFFIXES, *more))
        return next((member for member in found if member), None)

    def _first(self, suffix: str) -> Member | None:
        return next((m for m in self.members if m.suffix == suffix and m.whole), None)


def decoded(data: bytes, errors: str = "strict") -> str:
    """The text of UTF-8, or of what a byte order mark names; without the mark."""
    encoding = "utf-8"
    if data[:1] in (b"\xff", b"\xfe", b"\0"):
        encoding = next((name for mark, name in MARKS if data.startswith(mark)), encoding)
    return data.decode(encoding, errors).removeprefix("\ufeff")


def _is_shallow(value: object) -> bool:
    """Whether lists and objects nest no deeper than JSON_DEPTH, which every reader can parse."""
    level = [value]
    for _ in range(JSON_DEPTH):
        nested = [v for v in level if isinstance(v, (dict, list))]
        level = [each for v in nested for each in (v.values() if isinstance(v, dict) else v)]
    return not level


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
