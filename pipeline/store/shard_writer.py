"""Writes labels into copies of webdataset shards, with the same bytes every time."""

import io
import json
import tarfile
from collections.abc import Iterator
from typing import IO, Any

from pipeline.store.samples import Member, Sample, is_unsafe, split_name
from pipeline.store.shards import ANY_BYTES


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
        self.add_from(name, io.BytesIO(data), len(data))

    def add_from(self, name: str, stream: IO[bytes], size: int) -> None:
        """Append a file of the next `size` bytes of `stream`, copied in pieces."""
        header = tarfile.TarInfo(name)
        header.size = size
        self._tar.addfile(header, stream)
        self._tar.members = []  # type: ignore[attr-defined]  # else every header stays in memory


def labelled(sample: Sample, label: dict[str, Any]) -> Iterator[tuple[str, bytes | Member]]:
    """Names and bytes of the sample's members for the output shard, with the label added.

    The label becomes the key `ratecluster` of the json member; no other character changes. If the
    json is no object, it stays and `{key}.ratecluster.json` is added. A member too large to be read
    is yielded itself in place of its bytes. Links and samples with unsafe names are left out.
    """
    if any(is_unsafe(member.tar_name) for member in sample.members):
        return
    text = sample.json_text()
    alone = json.dumps({"ratecluster": label}, sort_keys=True, ensure_ascii=False, allow_nan=False)
    taken = text is None and any(m.suffix == "json" and m.there for m in sample.members)
    added = "ratecluster.json" if taken else "json"
    pending = True
    for member in sample.members:
        if not member.there or member.suffix == added != "json":
            continue
        if member.suffix == "json" and member.whole and text is not None and pending:
            yield member.tar_name, _with_label(text, alone).encode()
            pending = False
        else:
            yield member.tar_name, member.data if member.whole else member
    if pending:
        keys = (split[0] for m in sample.members if (split := split_name(m.tar_name)))
        yield f"{next(keys, sample.key)}.{added}", alone.encode()


def _with_label(text: str, label: str) -> str:
    """Append the only key of the object `label` to the object `text`."""
    facts = json.loads(text)
    if "ratecluster" in facts:
        del facts["ratecluster"]
        text = json.dumps(facts)
    head, brace, tail = text.rpartition("}")
    return f"{head}{', ' if facts else ''}{label[1:-1]}{brace}{tail}"
