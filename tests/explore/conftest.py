"""A small run that can be searched: real pictures, real embeddings, hostile texts."""

import json

import numpy as np
import pyarrow as pa
import pytest
import torch
from safetensors.torch import save

from pipeline.artifacts import layout
from pipeline.explore.search import index
from pipeline.explore.search import settings as index_settings
from pipeline.explore.search.index import Space
from pipeline.mcr2.network import Network
from pipeline.store import storage, tables
from pipeline.vision import clip, images
from tests import fake_run
from tests.explore import points

FEATURES = 8


@pytest.fixture(scope="session")
def embedded_run(tmp_path_factory) -> layout.RunPaths:
    """`fake_run`, with its pictures' embeddings by pico-clip and a network for them."""
    paths = fake_run.build(tmp_path_factory.mktemp("searchable"))
    encoder = clip.load("pico-clip", "", device="cpu", precision="fp32")
    found = [_embed(paths, stem, encoder) for stem in fake_run.STEMS]
    torch.manual_seed(0)
    network = Network([encoder.dim], 16, FEATURES, words=5)
    words = points.unit(np.random.default_rng(0).standard_normal((5, encoder.dim)))
    x = torch.from_numpy(np.concatenate(found))
    network.centre(x, torch.from_numpy(words), 10.0)
    network.start(x, [1.0, 1.0])
    torch.nn.init.normal_(network.residual[-1].weight, std=0.1)
    storage.write_bytes(paths.network.file("network.safetensors"), save(network.state_dict()))
    facts = json.dumps({"shape": network.shape}).encode()
    storage.write_bytes(paths.network.file("network.json"), facts)
    return paths


@pytest.fixture(scope="session")
def searchable(embedded_run, ray_session) -> layout.RunPaths:
    """The same, with an index of both spaces."""
    for space in Space:
        index.run(index_settings.Config(), embedded_run, space)
    return embedded_run


def picture(paths: layout.RunPaths, row: dict) -> bytes:
    """The picture's file of a row of the embeddings."""
    shards = paths.embeddings.manifest()["shards"]
    url = next(s["shard"]["url"] for s in shards if s["shard"]["stem"] == row["shard"])
    return storage.read_range(url, row["tar_offset"], row["tar_size"])


def _embed(paths: layout.RunPaths, stem: str, encoder: clip.Encoder) -> np.ndarray:
    url = paths.embeddings.file(f"{stem}.parquet")
    table = tables.read(url).drop_columns(["embedding"])
    decoded = [images.decode(picture(paths, row), 10**6) for row in table.to_pylist()]
    x = encoder.encode_images(np.stack([encoder.prepare(each) for each in decoded]))
    column = pa.field("embedding", tables.vectors(encoder.dim))
    tables.write(url, table.append_column(column, tables.from_matrix(x)))
    return x
