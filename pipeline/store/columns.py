"""The json of samples as columns of one type for the whole run, whatever each shard's json held.

A kind is one of bool, int, long (beyond what a float holds exactly), float, str, null and json
(lists, objects, numbers beyond 64 bits, and columns whose types clash between samples: kept as JSON
text).
"""

import json
from collections.abc import Iterable
from itertools import islice
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
}
MAX_COLUMNS = 1000  # of a run; a shard of random keys must not make a table of a million columns
MAX_NAME = 256  # characters; what has a longer name is no column, but stays in the json


def kinds(texts: Iterable[str | None]) -> dict[str, str]:
    """Column -> kind over the json texts of many samples, the first MAX_COLUMNS by name."""
    return survey(texts)[0]


def survey(texts: Iterable[str | None]) -> tuple[dict[str, str], set[str]]:
    """`kinds`, and those among them whose types clash between samples."""
    found: dict[str, str] = {}
    clashes: set[str] = set()
    for text in texts:
        values = {name: value for name, value in parse(text).items() if len(name) <= MAX_NAME}
        clashes |= merge(found, {name: _kind(value) for name, value in values.items()})
    kept = dict(islice(sorted(found.items()), MAX_COLUMNS))
    return kept, clashes & kept.keys()


def merge(found: dict[str, str], more: dict[str, str]) -> set[str]:
    """Widen `found` by `more`: null gives way, int with float is float and with long is long, any
    other clash is json.

    Returns the columns that clash.
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
    """The object in a sample's json text; names without NUL, which Parquet tools do not like.

    Half a surrogate pair, as where a title was cut, becomes U+FFFD: no table can hold it.
    """
    values = json.loads(text) if text else {}
    if text and "\\u" in text:
        values = _storable(values)
    return {str(name).replace("\0", ""): value for name, value in values.items()}


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
