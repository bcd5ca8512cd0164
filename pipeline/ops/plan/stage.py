"""Command plan: what a run over these shards will take, here or on a cluster that is described.

reads   a few of the input shards
writes  nothing

`stage_timings` measures on this machine. The estimate is arithmetic: every stage is a start-up
time, and a rate multiplied by the N images of the run.
"""

import math
import tempfile
from dataclasses import asdict, dataclass
from functools import partial
from typing import Any

from pipeline.caption import stage as caption
from pipeline.ops.plan import stage_timings
from pipeline.ops.plan.stage_timings import Facts, Sampled
from pipeline.ops.text import digits, duration, filled, table
from pipeline.runtime import tasks
from pipeline.runtime.config import Sections
from pipeline.runtime.errors import UserError
from pipeline.select_k import full_passes
from pipeline.store import storage
from pipeline.store.listing import Shard
from pipeline.train import loop, sampling

# What Ray adds, in starts of one process; fitted to the emoji (benchmarks/plan.py), 2 idle cores
RAY_STARTS = 1.3  # before its first work
POOL_STARTS = 0.95  # Ray Data and one actor, to its first call
TRAIN_STARTS = 3.75  # Ray Train and its worker, and their end
WRITE_STARTS = 0.25  # of tasks whose processes are there
SESSION_STARTS = 2.0  # the command itself, and Ray's end
REPORT_S = 1.0
GB = 10**9


@dataclass(frozen=True)
class Target:
    """The cluster that is planned for."""

    nodes: int
    cpus: int  # of each node
    gpus: int  # of each node
    encode_rate: float  # images/s of one GPU; 0: unknown

    def __post_init__(self) -> None:
        for name, least in {"nodes": 1, "cpus": 1, "gpus": 0, "encode_rate": 0}.items():
            if not least <= getattr(self, name) < math.inf:
                option = f"--{name.replace('_', '-')} {getattr(self, name)}"
                raise UserError(f"{option}: give a number that is {least} or more")
        if self.encode_rate and not self.gpus:
            raise UserError(f"--encode-rate {self.encode_rate:g} is of a GPU: give --gpus, too")

    def rate(self, found: Facts) -> float:
        """Images/s of one encoder; without a given rate, of this machine's device."""
        return self.encode_rate or 1 / float(found["encode_s"])


def run(sections: Sections, shards: list[Shard], target: Target, sample: int, images: int) -> Facts:
    """Sample `sample` shards with up to `images` images each, measure, estimate."""
    if sample < 1 or images < 1:
        raise UserError(f"--sample {sample}, --images {images}: give 1 or more of both")
    if unknown := [shard for shard in shards if not shard.size]:
        raise UserError(f"the size of {unknown[0].url} is unknown: plan over a copy of some shards")
    chosen, limit = stage_timings.choose(shards, sample), sections["embed"].max_sample_bytes
    with tempfile.TemporaryDirectory(prefix="ratecluster-plan-") as root:
        copy = partial(stage_timings.sample, images=images, folder=root, max_sample_bytes=limit)
        read = [storage.retry(partial(copy, shard)) for shard in chosen]
        if not (sampled := [s for s in read if s.images]):
            raise UserError(f"no sample in {', '.join(s.url for s in chosen)}: correct --shards")
        images, low, high = count_images(shards, sampled)
        found = stage_timings.measure(sections, sampled, images, root)
    stages = estimate(sections, len(shards), images, found, target)
    rate, decode = target.rate(found), 1 / found["decode_s"]
    return {
        "target": asdict(target),
        "shards": len(shards),
        "sampled": [s.shard.stem for s in sampled],
        "images": images,
        "images_low": low,
        "images_high": high,
        "bytes_in": sum(shard.size for shard in shards),
        "bytes_out": {name: round(each * images) for name, each in found["part_bytes"].items()},
        "decode_rate": decode,  # images/s of one core
        "encode_rate": rate,  # images/s of one encoder
        "decode_cpus_per_gpu": math.ceil(rate / decode),
        "peak_bytes": found["peak_bytes"],  # of this process
        "leaf_bytes": found["leaf_bytes"],  # in every task of select_k
        "stages": stages,
        "wall_s": sum(stage["start_s"] + stage["work_s"] for stage in stages),
        "notes": notes(sections, len(shards), found, target),
    }


