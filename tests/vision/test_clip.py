"""Encoders against open_clip's own preprocess and encode; names, checkpoints and their errors."""

import json
import os
import pickle
import socket
import tarfile
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np
import open_clip
import pytest
import torch
from PIL import Image
from safetensors.torch import save_file

from pipeline.runtime.errors import UserError
from pipeline.vision import clip, images, prompts, vocabulary

ROOT = Path(__file__).parents[2]
EMOJI = ROOT / "examples/noto-emoji"
PICO = ROOT / "pipeline/vision/assets/pico-clip"
CIFAR = ROOT.parent / "shared/data/cifar10-test"


def samples(path: Path, count: int) -> list[tuple[Image.Image, dict]]:
    """The first pictures of a shard, with their json."""
    parts: dict[str, dict[str, bytes]] = {}
    with tarfile.open(path) as tar:
        for member in tar:
            key, suffix = member.name.split(".", 1)
            parts.setdefault(key, {})[suffix] = tar.extractfile(member).read()
    chosen = list(parts.values())[:count]
    picture = [part.get("jpg") or part["png"] for part in chosen]
    decoded = [images.decode(data, 10**7) for data in picture]
    return [(i, json.loads(part["json"])) for i, part in zip(decoded, chosen, strict=True)]


@pytest.fixture(scope="module")
def pico() -> clip.Encoder:
    return clip.load("pico-clip", "", device="cpu")


@pytest.fixture(scope="module")
def reference():
    """open_clip's own pico-clip, as its README says to load it."""
    open_clip.add_model_config(PICO)
    weights = str(PICO / "open_clip_model.safetensors")
    model, _, preprocess = open_clip.create_model_and_transforms("pico-clip", pretrained=weights)
    return model.eval(), preprocess, open_clip.get_tokenizer("pico-clip", context_length=16)


@pytest.fixture(scope="module")
def random_vit() -> clip.Encoder:
    return clip.load("ViT-B-32", "none", device="cpu", precision="fp32")


def embed(encoder: clip.Encoder, pictures: list[Image.Image]) -> np.ndarray:
    return encoder.encode_images(np.stack([encoder.prepare(p) for p in pictures]))


def cosines_to(reference, encoder: clip.Encoder, pictures: list[Image.Image]) -> np.ndarray:
    model, preprocess, _ = reference
    with torch.inference_mode():
        expected = model.encode_image(torch.stack([preprocess(p) for p in pictures])).numpy()
    expected /= np.linalg.norm(expected, axis=1, keepdims=True)
    return (expected * embed(encoder, pictures)).sum(1)


def test_what_an_encoder_says_of_itself(pico):
    assert (pico.dim, pico.image_size, pico.device) == (256, (128, 128), "cpu")
    assert (pico.model_name, pico.precision) == ("pico-clip", "fp32")


def test_emoji_embed_as_in_open_clip(pico, reference):
    pictures = [picture for picture, _ in samples(EMOJI / "00001.tar", 40)]
    assert cosines_to(reference, pico, pictures).min() > 0.99999


@pytest.mark.parametrize(
    "size", [(1, 1), (3, 200), (200, 3), (63, 65), (64, 64), (640, 480), (101, 997), (3000, 2000)]
)
def test_odd_sizes_embed_as_in_open_clip(pico, reference, size):
    noise = np.random.default_rng(0).integers(0, 256, (9, 7, 3), np.uint8)
    picture = Image.fromarray(noise).resize(size, Image.Resampling.BICUBIC)
    assert cosines_to(reference, pico, [picture]).min() > 0.99999


def test_bf16_is_near(reference):
    encoder = clip.load("pico-clip", "", device="cpu", precision="bf16")
    pictures = [picture for picture, _ in samples(EMOJI / "00001.tar", 40)]
    assert cosines_to(reference, encoder, pictures).mean() > 0.99


def test_texts_embed_as_in_open_clip(pico, reference):
    model, _, tokenizer = reference
    texts = ["dog", "a tow truck", "", "many words " * 50, "ünïcode 猫"]
    with torch.inference_mode():
        expected = model.encode_text(tokenizer(texts), normalize=True).numpy()
    assert np.abs(pico.encode_texts(texts, batch_size=2) - expected).max() < 1e-5


def test_rows_are_unit_float32_and_repeat_to_the_byte(pico):
    pictures = [picture for picture, _ in samples(EMOJI / "00000.tar", 33)]
    rows, words = embed(pico, pictures), pico.encode_texts(["dog", "cat"], 8)
    for x in (rows, words):
        assert x.dtype == np.float32 and np.allclose(np.linalg.norm(x, axis=1), 1, atol=1e-6)
    assert rows.tobytes() == embed(pico, pictures).tobytes()
    assert rows.tobytes() == embed(clip.load("pico-clip", "", device="cpu"), pictures).tobytes()


