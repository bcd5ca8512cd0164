"""Folding changes the speed of a convolutional tower, not what it says."""

from copy import deepcopy
from pathlib import Path

import open_clip
import pytest
import torch
from torch.nn.functional import normalize

from pipeline.vision import batch_norm

ASSETS = Path(__file__).parents[2] / "pipeline/vision/assets"
SIDES = {"pico-clip": (128, 128), "pico-resnet": (64, 64)}


def norms(tower: torch.nn.Module) -> int:
    return sum(isinstance(module, torch.nn.BatchNorm2d) for module in tower.modules())


@pytest.mark.parametrize("name", ["pico-clip", "pico-resnet"])
def test_a_folded_tower_says_the_same_without_norms(name):
    open_clip.add_model_config(ASSETS / name)
    weights = str(ASSETS / name / "open_clip_model.safetensors")
    tower = open_clip.create_model(name, pretrained=weights).eval().visual
    folded = deepcopy(tower)
    batch_norm.fold(folded)
    assert norms(tower) and not norms(folded)
    pixels = torch.rand(8, 3, *SIDES[name], generator=torch.Generator().manual_seed(0))
    with torch.inference_mode():
        found, expected = (normalize(net(pixels * 4 - 2)) for net in (folded, tower))
    torch.testing.assert_close(found, expected, rtol=0, atol=1e-5)


def test_other_models_are_left_alone():
    tower = torch.nn.Sequential(torch.nn.Conv2d(3, 4, 1), torch.nn.BatchNorm2d(4)).eval()
    batch_norm.fold(tower)
    assert norms(tower) == 1
