"""Recall, latency, size and build time of an index, and the precision of both spaces.

    python -m benchmarks.search [--samples 100000 1000000] [--cache FOLDER]
    python -m benchmarks.search --only precision --seeds 3

Index: a run below --folder with 10,000 embeddings per shard is indexed by the code of `ratecluster
index` on a local Ray, and searched by that of `ratecluster search`, one query at a time. The
vectors are those of pico-clip (256 dimensions) for the CIFAR-10 and CIFAR-100 test images. 200 are
queries; the other 19,800 are in the collection. More vectors are copies of these, moved along the
difference of two others, by the median distance to a nearest neighbour. So they are as close, and
as spread over the dimensions, as real ones. Recall compares with all cosines of the stored vectors.
HNSW (M = 32) of FAISS, built on all cores, is a comparison up to 10⁵ vectors.

Latency is measured for a whole search (candidates from the index, their embeddings from Parquet,
exact order) and for the index alone. The size is that of the files in index/.

Precision: for every image of cifar10-test, the share of its 20 nearest neighbours with its class.
"""

import argparse
import os
import shutil
import tempfile
import time
from pathlib import Path

import faiss
import numpy as np
import pyarrow as pa
import ray
import torch
from torch import Tensor
from torch.nn.functional import normalize

from benchmarks import published
from benchmarks.features import MODEL, Source
from pipeline.artifacts import layout, schemas
from pipeline.explore.search import index
from pipeline.explore.search import settings as index_settings
from pipeline.explore.search.index import Space
from pipeline.explore.search.search import Search
from pipeline.store import tables

SETS = ("cifar10-test", "cifar100-test")
PART_ROWS = 10_000
QUERIES = 200
TOP = 10
MOST_HNSW = 100_000
NEAREST = 20  # of the precision
HEAD = "index | recall@10 | by the index alone | p50 / p95 | of the index | built in | size"


def unit(x: np.ndarray) -> np.ndarray:
    """Rows of length 1, float16 as the product stores them."""
    return (x / np.linalg.norm(x, axis=1, keepdims=True)).astype(np.float16)


def collection(real: np.ndarray, samples: int) -> np.ndarray:
    """`samples` vectors (N, D): the real ones first, then moved copies of them."""
    if samples <= len(real):
        return real[:samples]
    x = torch.from_numpy(real).float()
    cosine = float(_best(x[:2000], x, 2)[0][:, 1].median())
    length = (cosine**-2 - 1) ** 0.5  # of what is added, so that a copy is so far from its original
    print(f"  copies have a cosine of {cosine:.3f} to their originals, as the nearest neighbours")
    blocks = [real]
    for start in range(len(real), samples, PART_ROWS):
        rng = np.random.default_rng(start)
        own, one, other = rng.integers(0, len(real), (3, min(PART_ROWS, samples - start)))
        step = (x[one] - x[other]).numpy()
        step /= np.maximum(np.linalg.norm(step, axis=1, keepdims=True), 1e-6)
        blocks.append(unit(x[own].numpy() + length * step))
    return np.concatenate(blocks)


def _best(queries: Tensor, x: Tensor, top: int) -> tuple[Tensor, Tensor]:
    """Cosines and rows (q, top) of the nearest, block by block."""
    values, rows = torch.empty(len(queries), 0), torch.empty(len(queries), 0, dtype=torch.long)
    for start in range(0, len(x), 1 << 16):
        more = queries @ x[start : start + (1 << 16)].float().T
        values = torch.cat([values, more], 1)
        rows = torch.cat([rows, torch.arange(start, start + more.shape[1]).expand_as(more)], 1)
        values, best = values.topk(min(top, values.shape[1]), dim=1)
        rows = rows.gather(1, best)
    return values, rows


def write_run(x: np.ndarray, root: str) -> layout.RunPaths:
    """A run as far as searching reads it."""
    paths, shards = layout.RunPaths(root), []
    schema = schemas.embeddings_schema(x.shape[1])
    for start in range(0, len(x), PART_ROWS):
        stem, rows = f"{start // PART_ROWS:05d}", x[start : start + PART_ROWS]
        ids = {"sample_id": [f"{stem}/{row:09d}" for row in range(len(rows))]}
        nothing = [None] * len(rows)
        texts = [pa.array(ids.get(f.name, nothing), f.type) for f in list(schema)[:-1]]
        table = pa.table([*texts, tables.from_matrix(rows)], schema=schema)
        tables.write(paths.embeddings.file(f"{stem}.parquet"), table)
        shards.append({"shard": {"stem": stem, "url": ""}, "embedded": len(rows)})
    made_with = {"model": MODEL, "pretrained": "", "max_image_pixels": 0}
    paths.embeddings.finish("e", config=made_with, shards=shards, embedded=len(x))
    paths.network.finish("n", upstream="e")
    paths.clusters.finish("c", upstream="n", sizes=[len(x)])
    paths.captions.finish("w", upstream="c", captions=[None])
    return paths


