"""The levels of a run: which cluster each small group is in, from the coarsest level to the finest.

g small groups, L levels, k clusters of a level, f of the finest, d dimensions of features.
"""

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from pipeline.artifacts.layout import RunPaths
from pipeline.runtime.errors import UserError
from pipeline.store import tables


@dataclass(frozen=True)
class Levels:
    """The table clusters/levels.parquet."""

    cluster_of: np.ndarray  # (g,) the cluster_id of each group
    clusters: np.ndarray  # (g, L) its cluster at each level
    vectors: np.ndarray  # (g, d) unit rows

    @property
    def default(self) -> int:
        """The level of cluster_id, counted from 0."""
        return int((self.clusters == self.cluster_of[:, None]).all(axis=0).argmax())

    @property
    def others(self) -> list[int]:
        """The other levels: coarser ones first, the nearest first, then finer ones."""
        count, default = self.clusters.shape[1], self.default
        return [*range(default - 1, -1, -1), *range(default + 1, count)]

    @property
    def finest(self) -> np.ndarray:
        """(g,) the cluster of each group at the finest level."""
        return self.clusters[:, -1]

    def within(self, level: int, other: int) -> np.ndarray:
        """For each cluster of a level (k,), that of a coarser level `other` which contains it."""
        found = np.empty(self.clusters[:, level].max() + 1, np.int64)
        found[self.clusters[:, level]] = self.clusters[:, other]
        return found

    def sizes(self, level: int, groups: Sequence[int]) -> list[int]:
        """Samples in each cluster of a level (k,), of those in the groups (g,)."""
        found = np.zeros(self.clusters[:, level].max() + 1, np.int64)
        np.add.at(found, self.clusters[:, level], groups)
        return found.tolist()


def read(paths: RunPaths) -> Levels:
    """The levels of a run; UserError where its clusters are of a version without levels."""
    try:
        table = tables.read(paths.clusters.file("levels.parquet")).combine_chunks()
    except FileNotFoundError:
        raise UserError(
            f"{paths.root}: clusters/ has no levels; run `ratecluster select-k` again"
        ) from None
    clusters = np.array(table["levels"].to_pylist())
    vectors = tables.to_matrix(table["vector"])
    return Levels(table["cluster_id"].to_numpy(), clusters, vectors)
