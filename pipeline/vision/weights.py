"""Finds the weights of a model, and makes sure that reading them runs no code.

A model is one of open_clip, one of the bundled ones, or timm:NAME for an image model of timm.
`pretrained` is "" for the default (the bundled models, hf-hub:, local-dir: and timm: have one), a
tag of open_clip, the path of a checkpoint, or "none" for random weights, which are for benchmarks.

open_clip and timm are imported inside functions, because the import takes seconds.
"""

import difflib
import functools
import importlib.resources
import os
import zipfile
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from pipeline.runtime.errors import UserError
from pipeline.vision import timm_models

PICO = "pico-clip"  # the bundled model
PICO_RESNET = "pico-resnet"  # the bundled second encoder, for images alone
BUNDLED = (PICO, PICO_RESNET)
RANDOM = timm_models.RANDOM
PRECISIONS = ("auto", "fp32", "bf16", "fp16")

_SCHEMES = ("hf-hub:", "local-dir:")  # open_clip's own; config and weights come together
_SUFFIXES = (".safetensors", ".pt", ".pth", ".bin")


def split(name: str) -> tuple[str, str]:
    """The model and `pretrained` of a name of both: ARCH:TAG, ARCH:FILE, ARCH, timm:NAME:FILE."""
    if name.startswith(_SCHEMES):
        return name, ""
    prefix = timm_models.PREFIX if name.startswith(timm_models.PREFIX) else ""
    model, _, pretrained = name.removeprefix(prefix).partition(":")
    return prefix + model, pretrained


def images_only(model: str) -> bool:
    """Whether the model has no text encoder."""
    return model == PICO_RESNET or model.startswith(timm_models.PREFIX)


def check(model: str, pretrained: str) -> None:
    """Raises UserError for an unknown model, tag or checkpoint, without reading weights."""
    if model.startswith(timm_models.PREFIX):
        timm_models.check(model.removeprefix(timm_models.PREFIX), pretrained)
        if pretrained not in ("", RANDOM):
            _check_checkpoint(Path(pretrained))
        return
    if model.startswith(_SCHEMES):
        _check_scheme(model, pretrained)
        return
    if model in BUNDLED and pretrained == "":
        return
    import open_clip

    _register_bundled()
    known = open_clip.list_models()
    if model not in known:
        near = difflib.get_close_matches(model, known, n=3, cutoff=0.4) or [PICO, "ViT-B-32"]
        raise UserError(f"unknown model {model!r}; did you mean {' or '.join(near)}?")
    tags = open_clip.list_pretrained_tags_by_model(model)
    if pretrained in ("", RANDOM) or open_clip.is_pretrained_cfg(model, pretrained):
        if pretrained == "":
            raise UserError(f"model {model} needs pretrained weights: {_choices(tags)}")
    elif pretrained.endswith(_SUFFIXES) or Path(pretrained).exists():
        _check_checkpoint(Path(pretrained))
    else:
        raise UserError(f"unknown pretrained {pretrained!r} for {model}: {_choices(tags)}")


def architecture(model: str) -> dict[str, Any] | None:
    """open_clip's config of a model; None where it comes with the weights."""
    import open_clip

    _register_bundled()
    found: dict[str, Any] | None = None
    if model in open_clip.list_models():
        found = open_clip.get_model_config(model)
    return found


def source(model: str, pretrained: str) -> dict[str, Any]:
    """Arguments of open_clip for the weights; it fails where there are none."""
    import open_clip

    _register_bundled()
    if pretrained == RANDOM:
        return {"pretrained": None, "pretrained_text": False}
    if pretrained == "" and model in BUNDLED:
        pretrained = str(_assets() / model / "open_clip_model.safetensors")
    # OpenAI's and some other weights were trained with QuickGELU, which their config lacks;
    # open_clip only warns, and the vectors would be worse.
    quick = bool(open_clip.get_pretrained_cfg(model, pretrained).get("quick_gelu", False))
    return {"pretrained": pretrained, "require_pretrained": True, "force_quick_gelu": quick}


@contextmanager
def tensors_only() -> Iterator[None]:
    """In this context torch unpickles tensors only.

    open_clip asks for the same, but repeats the load without it after a TypeError, which a crafted
    file can cause; and environment variables of the user could switch it off.
    """
    names = ("TORCH_FORCE_WEIGHTS_ONLY_LOAD", "TORCH_FORCE_NO_WEIGHTS_ONLY_LOAD")
    before = {name: os.environ.pop(name) for name in names if name in os.environ}
    os.environ[names[0]] = "1"
    try:
        yield
    finally:
        del os.environ[names[0]]
        os.environ.update(before)


@functools.cache
def _register_bundled() -> None:
    import open_clip

    for model in BUNDLED:
        open_clip.add_model_config(_assets() / model)


def _assets() -> Path:
    return Path(str(importlib.resources.files("pipeline.vision") / "assets"))


def _check_scheme(model: str, pretrained: str) -> None:
    if pretrained:
        raise UserError(f"weights come with {model!r}; leave pretrained empty, not {pretrained!r}")
    if model.startswith("local-dir:"):
        config = Path(model.removeprefix("local-dir:")) / "open_clip_config.json"
        if not config.is_file():
            raise UserError(f"model {model!r}: there is no file {config}")


def _check_checkpoint(path: Path) -> None:
    if not path.is_file():
        raise UserError(f"checkpoint {path} does not exist or is no file")
    if path.suffix not in _SUFFIXES:
        raise UserError(f"checkpoint {path} must end in one of {', '.join(_SUFFIXES)}")
    if path.suffix == ".safetensors" or not zipfile.is_zipfile(path):
        return
    with zipfile.ZipFile(path) as archive:
        if any(name.endswith("/constants.pkl") for name in archive.namelist()):
            raise UserError(f"checkpoint {path} is a TorchScript archive; give a state dict")


def _choices(tags: Sequence[str]) -> str:
    tail = f'the path of a checkpoint, or "{RANDOM}" for random weights'
    return f"choose one of {', '.join(tags)}, {tail}" if tags else f"give {tail}"
