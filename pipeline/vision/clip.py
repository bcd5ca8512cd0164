"""Encodes images and words as unit vectors, with any model of open_clip; images with any of timm.

The bundled models are loaded like every other model, from their folders. `pico-resnet` and the
models of timm have no words. Weights are read as tensors only: no code in a checkpoint is ever run.

n images or texts, h × w the encoder's image size, dim the length of a vector.
"""

import hashlib
import logging
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from PIL import Image
from torch import Tensor

from pipeline.runtime.errors import UserError
from pipeline.vision import batch_norm, timm_models
from pipeline.vision.weights import (
    BUNDLED,
    PICO,
    PRECISIONS,
    architecture,
    check,
    images_only,
    source,
    tensors_only,
)

if TYPE_CHECKING:
    from torchvision import transforms
log = logging.getLogger(__name__)
DEVICES = ("auto", "cpu", "cuda")
TEXTS_PER_BATCH = 256  # through the text encoder at once
CPU_IMAGES = 16  # through a model on the CPU at once: more do not fit its caches (pico-clip: half)
_DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}


@dataclass(frozen=True)
class Prepare:
    """RGB image of any size → uint8 (h, w, 3), resized and cropped as open_clip does.

    Does not hold the model, so it can be sent to processes that only decode.
    """

    geometry: Callable[[Image.Image], Image.Image]

    def __call__(self, image: Image.Image) -> np.ndarray:
        return np.asarray(self.geometry(image))


class Encoder:
    """A loaded model. `prepare` may be called from many threads, the others from one at a time.

    The same call gives the same bytes on the same machine. The last bits of a row may depend on the
    size of its batch, so batches should be cut the same way each time.
    """

    def __init__(
        self,
        model_name: str,
        model: torch.nn.Module,
        preprocess: "transforms.Compose",
        tokenizer: Callable[[list[str]], Tensor] | None,
        device: str,
        precision: str,
    ) -> None:
        """`model` is a CLIP of open_clip; without a tokenizer it is an image tower alone."""
        self.model_name = model_name
        self.device = device
        self.precision = precision
        self.weights = _digest(model)
        net: Any = model.eval()
        if precision == "fp32":  # half precision would round the scales into the weights
            batch_norm.fold(net.visual if tokenizer else net)
        # channels_last: faster convolutions, and a batch of (n, h, w, 3) pixels has this order
        # already. Transformers ignore it.
        self._model = net.to(device).to(memory_format=torch.channels_last)
        self._tokenizer = tokenizer
        self._encode_image = self._model.encode_image if tokenizer else self._model
        # of cosines, as trained; 1 without words
        self.logit_scale = float(net.logit_scale.detach().exp()) if tokenizer else 1.0
        geometry, normalize = _split(preprocess)
        self.prepare = Prepare(geometry)
        self._mean = torch.as_tensor(normalize.mean, device=device).view(1, 3, 1, 1)
        self._std = torch.as_tensor(normalize.std, device=device).view(1, 3, 1, 1)
        blank = self.prepare(Image.new("RGB", (64, 64)))
        self.image_size: tuple[int, int] = blank.shape[:2]  # height, width
        rows = self._forward(self._encode_image, self._pixels(blank[None]))
        if rows.ndim != 2:
            raise UserError(
                f"model {model_name!r} gives no single vector for an image: choose another"
            )
        self.dim: int = rows.shape[1]

    def encode_images(self, pixels: np.ndarray) -> np.ndarray:
        """uint8 (n, h, w, 3) from `prepare` → float32 (n, dim), rows of unit length.

        A row is not finite if the model's output is not, for example in fp16 beyond 65,504.
        """
        assert pixels.dtype == np.uint8 and pixels.shape[1:] == (*self.image_size, 3), pixels.shape
        rows = [np.empty((0, self.dim), np.float32)]
        at_once = CPU_IMAGES if self.device == "cpu" else max(1, len(pixels))
        for start in range(0, len(pixels), at_once):
            batch = self._pixels(pixels[start : start + at_once])
            rows.append(self._forward(self._encode_image, batch))
        return np.concatenate(rows)

    def encode_texts(self, texts: Sequence[str], batch_size: int) -> np.ndarray:
        """Texts → float32 (n, dim), rows of unit length; longer texts are cut to the context.

        Raises UserError if the model has no text encoder.
        """
        if self._tokenizer is None:
            raise UserError(
                f"model {self.model_name!r} encodes images only; set embed.model to a model with a "
                f"text encoder, such as {PICO}"
            )
        rows = [np.empty((0, self.dim), np.float32)]
        for start in range(0, len(texts), batch_size):
            tokens = self._tokenizer(list(texts[start : start + batch_size]))  # (batch, context)
            rows.append(self._forward(self._model.encode_text, tokens.to(self.device)))
        return np.concatenate(rows)

    def encode_words(
        self, words: Sequence[str], prompts: Sequence[str], batch_size: int
    ) -> np.ndarray:
        """Words → float32 (n, dim), unit rows: the mean over the prompts; {} is the word."""
        filled = [prompt.replace("{}", word) for word in words for prompt in prompts]
        encoded = self.encode_texts(filled, batch_size)
        mean = encoded.reshape(len(words), len(prompts), -1).mean(axis=1)
        unit: np.ndarray = mean / np.maximum(np.linalg.norm(mean, axis=1, keepdims=True), 1e-12)
        return unit.astype(np.float32)

    def _pixels(self, pixels: np.ndarray) -> Tensor:
        """uint8 (n, h, w, 3) → the model's input (n, 3, h, w) on its device."""
        host = torch.from_numpy(np.require(pixels, requirements=["C", "W"]))
        if self.device == "cuda":
            host = host.pin_memory()
        x = host.to(self.device, non_blocking=True).permute(0, 3, 1, 2)
        x = (x.float() / 255 - self._mean) / self._std
        return x.to(_DTYPES[self.precision])

    def _forward(self, encode: Callable[[Tensor], Tensor], batch: Tensor) -> np.ndarray:
        with torch.inference_mode():
            rows = torch.nn.functional.normalize(encode(batch).float(), dim=-1)
        return rows.cpu().numpy()


