"""Speed, memory and recall of `ratecluster duplicates` on synthetic embeddings of 512 dimensions.

    python -m benchmarks.curation [--samples 300000] [--clusters 100] [--folder /tmp]

It writes a run with 10,000 samples per shard below the folder, and deletes it at the end. Samples
lie around the direction of their cluster. PLANTED rows of every shard except the first are
near-copies of rows of the shard before, at cosines spread over COSINES. `ratecluster duplicates
--threshold 0.95` runs as a process with a local Ray; memory is measured as in `benchmarks.scale`.
It prints samples/s of the comparison (with the start of Ray), how many of the planted copies are
found at each threshold, and how many other samples. First it prints the processor seconds for one
cluster on one thread, and those of its matrix products alone, which cover half of all pairs.
"""

import argparse
import os
import shutil
import tempfile
import time
from concurrent.futures import ProcessPoolExecutor
from functools import partial

import numpy as np
import pyarrow as pa
import torch

from benchmarks.scale import DIM, PART_ROWS, measured
from pipeline.artifacts import layout
from pipeline.explore.curate import similarity
from pipeline.mcr2.threads import one_thread
from pipeline.store import tables

PLANTED = 500  # copies in a shard
COSINES = (0.9, 1.0)  # of a copy to its original, evenly
NOISE = 1.0  # length of the noise around the direction of a cluster


def base(number: int, clusters: int) -> tuple[np.ndarray, np.ndarray]:
    """Unit rows of a shard, before copies are planted, and their clusters."""
    rng = np.random.default_rng((number, 0))
    centres = np.random.default_rng(0).standard_normal((clusters, DIM), dtype=np.float32)
    own = rng.integers(0, clusters, PART_ROWS)
    x = centres[own] + NOISE * rng.standard_normal((PART_ROWS, DIM), dtype=np.float32)
    return x / np.linalg.norm(x, axis=1, keepdims=True), own


def with_copies(number: int, clusters: int) -> tuple[np.ndarray, np.ndarray]:
    """The shard: its first PLANTED rows are copies of the last of the shard before."""
    x, own = base(number, clusters)
    if number:
        before, theirs = base(number - 1, clusters)
        originals = before[-PLANTED:]
        aside = np.random.default_rng((number, 1)).standard_normal((PLANTED, DIM))
        aside -= (aside * originals).sum(1, keepdims=True) * originals
        aside /= np.linalg.norm(aside, axis=1, keepdims=True)
        cosine = np.linspace(*COSINES, PLANTED)[:, None]
        x[:PLANTED] = cosine * originals + np.sqrt(1 - cosine**2) * aside
        own[:PLANTED] = theirs[-PLANTED:]
    return x, own


def write_part(number: int, clusters: int, root: str) -> np.ndarray:
    """Commit one part of embeddings and of assignments; returns the sizes of the clusters."""
    paths, stem = layout.RunPaths(root), f"{number:05d}"
    x, own = with_copies(number, clusters)
    ids = [f"{stem}/{row:06d}" for row in range(PART_ROWS)]
    table = pa.table({"sample_id": ids, "embedding": tables.from_matrix(x)})
    tables.write(paths.embeddings.file(f"{stem}.parquet"), table)
    scores = np.random.default_rng((number, 2)).random(PART_ROWS).astype(np.float32)
    assigned = {"sample_id": ids, "cluster_id": own.astype(np.int32), "outlier_score": scores}
    tables.write(paths.assignments.file(f"{stem}.parquet"), pa.table(assigned))
    return np.bincount(own, minlength=clusters)


def build(samples: int, clusters: int, root: str) -> None:
    """Write the files of a run that curation reads."""
    paths, parts = layout.RunPaths(root), samples // PART_ROWS
    with ProcessPoolExecutor() as pool:
        sizes = sum(pool.map(partial(write_part, clusters=clusters, root=root), range(parts)))
    shards = [{"shard": {"stem": f"{number:05d}"}} for number in range(parts)]
    paths.embeddings.finish("0" * 12, config={}, embedded=parts * PART_ROWS, shards=shards)
    paths.network.finish("1" * 12, upstream="0" * 12, config={})
    paths.clusters.finish("2" * 12, upstream="1" * 12, config={}, sizes=sizes.tolist())


def core() -> None:
    """Print the time of the comparison, and that of its matrix products alone."""
    with one_thread():
        torch.randn(2000, DIM) @ torch.randn(DIM, 2000)  # warms up
        for rows in (1_000, 3_000, 10_000):
            x = torch.nn.functional.normalize(torch.randn(rows, DIM), dim=1)
            rank, half = torch.arange(rows), x.half()
            began = time.process_time()
            for start in range(0, rows, 1000):
                x[start : start + 1000] @ x[: start + 1000].T
            between = time.process_time()
            similarity.most_similar_before(half, rank, half, rank)
            bare, ours = between - began, time.process_time() - between
            print(
                f"{rows:,} in a cluster: {rows / ours:,.0f} samples/s of one thread, {bare:.2f} s "
                f"of bare products, {ours:.2f} s in all",
                flush=True,
            )


def recall(parts: int, root: str) -> str:
    """For each threshold: planted pairs over it that are found, and other samples found."""
    folder = layout.RunPaths(root).folder("curation/similarity")
    names = [n for n in folder.names() if n[0].isdigit()]
    rows = [row for n in names for row in tables.read(folder.file(n)).to_pylist()]
    found = {row["sample_id"]: row["similarity"] for row in rows}
    pairs = [
        (cosine, f"{part:05d}/{row:06d}", f"{part - 1:05d}/{PART_ROWS - PLANTED + row:06d}")
        for part in range(1, parts)
        for row, cosine in enumerate(np.linspace(*COSINES, PLANTED))
    ]
    planted = {sample_id for pair in pairs for sample_id in pair[1:]}
    lines = []
    for threshold in (t for t in similarity.THRESHOLDS if COSINES[0] <= t):
        over = [pair for pair in pairs if pair[0] > threshold + 1e-3]  # of float16
        got = sum(any(found.get(i, 0) > threshold for i in pair[1:]) for pair in over)
        other = sum(s > threshold for i, s in found.items() if i not in planted)
        lines.append(
            f"over {threshold}: {got:,} of {len(over):,} planted pairs found, {other:,} others"
        )
    return "\n".join(lines)


def main() -> None:
    """Write a run, measure, check the recall, and delete the run."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawTextHelpFormatter
    )
    parser.add_argument("--samples", type=int, default=300_000)
    parser.add_argument("--clusters", type=int, default=100)
    parser.add_argument("--folder", default=tempfile.gettempdir(), help="for the run")
    options = parser.parse_args()
    root = f"{options.folder}/curation-{options.samples}-{options.clusters}"
    try:
        build(options.samples, options.clusters, root)
        print(f"{os.cpu_count()} cores, load {os.getloadavg()[0]:.1f}", flush=True)
        core()
        took = measured("duplicates", root, [])
        manifest = layout.RunPaths(root).folder("curation/similarity").manifest()
        print(
            f"{options.samples:,} samples in {options.clusters:,} clusters: {took}; the comparison "
            f"{manifest['seconds']:.0f} s, {manifest['samples'] / manifest['seconds']:,.0f} "
            f"samples/s\n{recall(options.samples // PART_ROWS, root)}"
        )
    finally:
        shutil.rmtree(root, ignore_errors=True)


if __name__ == "__main__":
    main()
