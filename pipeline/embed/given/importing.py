"""All files of given embeddings, as one task per file."""

from collections.abc import Callable, Iterator
from dataclasses import asdict
from typing import Any

from pipeline.artifacts import layout
from pipeline.embed.given import columns
from pipeline.embed.given.parts import import_part
from pipeline.embed.given.settings import Config
from pipeline.embed.given.sources import file_of
from pipeline.runtime import tasks
from pipeline.runtime.errors import UserError
from pipeline.store.listing import Shard
from pipeline.vision import clip

Import = Callable[[list[Shard], layout.RunPaths], Iterator[dict[str, Any]]]


def prepare(cfg: Config, shards: list[Shard]) -> Import:
    """Look at the columns of all files; returns what imports some of them, as a row per file.

    UserError as `columns.choose`, and where the texts of embeddings.model do not fit.
    """
    wanted = columns.choose(cfg, [file_of(shard) for shard in shards])
    if cfg.model and (dim := clip.text_dim(cfg.model, cfg.pretrained)) != wanted.dims[0]:
        raise UserError(
            f"embeddings.model = {cfg.model!r}: its texts have {dim} dimensions, the vectors of "
            f"{wanted.vectors[0]!r} have {wanted.dims[0]}; name the model that made them, or none"
        )

    def run(todo: list[Shard], paths: layout.RunPaths) -> Iterator[dict[str, Any]]:
        return tasks.results(import_part, [asdict(s) for s in todo], wanted, cfg, paths)

    return run
