"""What the owner of a GPU runs by `make test-gpu`: a device changes speed and last bits alone."""

import io
import tarfile
from dataclasses import replace

import numpy as np
import pytest
import torch
from PIL import Image

from pipeline.artifacts import layout
from pipeline.cli import main as cli
from pipeline.embed import settings as embed_settings
from pipeline.embed import stage as embed
from pipeline.mcr2 import objective
from pipeline.mcr2.network import Network, alone
from pipeline.store import tables
from pipeline.store.listing import list_shards
from pipeline.vision import clip
from tests.conftest import BUNDLED, run_arguments

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device"),
]
CFG = embed_settings.Config(device="cuda", batch_size=16)


@pytest.fixture(scope="module")
def pictures() -> list[Image.Image]:
    with tarfile.open(BUNDLED / "00000.tar") as tar:
        files = [m for m in tar if m.name.endswith(".png")][:100]
        return [Image.open(io.BytesIO(tar.extractfile(m).read())).convert("RGB") for m in files]


def encoded(device, pictures, **options):
    encoder = clip.load(device=device, **options)
    return encoder.encode_images(np.stack([encoder.prepare(p) for p in pictures]))


@pytest.mark.parametrize("model, pretrained", [("pico-clip", ""), ("ViT-B-32", "none")])
@pytest.mark.parametrize("precision", ["fp32", "bf16", "fp16"])
def test_embeddings_are_those_of_the_cpu(pictures, model, pretrained, precision):
    expected = encoded("cpu", pictures, model=model, pretrained=pretrained, precision="fp32")
    found = encoded("cuda", pictures, model=model, pretrained=pretrained, precision=precision)
    assert (found * expected).sum(1).min() > (0.9999 if precision == "fp32" else 0.995)


def test_auto_is_the_gpu_in_half_precision():
    encoder = clip.load("ViT-B-32", "none")
    halves = "bf16" if torch.cuda.get_device_capability() >= (8, 0) else "fp16"
    assert (encoder.device, encoder.precision) == ("cuda", halves)


def test_the_objective_and_its_gradients_are_those_of_the_cpu():
    torch.manual_seed(0)
    network, x = Network([64], 128, 32, 16).train(), torch.randn(512, 64)
    found = {}
    for device in ("cpu", "cuda"):
        network.to(device).zero_grad()
        columns = torch.arange(64, device=device)
        terms = objective.rate_reduction(network(x.to(device)), columns, 0.2, 0.15, alone)
        terms.loss.backward()
        gradients = [p.grad.cpu().clone() for p in network.parameters() if p.grad is not None]
        found[device] = [terms.loss.detach().cpu(), *gradients]
    for mine, theirs in zip(found["cuda"], found["cpu"], strict=True):
        torch.testing.assert_close(mine, theirs, rtol=1e-2, atol=1e-4)


@pytest.mark.parametrize("cpus", [0, 2])
def test_shards_are_the_same_bytes_again_and_wherever_they_are_decoded(
    tiny_shards, tmp_path, ray_session, cpus
):
    shards, found = list_shards(str(tiny_shards)), []
    for number, cfg in enumerate((CFG, replace(CFG, decode_cpus=cpus))):
        paths = layout.RunPaths(str(tmp_path / str(number)))
        manifest = embed.run(cfg, paths, shards)
        assert [way.split()[0] for way in manifest["precisions"]] == ["cuda"]
        part = tables.read(paths.embeddings.file("00000.parquet"))
        found.append(tables.to_matrix(part["embedding"]).tobytes())
    assert found[0] == found[1]


def test_a_whole_run(tiny_shards, tmp_path, ray_session):
    arguments = [*run_arguments(tiny_shards, tmp_path), "--set", "embed.device=cuda"]
    assert cli.invoke(arguments) == 0
    assert cli.invoke(["verify", "--root", str(tmp_path)]) == 0
