"""Settings of caption."""

from dataclasses import dataclass

from pipeline.artifacts import layout, outputs, stages
from pipeline.caption import vlm_client
from pipeline.runtime import config
from pipeline.runtime.config import Sections, setting
from pipeline.runtime.errors import UserError
from pipeline.vision import prompts, vocabulary


@dataclass(frozen=True, kw_only=True)
class Config(vlm_client.Config):
    """Where candidate captions come from, how they are compared, and which model names clusters."""

    vocabulary: tuple[str, ...] = setting(
        (),
        "imagenet, wordnet, pico-clip or files of one name per line; default: chosen to match "
        "the model",
    )
    templates: tuple[str, ...] = setting(
        (),
        "prompts with {} in place of the candidate, averaged, or open_clip's sets: openai (80 "
        "prompts), simple (7); default: chosen to match the model",
    )
    alt_texts: int = setting(20, "candidates per cluster from the samples' own captions; 0: none")
    temperature: float = setting(0.01, "temperature of the softmax over candidates, cosine units")

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.temperature <= 0:
            raise UserError(f"caption.temperature = {self.temperature}: give a positive number")
        if self.alt_texts < 0:
            raise UserError(f"caption.alt_texts = {self.alt_texts}: give 0 or more")
        prompts.check_templates(self.templates)


def check(sections: Sections) -> None:
    """UserError if the vocabulary is empty or the settings of the captioning server are invalid."""
    cfg = sections["caption"]
    read_vocabulary(cfg, sections["embed"].model)
    vlm_client.check(cfg)


def read_vocabulary(cfg: Config, model: str) -> list[str]:
    """The candidate names; UserError if there are none."""
    return vocabulary.load_or_default(cfg.vocabulary, model)


def expected(
    cfg: Config, made: outputs.Manifests, paths: layout.RunPaths
) -> outputs.ExpectedOutputs:
    """The captions of these clusters."""
    names = read_vocabulary(cfg, made["embeddings"]["config"]["model"])
    made_of = config.fingerprint(cfg, made["clusters"]["fingerprint"], names)
    files = {paths.captions: stages.named("caption").files}
    return outputs.ExpectedOutputs("caption", paths.captions, made_of, cfg, files)
