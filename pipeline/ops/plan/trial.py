"""A run in small, timed: every stage's own core over a few shards, each as the process it will be.

reads   some images of the sampled shards
writes  nothing that stays: what the cores commit lies in a temporary folder until `run` returns

No Ray: a core runs in a fresh process, as in a Ray worker, so that its start and its peak memory
are those of a worker. What a stage does once (training, the cut of the landmarks) is done on as
many rows as it will have; where the sampled images are fewer, they are drawn again with noise.

N images of the whole run, D input dimensions, V words.
"""

import logging
import random
import time
from collections.abc import Callable
from concurrent.futures import ProcessPoolExecutor
from dataclasses import dataclass
from itertools import islice, pairwise
from multiprocessing import get_context
from pathlib import Path
from statistics import median
from typing import Any

from pipeline.artifacts import layout
from pipeline.caption import stage as caption
from pipeline.ops.plan import stage_timings
from pipeline.runtime.config import Sections
from pipeline.store import storage
from pipeline.store.listing import Shard
from pipeline.store.shard_writer import ShardWriter
from pipeline.store.shards import ShardReader
from pipeline.train import stage as train

log = logging.getLogger(__name__)
CLOCK = time.perf_counter
OWN = time.thread_time  # processor time of this thread


@dataclass(frozen=True)
class Sampled:
    """What was read of one shard."""

    shard: Shard
    copy: Shard  # its first images, on the local disk
    images: int
    bytes: int  # of the shard up to there
    whole: bool  # the shard has no more
    waited_s: float  # for the store


@dataclass(frozen=True)
class Timed:
    """What a process said, and what it took to be one."""

    facts: dict[str, Any]
    start_s: float  # until its modules were imported
    peak_bytes: int  # resident


@dataclass(frozen=True)
class Trial:
    """All that was measured. Seconds are per image, word, row, step or once, as the name says."""

    sampled: list[Sampled]
    encoder: Timed
    texts: Timed
    trainer: Timed
    driver: Timed
    task: Timed
    part_bytes: dict[str, float]  # folder -> bytes per image

    @property
    def images(self) -> int:
        """That were sampled."""
        return sum(sampled.images for sampled in self.sampled)

    @property
    def start_s(self) -> float:
        """Until a process has imported what it needs."""
        every = (self.encoder, self.texts, self.trainer, self.driver, self.task)
        return median(timed.start_s for timed in every)


def choose(shards: list[Shard], count: int, seed: int = 0) -> list[Shard]:
    """`count` of the shards, one at random out of each of as many even stretches of the list."""
    rng, count = random.Random(seed), min(count, len(shards))
    ends = [len(shards) * i // count for i in range(count + 1)]
    return [shards[rng.randrange(*stretch)] for stretch in pairwise(ends)]


def sample(shard: Shard, images: int, folder: Path, max_sample_bytes: int) -> Sampled:
    """Copy the first images of a shard."""
    target = folder / f"{shard.stem}.tar"
    began, own, count, end = CLOCK(), OWN(), 0, 0
    with storage.open_read(shard.url, shard.size) as stream:
        reader = ShardReader(stream, max_sample_bytes)
        with target.open("wb") as file, ShardWriter(file) as writer:
            samples = iter(reader)
            for found in islice(samples, images):
                count, end = count + 1, max(m.offset + m.size for m in found.members)
                for member in found.members:
                    if member.whole:
                        writer.add(member.tar_name, member.data)
        waited, whole = CLOCK() - began - (OWN() - own), next(samples, None) is None
    copy = Shard(shard.stem, str(target), target.stat().st_size, "")
    return Sampled(shard, copy, count, shard.size if whole else end, whole, waited)


def run(sections: Sections, sampled: list[Sampled], images: int, root: str) -> Trial:
    """The river over the sampled shards, as it will be for N images."""
    cfg, paths = sections["embed"], layout.RunPaths(root)
    log.info("plan: %s over %d images", cfg.model, sum(s.images for s in sampled))
    encoder = apart(stage_timings.embedding, cfg, [s.copy for s in sampled], paths)
    log.info("plan: training, cutting and captioning")
    names = train.check(sections["train"], cfg.model), caption.check(sections["caption"], cfg.model)
    texts = apart(stage_timings.encoding, cfg, sections["caption"].templates, max(names, key=len))
    vectors = texts.facts.pop("vectors")
    words = [stage_timings.filled(vectors, len(each)) for each in names]
    scale, total = texts.facts["logit_scale"], round(images * encoder.facts["embedded"])
    trainer = apart(stage_timings.training, sections["train"], paths, total, words[0], scale)
    driver = apart(stage_timings.clustering, sections["select_k"], paths, total)
    cut = driver.facts.pop("cut")
    task = apart(
        stage_timings.passing, cut, words[1], sections["caption"], sections["write"], paths
    )
    sizes = {
        folder: sum(Path(f"{root}/{folder}/{name}").stat().st_size for name in found)
        for folder in ("embeddings", "rejects", "assignments", "labels", "labeled")
        if (found := paths.folder(folder).names() - {"manifest.json"})
    }
    count = sum(s.images for s in sampled)
    per_image = {folder: size / count for folder, size in sizes.items()}
    return Trial(sampled, encoder, texts, trainer, driver, task, per_image)


def apart(function: Callable[..., dict[str, Any]], *arguments: Any) -> Timed:
    """Call it in a fresh process."""
    with ProcessPoolExecutor(1, mp_context=get_context("spawn")) as pool:
        return pool.submit(_timed, function, arguments, time.time()).result()


def _timed(function: Callable[..., dict[str, Any]], arguments: Any, asked: float) -> Timed:
    start_s = time.time() - asked
    facts = function(*arguments)
    return Timed(facts, start_s, stage_timings.peak_bytes())
