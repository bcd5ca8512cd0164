"""A union of orthogonal subspaces, and a run whose embeddings and features are such a union."""

import json

import numpy as np
import pyarrow as pa
import torch
from safetensors.torch import save

from pipeline.artifacts import layout, schemas
from pipeline.mcr2.network import Network
from pipeline.store import storage, tables


def union(k: int, dim: int, each: int, seed: int = 0) -> tuple[np.ndarray, np.ndarray]:
    """Unit rows (k·each, k·dim) of k subspaces with a mean of their own, shuffled; their labels."""
    rng = np.random.default_rng(seed)
    x = np.zeros((k * each, k * dim))
    for c in range(k):
        rows = rng.normal(size=(each, dim))
        rows[:, 0] += 4
        x[c * each : (c + 1) * each, c * dim : (c + 1) * dim] = rows
    x /= np.linalg.norm(x, axis=1, keepdims=True)
    order = rng.permutation(len(x))
    return x[order], np.repeat(np.arange(k), each)[order]


def write_part(paths: layout.RunPaths, stem: str, x: np.ndarray) -> list[str]:
    """Commit embeddings/{stem}.parquet with the rows x; returns their sample ids."""
    n, keys = len(x), [f"{i:06d}" for i in range(len(x))]
    columns = {
        "sample_id": [f"{stem}/{key}" for key in keys],
        "shard": [stem] * n,
        "key": keys,
        "index": range(n),
        "image_member": [f"{key}.jpg" for key in keys],
        "tar_offset": range(n),
        "tar_size": [1] * n,
        "image_width": [8] * n,
        "image_height": [8] * n,
        "caption": [None] * n,
        "json": ["{}"] * n,
        "text_problem": [None] * n,
        "cls": [None] * n,
    }
    schema = schemas.embeddings_schema(x.shape[1])
    arrays = [pa.array(list(columns[f.name]), f.type) for f in list(schema)[:-1]]
    table = pa.table([*arrays, tables.from_matrix(x)], schema=schema)
    tables.write(paths.embeddings.file(f"{stem}.parquet"), table)
    return table["sample_id"].to_pylist()


def write_parts(paths: layout.RunPaths, parts: list[np.ndarray]) -> list[str]:
    """Commit finished embeddings of one part per array; returns all sample ids in order."""
    stems = [f"{i:05d}" for i in range(len(parts))]
    ids = [i for stem, x in zip(stems, parts, strict=True) for i in write_part(paths, stem, x)]
    shards = [
        {"shard": {"stem": stem}, "embedded": len(x)} for stem, x in zip(stems, parts, strict=True)
    ]
    made_with = {"model": "pico-clip", "pretrained": ""}
    encoders = [{"column": "embedding", "dim": parts[0].shape[1], **made_with}]
    facts = {"config": made_with, "encoders": encoders, "shards": shards}
    paths.embeddings.finish("embeddings-1", embedded=len(ids), **facts)
    return ids


def write_network(paths: layout.RunPaths, x: np.ndarray, ids: list[str]) -> None:
    """Commit a finished network whose features are its inputs, with the landmarks x (m, D)."""
    dim = x.shape[1]
    network = Network([dim], 4, dim).eval()  # its residual is zero until it is trained
    with torch.no_grad():
        network.project.weight.copy_(torch.eye(dim))
    storage.write_bytes(paths.network.file("network.safetensors"), save(network.state_dict()))
    shape = {"input_dims": [dim], "hidden_dim": 4, "feature_dim": dim, "words": 0}
    storage.write_bytes(paths.network.file("network.json"), json.dumps({"shape": shape}).encode())
    columns = [ids, tables.from_matrix(x), tables.from_matrix(x, pa.float32())]
    sample = pa.table(columns, schema=schemas.sample_schema(dim, dim))
    tables.write(paths.network.file("sample.parquet"), sample)
    paths.network.finish("network-1", upstream="embeddings-1")
