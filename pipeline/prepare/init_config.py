"""Command init: writes a commented configuration for the user's shards.

reads   the list of shards, and the whole first shard; this machine's cores and GPUs
writes  a new TOML file

The content of the shard is untrusted: the file shows it in comments of one line each, in printable
characters.
"""

import os
import shlex
from collections import Counter
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from importlib import resources
from pathlib import Path
from statistics import median
from typing import Any

import torch

from pipeline.embed import settings as embed_settings
from pipeline.prepare import pack
from pipeline.runtime import templates
from pipeline.runtime.errors import UserError
from pipeline.runtime.redaction import redacted
from pipeline.runtime.reject_reasons import printable
from pipeline.store import columns, compressed, storage
from pipeline.store.listing import Shard, list_shards
from pipeline.store.samples import MissingImage, Sample
from pipeline.store.shards import ShardReader

SHOWN = 40  # json columns in the file
SMALL_SIDE = 192  # pixels; pico-clip, which sees 128, loses little of such images
MANY = 10_000_000  # samples, above which [train] gets a large batch


@dataclass(frozen=True, kw_only=True)
class Seen:
    """Facts of the shards, the first shard and the machine."""

    shards: int
    shard_bytes: int  # of all; 0 if unknown
    first: str
    end: str  # of the first shard: complete, or its damage
    samples: int  # of the first shard, as all fields below
    suffixes: dict[str, int]  # of images
    reasons: dict[str, int]  # why samples have no readable image
    image_bytes: int  # median
    sides: tuple[int, int]  # median width and height
    captions: int
    columns: dict[str, str]  # of the json -> bool, int, float, str or json
    cores: int
    gpus: int


def look(samples: Iterable[Sample]) -> dict[str, Any]:
    """Facts of the samples of a shard; of the images only headers are read."""
    suffixes, reasons = Counter[str](), Counter[str]()
    sizes, sides, kinds = [], [], dict[str, str]()
    count = captions = 0
    for sample in samples:
        count += 1
        captions += bool(sample.caption())
        columns.merge(kinds, columns.kinds(sample.values))
        try:
            image = sample.image()
        except MissingImage as missing:
            reasons[str(missing).partition(":")[0]] += 1
            continue
        if sample.problem:
            reasons[sample.problem.partition(":")[0]] += 1
            continue
        suffixes[image.suffix.rpartition(".")[2]] += 1
        sizes.append(image.size)
        width, height = pack.dimensions(image.data)
        if width and height:
            sides.append((width, height))
    return {
        "samples": count,
        "suffixes": dict(suffixes.most_common()),
        "reasons": dict(reasons.most_common()),
        "image_bytes": int(median(sizes or [0])),
        "sides": tuple(int(median(each)) for each in zip(*sides or [(0, 0)], strict=True)),
        "captions": captions,
        "columns": kinds,
    }


def toml(seen: Seen, shards: Sequence[str], out: str) -> str:
    """The configuration; every value in it is redacted and printable."""
    environment = templates.environment(
        lambda value: printable(redacted(str(value))), autoescape=False
    )
    template = environment.from_string(
        resources.files("pipeline.prepare").joinpath("init.toml").read_text()
    )
    names = [f"{name} ({kind})" for name, kind in list(seen.columns.items())[:SHOWN]]
    if len(seen.columns) > SHOWN:
        names.append("…")
    return template.render(
        **vars(seen)
        | {
            "quoted": _quoted(shards),
            "out": shlex.quote(out),
            "estimate": seen.samples * seen.shards,
            "size": f"{seen.shard_bytes / 1e9:.3g} GB" if seen.shard_bytes else "of unknown size",
            "kinds": _counted(seen.suffixes),
            "reasons": _counted(seen.reasons),
            "named": ", ".join(names),
            "small": max(seen.sides) <= SMALL_SIDE,
            "lost": sum(seen.reasons.values()) / seen.samples,
            "max_lost": embed_settings.Config.max_reject_fraction,
            "many": MANY,
        }
    )


def _counted(counts: dict[str, int]) -> str:
    return ", ".join(f"{count:,} {name}" for name, count in counts.items())


def _quoted(shards: Sequence[str]) -> str:
    """The values of --shards as a shell takes them."""
    return " --shards ".join(map(shlex.quote, shards))


def run(shards: Sequence[str], out: str) -> Seen:
    """Write the configuration; UserError if the file exists or the first shard has no sample."""
    path = Path(out)
    if path.exists():
        raise UserError(f"{out} exists already; delete it, or choose another file with --out FILE")
    found = list_shards(shards)
    seen = _seen(found)
    if not seen.samples:
        raise UserError(f"{found[0].url} holds no sample ({seen.end}): correct --shards")
    storage.check_writable(str(path.resolve().parent))
    storage.write_bytes(str(path.resolve()), toml(seen, shards, out).encode())
    return seen


def _seen(found: list[Shard]) -> Seen:
    with compressed.open_tar(found[0].url, found[0].size, found[0].version) as stream:
        reader = ShardReader(stream, embed_settings.Config.max_sample_bytes)
        looked = look(reader)
    return Seen(
        shards=len(found),
        shard_bytes=sum(shard.size for shard in found) if all(s.size for s in found) else 0,
        first=found[0].url,
        end=reader.end,
        cores=os.cpu_count() or 1,
        gpus=torch.cuda.device_count(),
        **looked,
    )


def facts(seen: Seen) -> dict[str, Any]:
    """The facts as JSON values."""
    return vars(seen)


def summary(seen: Seen, shards: Sequence[str], out: str) -> str:
    """The message to the user."""
    return (
        f"wrote {out} for {seen.shards:,} {'shard' if seen.shards == 1 else 'shards'} of about "
        f"{seen.samples:,} samples. Check it, then run:\n"
        f"ratecluster run --shards {printable(_quoted(shards))} --root my-run "
        f"--config {shlex.quote(out)}"
    )
