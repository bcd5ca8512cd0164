"""Settings of index."""

from dataclasses import dataclass

from pipeline.runtime.config import setting
from pipeline.runtime.errors import UserError

LEAST_COMPRESSED = 1000  # samples: codebooks have 256 centroids


@dataclass(frozen=True, kw_only=True)
class Config:
    """When an index is compressed."""

    flat_below: int = setting(
        100_000, "samples from which an index is compressed (IVF-PQ); smaller ones are exact"
    )

    def __post_init__(self) -> None:
        if self.flat_below < LEAST_COMPRESSED:
            raise UserError(
                f"index.flat_below = {self.flat_below}: give {LEAST_COMPRESSED} or more"
            )
