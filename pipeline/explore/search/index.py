"""Command index: build a FAISS index of a run's embeddings, or of its network's features; open it.

reads   embeddings/{stem}.parquet; network/… for the space z
writes  index/{space}/{fingerprint}-trained.faiss   centroids and codebooks, without samples
        index/{space}/{fingerprint}-{stem}.lists    inverted lists of a group of shards, named after
                                                    the first one
        index/{space}/manifest.json

A sample's id is its row among all embeddings, with the shards in the order of the manifest.
A small run gets one list of float16 vectors, as exact as the embeddings. A larger one gets IVF-PQ
with 72 bytes per sample. `search` ranks its candidates by the embeddings.
N samples, D dimensions of an embedding, d of a compared vector.
"""

import hashlib
import logging
import os
import shutil
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch

from pipeline.artifacts import layout, outputs, views
from pipeline.artifacts.layout import Space
from pipeline.explore.search.settings import Config
from pipeline.mcr2.network import FeatureNetwork
from pipeline.runtime import config, console, tasks
from pipeline.runtime.errors import UserError
from pipeline.runtime.progress import StageProgress
from pipeline.select_k.assign_parts import embedding_columns, load_network
from pipeline.store import storage, tables
from pipeline.train import sampling

log = logging.getLogger(__name__)
MOST_GROUPS = 64  # of shards; each is a task and a file
MOST_LISTS = 1 << 14  # training holds PER_LIST vectors for each: 1.3 GB of 512 dimensions
PER_LIST = 40  # training samples; FAISS warns below 39
LEAST_TRAINED_ON = 1 << 16  # samples, for the 256 centroids of each codebook
CODE_BYTES = 64  # of a compressed vector
BATCH_ROWS = 1 << 14  # added at once
PROBES = 64  # inverted lists that a query searches first
WIDER = 4  # times as many if they hold too few samples
SOURCE = {Space.CLIP: "embeddings", Space.Z: "network"}  # the folder that an index depends on


@dataclass(frozen=True)
class Rows:
    """The ids of a run's samples; those of shard i are [ends[i − 1], ends[i])."""

    stems: list[str]
    ends: np.ndarray  # (parts,) int64

    @classmethod
    def of(cls, embedded: dict[str, Any]) -> "Rows":
        """From the manifest of the embeddings; shards without readable samples are ignored."""
        counts = {s["shard"]["stem"]: s["embedded"] for s in embedded["shards"] if s["embedded"]}
        return cls(list(counts), np.cumsum(list(counts.values()), dtype=np.int64))

    @property
    def total(self) -> int:
        """N."""
        return int(self.ends[-1])

    def ids(self, part: int) -> range:
        """The ids of the samples of a shard."""
        return range(int(self.ends[part - 1]) if part else 0, int(self.ends[part]))

    def parts(self, ids: np.ndarray) -> np.ndarray:
        """The numbers of the shards that hold these samples."""
        return np.searchsorted(self.ends, ids, side="right")


def load_faiss() -> Any:
    """The module faiss; UserError if it is not installed."""
    try:
        import faiss  # of the extras cpu and gpu
    except ImportError:
        raise UserError(
            "faiss is not installed: pip install 'ratecluster[cpu]', with CUDA 'ratecluster[gpu]'"
        ) from None
    return faiss


def columns_of(network: FeatureNetwork | None) -> list[str]:
    """The columns of embeddings that are compared."""
    return embedding_columns(network) if network else views.columns(1)


def as_vectors(x: np.ndarray, network: FeatureNetwork | None) -> np.ndarray:
    """Embeddings (n, D) → the vectors that are compared: (n, d) float32, unit rows."""
    wide = x.astype(np.float32)
    return wide if network is None else network.features(torch.from_numpy(wide)).numpy()


def pad(x: np.ndarray, width: int) -> np.ndarray:
    """(n, d) → (n, width), by zeros, which change no cosine."""
    return x if x.shape[1] == width else np.pad(x, ((0, 0), (0, width - x.shape[1])))


