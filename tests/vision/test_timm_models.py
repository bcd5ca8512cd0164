"""Models of timm against timm's own functions; their checkpoints, and mistakes in their names."""

import numpy as np
import pytest
import timm
import torch
from PIL import Image
from safetensors.torch import save_file

from pipeline.runtime.errors import UserError
from pipeline.vision import clip, weights
from tests.vision.test_clip import Payload, once_a_type_error

NAMES = ("resnet18", "vit_tiny_patch16_224", "tf_efficientnet_lite0")


def trained(name: str, **options) -> torch.nn.Module:
    """A model of timm with a classifier and weights that are not its initial ones."""
    torch.manual_seed(1)
    net = timm.create_model(name, pretrained=False, **options).eval()
    for module in net.modules():
        if isinstance(module, torch.nn.BatchNorm2d):
            module.running_mean.normal_(0, 0.1)
            module.running_var.uniform_(0.5, 2)
    return net


def saved(net: torch.nn.Module, path) -> str:
    state = {name: tensor.contiguous() for name, tensor in net.state_dict().items()}
    save_file(state, path) if path.suffix == ".safetensors" else torch.save(state, path)
    return str(path)


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("suffix", [".safetensors", ".pth"])
def test_a_checkpoint_encodes_as_in_timm(name, suffix, tmp_path):
    net = trained(name, num_classes=1000 if suffix == ".pth" else 7)
    path = saved(net, tmp_path / f"weights{suffix}")
    encoder = clip.load(f"timm:{name}", path, device="cpu", precision="fp32")
    noise = np.random.default_rng(0).integers(0, 256, (150, 200, 3), np.uint8)
    picture = Image.fromarray(noise)
    net.reset_classifier(0)
    prepare = timm.data.create_transform(
        **timm.data.resolve_model_data_config(net), is_training=False
    )
    with torch.inference_mode():
        expected = torch.nn.functional.normalize(net(prepare(picture)[None])).numpy()
    found = encoder.encode_images(encoder.prepare(picture)[None])
    assert found.shape == (1, net.num_features) and encoder.image_size == (224, 224)
    assert (found * expected).sum() > 0.99999
    with pytest.raises(UserError, match=f"'timm:{name}' encodes images only"):
        encoder.encode_texts(["dog"], 1)


def test_auto_precision_is_full_with_batch_norms(monkeypatch):
    monkeypatch.setattr(clip, "_cpu_has_bf16", lambda: True)
    for name, precision in (("resnet18", "fp32"), ("vit_tiny_patch16_224", "bf16")):
        encoder = clip.load(f"timm:{name}", "none", device="cpu")
        assert encoder.precision == precision
        pixels = np.zeros((2, *encoder.image_size, 3), np.uint8)
        assert np.isfinite(encoder.encode_images(pixels)).all()


def test_a_checkpoint_of_another_model_is_refused_not_made_up(tmp_path):
    """timm loads what fits, and leaves the rest random."""
    path = saved(trained("vit_tiny_patch16_224"), tmp_path / "w.pt")
    with pytest.raises(UserError, match=r"cannot load 'timm:resnet18'.*lacks"):
        clip.load("timm:resnet18", path, device="cpu")
    part = {k: v for k, v in trained("resnet18").state_dict().items() if "layer4" not in k}
    torch.save(part, tmp_path / "part.pt")
    with pytest.raises(UserError, match=r"lacks .* tensors, such as layer4"):
        clip.load("timm:resnet18", str(tmp_path / "part.pt"), device="cpu")


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("retried", [False, True])
def test_code_in_a_checkpoint_never_runs(tmp_path, monkeypatch, retried):
    path, target = tmp_path / "evil.pt", tmp_path / "created"
    torch.save({"state_dict": Payload(target)}, path)
    monkeypatch.setenv("TORCH_FORCE_NO_WEIGHTS_ONLY_LOAD", "1")
    if retried:
        monkeypatch.setattr(torch, "load", once_a_type_error(torch.load))
    with pytest.raises(UserError, match="cannot load 'timm:resnet18'"):
        clip.load("timm:resnet18", str(path), device="cpu")
    assert not target.exists()


@pytest.mark.parametrize(
    ("name", "parts"),
    [
        ("timm:resnet81", ["unknown model of timm 'resnet81'", "did you mean resnet18"]),
        ("timm:resnet18.openai", ["unknown model of timm", "resnet18."]),
        ("timm:coatnet_0_224", ["no weights for 'coatnet_0_224'", "timm:coatnet_0_224:FILE"]),
        ("timm:resnet18:/nowhere/w.pt", ["/nowhere/w.pt does not exist"]),
        ("timm:", ["unknown model of timm ''"]),
    ],
)
def test_mistakes_are_named_before_anything_is_loaded(name, parts):
    for function in (weights.check, clip.load):
        with pytest.raises(UserError) as caught:
            function(*weights.split(name))
        assert all(part in str(caught.value) for part in parts)


@pytest.mark.parametrize(
    ("name", "parts"),
    [
        ("ViT-B-32:openai", ("ViT-B-32", "openai")),
        ("ViT-B-32:/a:b/w.pt", ("ViT-B-32", "/a:b/w.pt")),
        ("pico-resnet", ("pico-resnet", "")),
        ("hf-hub:org/repo", ("hf-hub:org/repo", "")),
        ("local-dir:/models/x", ("local-dir:/models/x", "")),
        ("timm:resnet18.a1_in1k", ("timm:resnet18.a1_in1k", "")),
        ("timm:resnet18:w.pt", ("timm:resnet18", "w.pt")),
    ],
)
def test_a_name_of_model_and_weights_is_split(name, parts):
    assert weights.split(name) == parts
