"""Command plan: what a run over these shards will take, here or on a cluster that is described.

reads   a few of the input shards
writes  nothing

`trial` measures on this machine, `capacity` carries that over.
"""

import math
import tempfile
import textwrap
from dataclasses import asdict
from pathlib import Path
from typing import Any

from pipeline.ops.plan import estimate, trial
from pipeline.ops.plan.estimate import GB, Estimate, Plan, Target
from pipeline.runtime.config import Sections
from pipeline.runtime.errors import UserError
from pipeline.runtime.reject_reasons import printable
from pipeline.store import storage
from pipeline.store.listing import Shard

WIDTH = 100  # columns of the text
HEADS = (
    "stage",
    "CPU-hours",
    "GPU-hours",
    "start",
    "work",
    "waits for",
    "peak memory of a process",
)


def run(sections: Sections, shards: list[Shard], target: Target, sample: int, images: int) -> Plan:
    """Sample, try, and reckon."""
    if sample < 1 or images < 1:
        raise UserError(f"--sample {sample}, --images {images}: give 1 or more of both")
    if unknown := [shard for shard in shards if not shard.size]:
        raise UserError(
            f"the store does not tell the size of {len(unknown)} shards, the first "
            f"{unknown[0].url}: plan over a copy of some of them"
        )
    with tempfile.TemporaryDirectory(prefix="ratecluster-plan-") as root:
        folder = Path(root) / "shards"
        folder.mkdir()
        limit = sections["embed"].max_sample_bytes
        sampled = [
            storage.retry(lambda shard=shard: trial.sample(shard, images, folder, limit))  # type: ignore[misc]
            for shard in trial.choose(shards, sample)
        ]
        if not any(s.images for s in sampled):
            raise UserError(
                f"{sampled[0].shard.url} and all others of --sample {sample} shards hold no "
                "sample: correct --shards"
            )
        sampled = [s for s in sampled if s.images]
        images, _, _ = estimate.counted(shards, sampled)
        found = trial.run(sections, sampled, images, root)
    return planned(Estimate(sections, len(shards), images, found, target), shards)


def planned(reckoning: Estimate, shards: list[Shard]) -> Plan:
    """All that is said of it."""
    found, stages = reckoning.trial, reckoning.stages()
    images, low, high = estimate.counted(shards, found.sampled)
    decode_rate = 1 / found.encoder.facts["decode_s"]
    return Plan(
        target=reckoning.target,
        shards=len(shards),
        sampled=[s.shard.stem for s in found.sampled],
        images=images,
        images_low=low,
        images_high=high,
        bytes_in=sum(shard.size for shard in shards),
        bytes_out={name: round(each * images) for name, each in found.part_bytes.items()},
        decode_rate=decode_rate,
        encode_rate=reckoning.encode_rate,
        decode_cpus_per_gpu=math.ceil(reckoning.encode_rate / decode_rate),
        stages=stages,
        wall_s=sum(stage.start_s + stage.work_s for stage in stages),
        notes=notes(reckoning),
    )


def notes(reckoning: Estimate) -> list[str]:
    """What a reader must know before believing the figures."""
    target, found, cfg = reckoning.target, reckoning.trial, reckoning.sections["embed"]
    facts = found.encoder.facts
    device = "GPU" if facts["device"] == "cuda" else f"CPU, {facts['cores']} cores"
    said = [
        f"timed here on {found.images:,} images, {cfg.model} {facts['precision']} on this "
        f"machine's {device}; a process takes {found.start_s:.1f} s to start"
    ]
    if target.gpus and not target.encode_rate:
        said.append(
            f"a GPU's rate was taken to be that of this machine's {device}: give --encode-rate"
        )
    if target.gpus and found.trainer.facts["device"] == "cpu":
        said.append("training was timed on this machine's CPU: on a GPU it is not known")
    encoders = cfg.actors or max(1, reckoning.gpus)
    if not target.gpus and encoders < target.nodes:
        said.append(
            f"{encoders} encoder on {target.nodes} nodes: set embed.actors={target.nodes} to use "
            "all of them"
        )
    if reckoning.sections["train"].workers > 1:
        said.append("training was timed as one worker; more are faster")
    if reckoning.sections["evaluate"].label:
        said.append("evaluate is not in it")
    said.append("writing to the store of --root is not in it, nor downloading the model")
    return said


def text(plan: Plan) -> str:
    """For a person."""
    target = plan.target
    out = ", ".join(f"{name} {digits(size / GB)}" for name, size in plan.bytes_out.items())
    lines = [
        f"cluster   {target.nodes} nodes, each {target.cpus} CPUs and {target.gpus} GPUs",
        f"shards    {plan.shards:,}; sampled: {', '.join(plan.sampled)}",
        f"images    {plan.images:,} ({plan.images_low:,} to {plan.images_high:,})",
        f"in        {digits(plan.bytes_in / GB)} GB",
        f"out       {digits(sum(plan.bytes_out.values()) / GB)} GB: {out}",
        f"decode    {plan.decode_rate:,.0f} images/s of one CPU",
        f"encode    {plan.encode_rate:,.0f} images/s of one "
        + ("GPU" if target.gpus else "encoder, alone"),
        f"balance   {plan.decode_cpus_per_gpu:,} decode CPUs per "
        + ("GPU" if target.gpus else "encoder of that rate")
        + f": embed.decode_cpus={plan.decode_cpus_per_gpu} lets CPUs of any node decode",
        "",
    ]
    cells = [HEADS]
    for stage in plan.stages:
        held = stage.process
        memory = f"{held.name} {held.bytes / GB:.2f} GB" if held else "–"
        hours = digits(stage.cpu_h), digits(stage.gpu_h)
        times = (duration(stage.start_s), duration(stage.work_s))
        cells.append((stage.stage, *hours, *times, stage.bound, memory))
    widths = [max(len(line[column]) for line in cells) for column in range(len(HEADS))]
    lines += ["  ".join(map(str.ljust, line, widths)).rstrip() for line in cells]
    lines += ["", f"wall time {duration(plan.wall_s)}", ""]
    for stage in plan.stages:
        lines += [f"memory    {stage.stage}: {stage.process.why}"] if stage.process else []
    lines += [f"note      {note}" for note in plan.notes]
    wrap = textwrap.TextWrapper(WIDTH, subsequent_indent=" " * 10, break_on_hyphens=False)
    return "\n".join("\n".join(wrap.wrap(printable(line))) for line in lines)


def facts(plan: Plan) -> dict[str, Any]:
    """For a script: the same."""
    return asdict(plan)


def duration(seconds: float) -> str:
    """Seconds up to two minutes, else hours and minutes."""
    if seconds < 120:
        return f"{seconds:.1f} s"
    hours, minutes = divmod(round(seconds / 60), 60)
    return f"{hours:,} h {minutes:02d} min"


def digits(value: float) -> str:
    """To three digits, without an exponent."""
    if value >= 100 or not value:
        return f"{value:,.0f}"
    return f"{value:.{max(0, 2 - math.floor(math.log10(value)))}f}"