def load(
    model: str,
    pretrained: str,
    *,
    device: str = "auto",
    precision: str = "auto",
    threads: int | None = None,
) -> Encoder:
    """The model on its device, with its weights cast to its precision. Raises UserError.

    pretrained  as in `weights`
    device      auto is cuda where there is one, else cpu
    precision   as in `choose_precision`
    threads     of torch on the CPU, for the whole process; None: unchanged
    """
    check(model, pretrained)
    device = _choose_device(device)
    asked, precision = precision, choose_precision(model, device, precision)
    if threads is not None:
        torch.set_num_threads(threads)
    try:
        with tensors_only(), torch.random.fork_rng(devices=[]):
            torch.random.default_generator.manual_seed(0)
            if model.startswith(timm_models.PREFIX):
                net, preprocess = timm_models.build(model, pretrained)
                tokenizer = None
                if asked == "auto" and timm_models.has_batch_norm(net):
                    precision = "fp32"
                net = net.to(_DTYPES[precision])
            else:
                net, preprocess, tokenizer = _open_clip(model, pretrained, precision)
    except Exception as error:  # of open_clip, huggingface_hub, safetensors, pickle: no common base
        reason = " ".join(str(error).split())
        reason = reason if len(reason) < 300 else f"{reason[:300]}…"
        raise UserError(
            f"cannot load {model!r} with weights {pretrained!r}: {type(error).__name__}: {reason}; "
            "check that they belong together, and the network where they must be downloaded"
        ) from error
    log.info("clip: %s, weights %s, %s, %s", model, pretrained or "default", device, precision)
    return Encoder(model, net, preprocess, tokenizer, device, precision)