def test_nothing_in_nothing_out(pico):
    assert pico.encode_images(np.empty((0, 128, 128, 3), np.uint8)).shape == (0, 256)
    assert pico.encode_texts([], batch_size=8).shape == (0, 256)


def test_read_only_pixels_are_taken(pico):
    pixels = np.zeros((2, 128, 128, 3), np.uint8)
    pixels.flags.writeable = False  # as Ray hands them out
    assert np.isfinite(pico.encode_images(pixels)).all()


def test_prepare_is_safe_in_threads(pico):
    pictures = [picture for picture, _ in samples(EMOJI / "00002.tar", 64)]
    alone = [pico.prepare(picture) for picture in pictures]
    with ThreadPoolExecutor(4) as pool:
        together = list(pool.map(pico.prepare, pictures))
    assert all(np.array_equal(a, b) for a, b in zip(alone, together, strict=True))


def test_emoji_find_their_name_among_two_thousand(pico):
    """Noto was never seen in training; chance would be 5 in 2,852."""
    shard = samples(EMOJI / "00000.tar", 200)
    names = vocabulary.load(["pico-clip"])
    known = [(p, truth["caption"]) for p, truth in shard if truth["caption"] in names]
    scores = embed(pico, [p for p, _ in known]) @ pico.encode_texts(names, 256).T
    top = np.argsort(-scores, axis=1)[:, :5]
    hits = [names.index(caption) in row for (_, caption), row in zip(known, top, strict=True)]
    assert len(hits) > 100 and np.mean(hits) > 0.3


@pytest.mark.skipif(not CIFAR.is_dir(), reason="CIFAR-10 is not in ../shared/data")
def test_bare_words_are_the_right_prompt_for_pico_clip(pico):
    shard = samples(CIFAR / "00000.tar", 300)
    images = pico.encode_images(np.stack([pico.prepare(p) for p, _ in shard]))
    classes = sorted({truth["label"] for _, truth in shard})
    truth = np.array([classes.index(t["label"]) for _, t in shard])

    def accuracy(template: str) -> float:
        words = pico.encode_texts([template.format(c) for c in classes], 16)
        return float(np.mean((images @ words.T).argmax(1) == truth))

    bare, usual = (
        accuracy(*prompts.templates("pico-clip")),
        accuracy(*prompts.templates("ViT-B-32")),
    )
    assert bare > 0.78 and bare > usual


def test_random_vit_prepares_as_open_clip_does(random_vit):
    _, _, preprocess = open_clip.create_model_and_transforms("ViT-B-32", pretrained=None)
    picture = samples(EMOJI / "00000.tar", 1)[0][0].resize((300, 211))
    assert (random_vit.image_size, random_vit.dim) == ((224, 224), 512)
    ours = random_vit._pixels(random_vit.prepare(picture)[None])[0]
    assert torch.equal(ours, preprocess(picture))


def test_random_weights_are_the_same_each_time_and_leave_the_seed_alone(random_vit):
    torch.manual_seed(7)
    expected = torch.rand(1)
    torch.manual_seed(7)
    again = clip.load("ViT-B-32", "none", device="cpu", precision="fp32")
    assert torch.equal(torch.rand(1), expected)
    pixels = np.random.default_rng(0).integers(0, 256, (2, 224, 224, 3), np.uint8)
    assert random_vit.encode_images(pixels).tobytes() == again.encode_images(pixels).tobytes()
    assert random_vit.encode_texts(["dog"], 1).shape == (1, 512)


@pytest.mark.parametrize(
    ("model", "pretrained", "parts"),
    [
        ("ViT-B/32", "openai", ["unknown model 'ViT-B/32'", "ViT-B-32"]),
        ("pico-klip", "", ["unknown model", "pico-clip"]),
        ("ViT-B-32", "opnai", ["unknown pretrained 'opnai'", "openai", "laion2b_s34b_b79k"]),
        ("ViT-B-32", "", ["needs pretrained", "openai"]),
        ("pico-clip", "openai", ["unknown pretrained 'openai'", '"none"']),
        ("pico-clip", "/nowhere/w.safetensors", ["/nowhere/w.safetensors does not exist"]),
        ("pico-clip", str(PICO / "README.md"), [".safetensors"]),
        ("hf-hub:org/repo", "openai", ["leave pretrained empty"]),
        ("local-dir:/nowhere", "", ["/nowhere/open_clip_config.json"]),
    ],
)
def test_mistakes_are_told_before_anything_is_loaded(model, pretrained, parts):
    for function in (clip.check, clip.load):
        with pytest.raises(UserError) as caught:
            function(model, pretrained)
        message = str(caught.value)
        assert all(part in message for part in parts) and "\n" not in message


