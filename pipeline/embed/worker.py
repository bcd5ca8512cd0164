"""The encoder process of Ray Data: loads its models once, embeds one shard per call."""

import json
import logging
import traceback
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from typing import Any
from uuid import uuid4

import ray
import torch
from ray.exceptions import OutOfMemoryError, RayTaskError, WorkerCrashedError

from pipeline.artifacts import layout
from pipeline.embed.attempts import MOST_DEATHS, Attempts, Turns
from pipeline.embed.decoding import Batch, Prepare
from pipeline.embed.encode_shard import LOOKAHEAD_BATCHES, decode, embed_shard, quarantine
from pipeline.embed.settings import Config
from pipeline.store import storage
from pipeline.store.listing import Shard
from pipeline.vision import clip

log = logging.getLogger(__name__)
RETRIES = 3  # of a decode task whose node died


def decode_elsewhere(shard: Shard, prepare: Prepare, cfg: Config) -> Iterator[Batch]:
    """The batches of `decode`, from a task on any node with a free CPU.

    The task stays LOOKAHEAD_BATCHES ahead, and is restarted if its node dies.
    """
    task = ray.remote(decode).options(
        num_cpus=1,
        max_retries=RETRIES,
        num_returns="streaming",
        _generator_backpressure_num_objects=LOOKAHEAD_BATCHES,
    )
    batches: Any = task.remote(shard, prepare, cfg)
    try:
        for batch in batches:
            yield ray.get(batch)
    except RayTaskError as error:
        raise error.cause from None
    finally:
        ray.cancel(batches)  # in case the caller stopped early


class Embedder:
    """An actor that loads its models once and embeds one shard per call; calls may be parallel."""

    def __init__(self, cfg: Config, paths: layout.RunPaths, threads: int, command: str) -> None:
        self.cfg, self.paths, self.name = cfg, paths, uuid4().hex
        self.attempts, self.turns = Attempts(paths.attempts, command), Turns()
        self.thread = ThreadPoolExecutor(1, initializer=torch.set_num_threads, initargs=(threads,))
        self.encoders = [
            clip.load(*name, device=cfg.device, precision=cfg.precision, threads=threads)
            for name in cfg.encoders
        ]

    def __call__(self, row: dict[str, Any]) -> dict[str, Any]:
        """The shard's facts as JSON, or the error that stopped it; the driver decides."""
        shard = Shard(**json.loads(row["shard"]))
        try:
            facts = self._embed_or_quarantine(shard)
            return {"stem": shard.stem, "facts": json.dumps(facts), "error": ""}
        except Exception as error:  # a row, so that the other shards continue
            log.error("embed: %s: %s", shard.url, traceback.format_exc())
            message = f"{shard.url}: {type(error).__name__}: {error}"
            return {"stem": shard.stem, "facts": "", "error": message}

    def _embed_or_quarantine(self, shard: Shard) -> dict[str, Any]:
        """The facts of the shard. One that has ended several workers is not decoded again."""
        deaths = self.attempts.deaths(shard.stem)
        if deaths >= MOST_DEATHS:
            return self._quarantine(shard, f"it ended {deaths} workers")
        with self.turns.turn(alone=deaths > 0), self.attempts.attempt(shard.stem, deaths):
            try:
                return storage.retry(lambda: self._embed(shard))
            except (WorkerCrashedError, OutOfMemoryError) as error:  # of a task that decodes
                return self._quarantine(shard, f"its decoding ended with {type(error).__name__}")

    def _quarantine(self, shard: Shard, why: str) -> dict[str, Any]:
        log.error("embed: %s is quarantined: %s", shard.url, why)
        encoders = (self.encoders, self.thread, self.cfg, self.paths)
        return storage.retry(lambda: quarantine(shard, *encoders, why))

    def _embed(self, shard: Shard) -> dict[str, Any]:
        source = decode_elsewhere if self.cfg.decode_cpus else decode
        facts = embed_shard(shard, self.encoders, self.thread, self.cfg, self.paths, source)
        facts["took"]["encoder"] = self.name
        return facts
