"""The folders of a run."""

from dataclasses import dataclass
from enum import Enum

from pipeline.store.storage import Folder


class Space(str, Enum):
    """Where samples are compared."""

    CLIP = "clip"
    Z = "z"


@dataclass(frozen=True)
class RunPaths:
    """All the folders of one run, below one root."""

    root: str

    def folder(self, name: str) -> Folder:
        """A folder directly below the root."""
        return Folder(f"{self.root.rstrip('/')}/{name}")

    @property
    def top(self) -> Folder:
        """The root itself."""
        return Folder(self.root.rstrip("/"))

    @property
    def embeddings(self) -> Folder:
        """Stage embed: one part per shard."""
        return self.folder("embeddings")

    @property
    def rejects(self) -> Folder:
        """Stage embed: the unreadable samples, one part per shard."""
        return self.folder("rejects")

    @property
    def network(self) -> Folder:
        """Stage train."""
        return self.folder("network")

    @property
    def clusters(self) -> Folder:
        """Stage select_k: what the clusters are."""
        return self.folder("clusters")

    @property
    def assignments(self) -> Folder:
        """Stage select_k: which sample is in which, one part per shard."""
        return self.folder("assignments")

    @property
    def captions(self) -> Folder:
        """Stage caption."""
        return self.folder("captions")

    @property
    def exclude(self) -> Folder:
        """Stage write: the samples that are left out, one part per shard that has any."""
        return self.folder("exclude")

    @property
    def labels(self) -> Folder:
        """Stage write: what users read, one part per shard."""
        return self.folder("labels")

    @property
    def labeled(self) -> Folder:
        """Stage write: the input shards again, with labels."""
        return self.folder("labeled")

    @property
    def report(self) -> Folder:
        """Stage report."""
        return self.folder("report")

    def index(self, space: str) -> Folder:
        """Command index: for searching, in one space."""
        return self.folder(f"index/{space}")

    @property
    def clusters_table(self) -> str:
        """One row per cluster."""
        return f"{self.root.rstrip('/')}/clusters.parquet"

    @property
    def run_json(self) -> str:
        """What made this run."""
        return f"{self.root.rstrip('/')}/run.json"

    @property
    def evaluation_json(self) -> str:
        """Written by evaluate."""
        return f"{self.root.rstrip('/')}/evaluation.json"