def count_images(shards: list[Shard], sampled: list[Sampled]) -> tuple[int, int, int]:
    """Images of all shards by their bytes, and a range; exact for shards read to their end."""
    read = [s for s in sampled if s.whole]
    known = sum(s.images for s in read)
    left = sum(shard.size for shard in shards) - sum(s.shard.size for s in read)
    rates = [s.images / s.bytes for s in sampled]
    mean = sum(s.images for s in sampled) / sum(s.bytes for s in sampled)
    likely, low, high = (known + round(left * rate) for rate in (mean, min(rates), max(rates)))
    return likely, low, high


def estimate(
    sections: Sections, shards: int, images: int, found: Facts, target: Target
) -> list[Facts]:
    """The stages in their order, for N images in so many shards, as in the JSON of the plan."""
    cfg, gpus, cpus = sections["train"], target.nodes * target.gpus, target.nodes * target.cpus
    faster = target.cpus / found["cores"]  # than here; a GPU by as much as it is with images
    word_s = found["word_s"] / (target.rate(found) * found["encode_s"] if gpus else faster)
    words = found["train_words"] * word_s * bool(cfg.words)
    data = min(images, sampling.OVERREAD * found["train_samples"]) * found["read_row_s"]
    looks = loop.likely_validations(cfg)
    data += found["once_s"] + len(looks) * found["validation_s"]
    train = {"steps": looks[-1] * found["step_s"], "data and validation": data, "words": words}
    train_gpu_s = (sum(train.values()) - words) * cfg.workers + words
    cut, start, names = found["cut_s"], found["start_s"], found["caption_words"] * word_s
    pool = POOL_STARTS * start + found["load_text_s"]

    def passes(rate: str, most: int = shards) -> float:
        """Wall time of a pass over all shards, by at most `most` tasks."""
        return images * found[rate] / min(cpus, len(tasks.chunks(range(shards), most)))

    select = {"parts": passes("select_s", full_passes.MOST_TASKS), "landmarks": cut}
    votes = {"parts": passes("caption_s", caption.MOST_TASKS), "words": names}
    write = {"parts": passes("write_s"), "read": passes("waited_s")}
    cpu_s = {name: images * found[f"{name}_s"] for name in ("select", "caption", "write")}
    ready = TRAIN_STARTS * start + pool * bool(cfg.words)
    return [
        _embed(sections["embed"], shards, images, found, target),
        _stage("train", ready, sum(train.values()), train_gpu_s * (gpus >= cfg.workers), train),
        _stage("select_k", start, cpu_s["select"] + cut, 0, select),
        _stage("caption", pool, cpu_s["caption"] + names, names * bool(gpus), votes),
        _stage("write", WRITE_STARTS * start, cpu_s["write"], 0, write),
        _stage("report", SESSION_STARTS * start, REPORT_S, 0, {"pictures": REPORT_S}),
    ]


def _stage(name: str, start_s: float, cpu_s: float, gpu_s: float, work: Facts) -> Facts:
    """A stage starts, then does its work, part after part; `bound` names the longest part."""
    hours = {"cpu_h": cpu_s / 3600, "gpu_h": gpu_s / 3600}
    times = {"start_s": start_s, "work_s": sum(work.values())}
    return {"stage": name, **hours, **times, "bound": max(work, key=lambda part: float(work[part]))}


