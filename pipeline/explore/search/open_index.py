"""Open an index for queries; its files are memory-mapped.

N samples, d dimensions.
"""

import os
import shutil
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from pipeline.artifacts import layout, outputs
from pipeline.artifacts.layout import Space
from pipeline.explore.search.index import expected, load_faiss, pad
from pipeline.explore.search.settings import Config
from pipeline.runtime import config
from pipeline.runtime.errors import UserError
from pipeline.store import storage

PROBES = 64  # inverted lists that a query searches first
WIDER = 4  # times as many if they hold too few samples


@dataclass(frozen=True)
class Index:
    """An index of FAISS, and the lists that it points to without keeping them alive."""

    ivf: Any
    held: list[Any]

    @property
    def flat(self) -> bool:
        """Whether vectors are only rounded to float16."""
        return bool(self.ivf.nlist == 1)

    def candidates(
        self, query: np.ndarray, most: int, members: np.ndarray | None = None
    ) -> np.ndarray:
        """Ids of `most` samples near the query (d,), nearest first by compressed vectors.

        `members` (N,) bool limits the search. Fewer are returned only if there are no more.
        """
        faiss = load_faiss()
        limits: dict[str, Any] = {}
        if members is not None:
            if not (most := min(most, int(members.sum()))):
                return np.empty(0, np.int64)
            limits["sel"] = faiss.IDSelectorBitmap(np.packbits(members, bitorder="little"))
        rows, probes = pad(query[None], self.ivf.d), PROBES
        while True:
            asked = faiss.SearchParametersIVF(nprobe=min(probes, self.ivf.nlist), **limits)
            _, ids = self.ivf.search(rows, most, params=asked)
            found = ids[0][ids[0] >= 0]
            if len(found) == most or probes >= self.ivf.nlist:
                return np.asarray(found)
            probes *= WIDER


def open_index(paths: layout.RunPaths, made: outputs.Manifests, space: Space) -> Index:
    """The index of a run with these manifests; UserError names the command that builds it.

    Remote files are copied once to a cache on this machine.
    """
    faiss, folder = load_faiss(), paths.index(space.value)
    command = f"run `ratecluster index --root {paths.root} --space {space.value}`"
    manifest = folder.peek()
    if manifest is None:
        raise UserError(f"{paths.root} has no index of {space.value}: {command} first")
    want = expected(config.as_made(Config(), manifest["config"]), made, paths, space)
    _, reason = want.compare()
    if reason:
        raise UserError(f"{folder.url} is out of date, {reason}: {command} again")
    base = Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache")
    cache = base / "ratecluster" / f"{want.made_of}-{manifest['trained']}"
    trained, *files = [_local(folder.file(name), cache) for name in want.files[folder]]
    ivf = faiss.read_index(trained)
    pieces = faiss.InvertedListsPtrVector()
    held = [faiss.read_InvertedLists(faiss.FileIOReader(f), faiss.IO_FLAG_MMAP) for f in files]
    for piece in held:
        pieces.push_back(piece)
    stack = faiss.HStackInvertedLists(pieces.size(), pieces.data())
    ivf.replace_invlists(stack, False)
    ivf.ntotal = manifest["samples"]
    return Index(ivf, [stack, *held])


def _local(url: str, cache: Path) -> str:
    """The path of a local file, or of the local copy of a remote one."""
    if path := storage.local_path(url):
        return str(path)
    copy = cache / url.rpartition("/")[2]
    if not copy.exists():
        with storage.open_read(url) as source, storage.commit(str(copy)) as target:
            shutil.copyfileobj(source, target, 1 << 20)
    return str(copy)
