"""Image models of timm as encoders, built and prepared for by timm's own functions.

A name is one of timm's, with or without a tag: resnet50, vit_base_patch14_dinov2.lvd142m.

torch and timm are imported inside functions, because the import takes seconds.
"""

import difflib
from collections.abc import Iterator
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any

from pipeline.runtime.errors import UserError

if TYPE_CHECKING:
    from torch import nn

PREFIX = "timm:"  # of a model's name, in settings
RANDOM = "none"  # instead of weights


def check(name: str, pretrained: str) -> None:
    """UserError for a name that timm does not know, or that has no weights of its own.

    `pretrained` is "" where timm's own weights are wanted.
    """
    import timm

    names = [*timm.list_models(), *timm.list_pretrained()]
    if name not in names:
        near = difflib.get_close_matches(name, names, n=3, cutoff=0.4) or ["resnet50.a1_in1k"]
        raise UserError(f"unknown model of timm {name!r}; did you mean {' or '.join(near)}?")
    if pretrained == "" and not timm.models.is_model_pretrained(name):
        raise UserError(f"timm has no weights for {name!r}; give a checkpoint: {PREFIX}{name}:FILE")


def build(model: str, pretrained: str) -> tuple["nn.Module", Any]:
    """The model in fp32 without its classifier, and its transform of images for evaluation.

    `model` is timm:NAME, `pretrained` as in `weights`. RuntimeError where a checkpoint does not
    hold all weights of the model.
    """
    import timm

    given = {"file": pretrained, "custom_load": False} if pretrained not in ("", RANDOM) else None
    with _complete():
        net = timm.create_model(
            model.removeprefix(PREFIX),
            pretrained=pretrained != RANDOM,
            num_classes=0,
            pretrained_cfg_overlay=given,
        )
    transform = timm.data.create_transform(
        **timm.data.resolve_model_data_config(net), is_training=False
    )
    return net, transform


def has_batch_norm(net: "nn.Module") -> bool:
    """Whether the model is a convolutional network that half precision makes inexact."""
    from torch import nn

    return any(isinstance(module, nn.BatchNorm2d) for module in net.modules())


@contextmanager
def _complete() -> Iterator[None]:
    """In this context a model that a state dict does not fill raises RuntimeError.

    timm only logs it, and the rest of the model would stay random.
    """
    from torch import nn

    plain = nn.Module.load_state_dict

    def load(self: "nn.Module", state: Any, *args: Any, **options: Any) -> Any:
        result = plain(self, state, *args, **options)
        if missing := result.missing_keys:
            raise RuntimeError(f"the checkpoint lacks {len(missing)} tensors, such as {missing[0]}")
        return result

    nn.Module.load_state_dict = load  # type: ignore[assignment]
    try:
        yield
    finally:
        nn.Module.load_state_dict = plain  # type: ignore[method-assign]
