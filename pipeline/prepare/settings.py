"""Settings of shards."""

from dataclasses import dataclass

from pipeline.runtime.config import setting
from pipeline.runtime.errors import UserError

MAX_PER_SHARD = 10_000  # a key is five digits of the shard and four of the place in it


@dataclass(frozen=True, kw_only=True)
class Config:
    """How a folder of images is packed into shards."""

    samples_per_shard: int = setting(1000, "images in each shard; the last one may have fewer")
    shuffle_seed: int = setting(0, "seed of the order that mixes the classes in each shard")

    def __post_init__(self) -> None:
        if not 1 <= self.samples_per_shard <= MAX_PER_SHARD:
            raise UserError(
                f"shards.samples_per_shard = {self.samples_per_shard}: choose 1 to {MAX_PER_SHARD}"
            )
