"""Assign the samples of a part to clusters; pick samples that show what each cluster is.

d dimensions, k clusters, g small groups.
"""

import json
from collections.abc import Iterator
from dataclasses import dataclass

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import torch
from safetensors.torch import load as load_tensors
from torch import Tensor

from pipeline.artifacts import layout, schemas, views
from pipeline.mcr2 import assignment, coding_rate, levels
from pipeline.mcr2.network import FeatureNetwork, Network
from pipeline.mcr2.published import TwoHeads
from pipeline.store import storage, tables

KEPT = {"typical": 24, "borderline": 12, "odd": 12}  # exemplars of each kind and cluster
BY = {  # the score by which the exemplars of each kind are ranked
    "typical": ("centrality", "descending"),
    "borderline": ("margin", "ascending"),
    "odd": ("outlier_score", "descending"),
}
MEMBER = ["sample_id", "shard", "key", "image_member", "tar_offset", "tar_size", "caption"]
BATCH_ROWS = 4096  # through the network at once


def load_network(paths: layout.RunPaths) -> FeatureNetwork:
    """The trained network, in evaluation mode."""
    shape = json.loads(storage.read_bytes(paths.network.file("network.json")))["shape"]
    two = shape.pop("heads", 1) == 2
    network: FeatureNetwork = TwoHeads(**shape) if two else Network(**shape)
    network.load_state_dict(
        load_tensors(storage.read_bytes(paths.network.file("network.safetensors")))
    )
    return network.eval()


def embedding_columns(network: FeatureNetwork) -> list[str]:
    """The columns of embeddings that the network sees."""
    return views.columns(len(network.input_dims))


def row_features(rows: pa.Table, network: FeatureNetwork) -> Tensor:
    """z (n, d) of rows with `embedding_columns`."""
    x, _ = views.side_by_side(rows, embedding_columns(network))
    return network.features(torch.from_numpy(x.astype(np.float32)))


def part_features(
    url: str, network: FeatureNetwork, columns: list[str]
) -> Iterator[tuple[pa.Table, Tensor]]:
    """(rows with `columns`, their z (b, d)) of one part of embeddings/, BATCH_ROWS at a time."""
    table = tables.read(url, [*columns, *embedding_columns(network)])
    for start in range(0, table.num_rows, BATCH_ROWS):
        rows = table.slice(start, BATCH_ROWS)
        yield rows.select(columns), row_features(rows, network)


@dataclass(frozen=True)
class Assigner:
    """What tasks need to assign samples."""

    network: FeatureNetwork
    prototypes: assignment.Prototypes
    groups: levels.Groups
    made_of: str  # fingerprint of the stage, for the parts

    def nothing(self) -> "Assigned":
        """Of no samples."""
        shape = self.prototypes.k, self.prototypes.table.shape[1]
        sizes = torch.zeros(len(self.groups.table), dtype=torch.float64)
        return Assigned(coding_rate.no_statistics(*shape), sizes)


@dataclass(frozen=True)
class Assigned:
    """What is summed over samples."""

    clusters: coding_rate.Statistics
    groups: Tensor  # (g,) float64: samples in each small group

    def arrays(self) -> "Sums":
        """Arrays on the same memory."""
        return (*to_arrays(self.clusters), self.groups.numpy())


def assign_part(source: str, target: str, assigner: Assigner, total: Assigned) -> pa.Table:
    """Commit one part of the assignments, add to the sums; returns EXEMPLARS."""
    found, members, centres = [], [], assigner.prototypes.centres
    for rows, z in part_features(source, assigner.network, MEMBER):
        a = assignment.assign(z, assigner.prototypes, schemas.TOP)
        group = assigner.groups.nearest(z, a.cluster)
        coding_rate.accumulate(total.clusters, z, a.cluster)
        total.groups.add_(torch.bincount(group, minlength=len(total.groups)))
        found.append(_assignment_rows(rows, a, group))
        central = (z * centres[a.cluster]).sum(dim=1)
        members.append(rows.append_column("centrality", pa.array(central.numpy())))
    table = pa.concat_tables([schemas.ASSIGNMENTS.empty_table(), *found])
    tables.write(target, table, made_of=assigner.made_of, rows=table.num_rows)
    return _exemplars(table, members)


def _assignment_rows(rows: pa.Table, a: assignment.Assignment, group: Tensor) -> pa.Table:
    columns = [
        rows["sample_id"],
        a.cluster.int().numpy(),
        a.confidence.numpy(),
        a.margin.numpy(),
        a.outlier_score.numpy(),
        pa.array(a.top_clusters.int().tolist(), pa.list_(pa.int32())),
        pa.array(a.top_shares.tolist(), pa.list_(pa.float32())),
        group.int().numpy(),
    ]
    return pa.table(
        dict(zip(schemas.ASSIGNMENTS.names, columns, strict=True)), schema=schemas.ASSIGNMENTS
    )


def _exemplars(table: pa.Table, members: list[pa.Table]) -> pa.Table:
    """EXEMPLARS of one part: each kind is chosen from all of its rows."""
    if not members:
        return schemas.EXEMPLARS.empty_table()
    scored = pa.concat_tables(members)
    for name in ("cluster_id", "outlier_score", "margin"):
        scored = scored.append_column(name, table[name])
    return pa.concat_tables([rank_members(scored, kind) for kind in schemas.KINDS])


def merge_exemplars(exemplars: list[pa.Table]) -> pa.Table:
    """EXEMPLARS of several parts, from the EXEMPLARS of each."""
    whole = pa.concat_tables(exemplars)
    kinds = [whole.filter(pc.equal(whole["kind"], kind)) for kind in schemas.KINDS]
    return pa.concat_tables(map(rank_members, kinds, schemas.KINDS))


def rank_members(scored: pa.Table, kind: str) -> pa.Table:
    """EXEMPLARS of one kind: the first KEPT rows of each cluster; ties by sample_id."""
    ascending = [(name, "ascending") for name in ("cluster_id", "sample_id")]
    scored = scored.sort_by([ascending[0], BY[kind], ascending[1]])
    clusters = scored["cluster_id"].to_numpy()
    starts = np.searchsorted(clusters, clusters)  # first row of each row's cluster
    rank = np.arange(len(clusters)) - starts
    ours = {"kind": pa.array([kind] * len(rank), pa.string()), "rank": rank.astype(np.int32)}
    columns = {n: ours[n] if n in ours else scored[n] for n in schemas.EXEMPLARS.names}
    return pa.table(columns, schema=schemas.EXEMPLARS).filter(rank < KEPT[kind])


Sums = tuple[np.ndarray, ...]  # Statistics as arrays, which Ray shares without copying


def assign_parts(
    stems: list[str], paths: layout.RunPaths, assigner: Assigner
) -> tuple[Sums, pa.Table]:
    """`assign_part` of several shards: the arrays of all sums, and EXEMPLARS of all."""
    total = assigner.nothing()
    best = schemas.EXEMPLARS.empty_table()
    for name in (f"{stem}.parquet" for stem in stems):
        source, target = paths.embeddings.file(name), paths.assignments.file(name)
        best = merge_exemplars([best, assign_part(source, target, assigner, total)])
    return total.arrays(), best


def to_arrays(total: coding_rate.Statistics) -> Sums:
    """Statistics as arrays on the same memory."""
    return tuple(sums.numpy() for sums in total)
