"""What commands share: their options, the settings from file and `--set`, the lock of a root."""

import json
import logging
import os
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from importlib import import_module
from pathlib import Path
from typing import Annotated

from typer import Option

from pipeline.artifacts import layout
from pipeline.artifacts.stages import STAGES
from pipeline.runtime import cluster, config, progress
from pipeline.runtime.config import Sections
from pipeline.runtime.errors import UserError
from pipeline.runtime.interrupt import Interruption
from pipeline.store import lock, storage
from pipeline.store.listing import Shard, list_shards

log = logging.getLogger(__name__)
SETTINGS = {  # section -> the module that has its Config
    "shards": "pipeline.prepare.settings",
    STAGES[0].name: f"{STAGES[0].package}.settings",
    "embeddings": "pipeline.embed.given.settings",  # in place of those of embed
    **{stage.name: f"{stage.package}.settings" for stage in STAGES[1:]},
    "index": "pipeline.explore.search.settings",
    "run": "pipeline.runtime.progress",
}


class _Kinds(Mapping[str, type]):
    """Section -> its Config, which is imported when it is looked up."""

    def __getitem__(self, section: str) -> type:
        kind: type = import_module(SETTINGS[section]).Config
        return kind

    def __iter__(self) -> Iterator[str]:
        return iter(SETTINGS)

    def __len__(self) -> int:
        return len(SETTINGS)


KINDS = _Kinds()


def complete_set(incomplete: str) -> list[str]:
    """`section.key=` for the completion of --set."""
    names = [f"{name}=" for name, _, _ in config.describe(KINDS)]
    return [name for name in names if name.startswith(incomplete)]


Root = Annotated[
    str, Option(metavar="URL", help="folder of the run: a path, s3://, gs:// or hf://")
]
_SHARDS = Option(
    metavar="SHARDS",
    help="the webdataset shards (.tar, or .tar.gz, .tar.zst, .tar.bz2, .tar.xz): a folder, a glob, "
    "a brace pattern or a list file (.txt); may be given several times",
)
Shards = Annotated[list[str], _SHARDS]
SomeShards = Annotated[list[str] | None, _SHARDS]
Embeddings = Annotated[
    str | None,
    Option(
        metavar="URL",
        help="embeddings of your own: a folder, a glob, a list file or a file of Parquet with "
        "vectors, or a folder of clip-retrieval (img_emb/, metadata/)",
    ),
]
ConfigFile = Annotated[
    str | None,
    Option(
        "--config", metavar="FILE", help="TOML file with a table per stage; see ratecluster init"
    ),
]
Overrides = Annotated[
    list[str] | None,
    Option(
        "--set",
        metavar="SECTION.KEY=VALUE",
        help="change one setting; may be repeated",
        autocompletion=complete_set,
    ),
]
Address = Annotated[
    str | None,
    Option(
        metavar="HOST:PORT",
        help="Ray cluster to join; default: RAY_ADDRESS if it is set, else a local Ray",
    ),
]
Overwrite = Annotated[
    bool,
    Option(
        "--overwrite", help="re-embed shards whose embeddings were made with different settings"
    ),
]
CaptionsFrom = Annotated[
    str | None,
    Option(
        "--captions-from",
        metavar="FILE",
        help="your own captions instead of the vocabulary: a path or URL of a UTF-8 text file "
        "with one caption per line; lines that start with # are ignored. The same as --set "
        "caption.vocabulary=FILE. Add --set caption.alt_texts=0 to use no other captions",
    ),
]


def listed(
    sections: Sections,
    shards: str | Sequence[str] | None,
    embeddings: str | None,
    root: str = "",
) -> tuple[Sections, list[Shard]]:
    """The input files of embed, and the settings, where `embed` has those that fit the files.

    UserError without any, and where a shard has no file of embeddings. Shards below the folder
    `root` of the run are left out.
    """
    if not shards and not embeddings:
        raise UserError("there is no input: give --shards, --embeddings or both")
    tars = list_shards(shards, root) if shards else []
    if not embeddings:
        return sections, tars
    from pipeline.embed.given import sources  # imports pyarrow, which other commands do not need

    if sections["caption"].namer and not shards:
        raise UserError("caption.namer needs pictures: give --shards beside --embeddings")
    if sections["embed"] != type(sections["embed"])():
        log.warning(
            "embed: the settings of [embed] are of encoders; with --embeddings those of "
            "[embeddings] count"
        )
    files = sources.list_embeddings(embeddings)
    sections = {**sections, "embed": sections["embeddings"]}
    return sections, sources.pair(tars, files) if shards else files


@dataclass(frozen=True)
class Common:
    """The options that most commands share. `App` replaces a parameter of this type by them."""

    config_file: ConfigFile = None
    sets: Overrides = None
    address: Address = None

    def with_captions(self, file: str | None) -> "Common":
        """The same options, with the override that --captions-from stands for."""
        own = [f"caption.vocabulary={json.dumps([file], ensure_ascii=False)}"] if file else []
        return replace(self, sets=[*(self.sets or ()), *own])

    def begin(self, root: str) -> tuple[Sections, layout.RunPaths]:
        """The settings of all stages, and the run's folders. Sets the address of Ray."""
        if not root:
            raise UserError("the folder is empty text; give a path or a URL")
        if self.address:
            os.environ["RAY_ADDRESS"] = self.address
        sections = config.load(KINDS, self.config_file, self.sets or ())
        return sections, layout.RunPaths(storage.absolute(root))

    @contextmanager
    def locked(self, root: str) -> Iterator[tuple[Sections, layout.RunPaths]]:
        """The same as `begin`, while the lock of the root is held."""
        sections, paths = self.begin(root)
        with lock_root(paths.root, sections["run"]):
            yield sections, paths


@contextmanager
def lock_root(
    root: str, cfg: progress.Config, shards: Sequence[Shard] = (), reads: str | None = None
) -> Iterator[None]:
    """Hold the lock of the root; a stage in the block that makes no progress fails.

    A cluster must see the root, the shards, and the other root that is read.
    """
    storage.check_writable(root)
    other = storage.local_path(reads) if reads else None
    with (
        Interruption() as block,
        lock.acquire(root, progress.current, block.interrupt),
        progress.watched(cfg),
        cluster.require_shared(storage.local_path(root), other, *_one_per_folder(shards)),
    ):
        yield


def _one_per_folder(shards: Sequence[Shard]) -> list[Path | None]:
    """The first file of each folder, as a local path; None for other stores."""
    urls = [getattr(shard, "file_url", shard.url) for shard in shards]
    urls += [shard.url for shard in shards]
    first = {url.rpartition("/")[0]: url for url in reversed(urls)}
    return [storage.local_path(url) for url in first.values()]
