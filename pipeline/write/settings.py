"""Settings of write."""

from dataclasses import dataclass

from pipeline.runtime.config import setting
from pipeline.write import exclude_lists


@dataclass(frozen=True, kw_only=True)
class Config:
    """What is written."""

    shards: bool = setting(True, "write labeled/*.tar too; false: only the labels Parquet")
    exclude: tuple[str, ...] = setting(
        (), "lists of samples to leave out of labeled/: Parquet with sample_id, folders of it, .txt"
    )

    def __post_init__(self) -> None:
        object.__setattr__(self, "exclude", exclude_lists.urls_of(self.exclude))
