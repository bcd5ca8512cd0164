"""Folding changes the speed of a ResNet, not what it says."""

from copy import deepcopy
from pathlib import Path

import open_clip
import pytest
import torch
from torch.nn.functional import normalize

from pipeline.vision import batch_norm

PICO = Path(__file__).parents[2] / "pipeline/vision/assets/pico-clip"


@pytest.fixture(scope="module")
def resnet() -> torch.nn.Module:
    open_clip.add_model_config(PICO)
    weights = str(PICO / "open_clip_model.safetensors")
    return open_clip.create_model("pico-clip", pretrained=weights).eval().visual


def norms(tower: torch.nn.Module) -> int:
    return sum(isinstance(module, torch.nn.BatchNorm2d) for module in tower.modules())


def test_a_folded_resnet_says_the_same_without_norms(resnet):
    folded = deepcopy(resnet)
    batch_norm.fold(folded)
    assert norms(resnet) and not norms(folded)
    x = torch.randn(8, 3, 64, 64, generator=torch.Generator().manual_seed(0))
    with torch.inference_mode():
        torch.testing.assert_close(normalize(folded(x)), normalize(resnet(x)), rtol=0, atol=1e-5)


def test_other_models_are_left_alone():
    tower = torch.nn.Sequential(torch.nn.Conv2d(3, 4, 1), torch.nn.BatchNorm2d(4)).eval()
    batch_norm.fold(tower)
    assert norms(tower) == 1
