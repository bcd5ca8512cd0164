"""Command assign: assign new shards to the clusters of a finished run, without training.

reads   the new shards; network/, clusters/, captions/, assignments/ of the run
writes  a new root with the layout of a run: embeddings/, rejects/, assignments/, labels/, labeled/
        of the new shards; copies of network/, clusters/, captions/, whose manifests say
        `taken_from`
        curation/unexplained/   OUTLIERS   samples that the clusters do not explain

It runs embed with the run's settings, the second pass of select_k, and write. A cluster may have no
member here, and cluster 0 need not be the largest. A sample is unexplained if its outlier_score is
above a quantile of the run's scores.
"""

import logging
from typing import Any

import torch

from pipeline.artifacts import inputs, layout, outputs
from pipeline.artifacts.stages import Stage, chain
from pipeline.embed import settings as embed_settings
from pipeline.embed import stage as embed
from pipeline.explore.curate import outliers
from pipeline.mcr2 import coding_rate
from pipeline.mcr2.assignment import Prototypes
from pipeline.mcr2.levels import Groups
from pipeline.runtime import config, console
from pipeline.runtime.errors import UserError
from pipeline.runtime.progress import StageProgress
from pipeline.select_k.assign_parts import Assigner, load_network
from pipeline.select_k.full_passes import Parts, assign_all
from pipeline.store import partial_sums, storage, tables
from pipeline.store.listing import Shard
from pipeline.write import settings as write_settings
from pipeline.write import stage as write

log = logging.getLogger(__name__)
COPIED = [stage for stage in chain() if stage.name in ("train", "select_k", "caption")]


def encoder(asked: embed_settings.Config, made_with: dict[str, Any]) -> embed_settings.Config:
    """The run's settings, and of `asked` those that do not change embeddings.

    UserError if `asked` names another encoder.
    """
    usual = config.facts(embed_settings.Config())
    for name, value in config.facts(asked).items():
        if value != usual[name] and value != made_with.get(name, value):
            raise UserError(
                f"embed.{name} = {value!r}, but the run used {made_with[name]!r}, and its "
                "clusters hold only for that encoder; leave the setting out"
            )
    return config.as_made(asked, made_with)


def check(source: layout.RunPaths, shards: list[Shard], paths: layout.RunPaths) -> None:
    """UserError if the new root is that of the run, or holds a trained run."""
    if source.root.rstrip("/") == paths.root.rstrip("/"):
        raise UserError(f"--root {paths.root} is the run itself; give the new shards another root")
    trained = paths.network.peek()
    if trained is not None and "taken_from" not in trained:
        raise UserError(f"--root {paths.root} holds a trained run; give another root")
    known = {facts["shard"]["stem"] for facts in source.embeddings.manifest()["shards"]}
    if same := sorted(known & {shard.stem for shard in shards}):
        log.warning(
            "assign: %d shards share names with shards of the run, such as %s: sample_ids are "
            "unique in %s, but not together with those in %s",
            *(len(same), same[0], paths.root, source.root),
        )


