"""Embeds one shard: decodes, encodes and commits. Uses no Ray.

The part is committed after its rejects, with the facts of the shard in its footer: a shard that has
a part is done.
"""

import logging
import os
import time
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict, replace
from typing import Any

import numpy as np
import pyarrow as pa

from pipeline.artifacts import layout, schemas, views
from pipeline.embed.decoding import (
    Batch,
    Decoder,
    Limits,
    Pixels,
    Prepare,
    PrepareEach,
    Row,
    batches,
)
from pipeline.embed.kept_columns import MADE_WITH, NOT_FINITE, Kept, Name, find
from pipeline.embed.settings import Config
from pipeline.runtime import config
from pipeline.runtime.reject_reasons import Reason
from pipeline.store import columns, compressed, tables
from pipeline.store.listing import Shard
from pipeline.store.shards import ShardReader
from pipeline.store.storage import content
from pipeline.vision import clip

log = logging.getLogger(__name__)
LOOKAHEAD_BATCHES = 2  # of a shard, decoded before the model takes them
Column = tuple[np.ndarray, dict[str, Any]]  # (rows, D) float16; the values of MADE_WITH
Source = Callable[[Shard, Prepare, Config], Iterator[Batch]]


class ShardRows:
    """The rows, embeddings and rejects of a shard so far."""

    def __init__(self, encoders: Mapping[Name, clip.Encoder], thread: ThreadPoolExecutor) -> None:
        self.encoders, self.thread = encoders, thread
        self.rows: list[Row] = []
        self.rejects: list[Row] = []
        self.encoded: list[list[np.ndarray]] = []  # of each batch, by each encoder
        self.end = ""  # how the shard ended; "" before
        self.encode_s = self.decode_s = 0.0

    def add(self, batch: Batch) -> None:
        """Encode a batch; a sample is rejected if one of its embeddings is not finite."""
        self.end = batch.end
        self.rejects += batch.rejects
        self.decode_s += batch.decode_s
        if not batch.rows:
            return
        work = self.thread.submit(_timed, list(self.encoders.values()), batch.pixels)
        encoded, seconds = work.result()
        self.encode_s += seconds
        finite = np.logical_and.reduce([np.isfinite(rows).all(axis=1) for rows in encoded])
        for row, good in zip(batch.rows, finite, strict=True):
            if good:
                self.rows.append(row)
            else:
                self.reject(row)
        self.encoded.append([rows[finite].astype(np.float16) for rows in encoded])

    def reject(self, row: Row) -> None:
        """Reject a sample with an embedding that is not finite."""
        member, reason = row["image_member"], Reason.EMBEDDING_NOT_FINITE.because()
        self.rejects.append({**row, "member": member, "reason": reason})

    def readable(self) -> set[str]:
        """sample_ids of the rows, and of the rejects whose image was encoded."""
        encoded = [row for row in self.rejects if row["reason"].startswith(NOT_FINITE)]
        return {row["sample_id"] for row in (*self.rows, *encoded)}

    def columns(self) -> dict[Name, Column]:
        """The column of each encoder."""
        empty = [np.zeros((0, encoder.dim), np.float16) for encoder in self.encoders.values()]
        matrices = [np.concatenate(each) for each in zip(empty, *self.encoded, strict=True)]
        return {
            name: (matrix, {fact: getattr(encoder, fact) for fact in MADE_WITH})
            for (name, encoder), matrix in zip(self.encoders.items(), matrices, strict=True)
        }

    def columns_with(self, kept: Kept) -> dict[Name, Column]:
        """The columns of these encoders and of the part; rejects the rows that the part lacks."""
        rows = self.rows
        self.rows = [row for row in rows if row["sample_id"] in kept.row_of]
        for row in rows:
            if row["sample_id"] not in kept.row_of:
                self.reject(row)
        new = [i for i, row in enumerate(rows) if row["sample_id"] in kept.row_of]
        old = [kept.row_of[row["sample_id"]] for row in self.rows]
        return {
            **{name: (matrix[old], facts) for name, (matrix, facts) in kept.columns.items()},
            **{name: (matrix[new], facts) for name, (matrix, facts) in self.columns().items()},
        }


def _timed(encoders: Sequence[clip.Encoder], pixels: Pixels) -> tuple[list[np.ndarray], float]:
    started = time.perf_counter()
    encoded = [each.encode_images(own) for each, own in zip(encoders, pixels, strict=True)]
    return encoded, time.perf_counter() - started


def embed_shard(
    shard: Shard,
    encoders: Sequence[clip.Encoder],
    thread: ThreadPoolExecutor,
    cfg: Config,
    paths: layout.RunPaths,
    source: Source,
) -> dict[str, Any]:
    """Encode the batches of one shard, commit its rejects and its part; returns its facts.

    `encoders` are those of `cfg`, in its order. Where a part lacks only some of them, its columns
    stay, and the others are added.

    No batch crosses shards, so the bytes depend on the shard and `cfg` only. The models run in
    `thread`, a pool of one thread for all shards: torch keeps a team of OpenMP threads for every
    thread that calls it, and idle teams spin.
    """
    began, named = time.time(), dict(zip(cfg.encoders, encoders, strict=True))

    def encode(some: Mapping[Name, clip.Encoder]) -> ShardRows:
        out = ShardRows(some, thread)
        prepare = PrepareEach(tuple(encoder.prepare for encoder in some.values()))
        for batch in source(shard, prepare, cfg):
            out.add(batch)
        met = sorted(row["index"] for row in (*out.rows, *out.rejects))
        if not out.end or met != list(range(len(met))):  # a restarted decoder may cut other batches
            raise OSError(
                f"{shard.url}: its batches do not fit together; run the same command again"
            )
        return out

    kept = find(shard, cfg, paths)
    out = encode({n: e for n, e in named.items() if not kept or n not in kept.columns})
    if kept and not kept.fits(out.readable()):
        log.warning(
            "embed: %s: other images are readable than before: embedding it anew", shard.url
        )
        kept, out = None, encode(named)
    found = out.columns_with(kept) if kept else out.columns()
    facts = _finish(shard, out, found, cfg, paths)
    spent = {"encode_s": out.encode_s, "decode_s": out.decode_s}
    return {**facts, "took": {**spent, "began": began, "ended": time.time()}}


