"""What a run will take: the figures of a trial, carried over to all images and to other machines.

N images, D input dimensions. Nothing is measured here.
"""

import math
from dataclasses import dataclass

from pipeline.caption import stage as caption
from pipeline.ops.plan.trial import Sampled, Trial
from pipeline.runtime import tasks
from pipeline.runtime.config import Sections
from pipeline.runtime.errors import UserError
from pipeline.select_k import full_passes
from pipeline.store.listing import Shard
from pipeline.train import sampling

GB = 10**9
# What Ray adds, in starts of a process, each as long as one was measured to take here; fitted to
# one run of `benchmarks/plan.py` over the bundled emoji, on a quiet machine.
RAY_STARTS = 1.3  # before its first work
POOL_STARTS = 0.95  # Ray Data and one actor, to its first call
TRAIN_STARTS = 3.75  # Ray Train and its worker, and their end
WRITE_STARTS = 0.25  # of tasks whose processes are there
SESSION_STARTS = 2.0  # the command itself, and Ray's end
SPARE_TASKS = 2  # processes for tasks beyond a node's cores
REPORT_S = 1.0
DRIVER_BYTES = 150 * 10**6  # Ray in the command's own process; fitted to emoji, too
ROW_BYTES = 4096  # of a sample's texts as Python objects, beside its vector


@dataclass(frozen=True)
class Target:
    """The cluster that is planned for."""

    nodes: int
    cpus: int  # of each node
    gpus: int
    encode_rate: float  # images/s of one GPU; 0: not known

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
class Process:
    """The kind of a stage's processes that holds most memory."""

    name: str
    bytes: int
    why: str


@dataclass(frozen=True)
class Stage:
    """One stage of the run."""

    stage: str
    cpu_h: float
    gpu_h: float
    work_s: float  # wall time, once it has started
    start_s: float  # wall time of starting
    bound: str  # what the work waits for
    process: Process | None = None


@dataclass(frozen=True)
class Plan:
    """All that is printed."""

    target: Target
    shards: int
    sampled: list[str]  # stems
    images: int
    images_low: int
    images_high: int
    bytes_in: int
    bytes_out: dict[str, int]
    decode_rate: float  # images/s of one core
    encode_rate: float  # images/s of one encoder
    decode_cpus_per_gpu: int
    stages: list[Stage]
    wall_s: float
    notes: list[str]


def counted(shards: list[Shard], sampled: list[Sampled]) -> tuple[int, int, int]:
    """Images of all shards, and a range: as many per byte as the sampled have, or the extremes.

    Exact for what was read to its end.
    """
    read = [s for s in sampled if s.whole]
    known = sum(s.images for s in read)
    left = sum(shard.size for shard in shards) - sum(s.shard.size for s in read)
    rates = [s.images / s.bytes for s in sampled]
    mean = sum(s.images for s in sampled) / sum(s.bytes for s in sampled)
    likely, low, high = (known + round(left * rate) for rate in (mean, min(rates), max(rates)))
    return likely, low, high


