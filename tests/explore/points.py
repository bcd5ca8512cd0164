"""A run whose embeddings are given, as far as searching reads it: one cluster for each part."""

import numpy as np
import pyarrow as pa

from pipeline.artifacts import layout, schemas
from pipeline.store import tables


def build(root: str, parts: list[np.ndarray]) -> layout.RunPaths:
    """Parts of unit rows (n, D); the members of cluster c are the rows of part c."""
    paths = layout.RunPaths(root)
    shards = [_part(paths, number, x) for number, x in enumerate(parts)]
    sizes = [len(x) for x in parts]
    made_with = {"model": "pico-clip", "pretrained": "", "max_image_pixels": 10**6}
    paths.embeddings.finish("e1", config=made_with, shards=shards, embedded=sum(sizes))
    paths.network.finish("n1", upstream="e1")
    paths.clusters.finish("c1", upstream="n1", sizes=sizes)
    paths.captions.finish("w1", upstream="c1", captions=[f"part {i}" for i in range(len(parts))])
    return paths


def _part(paths: layout.RunPaths, number: int, x: np.ndarray) -> dict:
    stem, keys = f"{number:05d}", range(len(x))
    known = {
        "sample_id": [f"{stem}/{key}" for key in keys],
        "shard": [stem] * len(x),
        "tar_offset": [512] * len(x),
        "tar_size": [1] * len(x),
    }
    schema = schemas.embeddings_schema(x.shape[1])
    texts = [pa.array(known.get(f.name, [None] * len(x)), f.type) for f in list(schema)[:-1]]
    table = pa.table([*texts, tables.from_matrix(x)], schema=schema)
    tables.write(paths.embeddings.file(f"{stem}.parquet"), table)
    assigned = pa.table({"cluster_id": pa.array([number] * len(x), pa.int32())})
    tables.write(paths.assignments.file(f"{stem}.parquet"), assigned)
    return {"shard": {"stem": stem, "url": f"/nowhere/{stem}.tar"}, "embedded": len(x)}


def mixture(samples: int, dim: int, centres: int, noise: float, seed: int = 0) -> np.ndarray:
    """Unit rows around random directions, `noise` long beside them."""
    rng = np.random.default_rng(seed)
    x = rng.standard_normal((centres, dim))[rng.integers(0, centres, samples)] / dim**0.5
    return unit(x + noise * rng.standard_normal((samples, dim)) / dim**0.5)


def unit(x: np.ndarray) -> np.ndarray:
    """Rows of length 1, float32."""
    return (x / np.linalg.norm(x, axis=1, keepdims=True)).astype(np.float32)


def exact(x: np.ndarray, queries: np.ndarray, top: int) -> np.ndarray:
    """(q, top) rows of x (N, D) nearest to each query, by all cosines of what is stored."""
    stored = x.astype(np.float16).astype(np.float32)
    return np.argsort(-(queries @ stored.T), axis=1, kind="stable")[:, :top]
