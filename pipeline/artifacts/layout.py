"""The folders and files of a run."""

from dataclasses import dataclass
from enum import Enum

from pipeline.store.storage import Folder


class Space(str, Enum):
    """The space in which samples are compared: CLIP embeddings, or the features z."""

    CLIP = "clip"
    Z = "z"


class _Below:
    """A folder directly below the root of a run."""

    def __init__(self, name: str, meaning: str) -> None:
        self.name, self.__doc__ = name, meaning

    def __get__(self, paths: "RunPaths", owner: type) -> Folder:
        return paths.folder(self.name)


@dataclass(frozen=True)
class RunPaths:
    """The folders and files of one run, below one root."""

    root: str  # URL or path

    embeddings = _Below("embeddings", "embed: a part per shard")
    rejects = _Below("rejects", "embed: the unreadable samples, a part per shard")
    attempts = _Below(".attempts", "embed: the shards that workers have begun; until it is done")
    network = _Below("network", "train")
    clusters = _Below("clusters", "select_k: the clusters")
    assignments = _Below("assignments", "select_k: the cluster of each sample, a part per shard")
    captions = _Below("captions", "caption")
    exclude = _Below("exclude", "write: the excluded samples, a part per shard that has any")
    labels = _Below("labels", "write: the result for users, a part per shard")
    labeled = _Below("labeled", "write: the input shards with labels added")
    report = _Below("report", "report")

    @property
    def top(self) -> Folder:
        """The root itself."""
        return Folder(self.root.rstrip("/"))

    def folder(self, name: str) -> Folder:
        """A folder directly below the root."""
        return Folder(self.top.file(name))

    def index(self, space: str) -> Folder:
        """The search index of one space."""
        return self.folder(f"index/{space}")

    @property
    def clusters_table(self) -> str:
        """URL of clusters.parquet, one row per cluster."""
        return self.top.file("clusters.parquet")

    @property
    def run_json(self) -> str:
        """URL of run.json: versions, settings, counts and fingerprints of the run."""
        return self.top.file("run.json")

    @property
    def evaluation_json(self) -> str:
        """URL of evaluation.json."""
        return self.top.file("evaluation.json")