def run(
    sections: config.Sections,
    source: layout.RunPaths,
    shards: list[Shard],
    paths: layout.RunPaths,
    unexplained: outliers.Config,
    overwrite: bool = False,
) -> dict[str, Any]:
    """Embed, assign, list unexplained samples, write; returns the manifest of the list."""
    given = outputs.upstream(source, "captions")
    check(source, shards, paths)
    made_with = given["embeddings"]
    if inputs.are_given(made_with["config"]):
        raise UserError(
            f"{source.root}: its embeddings were given, and no encoder is known that makes those "
            "of new shards; run `ratecluster run --embeddings` on old and new ones together"
        )
    asked = encoder(sections["embed"], made_with["config"])
    embed_settings.check({"embed": asked})
    write_settings.digests(sections["write"])  # a missing list is an error before the work
    embedded = embed.run(asked, paths, shards, overwrite)
    if embedded["precisions"] != made_with.get("precisions"):
        log.warning(
            "assign: the run was embedded on %s, these shards on %s: cosines may differ a little",
            *(made_with.get("precisions"), embedded["precisions"]),
        )
    stems = [facts["shard"]["stem"] for facts in embedded["shards"]]
    upstream = embedded["fingerprint"]
    before: list[Any] = [upstream, [given[stage.folder]["fingerprint"] for stage in COPIED]]
    for stage in COPIED:
        name = stage.folder
        made_of = config.digest(given[name]["config"], *before, *stage.version)
        want = expected(stage, made_of, stems, paths)
        if want.if_done() is None:
            facts = given[name] | {"upstream": upstream}
            if name == "clusters":
                facts |= _assign(want.made_of, stems, given, source, paths)
            _copy(want, facts, source.folder(name))
        upstream, before = want.made_of, [want.made_of]
    partial_sums.remove_all(paths.clusters)
    found = outliers.run(unexplained, paths, "unexplained", "unexplained", source)
    write.run(sections["write"], paths)
    return found


def expected(
    stage: Stage, made_of: str, stems: list[str], paths: layout.RunPaths
) -> outputs.ExpectedOutputs:
    """The files of a copied folder, and the parts of the new shards."""
    folder = paths.folder(stage.folder)
    files = {folder: list(stage.files)}
    for part, suffix in stage.parts.items():
        files[paths.folder(part)] = [f"{stem}{suffix}" for stem in stems]
    return outputs.ExpectedOutputs(f"assign: {stage.folder}", folder, made_of, None, files)


def _copy(want: outputs.ExpectedOutputs, facts: dict[str, Any], source: storage.Folder) -> None:
    """Copy the files of the run, then write a manifest that names the run."""
    want.folder.remove({"manifest.json"})
    for name in sorted(want.files[want.folder]):
        if name != "exemplars.parquet":  # it is of the new samples
            storage.write_bytes(want.folder.file(name), storage.read_bytes(source.file(name)))
    facts = {**facts, "taken_from": source.url.rpartition("/")[0]}
    want.folder.finish(want.made_of, **{k: v for k, v in facts.items() if k != "fingerprint"})


def _vectors(source: layout.RunPaths, name: str) -> tuple[torch.Tensor, torch.Tensor]:
    """Unit rows (p, d) of a table in clusters/, and the cluster (p,) of each."""
    table = tables.read(source.clusters.file(f"{name}.parquet"), ["vector", "cluster_id"])
    return (
        torch.from_numpy(tables.to_matrix(table["vector"]).copy()),
        torch.from_numpy(table["cluster_id"].to_numpy().copy()).long(),
    )


def _assign(
    made_of: str,
    stems: list[str],
    given: outputs.Manifests,
    source: layout.RunPaths,
    paths: layout.RunPaths,
) -> dict[str, Any]:
    """Assign every new sample; returns facts of the clusters that depend on these samples."""
    samples = paths.embeddings.manifest()["embedded"]
    table, cluster_of = _vectors(source, "prototypes")
    prototypes = Prototypes(table, cluster_of, given["clusters"]["share_eta"])
    groups = Groups(*_vectors(source, "levels"))
    with StageProgress("assign", len(stems), "parts") as progress:
        assigner = Assigner(load_network(source), prototypes, groups, made_of)
        assigned = assign_all(Parts(paths, stems, made_of), assigner, progress)
    count, _, gram = assigned.clusters
    if count.sum() != samples:
        raise RuntimeError(f"assign: {count.sum():.0f} of {samples}: run again")
    bits = coding_rate.length_bits(count, gram, given["clusters"]["config"]["eps_sq"])
    paths.assignments.sweep()
    console.log_finished(log, "assign", progress.seconds, f"{samples:,} samples")
    return {
        "samples": samples,
        "sizes": count.long().tolist(),
        "groups": assigned.groups.long().tolist(),
        "cluster_bits": bits.tolist(),
        "seconds": round(progress.seconds, 2),
    }
