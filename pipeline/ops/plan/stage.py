"""Command plan: what a run over these shards will take, here or on a cluster that is described.

reads   a few of the input shards
writes  nothing

`stage_timings` measures on this machine, `estimate` carries that over.
"""

import math
import tempfile
import textwrap
from dataclasses import asdict
from pathlib import Path

from pipeline.ops.plan import estimate, stage_timings
from pipeline.ops.plan.estimate import Target
from pipeline.ops.plan.stage_timings import Facts
from pipeline.runtime.config import Sections
from pipeline.runtime.errors import UserError
from pipeline.runtime.reject_reasons import printable
from pipeline.store import storage
from pipeline.store.listing import Shard

GB = 10**9
WIDTH = 100  # columns of the text
HEADS = ("stage", "CPU-hours", "GPU-hours", "start", "work", "limited by")


def run(sections: Sections, shards: list[Shard], target: Target, sample: int, images: int) -> Facts:
    """Sample `sample` shards with up to `images` images each, measure, carry over."""
    if sample < 1 or images < 1:
        raise UserError(f"--sample {sample}, --images {images}: give 1 or more of both")
    if unknown := [shard for shard in shards if not shard.size]:
        raise UserError(
            f"the store does not report the size of {len(unknown)} shards, the first "
            f"{unknown[0].url}: plan over a copy of some of them"
        )
    with tempfile.TemporaryDirectory(prefix="ratecluster-plan-") as root:
        folder = Path(root) / "shards"
        folder.mkdir()
        limit = sections["embed"].max_sample_bytes
        sampled = [
            storage.retry(lambda s=shard: stage_timings.sample(s, images, folder, limit))  # type: ignore[misc]
            for shard in stage_timings.choose(shards, sample)
        ]
        if not any(s.images for s in sampled):
            raise UserError(
                f"{sampled[0].shard.url} and all others of --sample {sample} shards hold no "
                "sample: correct --shards"
            )
        sampled = [s for s in sampled if s.images]
        images, low, high = estimate.count_images(shards, sampled)
        found = stage_timings.measure(sections, sampled, images, root)
    stages = estimate.stages(sections, len(shards), images, found, target)
    rate, decode = estimate.encode_rate(found, target), 1 / found["decode_s"]
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
        "stages": [asdict(stage) for stage in stages],
        "wall_s": sum(stage.start_s + stage.work_s for stage in stages),
        "notes": notes(sections, len(shards), found, target),
    }


def notes(sections: Sections, shards: int, found: Facts, target: Target) -> list[str]:
    """What a reader must know before believing the figures."""
    cfg, gpus = sections["embed"], target.nodes * target.gpus
    on_gpu, encoders = found["device"].startswith("cuda"), cfg.actors or max(1, gpus)
    device = "GPU" if on_gpu else f"CPU, {found['cores']} cores"
    lines = {
        f"measured here on {found['images']:,} images, {cfg.model} on this machine's {device}; a "
        f"process takes {found['start_s']:.1f} s to start": True,
        f"the rate of a GPU is assumed to be that of this machine's {device}: give --encode-rate": (
            gpus and not target.encode_rate
        ),
        f"{shards:,} shards keep no more than {shards:,} of the {gpus:,} GPUs busy: make smaller "
        "shards": shards < gpus,
        "training was measured on this machine's CPU: its time on a GPU is unknown": (
            gpus and not on_gpu
        ),
        f"{encoders} encoder on {target.nodes} nodes: set embed.actors={target.nodes} to use all "
        "of them": not gpus and encoders < target.nodes,
        "training was measured with one worker; more are faster": sections["train"].workers > 1,
        "evaluate is not included": sections["evaluate"].label,
        "writing to the store of --root and downloading the model are not included": True,
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
        "",
    ]
    cells = [HEADS]
    for row in plan["stages"]:
        numbers = digits(row["cpu_h"]), digits(row["gpu_h"])
        times = duration(row["start_s"]), duration(row["work_s"])
        cells.append((row["stage"], *numbers, *times, row["bound"]))
    widths = [max(len(line[column]) for line in cells) for column in range(len(HEADS))]
    lines += ["  ".join(map(str.ljust, line, widths)).rstrip() for line in cells]
    lines += ["", f"wall time {duration(plan['wall_s'])}", ""]
    lines += [f"note      {note}" for note in plan["notes"]]
    wrap = textwrap.TextWrapper(WIDTH, subsequent_indent=" " * 10, break_on_hyphens=False)
    return "\n".join("\n".join(wrap.wrap(printable(line))) for line in lines)


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