def _embed(cfg: Any, shards: int, images: int, found: Facts, target: Target) -> Facts:
    """Decoding, encoding and reading happen at once: the slowest decides."""
    gpus = target.nodes * target.gpus
    encoders = min(cfg.actors or max(1, gpus), shards)
    cores = decoders = target.cpus * min(target.nodes, encoders)
    readers = encoders * cfg.readers
    if cfg.decode_cpus:  # on any node, next to the encoders
        decoders = min(readers, max(1, target.nodes * target.cpus - encoders))
    here = found["embed_s"] * found["cores"] / cores
    seconds = {
        "decode": images * found["decode_s"] / decoders,
        "read": images * found["waited_s"] / readers,
        "encode": images * (1 / (target.rate(found) * encoders) if gpus else here),
    }
    bound = max(seconds, key=lambda name: seconds[name])
    work = seconds[bound] * math.ceil(shards / encoders) * encoders / shards
    cpu_s = images * found["decode_s" if gpus else "embed_cpu_s"]
    start_s = (RAY_STARTS + POOL_STARTS) * found["start_s"] + found["load_s"]
    return _stage("embed", start_s, cpu_s, encoders * work * bool(gpus), {bound: work})


def notes(sections: Sections, shards: int, found: Facts, target: Target) -> list[str]:
    """What a reader must know before believing the figures."""
    cfg, train, gpus = sections["embed"], sections["train"], target.nodes * target.gpus
    last, rated = loop.likely_validations(train)[-1], not gpus or target.encode_rate
    on_gpu, encoders = found["device"].startswith("cuda"), cfg.actors or max(1, gpus)
    device = "GPU" if on_gpu else f"CPU, {found['cores']} cores"
    start = f"a process takes {found['start_s']:.1f} s to start"
    idle = f"{encoders} encoder on {target.nodes} nodes: set embed.actors={target.nodes} to use all"
    early = f"training is expected to bring no gain: it stops after {last} of {train.steps} steps"
    lines = {
        f"measured on {found['images']:,} images, {cfg.model} on this {device}; {start}": True,
        f"a GPU is assumed as fast as this {device}: give --encode-rate": not rated,
        f"{shards:,} shards keep no more than {shards:,} of the {gpus:,} GPUs busy": shards < gpus,
        "training was measured on a CPU: its time on a GPU is unknown": gpus and not on_gpu,
        idle: not gpus and encoders < target.nodes,
        "training was measured with one worker; more are faster": train.workers > 1,
        early: last < train.steps,
        "evaluate, writing to the store of --root and loading the model are not included": True,
    }
    return [line for line, holds in lines.items() if holds]


def text(plan: Facts) -> str:
    """For a person: no line is longer than WIDTH."""
    target, out = plan["target"], plan["bytes_out"]
    device = "GPU" if target["gpus"] else "encoder"
    each = ", ".join(f"{name} {digits(size / GB)}" for name, size in out.items())
    lines = [
        f"cluster   {target['nodes']} nodes, each {target['cpus']} CPUs and {target['gpus']} GPUs",
        f"shards    {plan['shards']:,}; sampled: {', '.join(plan['sampled'])}",
        f"images    {plan['images']:,} ({plan['images_low']:,} to {plan['images_high']:,})",
        f"in        {digits(plan['bytes_in'] / GB)} GB",
        f"out       {digits(sum(out.values()) / GB)} GB: {each}",
        f"decode    {plan['decode_rate']:,.0f} images/s of one CPU",
        f"encode    {plan['encode_rate']:,.0f} images/s of one {device}",
        f"balance   {plan['decode_cpus_per_gpu']:,} CPUs decode as fast as one {device} encodes",
        f"memory    {plan['peak_bytes'] / GB:.2f} GB in one process here; the leaf statistics of "
        f"select_k are {digits(plan['leaf_bytes'] / GB)} GB in every task",
    ]
    rows = [("stage", "limited by", "CPU-hours", "GPU-hours", "start", "work")]
    for row in plan["stages"]:
        hours = (digits(row[name]) for name in ("cpu_h", "gpu_h"))
        times = (duration(row[name]) for name in ("start_s", "work_s"))
        rows.append((row["stage"], row["bound"], *hours, *times))
    end = [
        "",
        f"wall time {duration(plan['wall_s'])}",
        "",
        *(f"note      {n}" for n in plan["notes"]),
    ]
    return "\n".join(filled(line, 10) for line in [*lines, "", *table(rows, 2), *end])
