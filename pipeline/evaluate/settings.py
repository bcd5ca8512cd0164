"""Settings of evaluate."""

from dataclasses import dataclass

from pipeline.runtime.config import setting
from pipeline.runtime.errors import UserError


@dataclass(frozen=True, kw_only=True)
class Config:
    """What the clusters are compared with."""

    label: str = setting("", "json field that holds the true class; '': label")
    baseline: bool = setting(True, "score k-means on the same embeddings too")
    captions: bool = setting(
        True, "score the captions too, beside the plain vote; reads the encoder's text side again"
    )
    restarts: int = setting(10, "of k-means; the one of least inertia counts")
    seed: int = setting(0, "of k-means")

    def __post_init__(self) -> None:
        if self.restarts < 1:
            raise UserError(f"evaluate.restarts = {self.restarts}: give 1 or more")
