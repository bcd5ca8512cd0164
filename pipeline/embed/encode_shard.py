"""Embeds one shard: decodes, encodes and commits. Uses no Ray.

The part is committed after its rejects, with the facts of the shard in its footer: a shard that has
a part is done.
"""

import logging
import os
import time
from collections import Counter
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict
from typing import Any

import numpy as np
import pyarrow as pa

from pipeline.artifacts import layout, schemas
from pipeline.embed.decoding import Batch, Limits, Prepare, Row, batches
from pipeline.embed.settings import Config
from pipeline.runtime import config
from pipeline.runtime.reject_reasons import Reason
from pipeline.store import columns, tables
from pipeline.store.listing import Shard
from pipeline.vision import clip

log = logging.getLogger(__name__)
LOOKAHEAD_BATCHES = 2  # of a shard, decoded before the model takes them
Source = Callable[[Shard, Prepare, Config], Iterator[Batch]]


class ShardRows:
    """The rows, embeddings and rejects of a shard so far."""

    def __init__(self, encoder: clip.Encoder, thread: ThreadPoolExecutor) -> None:
        self.encoder, self.thread = encoder, thread
        self.rows: list[Row] = []
        self.rejects: list[Row] = []
        self.embeddings: list[np.ndarray] = []
        self.encode_s = self.decode_s = 0.0

    def add(self, batch: Batch) -> None:
        """Encode a batch; a sample whose embedding is not finite is rejected."""
        self.rejects += batch.rejects
        self.decode_s += batch.decode_s
        if not batch.rows:
            return
        encoded, seconds = self.thread.submit(_timed, self.encoder, batch.pixels).result()
        self.encode_s += seconds
        finite = np.isfinite(encoded).all(axis=1)
        for row, good in zip(batch.rows, finite, strict=True):
            if good:
                self.rows.append(row)
            else:
                member, reason = row["image_member"], Reason.EMBEDDING_NOT_FINITE.because()
                self.rejects.append({**row, "member": member, "reason": reason})
        self.embeddings.append(encoded[finite].astype(np.float16))

    def matrix(self) -> np.ndarray:
        """(rows, dim) float16."""
        empty = np.zeros((0, self.encoder.dim), np.float16)
        return np.concatenate([empty, *self.embeddings])


def _timed(encoder: clip.Encoder, pixels: np.ndarray) -> tuple[np.ndarray, float]:
    started = time.perf_counter()
    encoded = encoder.encode_images(pixels)
    return encoded, time.perf_counter() - started


def embed_shard(
    shard: Shard,
    encoder: clip.Encoder,
    thread: ThreadPoolExecutor,
    cfg: Config,
    paths: layout.RunPaths,
    source: Source,
) -> dict[str, Any]:
    """Encode the batches of one shard, commit its rejects and its part; returns its facts.

    No batch crosses shards, so the bytes depend on the shard and `cfg` only. The model runs in
    `thread`, a pool of one thread for all shards: torch keeps a team of OpenMP threads for every
    thread that calls it, and idle teams spin.
    """
    began, end = time.time(), ""
    out = ShardRows(encoder, thread)
    for batch in source(shard, encoder.prepare, cfg):
        out.add(batch)
        end = batch.end
    met = sorted(row["index"] for row in (*out.rows, *out.rejects))
    if not end or met != list(range(len(met))):  # a restarted decoder may cut other batches
        raise OSError(f"{shard.url}: its batches do not fit together; run the same command again")
    facts = shard_facts(shard, out, end, cfg)
    _commit(shard.stem, out, facts, paths)
    spent = {"encode_s": out.encode_s, "decode_s": out.decode_s}
    return {**facts, "took": {**spent, "began": began, "ended": time.time()}}


def decode(shard: Shard, prepare: Prepare, cfg: Config) -> Iterator[Batch]:
    """The batches of a shard, decoded ahead in threads of this process."""
    threads = 1 if cfg.decode_cpus else os.cpu_count() or 1
    ahead = LOOKAHEAD_BATCHES * cfg.batch_size
    limits = Limits(cfg.max_image_pixels, cfg.decode_timeout_s, threads, ahead)
    yield from batches(shard, prepare, limits, cfg.batch_size, cfg.max_sample_bytes)


def shard_facts(shard: Shard, out: ShardRows, end: str, cfg: Config) -> dict[str, Any]:
    """Settings and counts of a finished shard; the same on every run."""
    samples = len(out.rows) + len(out.rejects)
    kinds, clashes = columns.survey(row["kinds"] for row in (*out.rows, *out.rejects))
    return {
        "stage": config.fingerprint(cfg),
        "config": config.facts(cfg),
        "shard": asdict(shard),
        "samples": samples,
        "embedded": len(out.rows),
        "rejected": len(out.rejects),
        "reasons": dict(Counter(row["reason"].partition(":")[0] for row in out.rejects)),
        "end": end,
        "columns": kinds,
        "clashes": sorted(clashes),
        "device": out.encoder.device,
        "precision": out.encoder.precision,
    }


def _commit(stem: str, out: ShardRows, facts: dict[str, Any], paths: layout.RunPaths) -> None:
    rejects = sorted(out.rejects, key=lambda row: row["index"])
    if facts["end"] != "complete":  # damage is a row without a key
        rejects.append({"shard": stem, "reason": Reason.SHARD.because(facts["end"])})
    table = pa.Table.from_pylist(rejects, schema=schemas.REJECTS)
    tables.write(paths.rejects.file(f"{stem}.parquet"), table, stage=facts["stage"])
    schema = schemas.embeddings_schema(out.encoder.dim)
    texts = {f.name: pa.array([r[f.name] for r in out.rows], f.type) for f in list(schema)[:-1]}
    part = pa.table({**texts, "embedding": tables.from_matrix(out.matrix())}, schema=schema)
    tables.write(paths.embeddings.file(f"{stem}.parquet"), part, **facts)
