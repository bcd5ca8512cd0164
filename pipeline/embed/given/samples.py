"""Which sample a row of given embeddings belongs to: one of its own, or one of a shard."""

from collections.abc import Iterator
from typing import Any

from pipeline.embed.decoding import Limits, Row, batches
from pipeline.embed.given.settings import Config
from pipeline.embed.settings import Config as EmbedConfig
from pipeline.runtime.reject_reasons import Reason
from pipeline.store.listing import Shard
from pipeline.store.shards import UniqueIds

THREADS = 2  # that decode a shard
BATCH = 256  # samples decoded at once


class FileSamples:
    """Every row of a file is a sample. Its key is the id; a repeated id gets #2, #3, …"""

    end = "complete"

    def __init__(self, stem: str) -> None:
        self.stem, self.count = stem, 0
        self._ids = UniqueIds()

    def of(self, key: str | None) -> Row:
        """The identity of the next row; with a `reason` where its id is missing or repeated."""
        text = key or ""
        own, repeated = self._ids.of(text, text)
        row: Row = {"sample_id": f"{self.stem}/{own}", "shard": self.stem}
        row |= {"key": text, "index": self.count}
        self.count += 1
        if key is None:
            row["reason"] = Reason.MISSING_ID.because()
        elif repeated:
            row["reason"] = Reason.DUPLICATE_KEY.because()
        return row

    def rest(self) -> Iterator[Row]:
        """Samples without a row: none."""
        return iter(())


class ShardSamples:
    """The samples of a shard, by their keys. Images are decoded, to reject those that are none."""

    def __init__(self, shard: Shard, cfg: Config) -> None:
        self.stem, self.rejects = shard.stem, list[Row]()
        self._waiting: dict[str, Row] = {}  # samples without a row so far
        self.end = ""
        limits = Limits(cfg.max_image_pixels, EmbedConfig.decode_timeout_s, THREADS, BATCH)
        for batch in batches(shard, lambda _: (), limits, BATCH, cfg.max_sample_bytes):
            self._waiting |= {row["key"]: row for row in batch.rows}
            self.rejects += batch.rejects
            self.end = batch.end

    def of(self, key: str | None) -> Row | None:
        """The sample of that key; None where there is none, or an earlier row was its."""
        return self._waiting.pop(key, None) if key is not None else None

    def rest(self) -> Iterator[Row]:
        """The rejected samples of the shard, and those without a row."""
        yield from self.rejects
        for row in self._waiting.values():
            reason = Reason.MISSING_EMBEDDING.because("no row has this id")
            yield {**row, "member": row["image_member"], "reason": reason}


Samples = FileSamples | ShardSamples


def key(value: Any) -> str | None:
    """An id as text; None for null, NaN and empty text. Whole floats are written as integers."""
    if isinstance(value, float):
        if value != value:
            return None
        value = int(value) if value.is_integer() else value
    return None if value is None else str(value) or None
