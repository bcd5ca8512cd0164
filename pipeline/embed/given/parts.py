"""One file of given embeddings to one part: rows, rejects and facts as embed leaves them.

The part is committed after its rejects, with the facts of the file in its footer: a file that has a
part is done.
"""

import json
import logging
import traceback
from collections import Counter
from collections.abc import Iterator
from dataclasses import asdict
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc

from pipeline.artifacts import layout, schemas, views
from pipeline.embed.decoding import Row
from pipeline.embed.given import columns as chosen
from pipeline.embed.given import sources
from pipeline.embed.given.columns import Columns
from pipeline.embed.given.samples import FileSamples, Samples, ShardSamples, key
from pipeline.embed.given.settings import Config
from pipeline.embed.given.vectors import unit_rows
from pipeline.runtime import config
from pipeline.runtime.reject_reasons import Reason
from pipeline.store import columns, storage, tables
from pipeline.store.listing import Paired, Shard, shard_of

log = logging.getLogger(__name__)


def import_part(
    item: dict[str, Any], wanted: Columns, cfg: Config, paths: layout.RunPaths
) -> dict[str, Any]:
    """The facts of a file as JSON, or the error that stopped it; a task. The driver decides."""
    shard = shard_of(item)
    try:
        facts = storage.retry(lambda: write_part(shard, wanted, cfg, paths))
        return {"stem": shard.stem, "facts": json.dumps(facts), "error": ""}
    except Exception as error:  # a row, so that the other files continue
        log.error("embed: %s: %s", shard.url, traceback.format_exc())
        message = f"{sources.file_of(shard).url}: {type(error).__name__}: {error}"
        return {"stem": shard.stem, "facts": "", "error": message}


def write_part(
    shard: Shard, wanted: Columns, cfg: Config, paths: layout.RunPaths
) -> dict[str, Any]:
    """Commit the rejects and the part of one file; returns its facts."""
    file, name = sources.file_of(shard), f"{shard.stem}.parquet"
    named = sources.schema(file)
    own = [f.name for f in named if chosen.is_kept(f, wanted)]
    there = [n for n in (*wanted.vectors, wanted.id, wanted.caption, *own) if n in named.names]
    paired = isinstance(shard, Paired)
    samples = ShardSamples(shard, cfg) if paired else FileSamples(shard.stem)
    with (
        tables.writer(paths.embeddings.file(name), schemas.embeddings_schema(*wanted.dims)) as rows,
        tables.writer(paths.rejects.file(name), schemas.REJECTS) as rejects,
    ):
        part = Part(samples, wanted, own, rows, rejects)
        for block in sources.blocks(file, there):
            part.add(block)
        part.finish()
        rows.facts = part.facts(shard, [named.field(n).type for n in wanted.vectors], cfg)
        rejects.facts = {"stage": rows.facts["stage"]}
    return rows.facts


