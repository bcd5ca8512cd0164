"""What commands share: their options, settings from file and `--set`, owning a root."""

import ast
import json
import os
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from importlib import import_module
from pathlib import Path
from typing import Annotated, Any

import typer

from pipeline.artifacts import layout
from pipeline.runtime import cluster, config, progress
from pipeline.runtime.errors import UserError
from pipeline.runtime.interrupt import Interruption
from pipeline.store import lock, storage
from pipeline.store.listing import Shard

ROOMS = {  # section -> the module that has its Config
    "shards": "prepare.pack",
    "embed": "embed.stage",
    "train": "train.stage",
    "select_k": "select_k.stage",
    "caption": "caption.stage",
    "write": "write.stage",
    "evaluate": "evaluate.stage",
    "report": "report.galleries",
    "index": "explore.search.index",
    "run": "runtime.progress",
}


class _Kinds(Mapping[str, type]):
    """Section -> its Config; a room is entered when its own is asked for."""

    def __getitem__(self, section: str) -> type:
        kind: type = import_module(f"pipeline.{ROOMS[section]}").Config
        return kind

    def __iter__(self) -> Iterator[str]:
        return iter(ROOMS)

    def __len__(self) -> int:
        return len(ROOMS)


KINDS = _Kinds()


def completed(incomplete: str) -> list[str]:
    """`section.key=` for --set: as the source has them, since entering a room takes seconds."""
    names = [f"{section}.{key}=" for section, room in ROOMS.items() for key in _keys(room)]
    return [name for name in names if name.startswith(incomplete)]


def _keys(room: str) -> Iterator[str]:
    """The settings of a room's Config, after those of the rooms that it takes them over from."""
    source = Path(__file__).parents[1].joinpath(*room.split(".")).with_suffix(".py")
    tree = ast.parse(source.read_text(encoding="utf-8"))
    (kind,) = (n for n in tree.body if isinstance(n, ast.ClassDef) and n.name == "Config")
    for base in kind.bases:
        yield from _keys(ast.unparse(base).removesuffix(".Config"))
    for line in kind.body:
        if isinstance(line, ast.AnnAssign):
            yield ast.unparse(line.target)


Root = Annotated[
    str, typer.Option(metavar="URL", help="the run's folder: a path, s3://, gs://, hf://")
]
Shards = Annotated[
    str,
    typer.Option(
        metavar="SHARDS", help="folder, glob, brace pattern or list file (.txt) of webdataset tars"
    ),
]
ConfigFile = Annotated[
    str | None,
    typer.Option("--config", metavar="FILE", help="TOML, a table per stage; see ratecluster init"),
]
Overrides = Annotated[
    list[str] | None,
    typer.Option(
        "--set",
        metavar="SECTION.KEY=VALUE",
        help="a setting; any number of times",
        autocompletion=completed,
    ),
]
Address = Annotated[
    str | None,
    typer.Option(
        metavar="HOST:PORT", help="of a Ray cluster; without it RAY_ADDRESS, else a local Ray"
    ),
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


def begin(root: str, file: str | None, sets: list[str] | None, address: str | None) -> Any:
    """The settings of all stages and the run's folders; remembers which Ray to join."""
    if not root:
        raise UserError("the folder is empty text; give a path or a URL")
    if address:
        os.environ["RAY_ADDRESS"] = address
    return config.load(KINDS, file, sets or ()), layout.RunPaths(storage.absolute(root))


@contextmanager
def owning(
    root: str, cfg: progress.Config, shards: Sequence[Shard] = (), reads: str | None = None
) -> Iterator[None]:
    """Only this command writes to the root, and no stage waits for ever.

    All nodes see the root, the shards, and the other root that it reads.
    """
    storage.check_writable(root)
    other = storage.local_path(reads) if reads else None
    with (
        Interruption() as block,
        lock.held(root, progress.current, block.interrupt),
        progress.watched(cfg),
        cluster.sharing(storage.local_path(root), other, *_one_of_each_folder(shards)),
    ):
        yield


def _one_of_each_folder(shards: Sequence[Shard]) -> list[Path | None]:
    """The first of the shards that lie together, where they lie on local disks."""
    first = {shard.url.rpartition("/")[0]: shard.url for shard in reversed(shards)}
    return [storage.local_path(url) for url in first.values()]
