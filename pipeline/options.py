"""What commands share: their options, settings from file and `--set`, owning a root."""

import json
import os
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Annotated, Any

import typer

from pipeline import (
    artifacts,
    caption,
    cluster,
    config,
    embed,
    evaluate,
    pack,
    progress,
    report,
    select_k,
    train,
    write,
)
from pipeline.errors import UserError
from pipeline.interrupt import Interruption
from pipeline.store import lock, storage
from pipeline.store.listing import Shard
from pipeline.use import index

KINDS: dict[str, type] = {
    "shards": pack.Config,
    "embed": embed.Config,
    "train": train.Config,
    "select_k": select_k.Config,
    "caption": caption.Config,
    "write": write.Config,
    "evaluate": evaluate.Config,
    "report": report.Config,
    "index": index.Config,
    "run": progress.Config,
}
RUN = [name for name in KINDS if name not in ("shards", "index")]  # what `run` goes by

Root = Annotated[str, typer.Option(help="URL of the run's folder: a path, s3://, gs://, hf://")]
Shards = Annotated[
    str, typer.Option(help="brace pattern, glob, folder or list file (.txt) of webdataset tars")
]
ConfigFile = Annotated[
    str | None, typer.Option("--config", help="TOML file, one table per stage; see jobs/configs/")
]
Overrides = Annotated[
    list[str] | None,
    typer.Option("--set", metavar="SECTION.KEY=VALUE", help="a setting; any number of times"),
]
Address = Annotated[
    str | None, typer.Option(help="of a Ray cluster; without it RAY_ADDRESS, else a local Ray")
]
Overwrite = Annotated[
    bool, typer.Option("--overwrite", help="make embeddings again that other settings made")
]

CaptionsFrom = Annotated[
    str | None,
    typer.Option(
        "--captions-from",
        metavar="FILE",
        help="your own list in place of the vocabulary: a path or URL of a UTF-8 text file, one "
        "caption per line, # before a remark; the same as --set caption.vocabulary=FILE. Add "
        "--set caption.alt_texts=0 to have no others",
    ),
]


def with_captions(sets: list[str] | None, file: str | None) -> list[str]:
    """The settings, and the one that --captions-from stands for."""
    own = [f"caption.vocabulary={json.dumps([file], ensure_ascii=False)}"] if file else []
    return [*(sets or ()), *own]


def settings_help(*sections: str) -> str:
    """What may be set, with defaults and units, for the end of --help."""
    rows = config.describe({name: KINDS[name] for name in sections})
    width = max(len(name) for name, _, _ in rows)
    head = "\b\nSettings, for --set section.key=value or the TOML file [default]:"
    return "\n".join([head, *(f"  {n:<{width}}  {help} [{default}]" for n, default, help in rows)])


def begin(root: str, file: str | None, sets: list[str] | None, address: str | None) -> Any:
    """The settings of all stages and the run's folders; remembers which Ray to join."""
    if not root:
        raise UserError("the folder is empty text; give a path or a URL")
    if address:
        os.environ["RAY_ADDRESS"] = address
    return config.load(KINDS, file, sets or ()), artifacts.RunPaths(storage.absolute(root))


@contextmanager
def owning(root: str, cfg: progress.Config, shards: Sequence[Shard] = ()) -> Iterator[None]:
    """Only this command writes to the root, which all nodes see, and no stage waits for ever."""
    storage.check_writable(root)
    with (
        Interruption() as block,
        lock.held(root, progress.current, block.interrupt),
        progress.watched(cfg),
        cluster.sharing(storage.local_path(root), *_one_of_each_folder(shards)),
    ):
        yield


def _one_of_each_folder(shards: Sequence[Shard]) -> list[Path | None]:
    """The first of the shards that lie together, where they lie on local disks."""
    first = {shard.url.rpartition("/")[0]: shard.url for shard in reversed(shards)}
    return [storage.local_path(url) for url in first.values()]
