"""Stage 3, select_k: choose the number of clusters, assign every sample.

reads   network/       the network, and the features of the landmarks
        embeddings/    all parts, twice
writes  clusters/      curve, tree, levels, prototypes and exemplars (.parquet); manifest.json, last
        assignments/   a part per shard

1. The landmarks are over-segmented into small groups, the leaves (`choose_k.over_segment`).
2. A pass over all parts sums the statistics of each leaf. Merging the leaves by coding length gives
   the bits of every k; k itself is chosen on the landmarks (`choose_k.choose_k`).
3. The landmarks are cut into k clusters (`cut.cut`), and these into small groups (`levels.split`).
   A second pass assigns all samples. The clusters are numbered by their sizes (`renumber`).
4. The tree of the clusters and their groups is cut at some more levels (`levels.find`).

clusters/unfinished-* keeps what an interrupted run has decided and summed, until the stage is done.
"""

import logging
from dataclasses import fields, replace
from typing import Any

import numpy as np
import pyarrow as pa
import torch
from torch import Tensor

from pipeline.artifacts import layout, outputs, schemas
from pipeline.mcr2 import choose_k, coding_rate, cut, levels, tree
from pipeline.mcr2.assignment import Prototypes
from pipeline.mcr2.choose_k import Choice
from pipeline.mcr2.network import FeatureNetwork
from pipeline.mcr2.threads import one_thread
from pipeline.runtime import config, console
from pipeline.runtime.errors import UserError
from pipeline.runtime.progress import StageProgress
from pipeline.select_k.assign_parts import Assigner, load_network
from pipeline.select_k.full_passes import Parts, all_statistics, assign_all
from pipeline.select_k.renumber import Numbers, renumber
from pipeline.select_k.settings import Config, expected, fit_settings
from pipeline.store import partial_sums, tables
from pipeline.store.partial_sums import Arrays, PartialResult

log = logging.getLogger(__name__)
DISAGREES = 2  # factor between two choices of k that is worth a warning
CURVES = ("bits", "bands", "ks", "measures")  # of a Choice; the rest are numbers


def _decide(
    z: Tensor,
    index: Tensor,
    fit: Config,
    parts: Parts,
    network: FeatureNetwork,
    progress: StageProgress,
) -> tuple[Choice, Prototypes]:
    """Steps 1 and 2, and the cut of step 3; what an interrupted run has decided is taken again."""
    decided = PartialResult(parts.paths.clusters, "choice", parts.made_of)
    if found := decided.load():
        progress.advance(len(parts.stems))
        return _from_arrays(found)
    leaves, stats = all_statistics(parts, network, lambda: choose_k.over_segment(z, fit), progress)
    choice = choose_k.choose_k(z, leaves, stats, fit)
    if fit.k:
        choice = replace(choice, k=fit.k)
    prototypes = cut.cut(z, choice.k, fit.seed, index)
    decided.save(_as_arrays(choice, prototypes))
    return choice, prototypes


def _check_k(k: int, z: Tensor) -> None:
    """UserError where there are fewer different landmarks z (m, d) than clusters are asked for."""
    if k and (found := len(z.unique(dim=0))) < k:
        raise UserError(
            f"select_k.k = {k}, but the landmarks have only {found} different features: give a "
            "smaller k"
        )


