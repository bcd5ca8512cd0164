"""Settings of caption."""

from dataclasses import dataclass

from pipeline.caption import (
    vlm_client,
)
from pipeline.runtime.config import setting
from pipeline.runtime.errors import UserError
from pipeline.vision import clip


@dataclass(frozen=True, kw_only=True)
class Config(vlm_client.Config):
    """Where candidate captions come from, how they are compared, and who may name a cluster."""

    vocabulary: tuple[str, ...] = setting(
        (), "imagenet, wordnet, pico-clip or files of one name per line; none: fit to the model"
    )
    templates: tuple[str, ...] = setting(
        (),
        "prompts with {} for the candidate, averaged, or open_clip's sets: openai (80 prompts), "
        "simple (7); none: fit to the model",
    )
    alt_texts: int = setting(20, "candidates per cluster from the samples' own captions; 0: none")
    temperature: float = setting(0.01, "of the softmax over candidates, in cosine units")
    actors: int = setting(0, "text encoder processes; 0: one per GPU, or one", operational=True)

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.temperature <= 0:
            raise UserError(f"caption.temperature = {self.temperature}: give a positive number")
        if self.alt_texts < 0 or self.actors < 0:
            raise UserError("caption.alt_texts and caption.actors: give 0 or more")
        clip.check_templates(self.templates)
