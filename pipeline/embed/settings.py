"""Settings of embed."""

from dataclasses import dataclass
from typing import ClassVar

from pipeline.embed.given import settings as given
from pipeline.runtime.config import Sections, setting
from pipeline.runtime.errors import UserError
from pipeline.vision import weights

READERS = 2  # shards that one encoder reads at once where its own threads decode


@dataclass(frozen=True, kw_only=True)
class Config:
    """How images become vectors."""

    section: ClassVar[str] = "embed"

    model: str = setting("pico-clip", "open_clip architecture, hf-hub:… or the bundled pico-clip")
    pretrained: str = setting("", "open_clip tag or checkpoint file; '' is pico-clip's own weights")
    also: tuple[str, ...] = setting(
        (),
        "further encoders, a column of embeddings for each: ARCH:TAG or ARCH:FILE of open_clip, "
        "pico-resnet, timm:NAME or timm:NAME:FILE; words are of embed.model alone",
    )
    precision: str = setting("auto", "auto, fp32, bf16 or fp16: arithmetic of the encoder")
    device: str = setting("auto", "auto, cpu or cuda: where the encoder runs", operational=True)
    batch_size: int = setting(64, "images in one call of the encoder")
    actors: int = setting(0, "encoder processes; 0: one per GPU, or one", operational=True)
    decode_cpus: int = setting(
        0,
        "CPUs, on any node, that decode for each encoder; 0: threads of the encoder's own process, "
        "one per core",
        operational=True,
    )
    image_suffixes: tuple[str, ...] = setting(
        (), 'suffixes of images beside jpg, png and so on, such as ["img"]', added=True
    )
    caption_suffixes: tuple[str, ...] = setting(
        (), 'suffixes of captions beside txt, such as ["cap", "outputs.txt"]', added=True
    )
    max_image_pixels: int = setting(178_956_970, "pixels of an image; larger ones are rejected")
    max_sample_bytes: int = setting(67_108_864, "bytes of a sample's files; larger are rejected")
    decode_timeout_s: float = setting(60.0, "seconds for decoding a sample; slower are rejected")
    retry_quarantined: bool = setting(
        False,
        "embed shards again that have ended their workers in an earlier run",
        operational=True,
    )
    max_reject_fraction: float = setting(
        0.5,
        "largest share of rejected samples in a shard or the run, 0 to 1; more fails embed",
        operational=True,
    )

    def __post_init__(self) -> None:
        if self.precision not in weights.PRECISIONS:
            raise UserError(
                f"embed.precision = {self.precision!r}: "
                f"choose one of {', '.join(weights.PRECISIONS)}"
            )
        if twice := [e for i, e in enumerate(self.encoders) if e in self.encoders[:i]]:
            model, pretrained = twice[0]
            raise UserError(
                f"embed.also = {list(self.also)}: encoder {model!r} {pretrained!r} is named twice; "
                "name each once, and not embed.model again"
            )
        for name in ("batch_size", "max_image_pixels", "max_sample_bytes"):
            if getattr(self, name) < 1:
                raise UserError(f"embed.{name} = {getattr(self, name)}: give 1 or more")
        for name in ("actors", "decode_cpus"):
            if getattr(self, name) < 0:
                raise UserError(f"embed.{name} = {getattr(self, name)}: give 0 (automatic) or more")
        if self.decode_timeout_s <= 0:
            raise UserError(f"embed.decode_timeout_s = {self.decode_timeout_s}: give more than 0")
        if not 0 <= self.max_reject_fraction <= 1:
            raise UserError(f"embed.max_reject_fraction = {self.max_reject_fraction}: give 0 to 1")

    @property
    def encoders(self) -> list[tuple[str, str]]:
        """(model, pretrained) of every encoder, in the order of the columns."""
        return [(self.model, self.pretrained), *map(weights.split, self.also)]

    @property
    def readers(self) -> int:
        """Shards that each encoder reads at once."""
        return self.decode_cpus or READERS


def check(sections: Sections) -> None:
    """UserError for an unknown model, tag or checkpoint; loads nothing."""
    cfg = sections["embed"]
    if isinstance(cfg, given.Config):
        given.check(cfg)
        return
    if weights.images_only(cfg.model):
        raise UserError(
            f"embed.model = {cfg.model!r} has no text encoder to name the clusters with; "
            f'give it as embed.also = ["{cfg.model}"]'
        )
    weights.check(cfg.model, cfg.pretrained)
    for name in cfg.also:
        try:
            weights.check(*weights.split(name))
        except UserError as error:
            raise UserError(f"embed.also = {name!r}: {error}") from None
