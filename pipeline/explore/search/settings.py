"""Settings of index."""

from dataclasses import dataclass

from pipeline.runtime.config import setting
from pipeline.runtime.errors import UserError

LEAST_COMPRESSED = 1000  # samples: codebooks have 256 centroids


@dataclass(frozen=True, kw_only=True)
class Config:
    """How much an index gives up of exactness for its size."""

    flat_below: int = setting(
        100_000, "samples: fewer are compared one by one, more by IVF-PQ, compressed"
    )
    code_bytes: int = setting(64, "of a compressed vector")

    def __post_init__(self) -> None:
        if self.flat_below < LEAST_COMPRESSED:
            raise UserError(
                f"index.flat_below = {self.flat_below}: give {LEAST_COMPRESSED} or more"
            )
        if not 1 <= self.code_bytes <= 1024:
            raise UserError(f"index.code_bytes = {self.code_bytes}: give 1 to 1024")
