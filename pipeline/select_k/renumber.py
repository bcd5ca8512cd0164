"""Numbers the clusters by their sizes: 0 is the largest.

The cut numbers them by their landmarks, a sample. Their sizes are known once all samples are
assigned; where the order is another one, the parts of assignments/ are written again.
k clusters, g small groups.
"""

from dataclasses import dataclass, replace

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import torch

from pipeline.artifacts import schemas
from pipeline.mcr2.assignment import Prototypes
from pipeline.mcr2.levels import Groups, Landmarks
from pipeline.runtime import tasks
from pipeline.runtime.progress import StageProgress
from pipeline.select_k.assign_parts import Assigned, merge_exemplars
from pipeline.select_k.full_passes import MOST_TASKS, Parts
from pipeline.store import tables


@dataclass(frozen=True)
class Numbers:
    """The new numbers."""

    order: np.ndarray  # (k,) the old number of each cluster, the largest first
    group_order: np.ndarray  # (g,) the old row of each group, in the order of the clusters

    @classmethod
    def by_size(cls, assigned: Assigned, groups: Groups) -> "Numbers":
        """Largest first; of equal ones, the first stays first."""
        order = np.argsort(-assigned.clusters[0].numpy(), kind="stable")
        own = np.argsort(_inverse(order)[groups.cluster_of.numpy()], kind="stable")
        return cls(order, own)

    @property
    def same(self) -> bool:
        """Whether nothing changes."""
        return bool((self.order == np.arange(len(self.order))).all())

    def prototypes(self, found: Prototypes) -> Prototypes:
        """The prototypes, in the order of the clusters."""
        cluster_of = _inverse(self.order)[found.cluster_of.numpy()]
        rows = np.argsort(cluster_of, kind="stable")
        numbers = torch.from_numpy(cluster_of[rows])
        return Prototypes(found.table[torch.from_numpy(rows)], numbers, found.eta)

    def groups(self, found: Groups) -> Groups:
        """The groups, in the order of the clusters."""
        rows = torch.from_numpy(self.group_order)
        new = torch.from_numpy(_inverse(self.order))
        return Groups(found.table[rows], new[found.cluster_of[rows]])

    def landmarks(self, found: Landmarks) -> Landmarks:
        """The landmarks in the same clusters."""
        return replace(found, clusters=torch.from_numpy(_inverse(self.order))[found.clusters])

    def assigned(self, found: Assigned) -> Assigned:
        """The sums, in the order of the clusters and of the groups."""
        order = torch.from_numpy(self.order)
        count, total, gram = (sums[order] for sums in found.clusters)
        return Assigned((count, total, gram), found.groups[torch.from_numpy(self.group_order)])


def _inverse(order: np.ndarray) -> np.ndarray:
    """The new number of each old one."""
    found = np.empty(len(order), np.int64)
    found[order] = np.arange(len(order))
    return found


def renumber(parts: Parts, numbers: Numbers) -> None:
    """Write assignments/ and the exemplars with the new numbers.

    A part that has them says so in its footer: an interrupted run renumbers only the others.
    """
    chunks = tasks.chunks(parts.stems, MOST_TASKS)
    with StageProgress("select_k", len(parts.stems), "parts renumbered") as progress:
        for chunk, _ in zip(
            chunks, tasks.results(_renumber_parts, chunks, parts, numbers), strict=True
        ):
            progress.advance(len(chunk))
    url = parts.paths.clusters.file("exemplars.parquet")
    exemplars = tables.read(url)
    place = exemplars.schema.get_field_index("cluster_id")
    new = _renumbered(exemplars["cluster_id"], _inverse(numbers.order))
    tables.write(url, merge_exemplars([exemplars.set_column(place, "cluster_id", new)]))


def _renumber_parts(stems: list[str], parts: Parts, numbers: Numbers) -> int:
    """A task: the number of parts that were written."""
    clusters, groups = _inverse(numbers.order), _inverse(numbers.group_order)
    written = 0
    for stem in stems:
        url = parts.paths.assignments.file(f"{stem}.parquet")
        if tables.facts(url).get("renumbered"):
            continue
        table = tables.read(url)
        top = table["top_clusters"].combine_chunks()
        lists = pa.ListArray.from_arrays(top.offsets, _renumbered(top.values, clusters))
        columns = {
            **{name: table[name] for name in schemas.ASSIGNMENTS.names},
            "cluster_id": _renumbered(table["cluster_id"], clusters),
            "group": _renumbered(table["group"], groups),
            "top_clusters": lists,
        }
        rows = pa.table(columns, schema=schemas.ASSIGNMENTS)
        tables.write(url, rows, made_of=parts.made_of, rows=len(rows), renumbered=True)
        written += 1
    return written


def _renumbered(column: pa.Array | pa.ChunkedArray, new: np.ndarray) -> pa.Array:
    return pc.take(pa.array(new, pa.int32()), column)
