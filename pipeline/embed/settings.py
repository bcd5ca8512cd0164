"""Settings of embed."""

from dataclasses import dataclass

from pipeline.runtime.config import setting
from pipeline.runtime.errors import UserError


@dataclass(frozen=True, kw_only=True)
class Config:
    """How images become vectors."""

    model: str = setting("pico-clip", "open_clip architecture, hf-hub:… or the bundled pico-clip")
    pretrained: str = setting("", "open_clip tag or checkpoint file; '' is pico-clip's own weights")
    precision: str = setting("auto", "auto, fp32, bf16 or fp16: arithmetic of the encoder")
    device: str = setting("auto", "auto, cpu or cuda: where the encoder runs", operational=True)
    compile: bool = setting(False, "torch.compile the encoder: for long runs; needs a compiler")
    batch_size: int = setting(64, "images in one call of the encoder")
    actors: int = setting(0, "encoder processes; 0: one per GPU, or one", operational=True)
    readers: int = setting(
        2, "shards read at once by each encoder; decode_slots, if given", operational=True
    )
    decode_threads: int = setting(0, "per shard being read; 0: one per core", operational=True)
    decode_slots: int = setting(
        0, "CPUs of any node that decode for each encoder; 0: its own threads", operational=True
    )
    threads: int = setting(0, "of the model on a CPU; 0: all cores", operational=True)
    max_image_pixels: int = setting(178_956_970, "pixels of an image; larger ones are rejected")
    max_sample_bytes: int = setting(67_108_864, "bytes of a sample's files; larger are rejected")
    decode_timeout_s: float = setting(60.0, "seconds for decoding a sample; slower are rejected")
    max_reject_fraction: float = setting(
        0.5, "of a shard's or the run's samples, 0 to 1; more rejected fails", operational=True
    )

    def __post_init__(self) -> None:
        for name in ("batch_size", "readers", "max_image_pixels", "max_sample_bytes"):
            if getattr(self, name) < 1:
                raise UserError(f"embed.{name} = {getattr(self, name)}: give 1 or more")
        for name in ("actors", "decode_threads", "decode_slots", "threads"):
            if getattr(self, name) < 0:
                raise UserError(f"embed.{name} = {getattr(self, name)}: give 0 (fit) or more")
        if self.decode_timeout_s <= 0:
            raise UserError(f"embed.decode_timeout_s = {self.decode_timeout_s}: give more than 0")
        if not 0 <= self.max_reject_fraction <= 1:
            raise UserError(f"embed.max_reject_fraction = {self.max_reject_fraction}: give 0 to 1")
