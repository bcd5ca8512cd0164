"""Settings of train."""

import math
from dataclasses import dataclass, replace

from pipeline.artifacts import layout, outputs, stages
from pipeline.runtime import config
from pipeline.runtime.config import Sections, setting
from pipeline.runtime.errors import UserError
from pipeline.vision import vocabulary

RECIPES = ("auto", "none", "mcr2", "cpp")
SEEN = 16_384  # least number of samples that all workers have; smaller samples they have whole


@dataclass(frozen=True, kw_only=True)
class Config:
    """How the network is trained. 0 means a fitted value where the help says "fit"."""

    recipe: str = setting(
        "auto",
        "none: the input views alone; mcr2: rate reduction, begun at the views; auto: whichever of "
        "the two delivers the better clusters; cpp: the published recipe, on the first encoder",
    )
    view_weights: tuple[float, ...] = setting(
        (),
        "weights of the views: images, words (unless there are none), each of embed.also, or each "
        "further one of embeddings.columns; "
        "default: by their agreement with the images",
    )
    words: int = setting(
        4096, "words compared with each image: the most probable ones of the sample; 0: none"
    )
    vocabulary: tuple[str, ...] = setting(
        (),
        "imagenet, wordnet, pico-clip or files of one word per line; default: chosen to match "
        "the model",
    )
    feature_dim: int = setting(
        0, "dimensions of the features z; 0: about √N for N samples, 32 to 128"
    )
    hidden_dim: int = setting(0, "width of the hidden layers; 0: 4 × the input, or 4096 with cpp")
    warm_up_steps: int = setting(50, "steps of the expansion alone, with the recipe cpp")
    batch_size: int = setting(1024, "samples in a global batch, over all workers")
    steps: int = setting(240, "training steps; the best validated network is kept")
    learning_rate: float = setting(3e-4, "learning rate of Adam")
    eps_sq: float = setting(0.1, "ε², squared distortion allowed per unit-norm feature")
    eta: float = setting(0.1, "η, temperature of the Sinkhorn membership")
    columns: int = setting(64, "columns of Π sampled per step for the compression term; 0: all")
    max_samples: int = setting(
        500_000, "most training samples, from all parts; fewer if the steps need fewer"
    )
    landmarks: int = setting(15_000, "samples whose features are kept for select_k and report")
    seed: int = setting(0, "seed of the weights, the order of samples and the sampled columns")
    workers: int = setting(1, "processes that train together", operational=True)
    checkpoint_steps: int = setting(200, "steps between checkpoints", operational=True)

    def __post_init__(self) -> None:
        if self.recipe not in RECIPES:
            raise UserError(f"train.recipe = {self.recipe!r}: choose one of {', '.join(RECIPES)}")
        if any(weight < 0 for weight in self.view_weights):
            raise UserError(f"train.view_weights = {list(self.view_weights)}: give 0 or more")
        positive = ("learning_rate", "eps_sq", "eta", "max_samples", "workers")
        for name in (*positive, "checkpoint_steps"):
            if getattr(self, name) <= 0:
                raise UserError(f"train.{name} = {getattr(self, name)}: give a positive number")
        if self.batch_size < 2 or self.landmarks < 2:
            raise UserError("train.batch_size and train.landmarks: give 2 or more")
        for name in ("words", "feature_dim", "hidden_dim", "warm_up_steps", "steps", "columns"):
            if getattr(self, name) < 0:
                raise UserError(f"train.{name} = {getattr(self, name)}: give 0 or more")


def fit_settings(cfg: Config, samples: int) -> Config:
    """The settings for N samples; the batch becomes a multiple of the workers.

    UserError if there are fewer samples than training needs.
    """
    if samples < max(2, cfg.workers):
        raise UserError(
            f"{samples} embedded samples are too few: training needs at least 2, and one for each "
            f"of train.workers = {cfg.workers}"
        )
    if cfg.batch_size < cfg.workers:
        raise UserError(
            f"train.batch_size = {cfg.batch_size} is less than one sample for each of "
            f"train.workers = {cfg.workers}: use a larger batch or fewer workers"
        )
    batch = min(cfg.batch_size, samples) // cfg.workers * cfg.workers
    fit_dim = 2 ** int(math.log2(samples) / 2)  # a cluster should have more members than this
    return replace(
        cfg,
        batch_size=batch,
        steps=0 if cfg.recipe == "none" else cfg.steps,
        feature_dim=cfg.feature_dim or min(128, max(32, fit_dim)),
        columns=min(cfg.columns or batch, batch) // cfg.workers * cfg.workers or cfg.workers,
    )


def samples_to_read(cfg: Config) -> int:
    """The most samples N to read: those of one epoch of the steps, at least `shared_samples`."""
    return min(cfg.max_samples, max(cfg.steps * cfg.batch_size, shared_samples(cfg)))


def shared_samples(cfg: Config) -> int:
    """The most samples m that all workers have."""
    return max(SEEN, cfg.landmarks)


def check(sections: Sections) -> None:
    """UserError if the list of words is missing or empty."""
    read_words(sections["train"], sections["embed"].model)


def read_words(cfg: Config, model: str) -> list[str]:
    """The words that the network sees next to each image; UserError as `vocabulary.load`."""
    return vocabulary.load_or_default(cfg.vocabulary, model) if cfg.words else []


def expected(
    cfg: Config, made: outputs.Manifests, paths: layout.RunPaths
) -> outputs.ExpectedOutputs:
    """The outputs of training on these embeddings."""
    embedded = made["embeddings"]
    words = read_words(cfg, embedded["config"]["model"])
    made_of = config.fingerprint(cfg, embedded["fingerprint"], words)
    return outputs.ExpectedOutputs(
        "train", paths.network, made_of, cfg, {paths.network: stages.named("train").files}
    )
