"""Settings of given embeddings, in place of those of embed."""

from dataclasses import dataclass
from typing import ClassVar

from pipeline.runtime.config import setting
from pipeline.runtime.errors import UserError
from pipeline.vision import weights


@dataclass(frozen=True, kw_only=True)
class Config:
    """Which columns of the files of `--embeddings` are read, and which model finds words."""

    section: ClassVar[str] = "embeddings"

    columns: tuple[str, ...] = setting(
        (),
        "columns of vectors: the first is the main view, the others are further views; default: "
        "the only one there is",
    )
    id_column: str = setting(
        "",
        "column that names a sample; '': the first there is of sample_id, key, id, image_path, "
        "image_id, uid, url",
    )
    caption_column: str = setting(
        "", "column of the samples' own captions; '': caption or text, if there is one"
    )
    model: str = setting(
        "",
        "open_clip architecture whose texts fit the first column: it finds words for train, names "
        "for the clusters, and searches texts; '': none of these",
    )
    pretrained: str = setting("", "open_clip tag or checkpoint file of that model")
    max_image_pixels: int = setting(
        178_956_970, "with --shards: pixels of an image; larger ones are rejected"
    )
    max_sample_bytes: int = setting(
        67_108_864, "with --shards: bytes of a sample's files; larger are rejected"
    )
    max_reject_fraction: float = setting(
        0.5,
        "largest share of rejected rows in a file or the run, 0 to 1; more fails embed",
        operational=True,
    )

    def __post_init__(self) -> None:
        if twice := [name for i, name in enumerate(self.columns) if name in self.columns[:i]]:
            raise UserError(
                f"embeddings.columns = {list(self.columns)}: {twice[0]!r} is named twice; name "
                "each column once"
            )
        if self.pretrained and not self.model:
            raise UserError(
                f"embeddings.pretrained = {self.pretrained!r} needs embeddings.model, the "
                "architecture of these weights"
            )
        for name in ("max_image_pixels", "max_sample_bytes"):
            if getattr(self, name) < 1:
                raise UserError(f"embeddings.{name} = {getattr(self, name)}: give 1 or more")
        if not 0 <= self.max_reject_fraction <= 1:
            raise UserError(
                f"embeddings.max_reject_fraction = {self.max_reject_fraction}: give 0 to 1"
            )


def check(cfg: Config) -> None:
    """UserError for an unknown model, or one without a text encoder; loads nothing."""
    if not cfg.model:
        return
    if weights.images_only(cfg.model):
        raise UserError(
            f"embeddings.model = {cfg.model!r} has no text encoder to find words with; leave it out"
        )
    weights.check(cfg.model, cfg.pretrained)
