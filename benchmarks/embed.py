"""How much of the bare model's speed embed keeps, beside a plain torch DataLoader loop.

    python -m benchmarks.embed --shards ../shared/data/cifar10-test [--images 2000] …

Three ways to embed the same images with the same model, precision, batch size and thread count, in
turns, `rounds` times; figures are images/s, ratios are to the bare forward pass of the same round:

    forward     the model alone, on batches of ready pixels that lie in memory
    dataloader  torch DataLoader (one worker process) over the tars with open_clip's own preprocess
    embed       this project's stage, through Ray Data, from tar to committed Parquet

None counts starting processes or loading the model: the DataLoader is timed from its first batch
to the last, embed from the start of its first shard to the last commit. "idle" is the share of
that time in which the encoder (the GPU, with --device cuda) was given nothing.
"""

import argparse
import json
import os
import platform
import tempfile
import time
from collections.abc import Iterator
from dataclasses import dataclass

import numpy as np
import open_clip
import ray
import torch
from torch.utils.data import DataLoader, IterableDataset

from pipeline.artifacts import layout
from pipeline.embed import settings as embed_settings
from pipeline.embed import stage as embed
from pipeline.store import storage
from pipeline.store.listing import Shard, list_shards
from pipeline.store.shards import ShardReader
from pipeline.vision import clip, images

WARM_UP_BATCHES = 2


@dataclass(frozen=True)
class Case:
    """What is embedded, and with what."""

    shards: list[Shard]
    cfg: embed_settings.Config
    threads: int


class Images(IterableDataset):
    """Preprocessed images of the shards, as a plain training script would read them."""

    def __init__(self, shards: list[Shard], preprocess) -> None:
        self.shards, self.preprocess = shards, preprocess

    def __iter__(self) -> Iterator[torch.Tensor]:
        for data in image_bytes(self.shards):
            yield self.preprocess(images.decode(data, 2**28))


def image_bytes(shards: list[Shard]) -> Iterator[bytes]:
    """The bytes of every image, in order."""
    for shard in shards:
        with storage.open_read(shard.url) as stream:
            for sample in ShardReader(stream, None):
                yield sample.image().data


def load(case: Case) -> clip.Encoder:
    """The encoder as embed loads it."""
    cfg = case.cfg
    return clip.load(
        cfg.model,
        cfg.pretrained,
        device=cfg.device,
        precision=cfg.precision,
        threads=case.threads,
    )


def forward(case: Case, encoder: clip.Encoder) -> float:
    """Images/s of the model alone."""
    pixels = [encoder.prepare(images.decode(data, 2**28)) for data in image_bytes(case.shards)]
    size = case.cfg.batch_size
    batches = [np.stack(pixels[start : start + size]) for start in range(0, len(pixels), size)]
    for batch in batches[:WARM_UP_BATCHES]:
        encoder.encode_images(batch)
    started = time.perf_counter()
    for batch in batches:
        encoder.encode_images(batch)
    return len(pixels) / (time.perf_counter() - started)


def dataloader(case: Case, encoder: clip.Encoder) -> float:
    """Images/s of the usual loop in the same precision, from its first batch on."""
    half = {"bf16": torch.bfloat16, "fp16": torch.float16}.get(encoder.precision)
    model, _, preprocess = open_clip.create_model_and_transforms(encoder.model_name)
    model = model.eval().to(encoder.device, half)
    loader = DataLoader(
        Images(case.shards, preprocess), batch_size=case.cfg.batch_size, num_workers=1
    )
    count, started = 0, 0.0
    with torch.inference_mode():
        for batch in loader:
            count += len(batch) if started else 0
            started = started or time.perf_counter()
            x = model.encode_image(batch.to(encoder.device, half), normalize=True)
            x.float().cpu().numpy()
    return count / (time.perf_counter() - started)


def stage(case: Case) -> tuple[float, float, float]:
    """Images/s of embed from the first shard's start to the last commit, the share of that time
    in which the encoder was idle, and the CPUs that decoded meanwhile."""
    with tempfile.TemporaryDirectory() as root:
        rows = list(embed.embed_shards(case.cfg, case.shards, layout.RunPaths(root)))
    assert not any(row["error"] for row in rows), rows
    took = [json.loads(row["facts"])["took"] for row in rows]
    count = sum(json.loads(row["facts"])["embedded"] for row in rows)
    wall = max(t["ended"] for t in took) - min(t["began"] for t in took)
    idle = embed.balance(took)["encoder_idle"]
    return count / wall, idle, sum(t["decode_s"] for t in took) / wall


def arguments() -> argparse.Namespace:
    """The command line."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawTextHelpFormatter
    )
    parser.add_argument("--shards", required=True)
    parser.add_argument("--take", type=int, default=2, help="shards of the pattern, from the first")
    parser.add_argument("--model", default="ViT-B-32")
    parser.add_argument("--pretrained", default="none", help="none: random weights")
    parser.add_argument("--precision", default="auto")
    parser.add_argument("--device", default="auto")
    parser.add_argument("--batch-size", type=int, default=64)
    parser.add_argument("--decode-cpus", type=int, default=0, help="as embed.decode_cpus")
    parser.add_argument("--threads", type=int, default=os.cpu_count())
    parser.add_argument("--rounds", type=int, default=2)
    return parser.parse_args()


def main() -> None:
    """Print the table."""
    options = arguments()
    shards = list_shards(options.shards)[: options.take]
    cfg = embed_settings.Config(
        model=options.model,
        pretrained=options.pretrained,
        precision=options.precision,
        device=options.device,
        batch_size=options.batch_size,
        decode_cpus=options.decode_cpus,
    )
    case = Case(shards, cfg, options.threads)
    encoder = load(case)
    count = sum(1 for _ in image_bytes(shards))
    print(
        f"{platform.processor() or platform.machine()}, {os.cpu_count()} cores, torch "
        f"{torch.__version__}, {options.model} {encoder.device} {encoder.precision}, "
        f"{options.threads} threads, batch {options.batch_size}, {count} images"
    )
    print("round   forward  dataloader  ratio     embed  ratio  idle  CPUs decoding")
    for number in range(options.rounds):
        bare = forward(case, encoder)
        loop = dataloader(case, encoder)
        ours, idle, decoding = stage(case)
        print(
            f"{number:>5} {bare:>9.1f} {loop:>11.1f} {loop / bare:>6.2f} {ours:>9.1f} "
            f"{ours / bare:>6.2f} {idle:>5.2f} {decoding:>14.2f}",
            flush=True,
        )
    ray.shutdown()


if __name__ == "__main__":
    main()