def lists(cfg: Config, samples: int) -> int:
    """How many inverted lists: one below cfg.flat_below samples, else about 4·√N."""
    if samples < cfg.flat_below:
        return 1
    return min(MOST_LISTS, samples // PER_LIST, 1 << round(np.log2(4 * samples**0.5)))


def empty(cfg: Config, samples: int, x: np.ndarray) -> Any:
    """An empty index for so many samples, with centroids from x (n, d)."""
    faiss = load_faiss()
    dim, count, product = x.shape[1], lists(cfg, samples), faiss.METRIC_INNER_PRODUCT
    if count == 1:
        half = faiss.ScalarQuantizer.QT_fp16
        index = faiss.IndexIVFScalarQuantizer(faiss.IndexFlatIP(dim), dim, 1, half, product, False)
    else:
        codes = min(CODE_BYTES, dim)
        width = -(-dim // codes) * codes
        index = faiss.IndexIVFPQ(faiss.IndexFlatIP(width), width, count, codes, 8, product)
        index.cp.spherical = True
    index.train(pad(x, index.d))
    return index


@dataclass(frozen=True)
class IndexJob:
    """What to index, and where."""

    paths: layout.RunPaths
    want: outputs.ExpectedOutputs
    rows: Rows
    network: FeatureNetwork | None


def train(cfg: Config, job: IndexJob, embedded: dict[str, Any], url: str) -> None:
    """Commit an empty index."""
    rows = max(PER_LIST * lists(cfg, job.rows.total), LEAST_TRAINED_ON)
    source = sampling.plan(embedded["shards"], job.paths, rows, seed=0)
    columns = columns_of(job.network)
    x = as_vectors(sampling.read_embeddings(source, range(len(source)), columns), job.network)
    faiss, index = load_faiss(), empty(cfg, job.rows.total, x)
    with storage.commit(url) as file:
        faiss.write_index(index, faiss.PyCallbackIOWriter(file.write))


def add_parts(stems: Sequence[str], job: IndexJob, data: np.ndarray) -> int:
    """Commit the inverted lists of some shards; `data` is the empty index. Returns the samples."""
    faiss = load_faiss()
    index = faiss.deserialize_index(data)
    for part, stem in enumerate(stems, start=job.rows.stems.index(stems[0])):
        url, ids = job.paths.embeddings.file(f"{stem}.parquet"), job.rows.ids(part)
        columns = columns_of(job.network)
        x, _ = views.side_by_side(tables.read(url, columns), columns)
        if len(x) != len(ids):
            raise RuntimeError(f"index: {url} has {len(x)} rows, its manifest says {len(ids)}")
        for start in range(0, len(x), BATCH_ROWS):
            batch = pad(as_vectors(x[start : start + BATCH_ROWS], job.network), index.d)
            index.add_with_ids(batch, np.arange(len(batch)) + ids.start + start)
    with storage.commit(job.want.folder.file(lists_file(job.want.made_of, stems))) as file:
        faiss.write_InvertedLists(index.invlists, faiss.PyCallbackIOWriter(file.write))
    return int(index.ntotal)


def lists_file(made_of: str, stems: Sequence[str]) -> str:
    """The name of the file with the inverted lists of some shards."""
    return f"{made_of}-{stems[0]}.lists"


def expected(
    cfg: Config, made: outputs.Manifests, paths: layout.RunPaths, space: Space
) -> outputs.ExpectedOutputs:
    """The files of the index of a run with these manifests, that with the centroids first."""
    made_of = config.fingerprint(cfg, made[SOURCE[space]]["fingerprint"], space.value)
    groups = tasks.chunks(Rows.of(made["embeddings"]).stems, MOST_GROUPS)
    names = [f"{made_of}-trained.faiss", *(lists_file(made_of, stems) for stems in groups)]
    folder = paths.index(space.value)
    return outputs.ExpectedOutputs("index", folder, made_of, cfg, {folder: names})


def run(cfg: Config, paths: layout.RunPaths, space: Space) -> dict[str, Any]:
    """Train on a sample, commit the lists of every group of shards, then the manifest.

    Resumes an interrupted build of the same index.
    """
    faiss = load_faiss()
    made = outputs.upstream(paths, SOURCE[space])
    want = expected(cfg, made, paths, space)
    if manifest := want.if_done():
        return manifest
    network = load_network(paths) if space is Space.Z else None
    job, folder = IndexJob(paths, want, Rows.of(made["embeddings"]), network), want.folder
    trained, *names = want.files[folder]
    there = {name for name in folder.names() if not name.startswith(".")}
    kept = there.intersection(want.files[folder])
    if trained not in kept:  # lists need their centroids: another machine may train different ones
        kept = set()
    folder.remove(there - kept)
    groups = tasks.chunks(job.rows.stems, MOST_GROUPS)
    todo = [group for name, group in zip(names, groups, strict=True) if name not in kept]
    with StageProgress("index", len(job.rows.stems), "parts") as progress:
        if not kept:
            train(cfg, job, made["embeddings"], folder.file(trained))
        centroids = storage.read_bytes(folder.file(trained))
        data = np.frombuffer(centroids, np.uint8)
        progress.advance(len(job.rows.stems) - sum(map(len, todo)))
        for group, samples in zip(todo, tasks.results(add_parts, todo, job, data), strict=True):
            progress.advance(len(group), samples)
    count = faiss.deserialize_index(data).nlist
    folder.finish(
        want.made_of,
        upstream=made[SOURCE[space]]["fingerprint"],
        config=config.facts(cfg),
        samples=job.rows.total,
        lists=count,
        files=sorted(want.files[folder]),
        trained=hashlib.sha256(centroids).hexdigest()[:12],
        seconds=round(progress.seconds, 2),
    )
    kind = f"IVF-PQ of {count:,} lists" if count > 1 else "flat"
    console.log_finished(log, "index", progress.seconds, f"{job.rows.total:,} samples", kind)
    return folder.manifest()


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

    The files are memory-mapped. Remote ones are copied once to a cache on this machine.
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
