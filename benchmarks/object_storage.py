"""What an object store that answers late costs: reading, embedding, requests.

    python -m benchmarks.object_storage [--shards ../shared/data/cifar10-test] [--latency 0.05] …

An S3 server of a process of its own (tests/store/slow_s3.py: moto, over HTTP) waits before every
answer. From it and from the local disk the same shards, each made of `merge` of the given ones, are
read alone and embedded, by `readers` threads as in an encoder actor, `rounds` times, each round
beginning with another way:

    local   both shards and root on the local disk
    before  both on S3, one request at a time: fsspec's `readahead` cache, blocks of 8 MiB
    cached  the same through fsspec's `background` cache, which has one block under way
    ahead   the same as the product reads: AHEAD range requests under way

Last come the requests for each shard: of embedding it, of finding it done, of listing it. The
server works on the same cores: how many seconds of theirs it took stands beside.
"""

import argparse
import json
import os
import statistics
import subprocess
import sys
import tempfile
import time
import urllib.request
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import IO, Any
from unittest.mock import patch

import psutil
import torch

from pipeline.artifacts import layout
from pipeline.embed import encode_shard, survey
from pipeline.embed import settings as embed_settings
from pipeline.store import storage
from pipeline.store.listing import Shard, list_shards
from pipeline.store.read_ahead import AHEAD, BLOCK_BYTES
from pipeline.store.shard_writer import ShardWriter
from pipeline.store.shards import ShardReader
from pipeline.vision import clip
from tests.store.slow_s3 import client, environment

READ_BYTES = 1 << 20
Opener = Callable[..., IO[bytes]]
ahead = storage.open_read


@dataclass(frozen=True)
class Server:
    """The S3 server."""

    url: str
    process: psutil.Process

    def asked(self) -> dict[str, int]:
        """Requests since the last time."""
        with urllib.request.urlopen(f"{self.url}/_asked") as answer:
            return json.load(answer)

    def cpu_s(self) -> float:
        """Processor seconds it has used."""
        times = self.process.cpu_times()
        return times.user + times.system


@contextmanager
def serving(latency_s: float) -> Iterator[Server]:
    """A server with a bucket, found by this process through its environment."""
    command = [sys.executable, "-m", "tests.store.slow_s3", "--latency", str(latency_s)]
    with subprocess.Popen(
        command, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, text=True
    ) as process:
        url = process.stdout.readline().strip()
        os.environ.update(environment(url))
        client(url).create_bucket(Bucket="bucket")
        try:
            yield Server(url, psutil.Process(process.pid))
        finally:
            process.terminate()


def opened(cache: str, **options: Any) -> Opener:
    """A file through a cache of fsspec, as the product would do it."""

    def open_read(url: str, size: int = 0, version: str = "") -> IO[bytes]:
        fs, path = storage.locate(url)
        return fs.open(path, "rb", cache_type=cache, **options)

    return open_read


WAYS: dict[str, Opener] = {
    "local": ahead,
    "before": opened("readahead", block_size=8 << 20),
    "cached": opened("background", block_size=BLOCK_BYTES, cache_options={"maxblocks": AHEAD + 1}),
    "ahead": ahead,
}


def merged(pattern: str, folder: Path, shards: int, merge: int) -> list[Shard]:
    """Shards on the local disk, each of `merge` of the pattern's."""
    sources = list_shards(pattern)
    for number in range(shards):
        with (folder / f"{number:05d}.tar").open("wb") as file, ShardWriter(file) as writer:
            for part in range(merge):
                source = sources[(number * merge + part) % len(sources)]
                with storage.open_read(source.url) as stream:
                    for sample in ShardReader(stream, None):
                        for member in sample.members:
                            writer.add(f"{part}-{member.name}", member.data)
    return list_shards(str(folder))


def read(shards: list[Shard], opener: Opener, readers: int) -> float:
    """MB/s of reading alone."""

    def one(shard: Shard) -> int:
        count = 0
        with opener(shard.url, shard.size, shard.version) as stream:
            while piece := stream.read(READ_BYTES):
                count += len(piece)
        assert count == shard.size
        return count

    started = time.perf_counter()
    with ThreadPoolExecutor(readers) as pool:
        total = sum(pool.map(one, shards))
    return total / 1e6 / (time.perf_counter() - started)


