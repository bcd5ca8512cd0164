"""Columns of a finished part that stay where encoders were added to embed.also.

The shard is decoded again, and only the added encoders encode it. If its readable samples are not
those of the part, as where a sample took too long to decode then or now, nothing is kept.
"""

from collections.abc import Mapping
from dataclasses import asdict, dataclass
from typing import Any

import numpy as np

from pipeline.artifacts import layout
from pipeline.embed.given.settings import Config as GivenConfig
from pipeline.embed.settings import Config
from pipeline.runtime import config
from pipeline.runtime.reject_reasons import Reason
from pipeline.store import storage, tables
from pipeline.store.listing import Shard

MADE_WITH = ("device", "precision", "weights")  # facts of an encoder that settings do not fix
NOT_FINITE = Reason.EMBEDDING_NOT_FINITE.value
Name = tuple[str, str]  # model and pretrained of an encoder


@dataclass(frozen=True)
class Kept:
    """The vectors of a finished part."""

    columns: dict[Name, tuple[np.ndarray, dict[str, Any]]]  # (rows, D) float16; device, precision
    row_of: dict[str, int]  # sample_id -> its row
    rejected: set[str]  # sample_ids with an embedding that was not finite

    def fits(self, readable: set[str]) -> bool:
        """Whether the part is of these readable samples."""
        there = self.row_of.keys()
        return there <= readable and readable - there <= self.rejected


def identity(shard: Mapping[str, Any]) -> tuple[Any, ...]:
    """The fields that change with the content of a shard; its URL is not one of them."""
    file = (shard["file_size"], shard["file_version"]) if "file_url" in shard else ()
    return shard["stem"], shard["size"], shard["version"], *file


def can_keep(facts: Mapping[str, Any], cfg: Config | GivenConfig) -> bool:
    """Whether `cfg` asks for everything that a part with these facts has, and more encoders."""
    made_with, now = facts.get("config", {}), config.facts(cfg)
    if "also" not in now:
        return False
    same = {**made_with, "also": now["also"]} == now
    return same and "also" in made_with and set(made_with["also"]) < set(now["also"])


def find(shard: Shard, cfg: Config, paths: layout.RunPaths) -> Kept | None:
    """The columns of the shard's part that can stay; None if there is no such part."""
    name = f"{shard.stem}.parquet"
    url = paths.embeddings.file(name)
    if not cfg.also or not storage.exists(url) or not storage.exists(paths.rejects.file(name)):
        return None
    facts = tables.facts(url)
    if not can_keep(facts, cfg) or identity(facts["shard"]) != identity(asdict(shard)):
        return None
    rejects = tables.read(paths.rejects.file(name), ["sample_id", "reason"])
    part = tables.read(url, ["sample_id", *(each["column"] for each in facts["encoders"])])
    return Kept(
        {
            (each["model"], each["pretrained"]): (
                tables.to_matrix(part[each["column"]]),
                {key: each[key] for key in MADE_WITH if key in each},
            )
            for each in facts["encoders"]
        },
        {sample: row for row, sample in enumerate(part["sample_id"].to_pylist())},
        {row["sample_id"] for row in rejects.to_pylist() if row["reason"].startswith(NOT_FINITE)},
    )