def indexed(
    paths: layout.RunPaths, cfg: index_settings.Config, queries: np.ndarray, true: Tensor
) -> str:
    """Build, search; the row of the table."""
    shutil.rmtree(paths.index("clip").url, ignore_errors=True)
    began = time.perf_counter()
    made = index.run(cfg, paths, Space.CLIP)
    seconds = time.perf_counter() - began
    folder = Path(paths.index("clip").url)
    size = sum(file.stat().st_size for file in folder.iterdir())
    search = Search(paths, [Space.CLIP])
    inner = search.indices[Space.CLIP]
    found, whole = timed(lambda q: search.rank(q, Space.CLIP, TOP)[0], queries)
    raw, alone = timed(lambda q: inner.candidates(q, TOP), queries)
    name = "flat" if made["lists"] == 1 else f"IVF-PQ, {made['lists']:,} lists"
    recalls = f"{recall(found, true):.3f} | {recall(raw, true):.3f}"
    return f"{name} | {recalls} | {whole} | {alone} | {seconds:.0f} s | {size / 2**20:,.0f} MiB"


def hnsw(x: np.ndarray, queries: np.ndarray, true: Tensor) -> str:
    """The same of FAISS's HNSW, in memory."""
    graph, began = (
        faiss.IndexHNSWFlat(x.shape[1], 32, faiss.METRIC_INNER_PRODUCT),
        time.perf_counter(),
    )
    graph.add(x.astype(np.float32))
    seconds = time.perf_counter() - began
    graph.hnsw.efSearch = 128
    found, alone = timed(lambda q: graph.search(q[None], TOP)[1][0], queries)
    size = len(faiss.serialize_index(graph))
    figures = f"{recall(found, true):.3f} | – | {alone} | {seconds:.0f} s | {size / 2**20:,.0f} MiB"
    return f"HNSW, M = 32 | – | {figures}"


def timed(function, queries: np.ndarray) -> tuple[list[np.ndarray], str]:
    """Answers, and p50 / p95 of their milliseconds; the first ten queries warm up."""
    for query in queries[:10]:
        function(query)
    found, took = [], []
    for query in queries:
        began = time.perf_counter()
        found.append(function(query))
        took.append(1000 * (time.perf_counter() - began))
    return found, "{:.1f} / {:.1f} ms".format(*np.percentile(took, [50, 95]))


def recall(found: list[np.ndarray], true: Tensor) -> float:
    """The share of the TOP nearest that are among as many found."""
    pairs = zip(found, true.numpy(), strict=True)
    return float(np.mean([len(np.intersect1d(ids, best)) / TOP for ids, best in pairs]))


def indices(source: Source, sizes: list[int], folder: str) -> None:
    """The table of each size."""
    real = np.concatenate([source.images(name).x.numpy() for name in SETS])
    real = real[np.random.default_rng(0).permutation(len(real))]
    queries, real = real[:QUERIES].astype(np.float32), real[QUERIES:]
    ray.init(address="local", num_cpus=(os.cpu_count() or 1) + 2, include_dashboard=False)
    for samples in sizes:
        print(f"\n{samples:,} vectors of {real.shape[1]} dimensions, {QUERIES} queries", flush=True)
        x = collection(real, samples)
        _, true = _best(torch.from_numpy(queries), torch.from_numpy(x), TOP)
        with tempfile.TemporaryDirectory(dir=folder) as root:
            paths = write_run(x, root)
            print(f"  {HEAD}")
            for flat_below in (samples + 1, index_settings.LEAST_COMPRESSED):
                cfg = index_settings.Config(flat_below=flat_below)
                print(f"  {indexed(paths, cfg, queries, true)}", flush=True)
        if samples <= MOST_HNSW:
            print(f"  {hnsw(x, queries, true)}", flush=True)


def precision(source: Source, seeds: int) -> None:
    """Same-class precision of the nearest others, in clip space and in z."""
    found = source.images("cifar10-test")
    truth = torch.from_numpy(found.truth("label"))

    def score(x: Tensor) -> float:
        _, rows = _best(x, x, NEAREST + 1)
        others = rows[rows != torch.arange(len(x))[:, None]]
        assert len(others) == NEAREST * len(x)  # each was among its own nearest
        return 100 * float((truth[others.view(-1, NEAREST)] == truth[:, None]).float().mean())

    x = found.x.float()
    print(f"\nsame-class precision@{NEAREST} on cifar10-test, {len(x):,} queries")
    print(f"  clip {score(normalize(x, dim=1)):.1f} %")
    print(f"  clip, centred {score(normalize(x - x.mean(0), dim=1)):.1f} %", flush=True)
    every = []
    for seed in range(seeds):
        network = published.trained(found.x, source.words, seed)[0].best().eval()
        every.append(score(network.features(x)))
        print(f"  z, seed {seed}: {every[-1]:.1f} %", flush=True)
    print(f"  z {np.mean(every):.1f} ± {np.std(every):.1f} %")


def main() -> None:
    """Print the sections asked for."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawTextHelpFormatter
    )
    parser.add_argument("--only", choices=["index", "precision"])
    parser.add_argument("--samples", type=int, nargs="+", default=[10**5, 10**6])
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--data", type=Path, default=Path("../shared/data"))
    parser.add_argument("--cache", type=Path, help="folder for features; none: a temporary one")
    parser.add_argument("--folder", default=tempfile.gettempdir(), help="for the runs")
    options = parser.parse_args()
    print(f"{os.cpu_count()} cores, load {os.getloadavg()[0]:.1f}", flush=True)
    with tempfile.TemporaryDirectory() as scratch:
        cache = options.cache or Path(scratch)
        cache.mkdir(parents=True, exist_ok=True)
        source = Source(options.data, cache, list(SETS), options.seeds)
        if options.only != "precision":
            indices(source, options.samples, options.folder)
        if options.only != "index":
            precision(source, options.seeds)


if __name__ == "__main__":
    main()
