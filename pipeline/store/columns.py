"""The json of samples as columns, each of one type for the whole run.

A kind is bool, int, long (an int beyond 2^53, which a float cannot hold), float, str, null or json
(lists, objects, ints beyond 64 bits and columns whose types clash between samples, as JSON text).
Not `pyarrow.unify_schemas`: it makes floats of longs, and does not say which columns clash.
"""

import json
from collections import Counter
from collections.abc import Mapping
from typing import Any

import pyarrow as pa

TYPES = {
    "bool": pa.bool_(),
    "int": pa.int64(),
    "long": pa.int64(),
    "float": pa.float64(),
    "str": pa.string(),
    "null": pa.string(),
    "json": pa.string(),
    "rest": pa.string(),  # the fields that have no column of their own, as JSON text
}
MAX_COLUMNS = 1000  # of a run, the most frequent; random keys must not make a million columns
REST = "other_fields"  # the column of kind `rest`
MAX_NAME = 256  # characters; a longer name is no column, but stays in the json


def kinds(values: dict[str, Any] | None) -> dict[str, str]:
    """Column -> kind of one sample's json."""
    return {name: _kind(raw) for name, raw in (values or {}).items() if len(name) <= MAX_NAME}


class Survey:
    """The columns of many samples."""

    def __init__(self) -> None:
        self.kinds: dict[str, str] = {}
        self.clashes: set[str] = set()  # columns whose types differ between samples
        self.counts: Counter[str] = Counter()  # samples that have the column

    def add(self, sample: dict[str, str]) -> None:
        """Count the `kinds` of a sample."""
        self.clashes |= merge(self.kinds, sample)
        self.counts.update(sample.keys())

    def facts(self) -> dict[str, Any]:
        """The kept columns as JSON values, by name, and how many columns were left out."""
        kept = most_frequent(self.kinds, self.counts)
        return {
            "columns": kept,
            "column_counts": {name: self.counts[name] for name in kept},
            "columns_left_out": len(self.kinds) - len(kept),
            "clashes": sorted(self.clashes & kept.keys()),
        }


def most_frequent(kinds: dict[str, str], counts: Mapping[str, int]) -> dict[str, str]:
    """The MAX_COLUMNS columns that most samples have, sorted by name."""
    ranked = sorted(kinds, key=lambda name: (-counts.get(name, 0), name))
    return {name: kinds[name] for name in sorted(ranked[:MAX_COLUMNS])}


def merge(found: dict[str, str], more: dict[str, str]) -> set[str]:
    """Widen the kinds `found` by `more`; returns the columns that clash, whose kind becomes json.

    null with any kind is that kind, int with float is float, int with long is long.
    """
    clashes = set()
    for name, kind in more.items():
        both = {found.get(name, kind), kind}
        if len(both) > 1:
            both.discard("null")
        if both in ({"int", "float"}, {"int", "long"}):
            both.discard("int")
        if len(both) > 1:
            clashes.add(name)
        found[name] = both.pop() if len(both) == 1 else "json"
    return clashes


def parse(text: str | None) -> dict[str, Any]:
    """The object in the json text that embed stored; empty without one."""
    return storable_object(json.loads(text), text) if text else {}


def storable_object(values: dict[str, Any], text: str) -> dict[str, Any]:
    """The object of a json text as tables can hold it.

    Half a surrogate pair, as where a title was cut, becomes U+FFFD. Names lose their NUL.
    """
    if "\\u" in text:
        values = _storable(values)
    return {str(name).replace("\0", ""): value for name, value in values.items()}


def values(originals: dict[str, Any], kinds: Mapping[str, str]) -> dict[str, Any]:
    """The value of each column for one sample's json."""
    found = {name: value(originals.get(name), kind) for name, kind in kinds.items()}
    if REST in kinds:
        rest = {name: raw for name, raw in originals.items() if name not in found or name == REST}
        found[REST] = json.dumps(rest, ensure_ascii=False, sort_keys=True) if rest else None
    return found


def value(raw: Any, kind: str) -> Any:
    """A json value as its column's kind."""
    if raw is None:
        return None
    if kind == "json":
        return json.dumps(raw, ensure_ascii=False, sort_keys=True)
    return float(raw) if kind == "float" else raw


def _storable(raw: Any) -> Any:
    if isinstance(raw, str):
        return raw.encode("utf-16", "surrogatepass").decode("utf-16", "replace")
    if isinstance(raw, dict):
        return {_storable(name): _storable(value) for name, value in raw.items()}
    return [_storable(value) for value in raw] if isinstance(raw, list) else raw


def _kind(raw: Any) -> str:
    if isinstance(raw, int) and not isinstance(raw, bool) and abs(raw) > 2**53:
        return "long" if -(2**63) <= raw < 2**63 else "json"
    names = {bool: "bool", int: "int", float: "float", str: "str", type(None): "null"}
    return names.get(type(raw), "json")
