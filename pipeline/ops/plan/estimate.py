"""Carries the measurements of a few shards over to all images and to the target cluster.

N images. Nothing is measured here: every stage is a rate multiplied by N, and a start-up time.
"""

import math
from dataclasses import dataclass
from typing import Any

from pipeline.caption import stage as caption
from pipeline.mcr2.model_selection import validation_steps
from pipeline.ops.plan.stage_timings import Facts, Sampled
from pipeline.runtime import tasks
from pipeline.runtime.config import Sections
from pipeline.runtime.errors import UserError
from pipeline.select_k import full_passes
from pipeline.store.listing import Shard
from pipeline.train import sampling

# What Ray adds, in starts of one process (as measured here). Fitted to one run of
# `benchmarks/plan.py` over the bundled emoji on a quiet machine; CIFAR is the check.
RAY_STARTS = 1.3  # before its first work
POOL_STARTS = 0.95  # Ray Data and one actor, to its first call
TRAIN_STARTS = 3.75  # Ray Train and its worker, and their end
WRITE_STARTS = 0.25  # of tasks whose processes are there
SESSION_STARTS = 2.0  # the command itself, and Ray's end
REPORT_S = 1.0


@dataclass(frozen=True)
class Target:
    """The cluster that is planned for."""

    nodes: int
    cpus: int  # of each node
    gpus: int  # of each node
    encode_rate: float  # images/s of one GPU; 0: unknown

    def __post_init__(self) -> None:
        for name, least in (("nodes", 1), ("cpus", 1), ("gpus", 0)):
            if getattr(self, name) < least:
                raise UserError(f"--{name} {getattr(self, name)}: give {least} or more")
        if self.encode_rate and not self.gpus:
            raise UserError(f"--encode-rate {self.encode_rate:g} is of a GPU: give --gpus, too")
        if not (self.encode_rate >= 0 and math.isfinite(self.encode_rate)):
            raise UserError(f"--encode-rate {self.encode_rate}: give images per second of one GPU")


@dataclass(frozen=True)
class Stage:
    """One stage of the run."""

    stage: str
    cpu_h: float
    gpu_h: float
    start_s: float  # wall time until the work begins
    work_s: float  # wall time of the work
    bound: str  # what limits the work


def count_images(shards: list[Shard], sampled: list[Sampled]) -> tuple[int, int, int]:
    """Images of all shards, and a range: as many per byte as the sampled have, or the extremes.

    Exact for shards that were read to their end.
    """
    read = [s for s in sampled if s.whole]
    known = sum(s.images for s in read)
    left = sum(shard.size for shard in shards) - sum(s.shard.size for s in read)
    rates = [s.images / s.bytes for s in sampled]
    mean = sum(s.images for s in sampled) / sum(s.bytes for s in sampled)
    likely, low, high = (known + round(left * rate) for rate in (mean, min(rates), max(rates)))
    return likely, low, high


def encode_rate(found: Facts, target: Target) -> float:
    """Images/s of one GPU; without one, of this machine's device."""
    return target.encode_rate or 1 / float(found["encode_s"])


def stages(
    sections: Sections, shards: int, images: int, found: Facts, target: Target
) -> list[Stage]:
    """The stages in their order, for N images in so many shards."""
    gpus, cpus, start = target.nodes * target.gpus, target.nodes * target.cpus, found["start_s"]
    faster = target.cpus / found["cores"]  # than here; a GPU by as much as it is with images
    word_s = found["word_s"] / (encode_rate(found, target) * found["encode_s"] if gpus else faster)

    def passes(seconds: float, most: int) -> float:
        return images * seconds / min(cpus, len(tasks.chunks(range(shards), most)))

    def stage(name: str, cpu_s: float, start_s: float, gpu_s: float = 0.0, **work: float) -> Stage:
        """The parts of the work happen one after the other; the longest is named."""
        longest = max(work, key=lambda part: work[part])
        return Stage(name, cpu_s / 3600, gpu_s / 3600, start_s, sum(work.values()), longest)

    cfg, pool = sections["train"], POOL_STARTS * start + found["load_text_s"]
    data = min(images, sampling.OVERREAD * found["train_samples"]) * found["read_row_s"]
    data += found["once_s"] + len(validation_steps(cfg.steps)) * found["validation_s"]
    steps, words = cfg.steps * found["step_s"], found["train_words"] * word_s if cfg.words else 0.0
    train = stage(
        "train",
        data + steps + words,
        TRAIN_STARTS * start + (pool if cfg.words else 0),
        cfg.workers * (data + steps) + words if gpus >= cfg.workers else 0.0,
        **{"steps": steps, "data and validation": data, "words": words},
    )
    cut, all_s = found["cut_s"], images * found["select_s"]
    parts = passes(found["select_s"], full_passes.MOST_TASKS)
    select = stage("select_k", all_s + cut, start, parts=parts, landmarks=cut)
    words, all_s = found["caption_words"] * word_s, images * found["caption_s"]
    parts, gpu_s = passes(found["caption_s"], caption.MOST_TASKS), words if gpus else 0.0
    captions = stage("caption", all_s + words, pool, gpu_s, parts=parts, words=words)
    all_s, read = images * found["write_s"], passes(found["waited_s"], shards)
    parts = passes(found["write_s"], shards)
    write = stage("write", all_s, WRITE_STARTS * start, parts=parts, read=read)
    report = stage("report", REPORT_S, SESSION_STARTS * start, pictures=REPORT_S)
    embed = _embed(sections["embed"], shards, images, found, target)
    return [embed, train, select, captions, write, report]


def _embed(cfg: Any, shards: int, images: int, found: Facts, target: Target) -> Stage:
    """Decoding, encoding and reading happen at once: the slowest decides."""
    gpus = target.nodes * target.gpus
    encoders = min(cfg.actors or max(1, gpus), shards)
    cores = decoders = target.cpus * min(target.nodes, encoders)
    readers = encoders * cfg.readers
    if cfg.decode_cpus:  # on any node, next to the encoders
        decoders = min(readers, max(1, target.nodes * target.cpus - encoders))
    seconds = {
        "decode": images * found["decode_s"] / decoders,
        "read": images * found["waited_s"] / readers,
        "encode": images / (encode_rate(found, target) * encoders)
        if gpus
        else images * found["embed_s"] * found["cores"] / cores,
    }
    bound = max(seconds, key=lambda name: seconds[name])
    work = seconds[bound] * math.ceil(shards / encoders) * encoders / shards
    cpu_s = images * found["decode_s" if gpus else "embed_cpu_s"]
    start_s = (RAY_STARTS + POOL_STARTS) * found["start_s"] + found["load_s"]
    return Stage("embed", cpu_s / 3600, encoders * work / 3600 * bool(gpus), start_s, work, bound)
