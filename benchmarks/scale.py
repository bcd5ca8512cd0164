"""Time and memory of train and select_k over 10⁵, 10⁶ and 10⁷ embeddings of 512 dimensions.

    python -m benchmarks.scale [--samples 100000 1000000 10000000] [--folder /tmp]
    python -m benchmarks.scale --only sample
    python -m benchmarks.scale --only manifest

Each size has its own run below the folder, which is deleted after the measurement (10⁷: 9 GB).
After an interruption the same command resumes it; the seconds are then those of the last piece. The
embeddings are made here: shards of 10,000, each with its own classes, from a mixture of 1,000
classes on the sphere. `ratecluster train` and `ratecluster select-k` then run as processes with a
local Ray, as for a user, with the default settings except `train.words=0`: words need the encoder,
and their columns would double the time of both passes.

The driver's memory is its resident set, and the part of it that is not shared (without the pages of
the object store). The total is the sum of the proportional set sizes of all processes, which counts
shared pages once. It is sampled twice a second.

`--only sample` makes only classes. It prints how much is read for the training sample of 10⁷
embeddings, and how far its classes are from even: squared, as a multiple of a simple random sample
(1.0), for the shards above and for the same shards sorted by class. `--only manifest` prints the
memory that the driver needs for 100,000 shards of 10⁹ samples: the manifest and the plan of the
sample.
"""

import argparse
import os
import shutil
import subprocess
import sys
import tempfile
import time
from concurrent.futures import ProcessPoolExecutor
from contextlib import suppress
from functools import partial
from multiprocessing import get_context
from unittest.mock import patch

import numpy as np
import psutil
import pyarrow as pa

from benchmarks.whole_run import EVERY_S, memory
from pipeline.artifacts import layout, schemas
from pipeline.store import tables
from pipeline.train import sampling
from pipeline.train import settings as train_settings

DIM = 512
PART_ROWS = 10_000
CLASSES = 1000
CLASSES_PER_SHARD = 100
NOISE = 1.0  # length of the noise added to the direction of a class
STAGES = ("train", "select-k")
SETTINGS = ("train.words=0",)


def classes(shard: int) -> np.ndarray:
    """The class of each sample of a shard, which has a tenth of all classes."""
    rng = np.random.default_rng((1, shard))
    return rng.choice(rng.choice(CLASSES, CLASSES_PER_SHARD, replace=False), PART_ROWS)