@pytest.mark.parametrize(
    ("model", "pretrained"),
    [
        ("pico-clip", ""),
        ("pico-clip", "none"),
        ("pico-resnet", ""),
        ("ViT-B-32", "none"),
        ("ViT-B-32", "laion2b-s34b-b79k"),
        ("ViT-L-14", "openai"),
        ("hf-hub:org/repo", ""),
    ],
)
def test_good_names_pass(model, pretrained):
    clip.check(model, pretrained)


@pytest.mark.parametrize("option", [{"device": "tpu"}, {"precision": "int8"}])
def test_unknown_options(option):
    with pytest.raises(UserError, match=r"unknown (device|precision) '(tpu|int8)'; choose one of"):
        clip.load("pico-clip", "", **option)


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a CUDA device")
def test_cuda_that_is_not_there():
    with pytest.raises(UserError, match="torch sees none"):
        clip.load("pico-clip", "", device="cuda")


def test_auto_precision():
    assert clip.choose_precision("pico-clip", "cpu", "auto") == "fp32"
    assert clip.choose_precision("pico-clip", "cpu", "bf16") == "bf16"
    assert clip.choose_precision("ViT-B-32", "cpu", "auto") in ("bf16", "fp32")


def test_the_bundled_models_need_no_network(monkeypatch):
    def refuse(*args, **kwargs):
        raise AssertionError("a connection was opened")

    monkeypatch.setattr(socket.socket, "connect", refuse)
    monkeypatch.setattr(socket, "getaddrinfo", refuse)
    for model in ("pico-clip", "pico-resnet"):
        assert clip.load(model, "", device="cpu").dim == 256


def test_pico_resnet_encodes_images_and_no_texts():
    encoder = clip.load("pico-resnet", "", device="cpu")
    assert (encoder.dim, encoder.image_size, encoder.precision) == (256, (64, 64), "fp32")
    pictures = [picture for picture, _ in samples(EMOJI / "00001.tar", 20)]
    folder = ROOT / "pipeline/vision/assets/pico-resnet"
    open_clip.add_model_config(folder)
    weights = str(folder / "open_clip_model.safetensors")
    net, _, preprocess = open_clip.create_model_and_transforms("pico-resnet", pretrained=weights)
    assert cosines_to((net.eval(), preprocess, None), encoder, pictures).min() > 0.99999
    for encode in (lambda: encoder.encode_texts(["dog"], 1), lambda: encoder.encode_texts([], 1)):
        with pytest.raises(UserError, match="'pico-resnet' encodes images only"):
            encode()


def test_openai_tags_get_their_activation():
    assert clip.source("ViT-L-14", "openai")["force_quick_gelu"] is True
    assert clip.source("ViT-B-32", "laion2b_s34b_b79k")["force_quick_gelu"] is False


@pytest.mark.parametrize("suffix", [".safetensors", ".pt", ".bin"])
def test_local_checkpoints(pico, reference, tmp_path, suffix):
    path = tmp_path / f"weights{suffix}"
    state = {name: tensor.contiguous() for name, tensor in reference[0].state_dict().items()}
    save_file(state, path) if suffix == ".safetensors" else torch.save(state, path)
    pixels = np.full((1, 128, 128, 3), 77, np.uint8)
    loaded = clip.load("pico-clip", str(path), device="cpu")
    assert np.array_equal(loaded.encode_images(pixels), pico.encode_images(pixels))


def test_checkpoint_of_another_model_is_a_user_error():
    weights = str(PICO / "open_clip_model.safetensors")
    with pytest.raises(UserError, match="cannot load 'RN50' with weights"):
        clip.load("RN50", weights)


def test_folder_without_weights_is_refused_not_made_up(tmp_path):
    config = {"model_cfg": json.loads((PICO / "pico-clip.json").read_text())}
    (tmp_path / "open_clip_config.json").write_text(json.dumps(config))
    with pytest.raises(UserError, match="cannot load"):
        clip.load(f"local-dir:{tmp_path}", "")


class Payload:
    """Its unpickling creates a file."""

    def __init__(self, target: Path) -> None:
        self.code = f"open({str(target)!r}, 'w').close()"

    def __reduce__(self):
        return exec, (self.code,)


