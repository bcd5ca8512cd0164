"""Checks a labelled shard: the members of the input in order, unchanged, and the labels.

Samples that are excluded are not in it.

reads   an input shard and labeled/{stem}.tar, each once from start to end, one sample at a time;
        members above the limit are compared in pieces
"""

import json
from collections.abc import Iterator
from typing import Any

from pipeline.artifacts import schemas
from pipeline.store import compressed, storage
from pipeline.store.samples import Member, Sample, is_unsafe, split_name, to_text
from pipeline.store.shards import ShardReader

PIECE_BYTES = 8 << 20
LABEL_BYTES = 1 << 20  # more than a label adds to a json
CLOSE = 1e-6  # to which the numbers of a label in json are rounded

Difference = tuple[str, str]  # sample_id or "", what is wrong


def differences(
    shard: dict[str, Any], target: str, labels: list[dict[str, Any]], limit: int
) -> Iterator[Difference]:
    """Differences between the tar `target` and the input shard with `labels`, rows of the table.

    `limit` is what the stages read of a sample. Errors of the store are raised.
    """
    source = shard["url"]
    with compressed.open_tar(source, shard["size"]) as before, storage.open_read(target) as after:
        reader, copy = ShardReader(before, limit), ShardReader(after, limit + LABEL_BYTES)
        copies = (member for sample in copy for member in sample.members)
        for number, sample in enumerate(reader):
            label = labels[number] if number < len(labels) else None
            if label is None or label["sample_id"] != f"{label['shard']}/{sample.id}":
                yield "", f"sample {number} of the input is {sample.id}, its label is not"
                return
            if label["status"] == "excluded":
                continue
            for name, member in _expected(sample):
                if (found := next(copies, None)) is None or found.tar_name != name:
                    there = "nothing" if found is None else found.name
                    yield label["sample_id"], f"has {there} where {to_text(name)} should be"
                    return
                if member is None:
                    read = storage.read_range
                    data = found.data if found.whole else read(target, found.offset, found.size)
                    yield from _label(data, found.name, sample, label)
                elif not _same_bytes(source, member, target, found):
                    yield label["sample_id"], f"the bytes of {to_text(name)} are not the input's"
        if (found := next(copies, None)) is not None:
            yield "", f"has {found.name} after all samples of the input"
        elif copy.end != "complete":
            yield "", f"is {copy.end}"


def _expected(sample: Sample) -> Iterator[tuple[str, Member | None]]:
    """Names of the members that the copy must hold; None where it is the json with the label."""
    if any(is_unsafe(member.tar_name) for member in sample.members):
        return
    labelled = sample.json_text() is not None
    named = any(m.suffix == "json" and m.there for m in sample.members)
    added = "ratecluster.json" if named and not labelled else "json"
    pending = True
    for member in sample.members:
        if not member.there or member.suffix == added != "json":
            continue
        own = labelled and pending and member.suffix == "json" and member.whole
        yield member.tar_name, None if own else member
        pending = pending and not own
    if pending:
        keys = [split[0] for m in sample.members if (split := split_name(m.tar_name))]
        yield f"{keys[0]}.{added}", None


def _label(data: bytes, name: str, sample: Sample, row: dict[str, Any]) -> Iterator[Difference]:
    """Check that a json member holds its input and the label of the table."""
    key = row["sample_id"]
    try:
        facts = json.loads(data)
        label = facts.pop("ratecluster")
    except (ValueError, KeyError, AttributeError, TypeError):
        yield key, f"{name} holds no label"
        return
    before = json.loads(sample.json_text() or "{}")
    before.pop("ratecluster", None)
    if repr(facts) != repr(before):
        yield key, f"{name} holds more than the input's json and the label, or less"
    wanted = {name: row[name] for name in schemas.IN_JSON if row[name] is not None}
    for field in sorted(wanted.keys() | label.keys()):
        if not _alike(label.get(field), wanted.get(field)):
            yield key, f"{field} is {label.get(field)!r} in its json, not {wanted.get(field)!r}"


def _alike(one: Any, other: Any) -> bool:
    if isinstance(one, float) and isinstance(other, float):
        return abs(one - other) <= CLOSE
    return bool(one == other)


def _same_bytes(source: str, one: Member, target: str, other: Member) -> bool:
    if one.whole and other.whole:
        return one.data == other.data
    if one.size != other.size:
        return False
    with compressed.open_tar(source) as before, storage.open_read(target) as after:
        compressed.skip(before, one.offset)
        compressed.skip(after, other.offset)
        sizes = [min(PIECE_BYTES, one.size - start) for start in range(0, one.size, PIECE_BYTES)]
        return all(compressed.take(before, n) == compressed.take(after, n) for n in sizes)
