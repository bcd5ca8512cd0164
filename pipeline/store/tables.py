"""Parquet tables, committed as a whole, with the facts of their making in the footer."""

import json
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

from pipeline.store import storage

FACTS_KEY = b"ratecluster"
ROW_GROUP_ROWS = 1024  # training reads a few rows of many groups: 1 MB of 512 float16 each
BUFFER_BYTES = 1 << 22  # of a column that is read some rows at a time
FOOTER_BYTES = 1 << 16  # of the first read; a longer footer takes a second


def vectors(dim: int, kind: pa.DataType | None = None) -> pa.DataType:
    """FixedSizeList of `dim` numbers, by default float16; DuckDB, Polars and datasets read it."""
    return pa.list_(pa.field("item", kind or pa.float16()), dim)


def from_matrix(x: np.ndarray, kind: pa.DataType | None = None) -> pa.FixedSizeListArray:
    """(n, dim) numbers as a column of vectors."""
    flat = np.ascontiguousarray(x.reshape(-1), dtype=(kind or pa.float16()).to_pandas_dtype())
    return pa.FixedSizeListArray.from_arrays(pa.array(flat), type=vectors(x.shape[1], kind))


def to_matrix(column: pa.ChunkedArray | pa.Array) -> np.ndarray:
    """A column of vectors as (n, dim); `flatten` and not `values`, which ignores a slice."""
    array = column.combine_chunks() if isinstance(column, pa.ChunkedArray) else column
    dim = array.type.list_size
    return np.asarray(array.flatten().to_numpy(zero_copy_only=False)).reshape(-1, dim)


def write(url: str, table: pa.Table, **facts: object) -> None:
    """Commit the table as one Parquet file; the bytes depend on the arguments only."""
    text = json.dumps(facts, sort_keys=True).encode()
    kept = {k: v for k, v in (table.schema.metadata or {}).items() if k != FACTS_KEY}
    table = table.replace_schema_metadata({**kept, FACTS_KEY: text})
    with storage.commit(url) as file:
        pq.write_table(table, file, row_group_size=ROW_GROUP_ROWS, **_options(table.schema))


class Writer:
    """A table that is written some rows at a time; `facts` go into its footer at the end."""

    def __init__(self, parquet: pq.ParquetWriter, schema: pa.Schema) -> None:
        self.facts: dict[str, Any] = {}
        self._parquet, self._waiting = parquet, schema.empty_table()

    def add(self, rows: pa.Table) -> None:
        """Append rows; full row groups are written."""
        rows = pa.concat_tables([self._waiting, rows])
        whole = rows.num_rows // ROW_GROUP_ROWS * ROW_GROUP_ROWS
        if whole:
            self._parquet.write_table(rows.slice(0, whole), ROW_GROUP_ROWS)
        self._waiting = rows.slice(whole)

    def finish(self) -> None:
        """Write the last row group, and the facts."""
        if self._waiting.num_rows:
            self._parquet.write_table(self._waiting, ROW_GROUP_ROWS)
        text = json.dumps(self.facts, sort_keys=True).encode()
        self._parquet.add_key_value_metadata({FACTS_KEY: text})


@contextmanager
def writer(url: str, schema: pa.Schema) -> Iterator[Writer]:
    """Commit a table as `write` does, for rows that do not fit into memory together."""
    with (
        storage.commit(url) as file,
        pq.ParquetWriter(file, schema, **_options(schema)) as parquet,
    ):
        rows = Writer(parquet, schema)
        yield rows
        rows.finish()


def _options(schema: pa.Schema) -> dict[str, Any]:
    """How all tables are written; checksums of pages let verify see a flipped bit."""
    return {
        "compression": "zstd",
        "use_dictionary": _repetitive(schema),
        "write_page_checksum": True,
    }


def _repetitive(schema: pa.Schema) -> list[str]:
    """The Parquet paths of all columns but vectors, which a dictionary makes larger and slower."""
    return [
        f"{field.name}.list.element" if pa.types.is_list(field.type) else field.name
        for field in schema
        if not pa.types.is_fixed_size_list(field.type)
    ]


def read(url: str, columns: Sequence[str] | None = None) -> pa.Table:
    """The whole table, or those of the columns that exist; OSError where it cannot be read."""

    def load() -> pa.Table:
        with storage.open_read(url) as file, _naming(url):
            return pq.ParquetFile(file, pre_buffer=True).read(list(columns) if columns else None)

    return storage.retry(load, url)


def read_rows(url: str, columns: Sequence[str], rows: range | np.ndarray) -> pa.Table:
    """Rows by their numbers, in this order; fetches only the footer and their row groups.

    A range is read without a copy.
    """

    def load() -> pa.Table:
        with storage.open_pieces(url) as file, _naming(url):
            parquet = pq.ParquetFile(file, pre_buffer=True)
            groups = range(parquet.num_row_groups)
            sizes = np.array([parquet.metadata.row_group(i).num_rows for i in groups])
            ends = np.cumsum(sizes)
            group = np.searchsorted(ends, np.asarray(rows), side="right")  # of each row
            held = np.unique(group)
            table = parquet.read_row_groups(held.tolist(), columns=list(columns))
            skipped = (ends - sizes)[held] - (np.cumsum(sizes[held]) - sizes[held])
            places = np.asarray(rows) - skipped[np.searchsorted(held, group)]
            if isinstance(rows, range):
                return table.slice(places[0], len(places))
            return table.take(places)

    return storage.retry(load, url)


def batches(url: str, columns: Sequence[str], rows: int = 1 << 16) -> Iterator[pa.Table]:
    """Those of the columns that exist, some rows at a time; holds no whole row group."""
    with storage.open_pieces(url) as file, _naming(url):
        parquet = pq.ParquetFile(file, buffer_size=BUFFER_BYTES)
        there = [name for name in columns if name in parquet.schema_arrow.names]
        for batch in parquet.iter_batches(rows, columns=there):
            yield pa.Table.from_batches([batch])


@contextmanager
def _naming(url: str) -> Iterator[None]:
    """Raise invalid Parquet as an OSError, which is retried: a read may have been cut short."""
    try:
        yield
    except ValueError as error:  # of Arrow, of JSON, of text
        raise OSError(
            f"{url} cannot be read ({error}): if it is damaged, delete it and run again"
        ) from None


def facts(url: str) -> dict[str, Any]:
    """The facts in the footer of a table; FileNotFoundError without the file."""

    def load() -> dict[str, Any]:
        tail = storage.read_tail(url, FOOTER_BYTES)
        length = int.from_bytes(tail[-8:-4], "little") + 8
        if length > len(tail) == FOOTER_BYTES and tail.endswith(b"PAR1"):
            tail = storage.read_tail(url, length)
        with _naming(url):
            metadata = pq.ParquetFile(pa.BufferReader(tail)).metadata.metadata or {}
            return dict(json.loads(metadata.get(FACTS_KEY, b"{}")))

    return storage.retry(load, url)
