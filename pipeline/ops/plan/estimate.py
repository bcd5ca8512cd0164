"""Carries the measurements of a few shards over to all images and to the target cluster.

N images. Nothing is measured here: every stage is a rate multiplied by N, and a start-up time.
"""

import math
from dataclasses import dataclass

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
        for name in ("nodes", "cpus"):
            if getattr(self, name) < 1:
                raise UserError(f"--{name} {getattr(self, name)}: give 1 or more")
        if self.gpus < 0:
            raise UserError(f"--gpus {self.gpus}: give 0 or more, of each node")
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
    rate = encode_rate(found, target)

    def words_s(words: int) -> float:  # a GPU is as much faster as it is with images
        seconds = words * found["word_s"]
        faster = rate * found["encode_s"] if gpus else target.cpus / found["cores"]
        return float(seconds / faster)

    def passes_s(each: float, most: int) -> float:
        return images * each / min(cpus, len(tasks.chunks(range(shards), most)))

    def stage(name: str, cpu_s: float, start_s: float, gpu_s: float = 0.0, **work: float) -> Stage:
        """The parts of the work happen one after the other; the longest is named."""
        longest = max(work, key=lambda part: work[part])
        return Stage(name, cpu_s / 3600, gpu_s / 3600, start_s, sum(work.values()), longest)

    cfg = sections["train"]
    read = min(images, sampling.OVERREAD * found["train_samples"]) * found["read_row_s"]
    steps = cfg.steps * found["step_s"]
    data = read + found["once_s"] + len(validation_steps(cfg.steps)) * found["validation_s"]
    words = words_s(found["train_words"]) if cfg.words else 0.0
    pool = POOL_STARTS * start + found["load_text_s"]
    train = stage(
        "train",
        data + steps + words,
        TRAIN_STARTS * start + (pool if cfg.words else 0),
        cfg.workers * (data + steps) + words if gpus >= cfg.workers else 0.0,
        **{"steps": steps, "data and validation": data, "words": words},
    )
    each = found["statistics_s"] + found["assign_s"]
    passes, cut = passes_s(each, full_passes.MOST_TASKS), found["cut_s"]
    select = stage("select_k", images * each + cut, start, parts=passes, landmarks=cut)
    each, words = found["count_s"] + found["votes_s"], words_s(found["caption_words"])
    votes = passes_s(each, caption.MOST_TASKS)
    gpu_s = words if gpus else 0.0
    named = stage("caption", images * each + words, pool, gpu_s, parts=votes, words=words)
    slots = min(cpus, shards)
    parts, wait = images * found["write_s"] / slots, images * found["waited_s"] / slots
    write = stage("write", images * found["write_s"], WRITE_STARTS * start, parts=parts, read=wait)
    report = stage("report", REPORT_S, SESSION_STARTS * start, pictures=REPORT_S)
    return [_embed(sections, shards, images, found, target), train, select, named, write, report]


def _embed(sections: Sections, shards: int, images: int, found: Facts, target: Target) -> Stage:
    """Decoding, encoding and reading happen at once: the slowest decides."""
    cfg, gpus = sections["embed"], target.nodes * target.gpus
    encoders = min(cfg.actors or max(1, gpus), shards)
    cores = decoders = target.cpus * min(target.nodes, encoders)
    readers = encoders * cfg.readers
    if cfg.decode_cpus:  # on any node, next to the encoders
        spare = max(1, target.nodes * target.cpus - encoders)
        decoders = min(readers, spare)
    seconds = {
        "decode": images * found["decode_s"] / decoders,
        "read": images * found["waited_s"] / readers,
    }
    if gpus:
        seconds["encode"] = images / (encode_rate(found, target) * encoders)
        cpu_s = images * found["decode_s"]
    else:
        seconds["encode"] = images * found["embed_s"] * found["cores"] / cores
        cpu_s = images * found["embed_cpu_s"]
    bound = max(seconds, key=lambda name: seconds[name])
    work = seconds[bound] * math.ceil(shards / encoders) * encoders / shards
    start_s = (RAY_STARTS + POOL_STARTS) * found["start_s"] + found["load_s"]
    gpu_h = encoders * work / 3600 if gpus else 0.0
    return Stage("embed", cpu_s / 3600, gpu_h, start_s, work, bound)