@pytest.mark.filterwarnings("ignore:Detected pickle protocol")
@pytest.mark.parametrize("forced", [None, "TORCH_FORCE_NO_WEIGHTS_ONLY_LOAD"])
@pytest.mark.parametrize("kind", ["zip", "pickle", "type error"])
def test_code_in_a_checkpoint_never_runs(tmp_path, monkeypatch, kind, forced):
    path, target = tmp_path / "evil.pt", tmp_path / "created"
    if forced:
        monkeypatch.setenv(forced, "1")
    if kind == "zip":
        torch.save({"state_dict": Payload(target)}, path)
    elif kind == "pickle":
        path.write_bytes(pickle.dumps(Payload(target)))
    else:  # the weights-only reader raises a TypeError, at which open_clip reads again without it
        monkeypatch.setattr(torch, "load", once_a_type_error(torch.load))
        torch.save({"state_dict": Payload(target)}, path)
    with pytest.raises(UserError, match="cannot load 'pico-clip'"):
        clip.load("pico-clip", str(path))
    assert not target.exists()
    assert os.environ.get("TORCH_FORCE_NO_WEIGHTS_ONLY_LOAD") == ("1" if forced else None)
    assert "TORCH_FORCE_WEIGHTS_ONLY_LOAD" not in os.environ


def once_a_type_error(load):
    calls = []

    def wrapped(*args, **kwargs):
        calls.append(args)
        if len(calls) == 1:
            raise TypeError("planted")
        return load(*args, **kwargs)

    return wrapped


def test_the_payload_is_real(tmp_path):
    """Else the test above would prove nothing."""
    path, target = tmp_path / "evil.pt", tmp_path / "created"
    torch.save(Payload(target), path)
    torch.load(path, weights_only=False)
    assert target.exists()


@pytest.mark.filterwarnings("ignore")
def test_torchscript_is_refused(tmp_path):
    path = tmp_path / "scripted.pt"
    torch.jit.save(torch.jit.script(torch.nn.Linear(2, 2)), str(path))
    with pytest.raises(UserError, match="TorchScript"):
        clip.check("pico-clip", str(path))


@pytest.mark.parametrize("precision", ["fp32", "bf16", "fp16"])
def test_pictures_go_to_the_device_of_the_model_in_its_precision(precision):
    """The meta device refuses tensors of any other, as a GPU would."""
    encoder = clip.load("pico-clip", "", device="cpu", precision=precision)
    encoder.device = "meta"
    encoder._model.to("meta")
    encoder._mean, encoder._std = encoder._mean.to("meta"), encoder._std.to("meta")
    pixels = encoder._pixels(np.zeros((2, *encoder.image_size, 3), np.uint8))
    assert (pixels.device.type, pixels.dtype) == ("meta", clip._DTYPES[precision])
    assert pixels.is_contiguous(memory_format=torch.channels_last)
    assert encoder._model.encode_image(pixels).is_meta


def test_templates_are_prompts_or_sets_of_them():
    assert prompts.templates("pico-clip") == ("{}",)
    assert prompts.templates("ViT-B-32") == ("a photo of a {}.",)
    assert prompts.templates("pico-clip", ["one {}", "two {}"]) == ("one {}", "two {}")
    both = prompts.templates("ViT-B-32", ["a {} here", "openai", "simple"])
    assert len(both) == 81 and both[0] == "a {} here"  # the simple ones are among the 80
    assert "a bad photo of a {}." in both and all(p.count("{}") == 1 for p in both)
    fills = [fill("dog") for fill in open_clip.SIMPLE_IMAGENET_TEMPLATES]
    simple = prompts.templates("ViT-B-32", ["simple"])
    assert [prompt.replace("{}", "dog") for prompt in simple] == fills and len(fills) == 7


def test_templates_that_are_neither_are_refused():
    prompts.check_templates(["openai", "simple", "{}"])
    for bad in ("opnai", "a photo", "{} {}"):
        with pytest.raises(UserError, match=r"exactly once, or be one of .*: openai, simple"):
            prompts.check_templates([bad])


def test_words_are_the_mean_over_their_prompts(pico):
    found = pico.encode_words(["dog", "car"], ("{}", "a {} here"), 3)
    both = [pico.encode_texts([w, f"a {w} here"], 2).mean(axis=0) for w in ("dog", "car")]
    assert found == pytest.approx(np.stack([v / np.linalg.norm(v) for v in both]), abs=1e-5)
    assert found.dtype == np.float32


def test_the_dimensions_of_texts_need_no_weights():
    assert clip.text_dim("ViT-L-14", "openai") == 768
    assert clip.text_dim("pico-clip", "") == clip.load("pico-clip", "").dim