def spread() -> None:
    """Print the quality of the sample and the bytes read for it."""
    shards = [classes(number) for number in range(10**7 // PART_ROWS)]
    listed = [{"shard": {"stem": str(i)}, "embedded": PART_ROWS} for i in range(len(shards))]
    share = np.bincount(np.concatenate(shards), minlength=CLASSES) / 10**7
    most = train_settings.samples_to_read(train_settings.Config())
    for overread in (1, 2, 4, 8):
        with patch.object(sampling, "OVERREAD", overread):
            plan = sampling.plan(listed, layout.RunPaths(""), most, 0)
        effects = []
        for of in (shards, [np.sort(shard) for shard in shards]):
            counts = np.zeros(CLASSES)
            for index, block in enumerate(plan.blocks):
                stem = block.url.rpartition("/")[2].removesuffix(".parquet")
                drawn = of[int(stem)][block.start + plan.rows_taken(index)]
                counts += np.bincount(drawn, minlength=CLASSES)
            expected = len(plan) * share
            effects.append(float(np.mean((counts - expected) ** 2 / (expected * (1 - share)))))
        read = sum(block.stop - block.start for block in plan.blocks) * DIM * 2
        print(
            f"{overread} rows read for each of {len(plan):,}: {read / 2**20:,.0f} MiB of "
            f"{10**7 * DIM * 2 / 2**20:,.0f}, {len(plan.blocks):,} row groups, classes off by "
            f"{effects[0]:.1f}, sorted {effects[1]:.1f}"
        )


def manifest() -> None:
    """Print the memory that the driver needs for many shards, measured in another process."""
    shard = {"url": "s3://collection/00000.tar", "size": 10**9, "version": "0" * 32}
    same = {"samples": PART_ROWS, "embedded": PART_ROWS, "rejected": 0, "end": "complete"}
    with tempfile.TemporaryDirectory() as root, ProcessPoolExecutor(1, get_context("spawn")) as one:
        shards = [{"shard": {**shard, "stem": str(number)}, **same} for number in range(100_000)]
        layout.RunPaths(root).embeddings.finish("0" * 12, shards=shards)
        print(one.submit(known, root).result())


def known(root: str) -> str:
    """Read the manifest and plan the sample; returns memory and time as text."""
    paths = layout.RunPaths(root)
    before, started = psutil.Process().memory_info().rss, time.monotonic()
    shards = paths.embeddings.manifest()["shards"]
    plan = sampling.plan(shards, paths, train_settings.samples_to_read(train_settings.Config()), 0)
    seconds, more = time.monotonic() - started, psutil.Process().memory_info().rss - before
    return (
        f"{len(shards):,} shards, the manifest and the plan of {len(plan):,} samples: "
        f"{more / 2**20:.0f} MiB, {seconds:.1f} s"
    )


def write_part(number: int, root: str) -> dict[str, object]:
    """Commit one part of the embeddings; returns the shard's facts for the manifest."""
    rng, stem = np.random.default_rng(number), f"{number:05d}"
    centres = np.random.default_rng(0).standard_normal((CLASSES, DIM), dtype=np.float32)
    drawn = classes(number)
    x = centres[drawn] + NOISE * rng.standard_normal((PART_ROWS, DIM), dtype=np.float32)
    x /= np.linalg.norm(x, axis=1, keepdims=True)
    keys = [f"{row:06d}" for row in range(PART_ROWS)]
    schema = schemas.embeddings_schema(DIM)
    known = {
        "sample_id": [f"{stem}/{key}" for key in keys],
        "shard": [stem] * PART_ROWS,
        "key": keys,
        "index": range(PART_ROWS),
    }
    nothing = [None] * PART_ROWS
    columns = [pa.array(known.get(f.name, nothing), f.type) for f in list(schema)[:-1]]
    table = pa.table([*columns, tables.from_matrix(x)], schema=schema)
    tables.write(layout.RunPaths(root).embeddings.file(f"{stem}.parquet"), table)
    return {"shard": {"stem": stem}, "embedded": PART_ROWS}


def embeddings(samples: int, root: str) -> None:
    """Write the outputs of stage embed for so many samples, if they are not there."""
    if layout.RunPaths(root).embeddings.peek():
        return
    with ProcessPoolExecutor() as pool:
        shards = list(pool.map(partial(write_part, root=root), range(samples // PART_ROWS)))
    made_with = {"model": "ViT-B-32", "pretrained": ""}
    layout.RunPaths(root).embeddings.finish(
        "0" * 12, config=made_with, embedded=samples, shards=shards
    )


def measured(stage: str, root: str, sets: list[str]) -> str:
    """Run a stage; seconds and peaks of memory as a text."""
    command = [sys.executable, "-c", "from pipeline.cli.main import main; main()", stage]
    command += ["--root", root, *(part for setting in sets for part in ("--set", setting))]
    started, driver, own, total = time.monotonic(), 0, 0, 0
    with subprocess.Popen(command) as child:
        process = psutil.Process(child.pid)
        while child.poll() is None:
            with suppress(psutil.Error):  # it may have ended meanwhile
                held = process.memory_full_info()
                driver, own = max(driver, held.rss), max(own, held.uss)
            total = max(total, memory(process))
            time.sleep(EVERY_S)
    if child.returncode:
        raise SystemExit(f"{stage} ended with exit code {child.returncode}")
    seconds = time.monotonic() - started
    gib = [f"{size / 2**30:.2f} GiB" for size in (driver, own, total)]
    return f"{seconds:.0f} s, driver {gib[0]}, {gib[1]} its own, all processes {gib[2]}"


def main() -> None:
    """Make the embeddings of each size, run the stages, print a line for each."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawTextHelpFormatter
    )
    parser.add_argument("--samples", type=int, nargs="+", default=[10**5, 10**6, 10**7])
    parser.add_argument("--folder", default=tempfile.gettempdir(), help="for the runs")
    parser.add_argument("--set", action="append", default=[], help="section.key=value")
    parser.add_argument("--only", choices=["sample", "manifest"])
    options = parser.parse_args()
    if options.only:
        {"sample": spread, "manifest": manifest}[options.only]()
        return
    sets = [*SETTINGS, *options.set]
    print(f"{os.cpu_count()} cores, load {os.getloadavg()[0]:.1f}, {', '.join(sets)}", flush=True)
    for samples in options.samples:
        root, started = f"{options.folder}/scale-{samples}", time.monotonic()
        embeddings(samples, root)
        print(f"{samples:,} embeddings made in {time.monotonic() - started:.0f} s", flush=True)
        for stage in STAGES:
            print(f"{samples:,} {stage}: {measured(stage, root, sets)}", flush=True)
        shutil.rmtree(root)


if __name__ == "__main__":
    main()
