"""What the guarantees cost, and how soon a rerun knows that nothing is to be done.

    python -m benchmarks.guarantees [--shards examples/noto-emoji] [--rounds 7]

1. embed and write over the same shards, in this process, guarded and unguarded in turns: medians,
   and the best of each, which other work on the machine disturbs least. Unguarded is the same code
   with these functions replaced, here and nowhere else:

       storage.commit            opens the target itself: no temporary file, no fsync, no rename
       pyarrow's page checksums  off
       embed._check_counts, write._check_counts   nothing is counted again
       config.fingerprint        a constant
       the end of the archive    not looked at

2. `ratecluster run`, as a process of its own, over a finished run of 10,000 shards. The run is a
   real one of two shards whose shards, parts and manifests are repeated; fingerprints are those
   that the stages ask for. And the same decision by embed alone where the manifest is lost, which
   reads the footers of all 10,000 parts.
"""

import argparse
import os
import resource
import shutil
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager, nullcontext
from dataclasses import asdict
from pathlib import Path
from unittest.mock import patch

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import torch

from pipeline.artifacts import layout, outputs, schemas
from pipeline.artifacts.levels import Levels
from pipeline.caption import settings as caption_settings
from pipeline.cli import options
from pipeline.embed import encode_shard, survey
from pipeline.embed import settings as embed_settings
from pipeline.embed import stage as embed
from pipeline.report import run_data
from pipeline.report import settings as report_settings
from pipeline.runtime import config
from pipeline.store import storage, tables
from pipeline.store.listing import Shard, list_shards
from pipeline.store.shards import ShardReader
from pipeline.train import settings as train_settings
from pipeline.vision import clip
from pipeline.write import stage as write

PARTS = 10_000
SETTINGS = ("train.steps=12", "train.batch_size=64", "select_k.k=4")


@contextmanager
def unguarded() -> Iterator[None]:
    """Without the guarantees."""

    @contextmanager
    def straight(url: str):
        Path(url).parent.mkdir(parents=True, exist_ok=True)
        with Path(url).open("wb") as file:
            yield file

    def ended(reader: ShardReader, block: bytes) -> None:
        reader.end = "complete"

    def plain(*args, write_page_checksum: bool, **kwargs) -> None:
        real(*args, **kwargs)

    real = pq.write_table
    with (
        patch.object(storage, "commit", straight),
        patch.object(pq, "write_table", plain),
        patch.object(embed, "_check_counts", lambda *_: None),
        patch.object(write, "_check_counts", lambda *_: None),
        patch.object(config, "fingerprint", lambda *_: "0" * 12),
        patch.object(ShardReader, "_ended", ended),
    ):
        yield


class Stages:
    """embed and write of one shard as their tasks and drivers do them, without Ray between."""

    def __init__(self) -> None:
        self.cfg, threads = embed_settings.Config(), os.cpu_count() or 1
        self.thread = ThreadPoolExecutor(1, initializer=torch.set_num_threads, initargs=(threads,))
        self.encoder = clip.load(self.cfg.model, self.cfg.pretrained, threads=threads)

    def embed(self, shard: Shard, paths: layout.RunPaths) -> int:
        """Returns the number of samples."""
        done = [
            encode_shard.embed_shard(
                shard, [self.encoder], self.thread, self.cfg, paths, encode_shard.decode
            )
        ]
        manifest = embed.summary(done, self.cfg, 0.0)
        embed._check_counts(done, manifest, 1.0)
        paths.embeddings.finish(survey.fingerprint(self.cfg, [shard]), **manifest)
        return int(manifest["samples"])

    def write(self, shard: Shard, paths: layout.RunPaths) -> int:
        """Of embeddings of `embed` and assignments that are there; returns the samples."""
        embedded = paths.embeddings.manifest()
        limit = embedded["config"]["max_sample_bytes"]
        one = Levels(np.zeros(1, int), np.zeros((1, 1), int), np.ones((1, 1)))
        named = (one, [["a caption"]])
        job = write.WriteJob(paths, embedded["columns"], *named, True, "0" * 12, limit)
        (samples,) = write.write_shards([asdict(shard)], job)
        write._check_counts(embedded, paths, job.made_of)
        return samples


def assign_all_to_one(paths: layout.RunPaths) -> None:
    """Assignments for write to read."""
    for shard in paths.embeddings.manifest()["shards"]:
        name = f"{shard['shard']['stem']}.parquet"
        ids = tables.read(paths.embeddings.file(name), ["sample_id"])["sample_id"]
        row = {"cluster_id": 0, "confidence": 0.9, "margin": 0.8, "outlier_score": 0.1}
        row |= {"top_clusters": [0], "top_shares": [0.9], "group": 0}
        rows = [{"sample_id": sample, **row} for sample in ids.to_pylist()]
        table = pa.Table.from_pylist(rows, schema=schemas.ASSIGNMENTS)
        tables.write(paths.assignments.file(name), table)


def seconds(stage: Callable[..., int], shard: Shard, paths: layout.RunPaths) -> float:
    """Per sample."""
    started = time.perf_counter()
    samples = stage(shard, paths)
    return (time.perf_counter() - started) / samples