@dataclass(frozen=True)
class Estimate:
    """The run that is planned, stage by stage."""

    sections: Sections
    shards: int
    images: int
    trial: Trial
    target: Target

    @property
    def gpus(self) -> int:
        """Of the whole cluster."""
        return self.target.nodes * self.target.gpus

    @property
    def encode_rate(self) -> float:
        """Images/s of one GPU; without one, of this machine's device."""
        return self.target.encode_rate or 1 / float(self.trial.encoder.facts["encode_s"])

    @property
    def rows(self) -> float:
        """Of the images of a shard, those that were not tried."""
        return max(0.0, self.images / self.shards - self.trial.images / len(self.trial.sampled))

    def stages(self) -> list[Stage]:
        """In their order."""
        return [
            self.embed(),
            self.train(),
            self.select_k(),
            self.caption(),
            self.write(),
            self.report(),
        ]

    def embed(self) -> Stage:
        """Decoding, encoding and reading go on at once: the slowest decides."""
        cfg, found, target = self.sections["embed"], self.trial.encoder.facts, self.target
        encoders = min(cfg.actors or max(1, self.gpus), self.shards)
        cores = decoders = target.cpus * min(target.nodes, encoders)
        readers = encoders * cfg.readers
        if cfg.decode_cpus:  # on any node, in addition to those of the encoders
            spare = max(1, target.nodes * target.cpus - encoders)
            decoders = min(readers, spare)
        seconds = {
            "decode": self.images * found["decode_s"] / decoders,
            "read": self.images * self._waited_s / readers,
        }
        if self.gpus:
            seconds["encode"] = self.images / (self.encode_rate * encoders)
            cpu_s = self.images * found["decode_s"]
        else:
            seconds["encode"] = self.images * found["embed_s"] * found["cores"] / cores
            cpu_s = self.images * found["embed_cpu_s"]
        bound = max(seconds, key=lambda name: seconds[name])
        uneven = math.ceil(self.shards / encoders) * encoders / self.shards
        work = seconds[bound] * uneven
        held = int(cfg.readers * self.rows * (ROW_BYTES + 4 * found["dim"]))
        why = self._why(self.trial.encoder.peak_bytes, held)
        return Stage(
            "embed",
            cpu_s / 3600,
            encoders * work / 3600 if self.gpus else 0.0,
            work,
            (RAY_STARTS + POOL_STARTS) * self.trial.start_s + found["load_s"],
            bound,
            Process("encoder", self.trial.encoder.peak_bytes + held, why),
        )

    def train(self) -> Stage:
        """Words, then one worker that trains alone, as long as it takes with more images."""
        cfg, found, dim = self.sections["train"], self.trial.trainer.facts, self._dim
        read = min(self.images, sampling.OVERREAD * found["samples"]) * found["read_s"]
        words = self._words_s(found["words"]) if cfg.words else 0.0
        work = read + found["once_s"] + found["judge_s"] + cfg.steps * found["step_s"]
        work += found["looks"] * found["look_s"]
        held = (found["samples"] - found["rows"]) * 2 * dim
        why = f"{found['rows']:,} rows measured; all {found['samples']:,}, of {dim} × 2 bytes"
        on_gpu = self.gpus >= cfg.workers
        starts = TRAIN_STARTS + (POOL_STARTS if cfg.words else 0)
        return Stage(
            "train",
            (work + words) / 3600,
            (cfg.workers * work + words) / 3600 if on_gpu else 0.0,
            work + words,
            starts * self.trial.start_s + (self._load_s if cfg.words else 0),
            "steps" if cfg.steps * found["step_s"] > work / 2 else "data and looks",
            Process("trainer", self.trial.trainer.peak_bytes + held, why),
        )

    def select_k(self) -> Stage:
        """What is decided on the landmarks, and two passes over all parts."""
        found, cut = self.trial.task.facts, self.trial.driver.facts
        each = found["statistics_s"] + found["assign_s"]
        work = self._passes_s(each, full_passes.MOST_TASKS)
        leaves, dim = cut["leaves"], cut["feature_dim"]
        sums = leaves * dim**2 * 8
        held = self.trial.driver.peak_bytes + sums + DRIVER_BYTES
        why = (
            f"{cut['landmarks']:,} landmarks measured; {leaves:,} leaves × {dim}² × 8 bytes are "
            f"{sums / GB:.2f} GB; {DRIVER_BYTES / GB:.2f} GB of Ray"
        )
        return Stage(
            "select_k",
            (self.images * each + cut["seconds"]) / 3600,
            0.0,
            work + cut["seconds"],
            self._tasks_start_s,
            "parts" if work > cut["seconds"] else "landmarks",
            Process("driver", held, why),
        )

    def caption(self) -> Stage:
        """Words, and a pass for the alt texts and one for the votes."""
        found = self.trial.task.facts
        each = found["count_s"] + found["votes_s"]
        words, work = self._words_s(found["words"]), self._passes_s(each, caption.MOST_TASKS)
        return Stage(
            "caption",
            (self.images * each + words) / 3600,
            words / 3600 if self.gpus else 0.0,
            words + work,
            POOL_STARTS * self.trial.start_s + self._load_s,
            "parts" if work > words else "words",
            self._task("votes_s"),
        )

    def write(self) -> Stage:
        """A task per shard, which reads it again."""
        found = self.trial.task.facts["write_s"]
        waited = self._waited_s
        slots = min(self.target.nodes * self.target.cpus, self.shards)
        return Stage(
            "write",
            self.images * found / 3600,
            0.0,
            self.images * (found + waited) / slots,
            WRITE_STARTS * self.trial.start_s,
            "read" if waited > found else "parts",
            self._task("write_s"),
        )

    def report(self) -> Stage:
        """The page, and the command around all stages."""
        start = SESSION_STARTS * self.trial.start_s
        return Stage("report", REPORT_S / 3600, 0.0, REPORT_S, start, "pictures")

    @property
    def _dim(self) -> int:
        return int(self.trial.encoder.facts["dim"])

    @property
    def _waited_s(self) -> float:
        return sum(s.waited_s for s in self.trial.sampled) / self.trial.images

    @property
    def _load_s(self) -> float:
        return float(self.trial.texts.facts["load_s"])

    @property
    def _tasks_start_s(self) -> float:
        at_once = min(self.target.cpus + SPARE_TASKS, -(-self.shards // self.target.nodes))
        return at_once / self.target.cpus * self.trial.start_s

    def _words_s(self, words: int) -> float:
        """Wall time of the text encoders; a GPU is as much faster as it is with images."""
        seconds = words * float(self.trial.texts.facts["word_s"])
        if self.gpus:
            return seconds / (self.encode_rate * self.trial.encoder.facts["encode_s"])
        return seconds * float(self.trial.encoder.facts["cores"]) / self.target.cpus

    def _passes_s(self, each: float, most: int) -> float:
        slots = min(
            self.target.nodes * self.target.cpus, len(tasks.chunks(range(self.shards), most))
        )
        return self.images * each / slots

    def _task(self, step: str) -> Process:
        measured, held = self.trial.task.facts["peaks"][step], self.rows * ROW_BYTES
        return Process("task", int(measured + held), self._why(measured, held))

    def _why(self, measured: float, held: float) -> str:
        return f"{measured / GB:.2f} GB measured, {held / GB:.2f} GB for more rows of a shard"
