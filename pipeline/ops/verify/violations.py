"""What verify has found, and reading so that damage of a file is found and not raised."""

import json
from collections.abc import Iterable
from dataclasses import dataclass, field
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq

from pipeline.runtime.redaction import redacted
from pipeline.runtime.reject_reasons import printable
from pipeline.store import storage, tables

MOST = 100  # violations kept word for word; all are counted
DAMAGE = (pa.ArrowException, OSError)  # what pyarrow raises for bytes it cannot read


@dataclass
class Findings:
    """Violations of the contract, and what could not be looked at."""

    count: int = 0
    lines: list[str] = field(default_factory=list)
    notes: list[str] = field(default_factory=list)  # no violations

    def add(self, place: str, what: str, keys: Iterable[str] = ("",)) -> None:
        """One violation per key, or one of the whole place."""
        for key in keys:
            self.count += 1
            if len(self.lines) < MOST:
                self.lines.append(_plain(": ".join(part for part in (place, key, what) if part)))

    def note(self, text: str) -> None:
        """Something a reader should know."""
        self.notes.append(_plain(text))

    def merge(self, more: "Findings") -> None:
        """What was found elsewhere."""
        self.count += more.count
        self.lines += more.lines[: MOST - len(self.lines)]
        self.notes += more.notes


def _plain(text: str) -> str:
    """Keys come from the web: nothing in them may act on a terminal."""
    return printable(redacted(text))


def open_part(url: str, place: str, found: Findings) -> pq.ParquetFile | None:
    """A Parquet file, in memory; a violation if it is not there or is none.

    Not by `tables.read`: an error of the store is raised, the file's own damage is told.
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
    found: Findings,
    leave_out: Iterable[str] = (),
) -> pa.Table | None:
    """Its rows, but for some columns, if it has the schema; else a violation."""
    if file is None:
        return None
    if not file.schema_arrow.equals(schema):
        odd = sorted({f.name for f in set(file.schema_arrow) ^ set(schema)})
        found.add(place, f"has not the columns it should: {', '.join(odd) or 'another order'}")
        return None
    try:
        return file.read([name for name in schema.names if name not in leave_out])
    except DAMAGE as error:
        found.add(place, f"cannot be read: {error}")
        return None


def footer(file: pq.ParquetFile) -> dict[str, Any]:
    """The facts a part carries; none where they cannot be read."""
    try:
        return dict(json.loads((file.schema_arrow.metadata or {}).get(tables.FACTS_KEY, b"{}")))
    except (ValueError, TypeError):
        return {}