def cost(pattern: str, rounds: int) -> None:
    """Print the first table: shard by shard, so that both ways meet the same other work."""
    stages, shards = Stages(), list_shards(pattern)
    with tempfile.TemporaryDirectory() as root:
        places = [layout.RunPaths(f"{root}/{shard.stem}") for shard in shards]
        for shard, paths in zip(shards, places, strict=True):
            stages.embed(shard, paths)  # warms up
            assign_all_to_one(paths)
        for name, stage in (("embed", stages.embed), ("write", stages.write)):
            found: dict[str, list[float]] = {"guarded": [], "unguarded": []}
            for number in range(rounds * len(shards)):
                which = number % len(shards)
                for kind in sorted(found, reverse=bool(number // len(shards) % 2)):
                    with nullcontext() if kind == "guarded" else unguarded():
                        found[kind].append(seconds(stage, shards[which], places[which]))
            _tell(name, found)


def _tell(name: str, found: dict[str, list[float]]) -> None:
    for what, of in (("median", statistics.median), ("best", min)):
        on, off = of(found["guarded"]), of(found["unguarded"])
        print(
            f"{name}, {what} of {len(found['guarded'])}: guarded {1 / on:,.0f} samples/s, "
            f"unguarded {1 / off:,.0f}: {off / on:.3f} of it",
            flush=True,
        )
    pairs = zip(found["guarded"], found["unguarded"], strict=True)
    print(f"{name}, median of the pairs: {statistics.median(off / on for on, off in pairs):.3f}")


def command(shards: Path, root: Path) -> list[str]:
    """`ratecluster run`."""
    sets = [part for setting in SETTINGS for part in ("--set", setting)]
    arguments = ["run", "--shards", str(shards), "--root", str(root), *sets]
    return [sys.executable, "-c", "from pipeline.cli.main import main; main()", *arguments]


def finished(folder: Path, source: Path) -> tuple[Path, layout.RunPaths]:
    """A finished run of PARTS shards: one of two, repeated."""
    shards, root = folder / "shards", folder / "run"
    shards.mkdir()
    for stem in ("00000", "00001"):
        shutil.copy(source / f"{stem}.tar", shards)
    subprocess.run(command(shards, root), check=True, capture_output=True)
    paths = layout.RunPaths(str(root))
    for number in range(2, PARTS):
        stem = f"{number:05d}"
        (shards / f"{stem}.tar").write_bytes(b"\0" * 1024)
        for name in ("embeddings", "rejects", "assignments", "labels"):
            os.link(root / name / "00000.parquet", root / name / f"{stem}.parquet")
        os.link(root / "labeled" / "00000.tar", root / "labeled" / f"{stem}.tar")
    _refinish(list_shards(str(shards)), paths)
    return shards, paths


def _refinish(shards: list[Shard], paths: layout.RunPaths) -> None:
    """Manifests of the stages as they would be for these shards."""
    cfg = config.load(options.KINDS, None, SETTINGS)
    manifest = paths.embeddings.manifest()
    facts = manifest["shards"][0]
    manifest["shards"] = [{**facts, "shard": asdict(shard)} for shard in shards]
    last = survey.fingerprint(cfg["embed"], shards)
    paths.embeddings.finish(last, **{k: v for k, v in manifest.items() if k != "fingerprint"})
    model = cfg["embed"].model
    for name, folder, more in (
        ("train", paths.network, [train_settings.read_words(cfg["train"], model)]),
        ("select_k", paths.clusters, []),
        ("caption", paths.captions, [caption_settings.read_vocabulary(cfg["caption"], model)]),
        ("write", paths.labels, []),
    ):
        manifest = {**folder.manifest(), "upstream": last}
        last = config.fingerprint(cfg[name], last, *more)
        folder.finish(last, **{k: v for k, v in manifest.items() if k != "fingerprint"})
    manifests = run_data.collect(paths).manifests
    made_of = report_settings.expected(cfg["report"], manifests, paths).made_of
    paths.report.finish(made_of, missing_pictures=0)


def processor_s() -> float:
    """Of all processes that this one has waited for."""
    used = resource.getrusage(resource.RUSAGE_CHILDREN)
    return used.ru_utime + used.ru_stime


def rerun() -> None:
    """Print how soon a rerun is over."""
    with tempfile.TemporaryDirectory() as folder:
        source = Path(__file__).parents[1] / "examples" / "noto-emoji"
        shards, paths = finished(Path(folder), source)
        for _ in range(3):
            started, before = time.monotonic(), processor_s()
            done = subprocess.run(
                command(shards, Path(paths.root)), check=True, capture_output=True, text=True
            )
            seconds = time.monotonic() - started
            assert done.stderr.count("already done") == 6, done.stderr
            spent = processor_s() - before
            print(
                f"run over {PARTS:,} finished shards: {seconds:.1f} s, {spent:.1f} processor "
                "seconds",
                flush=True,
            )
        started, before = time.monotonic(), processor_s()
        subprocess.run([sys.executable, "-c", "import pipeline.cli.main"], check=True)
        print(
            f"imports alone: {time.monotonic() - started:.1f} s, {processor_s() - before:.1f} "
            "processor seconds"
        )
        found = list_shards(str(shards))
        started = time.monotonic()
        there = outputs.part_facts(paths.embeddings, [shard.stem for shard in found])
        print(f"footers of {len(there):,} parts: {time.monotonic() - started:.1f} s")


def main() -> None:
    """Print both."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawTextHelpFormatter
    )
    parser.add_argument("--shards", default="examples/noto-emoji")
    parser.add_argument("--rounds", type=int, default=7)
    parser.add_argument("--only", choices=["cost", "rerun"])
    options = parser.parse_args()
    print(f"{os.cpu_count()} cores, load {os.getloadavg()[0]:.1f}")
    if options.only != "rerun":
        cost(options.shards, options.rounds)
    if options.only != "cost":
        rerun()


if __name__ == "__main__":
    main()
