"""The data of a report: manifests, stages, clusters and rejected samples of a run.

reads   all manifests; evaluation.json if it exists; network/history.parquet,
        rejects/{stem}.parquet of shards with rejected samples
"""

import logging
from dataclasses import dataclass
from typing import Any

import numpy as np
import pyarrow.compute as pc

from pipeline.artifacts import layout, outputs
from pipeline.artifacts.stages import chain
from pipeline.runtime.errors import UserError
from pipeline.store import tables

log = logging.getLogger(__name__)
REJECTS = 100  # rejected samples listed, and damaged shards

Facts = dict[str, Any]


@dataclass(frozen=True)
class RunData:
    """The manifests of a run; `write` and `evaluate` may not have run yet."""

    root: str
    embedded: Facts  # manifests of the stages, in order
    trained: Facts
    clustered: Facts
    captioned: Facts
    written: Facts | None
    evaluation: Facts | None

    @property
    def manifests(self) -> outputs.Manifests:
        """The manifests by folder."""
        shown = {"clusters": self.clustered, "captions": self.captioned}
        shown |= {"labels": self.written or {}, "evaluation": self.evaluation or {}}
        return shown


def collect(paths: layout.RunPaths) -> RunData:
    """Read the manifests; UserError names the first unfinished stage."""
    made = outputs.upstream(paths, "captions")
    clustered, captioned = made["clusters"], made["captions"]
    if taken := clustered.get("taken_from"):
        raise UserError(
            f"{paths.root}: its clusters were assigned from {taken}; run `ratecluster report` there"
        )
    written = paths.labels.peek()
    if written and written["upstream"] != captioned["fingerprint"]:
        written = None
    evaluation = paths.top.peek("evaluation.json")
    if evaluation and evaluation["clustering"] != clustered["fingerprint"]:
        log.warning("report: evaluation.json describes other clusters: run evaluate again")
        evaluation = None
    embedded, trained = made["embeddings"], made["network"]
    return RunData(paths.root, embedded, trained, clustered, captioned, written, evaluation)


def stages(run: RunData, paths: layout.RunPaths) -> list[Facts]:
    """The manifest of every finished stage, with its name, samples and samples per second.

    The speed of train is the median of its steps.
    """
    steps = tables.read(paths.network.file("history.parquet"), ["samples_per_s"])
    known = {"train": float(np.median(steps["samples_per_s"].to_numpy()))}
    rows = []
    for stage in chain():
        name, manifest = stage.name, paths.folder(stage.folder).peek()
        if manifest and (stage.folder != "labels" or run.written):
            done = run.embedded["embedded" if name in ("select_k", "caption") else "samples"]
            speed = manifest.get("samples_per_s") or done / max(manifest["seconds"], 1e-9)
            facts = {"samples": done, "samples_per_s": known.get(name, speed)}
            rows.append({"name": name, **manifest, **facts})
    return rows


def levels(run: RunData, clusters: list[Facts], paths: layout.RunPaths) -> list[Facts]:
    """The clusters of the coarsest level; each has its `parts` at the next one, and so on.

    Those of the level of `clusters` have their facts as `cluster`. Empty where there is one level
    only, or `write` has not finished.
    """
    if not run.written or len(run.clustered["levels"]) < 2:
        return []
    rows = tables.read(paths.top.file("levels.parquet")).to_pylist()
    default = run.clustered["levels"].index(len(clusters)) + 1
    facts = {row["id"]: row for row in clusters}
    by_id: dict[tuple[int, int], Facts] = {}
    for row in rows:
        own = by_id[row["level"], row["cluster_id"]] = {**row, "parts": []}
        own["cluster"] = facts[row["cluster_id"]] if row["level"] == default else None
        if row["level"] > 1:
            by_id[row["level"] - 1, row["parent"]]["parts"].append(own)
    return [row for (level, _), row in by_id.items() if level == 1]


def rejected(run: RunData, paths: layout.RunPaths) -> list[Facts]:
    """The first REJECTS rejected samples of the run, in the order of the shards."""
    rows: list[Facts] = []
    for shard in run.embedded["shards"]:
        if len(rows) < REJECTS and shard["rejected"]:
            table = tables.read(paths.rejects.file(f"{shard['shard']['stem']}.parquet"))
            table = table.filter(pc.is_valid(table["sample_id"]))  # others: damaged shards
            rows += table.slice(0, REJECTS - len(rows)).to_pylist()
    return rows


def clusters(run: RunData, paths: layout.RunPaths) -> list[Facts]:
    """Size, captions, bits, neighbours and true class of each cluster, largest first.

    Neighbours need a finished `write`, true classes a finished `evaluate`.
    """
    sizes = run.clustered["sizes"]
    rows: list[Facts] = [{"id": c, "size": size, "captions": []} for c, size in enumerate(sizes)]
    for caption in tables.read(paths.captions.file("captions.parquet")).to_pylist():
        rows[caption["cluster_id"]]["captions"].append(caption)
    for row, bits in zip(rows, run.clustered["cluster_bits"], strict=True):
        row["captions"].sort(key=lambda caption: caption["rank"])
        row["share"] = row["size"] / max(1, run.clustered["samples"])
        row["caption"] = row["captions"][0]["caption"] if row["captions"] else None
        row["bits"] = bits / max(1, row["size"])
    if run.written:
        for more in tables.read(paths.clusters_table).to_pylist():
            rows[more["cluster_id"]]["nearest"] = [rows[c] for c in more["nearest_clusters"]]
    for truth in run.evaluation["clusters"] if run.evaluation else ():
        rows[truth["cluster_id"]]["truth"] = truth
    return sorted(rows, key=lambda row: (-row["size"], row["id"]))