class Part:
    """The samples of one file so far."""

    def __init__(
        self,
        samples: Samples,
        wanted: Columns,
        own: list[str],
        rows: tables.Writer,
        rejects: tables.Writer,
    ) -> None:
        self.samples, self.wanted, self.own = samples, wanted, own
        self.rows, self.rejects = rows, rejects
        self.schema = schemas.embeddings_schema(*wanted.dims)
        self.embedded = self.rejected = 0
        self.unmatched = 0  # rows that are of no sample
        self.first_unmatched = ""  # id of one of these
        self.reasons: Counter[str] = Counter()
        self.survey = columns.Survey()

    def add(self, block: pa.Table) -> None:
        """Add the next rows of the file."""
        matrices, why = self._vectors(block)
        good, bad, places = list[Row](), list[Row](), list[int]()
        for place, (own_key, caption, values) in enumerate(self._texts(block)):
            row = self.samples.of(own_key)
            if row is None:
                self.unmatched += 1
                self.first_unmatched = self.first_unmatched or own_key or ""
                continue
            row = self._described(row, caption, values)
            if (reason := row.get("reason") or why.get(place)) is None:
                good.append(row)
                places.append(place)
            else:
                bad.append({**row, "member": row.get("image_member"), "reason": reason})
        own = list(self.schema)[: -len(matrices)]
        texts = {f.name: pa.array([row.get(f.name) for row in good], f.type) for f in own}
        found = {views.column(i): tables.from_matrix(x[places]) for i, x in enumerate(matrices)}
        self.rows.add(pa.table({**texts, **found}, schema=self.schema))
        self.embedded += len(good)
        self._reject(bad)

    def finish(self) -> None:
        """Reject the samples of the shard that have no row; note its damage."""
        rest = sorted(self.samples.rest(), key=lambda row: row["index"])
        for row in rest:
            self.survey.add(row.get("kinds", {}))
        self._reject(rest)
        if self.samples.end != "complete":
            damage = {"shard": self.samples.stem, "reason": Reason.SHARD.because(self.samples.end)}
            self.rejects.add(pa.Table.from_pylist([damage], schema=schemas.REJECTS))

    def _vectors(self, block: pa.Table) -> tuple[list[np.ndarray], dict[int, str]]:
        """The unit rows of each view, and row -> why it is rejected."""
        matrices, why = [], dict[int, str]()
        for name, dim in zip(self.wanted.vectors, self.wanted.dims, strict=True):
            x, own = unit_rows(block[name].combine_chunks(), name, dim)
            matrices.append(x)
            why = own | why
        return matrices, why

    def _texts(self, block: pa.Table) -> Iterator[tuple[str | None, str | None, dict[str, Any]]]:
        """The key, the caption and the kept values of each row."""
        keys = [key(value) for value in _values(block[self.wanted.id])]
        captions: list[str | None] = [None] * len(block)
        if self.wanted.caption in block.column_names:
            captions = _values(block[self.wanted.caption])
        kept = [_values(block[name]) for name in self.own]
        rows = [dict(zip(self.own, each, strict=True)) for each in zip(*kept, strict=True)]
        return zip(keys, captions, rows or [{}] * len(block), strict=True)

    def _described(self, row: Row, caption: str | None, values: dict[str, Any]) -> Row:
        """The row with caption and json; those of the shard's sample come first."""
        if row.get("caption") is None:
            row["caption"] = caption
        if self.own:
            values = values | columns.parse(row.get("json"))
            row["json"] = json.dumps(values, ensure_ascii=False)
            row["kinds"] = columns.kinds(values)
        self.survey.add(row.get("kinds", {}))
        return row

    def _reject(self, rows: list[Row]) -> None:
        self.rejects.add(pa.Table.from_pylist(rows, schema=schemas.REJECTS))
        self.reasons.update(row["reason"].partition(":")[0] for row in rows)
        self.rejected += len(rows)

    def facts(self, shard: Shard, kinds: list[pa.DataType], cfg: Config) -> dict[str, Any]:
        """Settings and counts of the file, as `encode_shard.shard_facts` gives those of a shard."""
        facts = {
            "stage": config.fingerprint(cfg),
            "config": config.facts(cfg),
            "shard": asdict(shard),
            "samples": self.embedded + self.rejected,
            "embedded": self.embedded,
            "rejected": self.rejected,
            "reasons": dict(self.reasons),
            "end": self.samples.end,
            **self.survey.facts(),
            "encoders": [
                {
                    "column": views.column(place),
                    "model": name,
                    "pretrained": "",
                    "dim": dim,
                    "device": "given",
                    "precision": f"float{kind.value_type.bit_width}",
                }
                for place, (name, dim, kind) in enumerate(
                    zip(self.wanted.vectors, self.wanted.dims, kinds, strict=True)
                )
            ],
        }
        if isinstance(shard, Paired):
            facts |= {"unmatched": self.unmatched, "first_unmatched": self.first_unmatched}
        return facts


def _values(column: pa.ChunkedArray) -> list[Any]:
    """The values of a column as JSON has them: dates and decimals as text, no bytes."""
    kind = column.type
    if pa.types.is_dictionary(kind):
        column = column.cast(kind.value_type)
    elif pa.types.is_temporal(kind) or pa.types.is_decimal(kind):
        column = column.cast(pa.string())
    try:
        return list(column.to_pylist())
    except UnicodeDecodeError:  # Parquet's texts may be no UTF-8
        found = pc.cast(column, pa.large_binary()).to_pylist()
        return [None if value is None else value.decode("utf-8", "replace") for value in found]