def text_dim(model: str, pretrained: str) -> int:
    """Dimensions of the model's vectors of texts; reads weights only where no config says it."""
    check(model, pretrained)
    known = architecture(model)
    return int(known["embed_dim"]) if known else load(model, pretrained, device="cpu").dim


def _open_clip(model: str, pretrained: str, precision: str) -> tuple[Any, Any, Any]:
    """A CLIP or, without words, its image tower; its transform of images; its tokenizer or None."""
    import open_clip  # as in `weights`: where it is needed

    net, _, preprocess = open_clip.create_model_and_transforms(
        model, **source(model, pretrained), precision=_open_clip_precision(precision)
    )
    if images_only(model):
        return net.visual, preprocess, None
    return net, preprocess, open_clip.get_tokenizer(model)


def choose_precision(model: str, device: str, precision: str) -> str:
    """fp32, bf16 or fp16: the given one, or for "auto" the fastest that is accurate enough.

    The bundled models stay in fp32: with pico-clip in bf16, 1,533 of the 1,911 Noto emoji have a
    cosine to fp32 below 0.999. So do models of timm with batch norms, which `load` finds out.
    ViT-B-32 in bf16 is about 3 times as fast, at 0.9999.
    Weights are cast once; autocast, which casts them at every call, is only 1.3 times as fast.
    """
    if precision not in PRECISIONS:
        raise UserError(f"unknown precision {precision!r}; choose one of {', '.join(PRECISIONS)}")
    if precision != "auto":
        return precision
    if model in BUNDLED:
        return "fp32"
    if device == "cuda":
        return "bf16" if torch.cuda.get_device_capability() >= (8, 0) else "fp16"
    return "bf16" if _cpu_has_bf16() else "fp32"


def _choose_device(device: str) -> str:
    if device not in DEVICES:
        raise UserError(f"unknown device {device!r}; choose one of {', '.join(DEVICES)}")
    if device == "cuda" and not torch.cuda.is_available():
        raise UserError("device 'cuda' is set but torch sees none; use auto or cpu")
    return "cuda" if device != "cpu" and torch.cuda.is_available() else "cpu"


def _cpu_has_bf16() -> bool:
    """Whether the processor multiplies bf16 itself; False without /proc (macOS, Windows).

    The functions of torch for this are private, or newer than the oldest supported version.
    """
    try:
        words = set(Path("/proc/cpuinfo").read_text().split())
    except OSError:
        return False
    return not words.isdisjoint({"avx512_bf16", "amx_bf16"})


def _open_clip_precision(precision: str) -> str:
    """open_clip's name for casting all weights; its "bf16" keeps some in fp32, which may fail."""
    return precision if precision == "fp32" else f"pure_{precision}"


def _split(
    preprocess: "transforms.Compose",
) -> tuple[Callable[[Image.Image], Image.Image], "transforms.Normalize"]:
    """open_clip's validation transform → (its steps on PIL images, its normalisation)."""
    from torchvision import transforms  # as in `weights`: where it is needed

    steps = list(preprocess.transforms)
    at = next(i for i, step in enumerate(steps) if isinstance(step, transforms.ToTensor))
    rest = steps[at + 1 :]
    assert len(rest) == 1 and isinstance(rest[0], transforms.Normalize), f"unknown steps {rest}"
    return transforms.Compose(steps[:at]), rest[0]


def _digest(net: torch.nn.Module) -> str:
    """Digest of all weights of a model, in the precision in which they were loaded."""
    found = hashlib.blake2b(digest_size=16)
    for name, tensor in sorted(net.state_dict().items()):
        found.update(f"{name} {tuple(tensor.shape)} {tensor.dtype} ".encode())
        found.update(tensor.detach().cpu().contiguous().view(-1).view(torch.uint8).numpy().data)
    return found.hexdigest()
