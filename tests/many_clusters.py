"""A run of many clusters, as far as the report reads it, on the pictures of `fake_run`."""

from pathlib import Path

import numpy as np
import pyarrow as pa

from pipeline.artifacts import layout, schemas
from pipeline.mcr2 import tree
from pipeline.store import tables
from tests import fake_run, level_tables

KEPT = {"typical": 24, "borderline": 12, "odd": 12}
DIM = 16
WORDS = ["amber birch", "cedar", "delta", "fjord", "grove", "heron", "island", "kelp", "lagoon"]


def build(root: Path, k: int) -> layout.RunPaths:
    """`k` clusters; captions and alt texts as long as those of the web are."""
    paths = fake_run.build(root)
    rng = np.random.default_rng(0)
    sizes = np.sort((1e6 / np.arange(3, k + 3)).astype(int))[::-1]
    centres = rng.normal(size=(k, DIM)).astype(np.float32)
    centres /= np.linalg.norm(centres, axis=1, keepdims=True)
    vectors = tables.from_matrix(centres, pa.float32())
    _write(paths, "prototypes", pa.table([range(k), vectors], schemas.prototypes_schema(DIM)))
    level_tables.write(paths, centres)
    _write(paths, "tree", pa.Table.from_pylist(_merges(k, rng), schemas.TREE))
    _write(paths, "exemplars", _exemplars(paths, k, rng))
    bits = [90 - 40 * np.log(c) / np.log(k) + c / k for c in range(1, 2 * k + 1)]
    curve = [{"k": i, "bits": b, "low": b - 1, "high": b + 1} for i, b in enumerate(bits, start=1)]
    _write(paths, "curve", pa.Table.from_pylist(curve, schemas.CURVE))
    owner = rng.integers(0, k, 3000)
    z = centres[owner] + rng.normal(0, 0.08, (3000, DIM))
    z /= np.linalg.norm(z, axis=1, keepdims=True)
    ids = [f"00000/{i}" for i in range(3000)]
    x = tables.from_matrix(z * 0.6 + 0.2)
    table = pa.table([ids, x, tables.from_matrix(z, pa.float32())], schemas.sample_schema(DIM, DIM))
    tables.write(paths.network.file("sample.parquet"), table)
    rows = [
        {"cluster_id": c, "rank": rank, "caption": _words(rng, 2), "share": 0.3 / (rank + 1)}
        | {"source": "vocabulary"}
        for c in range(k)
        for rank in range(10)
    ]
    table = pa.Table.from_pylist(rows, schemas.CAPTIONS)
    tables.write(paths.captions.file("captions.parquet"), table)
    facts = {"k": k, "k_best": k, "k_low": k - 2, "k_high": k + 2, "flat_from": k}
    facts |= {
        "flat_to": k + 20,
        "sizes": sizes.tolist(),
        "groups": sizes.tolist(),
        "levels": [k],
        "samples": int(sizes.sum()),
    }
    fake_run.refinish(paths.clusters, **facts, cluster_bits=(50.0 * sizes).tolist())
    return paths


def _write(paths: layout.RunPaths, name: str, table: pa.Table) -> None:
    tables.write(paths.clusters.file(f"{name}.parquet"), table)


def _words(rng: np.random.Generator, count: int) -> str:
    return " ".join(rng.choice(WORDS, count))


def _merges(k: int, rng: np.random.Generator) -> list[dict]:
    """Any tree: a few unions that grow, like those of pairs that cost least."""
    alive, rows = list(range(k)), []
    while len(alive) > 1:
        kept, merged = sorted(rng.choice(len(alive), 2, replace=False))
        merge = tree.Merge(alive[kept], alive[merged], -float(rng.integers(100, 900)))
        del alive[merged]
        rows.append({"k": len(alive), **vars(merge)})
    return rows


def _exemplars(paths: layout.RunPaths, k: int, rng: np.random.Generator) -> pa.Table:
    """As many as select_k keeps, of the few pictures there are; their texts are of 100 letters."""
    there = tables.read(paths.clusters.file("exemplars.parquet")).to_pylist()[:30]
    rows = []
    for cluster in range(k):
        for kind, count in KEPT.items():
            for rank, pick in enumerate(rng.integers(0, len(there), count)):
                name = f"00000/{cluster:05d}{kind[0]}{rank:03d}"
                mine = {"cluster_id": cluster, "kind": kind, "rank": rank, "sample_id": name}
                rows.append({**there[pick], **mine, "caption": _words(rng, 16)})
    return pa.Table.from_pylist(rows, schemas.EXEMPLARS)