def embedded(
    shards: list[Shard],
    opener: Opener,
    encoder: clip.Encoder,
    cfg: embed_settings.Config,
    root: str,
    readers: int = embed_settings.READERS,
) -> float:
    """Images/s of the stage's core, in threads as in an actor."""
    paths = layout.RunPaths(root)
    started = time.perf_counter()
    with (
        patch.object(storage, "open_read", opener),
        ThreadPoolExecutor(1, initializer=torch.set_num_threads, initargs=(os.cpu_count(),)) as one,
        ThreadPoolExecutor(readers) as pool,
    ):
        facts = pool.map(
            lambda shard: encode_shard.embed_shard(
                shard, [encoder], one, cfg, paths, encode_shard.decode
            ),
            shards,
        )
        count = sum(fact["embedded"] for fact in facts)
    return count / (time.perf_counter() - started)


def requests(
    server: Server, shards: list[Shard], encoder: clip.Encoder, cfg: embed_settings.Config
) -> None:
    """Print how often the store is asked."""
    ahead_of = f"{len(shards)} shards of {shards[0].size / 1e6:.0f} MB"
    root = "s3://bucket/counted"
    server.asked()
    embedded(shards, ahead, encoder, cfg, root)
    print(f"requests, {ahead_of}: embed {server.asked()}")
    paths = layout.RunPaths(root)
    assert len(survey.survey(cfg, shards, paths).done) == len(shards)
    print(f"    found done {server.asked()}")
    list_shards("s3://bucket/in")
    print(f"    listed {server.asked()}", flush=True)


def arguments() -> argparse.Namespace:
    """The command line."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawTextHelpFormatter
    )
    parser.add_argument("--shards", default="examples/noto-emoji")
    parser.add_argument("--count", type=int, default=8, help="shards to be embedded")
    parser.add_argument("--merge", type=int, default=4, help="of the given in each of them")
    parser.add_argument("--latency", type=float, default=0.05, help="seconds for each request")
    parser.add_argument("--readers", type=int, default=4)
    parser.add_argument("--model", default="pico-clip")
    parser.add_argument("--pretrained", default="", help="none: random weights")
    parser.add_argument("--rounds", type=int, default=3)
    return parser.parse_args()


def main() -> None:
    """Print the tables."""
    options = arguments()
    cfg = embed_settings.Config(model=options.model, pretrained=options.pretrained)
    encoder = clip.load(
        cfg.model, cfg.pretrained, device="cpu", precision="auto", threads=os.cpu_count()
    )
    with tempfile.TemporaryDirectory() as folder, serving(options.latency) as server:
        here = Path(folder)
        (here / "in").mkdir()
        local = merged(options.shards, here / "in", options.count, options.merge)
        for shard in local:
            storage.write_bytes(f"s3://bucket/in/{shard.stem}.tar", Path(shard.url).read_bytes())
        remote = list_shards("s3://bucket/in")
        print(
            f"{len(local)} shards of {local[0].size / 1e6:.1f} MB, {options.readers} readers, "
            f"{options.latency * 1000:.0f} ms before each answer, {options.model}, "
            f"{os.cpu_count()} cores"
        )
        for title, unit in (("reading alone", "MB/s"), ("embed", "images/s")):
            print(f"{title}, {unit} (processor seconds of the server)")
            ratios: dict[str, list[float]] = {way: [] for way in WAYS}
            for number in range(options.rounds):
                speeds, used = {}, {}
                order = list(WAYS)[number % len(WAYS) :] + list(WAYS)[: number % len(WAYS)]
                for way in order:
                    shards, before = local if way == "local" else remote, server.cpu_s()
                    if unit == "MB/s":
                        speeds[way] = read(shards, WAYS[way], options.readers)
                    else:
                        place = here / "out" if way == "local" else "s3://bucket/out"
                        root = f"{place}/{number}-{way}"
                        speeds[way] = embedded(
                            shards, WAYS[way], encoder, cfg, root, options.readers
                        )
                    used[way] = server.cpu_s() - before
                for way in WAYS:
                    ratios[way].append(speeds[way] / speeds["local"])
                line = [
                    f"{way} {speeds[way]:7.0f} ({used[way]:4.1f}) {ratios[way][-1]:5.2f}"
                    for way in WAYS
                ]
                print(f"  {number}  " + "   ".join(line), flush=True)
            medians = [f"{way} {statistics.median(found):.2f}" for way, found in ratios.items()]
            print(f"  median of the ratios to local: {', '.join(medians)}", flush=True)
        requests(server, remote, encoder, cfg)


if __name__ == "__main__":
    main()