def run(cfg: Config, paths: layout.RunPaths) -> dict[str, Any]:
    """Choose k, assign every sample, check the counts, commit the manifest."""
    made = outputs.upstream(paths, "network")
    embedded, trained = made["embeddings"], made["network"]
    want = expected(cfg, made, paths)
    if manifest := want.if_done():
        partial_sums.remove_all(paths.clusters)
        return manifest
    made_of, stems = want.made_of, [s["shard"]["stem"] for s in embedded["shards"]]
    sample = tables.read(paths.network.file("sample.parquet"), ["feature"])
    z = torch.from_numpy(tables.to_matrix(sample["feature"]).copy())
    fit = fit_settings(cfg, embedded["embedded"], *z.shape)
    network = load_network(paths)
    _check_k(fit.k, z)  # before any earlier result is removed
    paths.clusters.remove({*want.files[paths.clusters], "manifest.json"})
    parts = Parts(paths, stems, made_of)
    with one_thread(), StageProgress("select_k", 2 * len(stems), "parts") as progress:
        index = cut.neighbours(z)
        choice, prototypes = _decide(z, index, fit, parts, network, progress)
        landmarks = levels.Landmarks.of(z, prototypes, index)
        groups = levels.split(landmarks, fit.leaves, fit.seed)
        assigner = Assigner(network, prototypes, groups, made_of)
        assigned = assign_all(parts, assigner, progress)
    with one_thread():
        numbers = Numbers.by_size(assigned, groups)
        if not numbers.same:
            renumber(parts, numbers)
            prototypes, groups = numbers.prototypes(prototypes), numbers.groups(groups)
            landmarks, assigned = numbers.landmarks(landmarks), numbers.assigned(assigned)
        count, total, gram = assigned.clusters
        merges = tree.grow(count, total, gram, fit.eps_sq)
        found = levels.find(landmarks, groups, merges, assigned.groups, fit.eps_sq)
    sizes = count.long()
    if sizes.sum() != embedded["embedded"]:
        raise RuntimeError(f"select_k: {sizes.sum()} assigned of {embedded['embedded']} embedded")
    if want.parts(paths.assignments) != set(stems):
        raise RuntimeError("select_k: assignments/ changed during the run: run again")
    _warn(cfg, choice, prototypes)
    _write_clusters(choice, prototypes, merges, paths)
    _write_levels(groups, found, paths)
    cluster_bits = coding_rate.length_bits(count, gram, fit.eps_sq)
    choice = replace(choice, k=prototypes.k)
    facts = {key: value for key, value in vars(choice).items() if key not in CURVES}
    paths.assignments.sweep()
    paths.clusters.finish(
        made_of,
        upstream=trained["fingerprint"],
        config=config.facts(cfg),
        samples=int(sizes.sum()),
        sizes=sizes.tolist(),
        levels=(found.max(axis=1) + 1).tolist(),
        groups=assigned.groups.long().tolist(),
        cluster_bits=cluster_bits.tolist(),
        share_eta=prototypes.eta,
        bits=float((cluster_bits + coding_rate.name_bits(count, count.sum())).sum()),
        bits_of_one=float(choice.bits[0]),
        seconds=round(progress.seconds, 2),
        **facts,
    )
    partial_sums.remove_all(paths.clusters)
    console.log_finished(
        *(log, "select_k", progress.seconds, f"k = {choice.k}"),
        f"fewest bits at {choice.k_best} (band {choice.k_low} to {choice.k_high})",
        f"levels of {', '.join(f'{k + 1:,}' for k in found.max(axis=1))} clusters",
        f"{sizes.sum():,} samples",
    )
    return paths.clusters.manifest()


def _warn(cfg: Config, choice: Choice, prototypes: Prototypes) -> None:
    """Log what the user should know about k."""
    if prototypes.k < choice.k:
        log.warning(
            "select_k: only %d of %d requested clusters: the rest would contain identical samples",
            *(prototypes.k, choice.k),
        )
    if not cfg.k and not choice.k / DISAGREES <= choice.k_best <= choice.k * DISAGREES:
        log.warning(
            "select_k: k = %d has the best mean rank of four measures, but coding length is least "
            "at %d: look at the curves in the report, and set select_k.k to choose",
            *(choice.k, choice.k_best),
        )


def _write_levels(groups: levels.Groups, found: np.ndarray, paths: layout.RunPaths) -> None:
    columns = {
        "cluster_id": groups.cluster_of.int().numpy(),
        "levels": pa.array(found.T.tolist(), pa.list_(pa.int32())),
        "vector": tables.from_matrix(groups.table.numpy(), pa.float32()),
    }
    table = pa.table(columns, schema=schemas.levels_schema(groups.table.shape[1]))
    tables.write(paths.clusters.file("levels.parquet"), table)


def _as_arrays(choice: Choice, prototypes: Prototypes) -> Arrays:
    """The choice and the prototypes as arrays, for `PartialResult`."""
    facts = {name: np.asarray(value) for name, value in vars(choice).items()}
    where = {"table": prototypes.table.numpy(), "cluster_of": prototypes.cluster_of.numpy()}
    return {**facts, **where, "eta": np.float64(prototypes.eta)}


def _from_arrays(found: Arrays) -> tuple[Choice, Prototypes]:
    names = [f.name for f in fields(Choice)]
    facts: Any = {n: found[n] if n in CURVES else int(found[n]) for n in names}
    table, cluster_of = (torch.from_numpy(found[name]) for name in ("table", "cluster_of"))
    return Choice(**facts), Prototypes(table, cluster_of, float(found["eta"]))


def _write_clusters(
    choice: Choice,
    prototypes: Prototypes,
    merges: list[tree.Merge],
    paths: layout.RunPaths,
) -> None:
    ks = np.arange(1, len(choice.bits) + 1)
    every = np.full((6, len(ks)), np.nan)
    every[:3] = choice.bits, *choice.bands
    every[3:, choice.ks - 1] = choice.measures
    columns = [pa.array(ks, pa.int32()), *(pa.array(own, from_pandas=True) for own in every)]
    curve = pa.table(columns, schema=schemas.CURVE)
    tables.write(paths.clusters.file("curve.parquet"), curve)
    rows = [{"k": prototypes.k - step - 1, **vars(merge)} for step, merge in enumerate(merges)]
    merged = pa.Table.from_pylist(rows, schema=schemas.TREE)
    tables.write(paths.clusters.file("tree.parquet"), merged)
    table = pa.table(
        {
            "cluster_id": prototypes.cluster_of.int().numpy(),
            "vector": tables.from_matrix(prototypes.table.numpy(), pa.float32()),
        },
        schema=schemas.prototypes_schema(prototypes.table.shape[1]),
    )
    tables.write(paths.clusters.file("prototypes.parquet"), table)