def quarantine(
    shard: Shard,
    encoders: Sequence[clip.Encoder],
    thread: ThreadPoolExecutor,
    cfg: Config,
    paths: layout.RunPaths,
    why: str,
) -> dict[str, Any]:
    """Commit every sample of the shard as a reject, without decoding any; returns its facts."""
    out = ShardRows(dict(zip(cfg.encoders, encoders, strict=True)), thread)
    decoder = Decoder(shard.stem, PrepareEach(()), _limits(cfg))
    with compressed.open_tar(shard.url, shard.size, shard.now or shard.version) as stream:
        reader = ShardReader(stream, cfg.max_sample_bytes)
        for sample in reader:
            row, member = decoder.row(sample)
            reason = row.get("reason") or Reason.QUARANTINED.because(why)
            out.rejects.append({**row, "member": member and member.name, "reason": reason})
    out.end = reader.end
    return _finish(shard, out, out.columns(), cfg, paths)


def decode(shard: Shard, prepare: Prepare, cfg: Config) -> Iterator[Batch]:
    """The batches of a shard, decoded ahead in threads of this process."""
    yield from batches(shard, prepare, _limits(cfg), cfg.batch_size, cfg.max_sample_bytes)


def _limits(cfg: Config) -> Limits:
    threads = 1 if cfg.decode_cpus else os.cpu_count() or 1
    ahead = LOOKAHEAD_BATCHES * cfg.batch_size
    return Limits(
        *(cfg.max_image_pixels, cfg.decode_timeout_s, threads, ahead),
        *(cfg.image_suffixes, cfg.caption_suffixes),
    )


def shard_facts(
    shard: Shard, out: ShardRows, found: Mapping[Name, Column], cfg: Config
) -> dict[str, Any]:
    """Settings and counts of a finished shard; the same on every run."""
    samples = len(out.rows) + len(out.rejects)
    survey = columns.Survey()
    for row in (*out.rows, *out.rejects):
        survey.add(row["kinds"])
    return {
        "stage": config.fingerprint(cfg),
        "config": config.facts(cfg),
        "shard": asdict(replace(shard, content=content(shard.url, shard.size))),
        "samples": samples,
        "embedded": len(out.rows),
        "rejected": len(out.rejects),
        "reasons": dict(Counter(row["reason"].partition(":")[0] for row in out.rejects)),
        "examples": examples(out.rejects),
        "end": out.end,
        "classes": sum(row.get("cls") is not None for row in out.rows),
        "text_problems": text_problems((*out.rows, *out.rejects)),
        **survey.facts(),
        "encoders": [
            {
                "column": views.column(place),
                "model": name[0],
                "pretrained": name[1],
                "dim": found[name][0].shape[1],
                **found[name][1],
            }
            for place, name in enumerate(cfg.encoders)
        ],
    }


def examples(rejects: Iterable[Row]) -> dict[str, list[str]]:
    """Code of a reason -> the first rejected sample by sample_id, and its whole reason."""
    found: dict[str, list[str]] = {}
    for row in sorted(rejects, key=lambda row: row["sample_id"]):
        found.setdefault(row["reason"].partition(":")[0], [row["sample_id"], row["reason"]])
    return found


def text_problems(rows: Iterable[Row]) -> dict[str, list[Any]]:
    """Text problem -> samples that have it, and the first of them by sample_id."""
    found: dict[str, list[Any]] = {}
    for row in sorted(rows, key=lambda row: row["sample_id"]):
        if problem := row.get("text_problem"):
            found.setdefault(problem, [0, row["sample_id"]])[0] += 1
    return found


def _finish(
    shard: Shard,
    out: ShardRows,
    found: Mapping[Name, Column],
    cfg: Config,
    paths: layout.RunPaths,
) -> dict[str, Any]:
    """Commit the rejects, then the part; returns the facts of the shard."""
    stem, facts = shard.stem, shard_facts(shard, out, found, cfg)
    vectors = [found[name][0] for name in cfg.encoders]
    rejects = sorted(out.rejects, key=lambda row: row["index"])
    if facts["end"] != "complete":  # damage is a row without a key
        rejects.append({"shard": stem, "reason": Reason.SHARD.because(facts["end"])})
    table = pa.Table.from_pylist(rejects, schema=schemas.REJECTS)
    tables.write(paths.rejects.file(f"{stem}.parquet"), table, stage=facts["stage"])
    schema = schemas.embeddings_schema(*(matrix.shape[1] for matrix in vectors))
    own = list(schema)[: -len(vectors)]
    texts = {f.name: pa.array([row.get(f.name) for row in out.rows], f.type) for f in own}
    embedded = {views.column(i): tables.from_matrix(matrix) for i, matrix in enumerate(vectors)}
    part = pa.table({**texts, **embedded}, schema=schema)
    tables.write(paths.embeddings.file(f"{stem}.parquet"), part, **facts)
    return facts
