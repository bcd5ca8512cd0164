"""The two passes over all parts of the embeddings; an interrupted pass resumes.

N samples, d dimensions, p leaves.
"""

from collections.abc import Callable
from dataclasses import dataclass

import numpy as np
import pyarrow as pa
import torch
from torch import Tensor

from pipeline.artifacts import layout, outputs, schemas
from pipeline.mcr2 import assignment, coding_rate
from pipeline.mcr2.network import FeatureNetwork
from pipeline.runtime import tasks
from pipeline.runtime.progress import StageProgress
from pipeline.select_k.assign_parts import (
    Assigned,
    Assigner,
    Sums,
    assign_parts,
    merge_exemplars,
    part_features,
    to_arrays,
)
from pipeline.store import tables
from pipeline.store.partial_sums import Arrays, ResumableSum

MOST_TASKS = 128  # each returns p·d² numbers
SUMS = ("count", "sum", "gram", "groups")  # of `Assigned`; the first pass has no groups


@dataclass(frozen=True)
class Parts:
    """The parts that both passes read."""

    paths: layout.RunPaths
    stems: list[str]
    made_of: str  # fingerprint of the stage


def statistics(urls: list[str], network: FeatureNetwork, table: Tensor) -> Sums:
    """Additive statistics of the leaves `table` (p, d) over all samples of some parts."""
    total = coding_rate.no_statistics(*table.shape)
    for url in urls:
        for _, z in part_features(url, network, []):
            coding_rate.accumulate(total, z, assignment.nearest(z, table))
    return to_arrays(total)


def _add(total: Sums, more: Sums) -> None:
    """Add in place. The arrays that Ray returns are read-only, which torch does not accept."""
    for sums, summand in zip(total, more, strict=True):
        np.add(sums, summand, out=sums)


def all_statistics(
    parts: Parts, network: FeatureNetwork, begin: Callable[[], Tensor], progress: StageProgress
) -> tuple[Tensor, coding_rate.Statistics]:
    """First pass: the leaves (p, d) that `begin` computes, and their statistics over all parts."""
    urls = [parts.paths.embeddings.file(f"{stem}.parquet") for stem in parts.stems]
    chunks = tasks.chunks(urls, MOST_TASKS)
    running = ResumableSum(parts.paths.clusters, "leaves", parts.made_of, len(chunks))
    table = torch.from_numpy(running.restored["table"]) if running.done else begin()
    total = coding_rate.no_statistics(*table.shape)
    sums = _restore(running, to_arrays(total))
    progress.advance(sum(map(len, chunks[: running.done])))
    left = running.left(chunks)
    for chunk, more in zip(left, tasks.results(statistics, left, network, table), strict=True):
        _add(sums, more)
        running.advance(lambda: {"table": table.numpy(), **_by_name(sums)})
        progress.advance(len(chunk), int(more[0].sum()))
    return table, total


def assign_all(parts: Parts, assigner: Assigner, progress: StageProgress) -> Assigned:
    """Second pass: write assignments and exemplars; returns the sums over all samples."""
    paths, chunks = parts.paths, tasks.chunks(parts.stems, MOST_TASKS)
    running = ResumableSum(paths.clusters, "groups", parts.made_of, len(chunks))
    _forget_lost_parts(running, parts, [stem for chunk in chunks[: running.done] for stem in chunk])
    total = assigner.nothing()
    sums = _restore(running, total.arrays())
    best = schemas.EXEMPLARS.empty_table()
    if running.done:
        best = _from_bytes(running.restored["exemplars"])
    progress.advance(sum(map(len, chunks[: running.done])))
    left = running.left(chunks)
    found = tasks.results(assign_parts, left, paths, assigner)
    for chunk, (more, exemplars) in zip(left, found, strict=True):
        _add(sums, more)
        best = merge_exemplars([best, exemplars])
        running.advance(lambda best=best: {**_by_name(sums), "exemplars": _to_bytes(best)})  # type: ignore[misc]
        progress.advance(len(chunk), int(more[0].sum()))
    tables.write(paths.clusters.file("exemplars.parquet"), best)
    return total


def _forget_lost_parts(running: ResumableSum, parts: Parts, summed: list[str]) -> None:
    """Forget a sum if one of the parts that it includes is missing: then all are made again."""
    folder = parts.paths.assignments
    there = outputs.part_facts(folder, summed)
    if any(there.get(stem, {}).get("made_of") != parts.made_of for stem in summed):
        running.forget()
    if not running.done:
        folder.clear()  # parts of another fingerprint; only after the sum that includes them


def _restore(running: ResumableSum, sums: Sums) -> Sums:
    """The arrays, to which those of an interrupted pass are added; these are freed."""
    if running.done:
        for name, array in _by_name(sums).items():
            array += running.restored.pop(name)
    return sums


def _by_name(sums: Sums) -> Arrays:
    return dict(zip(SUMS, sums, strict=False))


def _to_bytes(table: pa.Table) -> np.ndarray:
    sink = pa.BufferOutputStream()
    with pa.ipc.new_file(sink, table.schema) as writer:
        writer.write_table(table)
    return np.frombuffer(sink.getvalue(), np.uint8)


def _from_bytes(data: np.ndarray) -> pa.Table:
    return pa.ipc.open_file(pa.BufferReader(data.tobytes())).read_all()
