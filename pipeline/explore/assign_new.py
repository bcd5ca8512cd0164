"""Command assign: new shards into the clusters of a finished run, without training.

reads   the new shards; of the run: network/, clusters/, captions/, assignments/
writes  a root of its own that is laid out as a run: embeddings/, rejects/, assignments/, labels/,
        labeled/ of the new shards; network/, clusters/, captions/ as the run has them, whose
        manifests say `taken_from`
        curation/unexplained/   OUTLIERS   samples that the run's clusters do not explain

Every step is the stage's own: embed with the run's settings, the second pass of select_k, write. A
cluster of the run may have no member here, and cluster 0 need not be the largest. A sample is not
explained if its outlier_score is above a quantile of the run's own.
"""

import logging
from typing import Any

import torch

from pipeline.artifacts import layout, outputs
from pipeline.embed import settings as embed_settings
from pipeline.embed import stage as embed
from pipeline.explore.curate import outliers
from pipeline.mcr2 import coding_rate
from pipeline.mcr2.assignment import Prototypes
from pipeline.runtime import config, console
from pipeline.runtime.errors import UserError
from pipeline.runtime.progress import StageProgress
from pipeline.select_k.assign_parts import Assigner, load_network
from pipeline.select_k.full_passes import Parts, assign_all
from pipeline.store import partial_sums, storage, tables
from pipeline.store.listing import Shard
from pipeline.write import stage as write

log = logging.getLogger(__name__)
COPIED = {
    "network": ("network.safetensors", "network.json", "history.parquet", "sample.parquet"),
    "clusters": ("curve.parquet", "tree.parquet", "prototypes.parquet"),
    "captions": ("captions.parquet", "voted.parquet", "candidates.parquet"),
}


def encoder(asked: embed_settings.Config, made_with: dict[str, Any]) -> embed_settings.Config:
    """The run's own settings; of those asked for, what does not change the embeddings.

    UserError where another encoder is asked for.
    """
    usual = config.facts(embed_settings.Config())
    for name, value in config.facts(asked).items():
        if value != usual[name] and value != made_with.get(name, value):
            raise UserError(
                f"embed.{name} = {value!r}, but the run was made with {made_with[name]!r}: its "
                "clusters are of its own encoder; leave the setting out"
            )
    return config.as_made(asked, made_with)


def check(source: layout.RunPaths, shards: list[Shard], paths: layout.RunPaths) -> None:
    """UserError where the new root is the run's, or holds a run that was trained there."""
    if source.root.rstrip("/") == paths.root.rstrip("/"):
        raise UserError(f"--root {paths.root} is the run itself; give the new shards a root")
    trained = paths.network.peek()
    if trained is not None and "taken_from" not in trained:
        raise UserError(f"--root {paths.root} holds a run that was trained there; give another")
    known = {facts["shard"]["stem"] for facts in source.embeddings.manifest()["shards"]}
    if same := sorted(known & {shard.stem for shard in shards}):
        log.warning(
            "assign: %d shards are named as shards of the run, the first %s: their sample_ids are "
            "unique in %s, but not together with those of %s",
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
    """Embed, assign, list what is not explained, write; the manifest of that list."""
    given = outputs.upstream(source, "captions")
    check(source, shards, paths)
    before = given["embeddings"]
    asked = encoder(sections["embed"], before["config"])
    embed.check(asked)
    write.digests(sections["write"])  # lists that are not there are told of before the work
    embedded = embed.run(asked, shards, paths, overwrite)
    if embedded["precisions"] != before.get("precisions"):
        log.warning(
            "assign: the run was embedded on %s, these shards on %s: cosines may differ a little",
            *(before.get("precisions"), embedded["precisions"]),
        )
    wants = wanted(given, embedded, source, paths)
    upstream = embedded["fingerprint"]
    for name, want in wants.items():
        if want.if_done() is None:
            counted = _assigned(want, embedded, given, source, paths) if name == "clusters" else {}
            _copy(want, {**given[name], "upstream": upstream, **counted}, source.folder(name))
        upstream = want.made_of
    partial_sums.remove_all(paths.clusters)
    found = outliers.run(unexplained, paths, "unexplained", "unexplained", source)
    write.run(sections["write"], paths)
    return found


def wanted(
    given: outputs.Manifests,
    embedded: dict[str, Any],
    source: layout.RunPaths,
    paths: layout.RunPaths,
) -> dict[str, outputs.ExpectedOutputs]:
    """What is to lie in the folders that are the run's; each was made from the one before."""
    prints = [given[name]["fingerprint"] for name in COPIED]
    upstream: list[Any] = [embedded["fingerprint"], prints]
    found = {}
    for name, files in COPIED.items():
        folder = paths.folder(name)
        all_files = {folder: list(files)}
        if name == "clusters":
            stems = [facts["shard"]["stem"] for facts in embedded["shards"]]
            all_files[folder].append("exemplars.parquet")
            all_files[paths.assignments] = [f"{stem}.parquet" for stem in stems]
        made_of = config.digest(given[name]["config"], *upstream)
        found[name] = outputs.ExpectedOutputs(f"assign: {name}", folder, made_of, None, all_files)
        upstream = [made_of]
    return found


def _copy(want: outputs.ExpectedOutputs, facts: dict[str, Any], source: storage.Folder) -> None:
    """The files of the run, then a manifest that says whose they are."""
    want.folder.remove({"manifest.json"})
    for name in COPIED[source.url.rpartition("/")[2]]:
        storage.write_bytes(want.folder.file(name), storage.read_bytes(source.file(name)))
    facts = {**facts, "taken_from": source.url.rpartition("/")[0]}
    want.folder.finish(want.made_of, **{k: v for k, v in facts.items() if k != "fingerprint"})


def _assigned(
    want: outputs.ExpectedOutputs,
    embedded: dict[str, Any],
    given: outputs.Manifests,
    source: layout.RunPaths,
    paths: layout.RunPaths,
) -> dict[str, Any]:
    """Assign every new sample; the facts of the clusters that are of these samples."""
    clustered = given["clusters"]
    table = tables.read(source.clusters.file("prototypes.parquet"))
    prototypes = Prototypes(
        torch.from_numpy(tables.to_matrix(table["vector"]).copy()),
        torch.from_numpy(table["cluster_id"].to_numpy().copy()).long(),
        clustered["share_eta"],
    )
    stems = [facts["shard"]["stem"] for facts in embedded["shards"]]
    with StageProgress("assign", len(stems), "parts") as progress:
        assigner = Assigner(load_network(source), prototypes, want.made_of)
        count, _, gram = assign_all(Parts(paths, stems, want.made_of), assigner, progress)
    if count.sum() != embedded["embedded"]:
        raise RuntimeError(f"assign: {count.sum():.0f} of {embedded['embedded']}: run again")
    bits = coding_rate.length_bits(count, gram, clustered["config"]["eps_sq"])
    paths.assignments.sweep()
    console.log_finished(log, "assign", progress.seconds, f"{embedded['embedded']:,} samples")
    sizes = count.long().tolist()
    return {
        "samples": sum(sizes),
        "sizes": sizes,
        "cluster_bits": bits.tolist(),
        "seconds": round(progress.seconds, 2),
    }
