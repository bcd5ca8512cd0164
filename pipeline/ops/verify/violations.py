"""Violations that verify found, and readers that report damaged files as violations."""

import json
from collections.abc import Iterable
from dataclasses import dataclass, field
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq

from pipeline.artifacts import schemas
from pipeline.runtime.redaction import redacted
from pipeline.runtime.reject_reasons import printable
from pipeline.store import storage, tables

MOST = 100  # violations kept word for word; all are counted
DAMAGE = (pa.ArrowException, OSError)  # what pyarrow raises for bytes it cannot read


@dataclass
class Violations:
    """What is wrong with a run, and what could not be checked."""

    count: int = 0
    lines: list[str] = field(default_factory=list)
    notes: list[str] = field(default_factory=list)  # not violations

    def add(self, place: str, what: str, keys: Iterable[str] = ("",)) -> None:
        """Add one violation per key, or one for the whole place."""
        for key in keys:
            self.count += 1
            if len(self.lines) < MOST:
                self.lines.append(_plain(": ".join(part for part in (place, key, what) if part)))

    def note(self, text: str) -> None:
        """Add something that a reader should know and that is no violation."""
        self.notes.append(_plain(text))

    def merge(self, more: "Violations") -> None:
        """Add what was found elsewhere."""
        self.count += more.count
        self.lines += more.lines[: MOST - len(self.lines)]
        self.notes += more.notes


def _plain(text: str) -> str:
    """Keys come from the web: their control characters must not reach a terminal."""
    return printable(redacted(text))


def open_part(url: str, place: str, found: Violations) -> pq.ParquetFile | None:
    """A Parquet file in memory; adds a violation if it is missing or damaged.

    Not by `tables.read`: an error of the store is raised, damage of the file is reported.
    """
    try:
        data = storage.read_bytes(url)
    except FileNotFoundError:
        found.add(place, "is missing")
        return None
    try:
        return pq.ParquetFile(pa.BufferReader(data), page_checksum_verification=True)
    except DAMAGE as error:
        found.add(place, f"cannot be read: {error}")
        return None


def read_part(
    file: pq.ParquetFile | None,
    schema: pa.Schema,
    place: str,
    found: Violations,
    leave_out: Iterable[str] = (),
) -> pa.Table | None:
    """The rows without some columns if the schema is right; adds a violation otherwise."""
    if file is None:
        return None
    lacks = [n for n in schema.names if n in schemas.LATER - set(file.schema_arrow.names)]
    if not file.schema_arrow.equals(pa.schema(f for f in schema if f.name not in lacks)):
        odd = sorted({f.name for f in set(file.schema_arrow) ^ set(schema)})
        found.add(place, f"has not the columns it should: {', '.join(odd) or 'another order'}")
        return None
    try:
        table = file.read([name for name in schema.names if name not in leave_out])
        for name in lacks:
            table = table.append_column(schema.field(name), pa.nulls(len(table), pa.string()))
        return table
    except DAMAGE as error:
        found.add(place, f"cannot be read: {error}")
        return None


def vector_length(file: pq.ParquetFile) -> int:
    """Numbers in each vector of a part; 0 if it has no vectors."""
    kinds = [f.type for f in file.schema_arrow if pa.types.is_fixed_size_list(f.type)]
    return int(kinds[0].list_size) if kinds else 0


def footer(file: pq.ParquetFile) -> dict[str, Any]:
    """The facts in the footer of a part; empty if they cannot be read."""
    try:
        return dict(json.loads((file.metadata.metadata or {}).get(tables.FACTS_KEY, b"{}")))
    except (ValueError, TypeError):
        return {}
