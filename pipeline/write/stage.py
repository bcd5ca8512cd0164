"""Stage 5, write: the labels.

reads   embeddings/, rejects/, assignments/, captions/, and the input shards again
writes  labels/{stem}.parquet   labels_schema  one row per input sample, failures included
        labeled/{stem}.tar                     the shard with labels added to its json, without
                                               the excluded samples
        exclude/{stem}.parquet  EXCLUDED       the excluded samples, if any
        clusters.parquet        CLUSTERS       one row per cluster
        levels.parquet          LEVELS         one row per cluster of every level
        run.json                               versions, settings and counts of the run
        README.md                              describes the tables to Hugging Face `datasets`
        labels/manifest.json

A shard's tar is committed before its labels, so the labels show that the shard is done.
Core: `label_rows`, `relabel` (no Ray). Shell: `run`.
"""

import json
import logging
from dataclasses import dataclass
from functools import partial
from itertools import zip_longest
from typing import IO, Any

import pyarrow as pa
import pyarrow.compute as pc

from pipeline.artifacts import inputs, layout, levels, outputs, schemas
from pipeline.artifacts.joins import read_joined
from pipeline.artifacts.levels import Levels
from pipeline.artifacts.stages import chain_to
from pipeline.mcr2 import assignment
from pipeline.runtime import config, console, tasks
from pipeline.runtime.progress import StageProgress
from pipeline.store import columns, compressed, storage, tables
from pipeline.store.listing import version_now
from pipeline.store.shard_writer import ShardWriter, labelled
from pipeline.store.shards import ShardReader
from pipeline.write import exclude_lists
from pipeline.write.settings import Config, digests, expected

log = logging.getLogger(__name__)
NEAREST = 3  # clusters named as neighbours of each
TYPICAL = 5  # members named for each cluster
# README.md describes the tables to Hugging Face `datasets`: load_dataset(root) reads the labels.
# Without it, `datasets` would read all Parquet files of the run as one table.
CARD = """---
configs:
- config_name: labels
  default: true
  data_files: labels/*.parquet
- config_name: embeddings
  data_files: embeddings/*.parquet
- config_name: clusters
  data_files: clusters.parquet
- config_name: levels
  data_files: levels.parquet
---
# A collection labelled by ratecluster

{samples:,} samples in {clusters:,} clusters. `labels` has a row for every sample, `embeddings` for
every one that could be read, `clusters` for every cluster; they join by `sample_id` and
`cluster_id`. `levels` has the coarser and finer clusters. `report/index.html` shows the clusters,
`run.json` says what made them.
"""


@dataclass(frozen=True)
class WriteJob:
    """What every task gets in addition to its shards."""

    paths: layout.RunPaths
    kinds: dict[str, str]  # of the run's json columns
    levels: Levels
    captions: list[list[str | None]]  # best caption of each cluster of each level
    shards: bool
    made_of: str
    max_sample_bytes: int  # the limit for a sample, as in embed
    excluded: frozenset[str] = frozenset()  # stems of the shards that have excluded samples


def label_rows(stem: str, job: WriteJob) -> pa.Table:
    """labels_schema: one row per input sample of a shard, in the order of the tar."""
    other = ("sample_id", "embedding")
    wanted = [name for name in schemas.embeddings_schema(1).names if name not in other]
    ours = [name for name in schemas.ASSIGNMENTS.names if name != "sample_id"]
    schema = schemas.labels_schema(job.kinds, len(job.captions))
    assigned = read_joined(stem, job.paths, wanted, ours)
    rejected = tables.read(job.paths.rejects.file(f"{stem}.parquet"))
    rejected = rejected.filter(pc.is_valid(rejected["sample_id"]))
    captions = job.captions[job.levels.default]
    rows = [
        {**row, "status": "success", "cluster_caption": captions[row["cluster_id"]]}
        | _level_columns(job, row["group"])
        for row in assigned.to_pylist()
    ]
    for row in rejected.to_pylist():
        known = {"image_member": row["member"], "error_message": row["reason"]}
        rows.append({**row, **known, "status": "rejected"})
    rows.sort(key=lambda row: row["index"])
    names = schemas.label_names(job.kinds)
    excluded = exclude_lists.reasons(stem, job.paths) if stem in job.excluded else {}
    for row in rows:
        if row["sample_id"] in excluded:
            row |= {"status": "excluded", "error_message": excluded[row["sample_id"]]}
        for name, value in columns.values(columns.parse(row["json"]), job.kinds).items():
            row[names[name]] = value
    return pa.Table.from_pylist(rows, schema=schema)


def _level_columns(job: WriteJob, group: int) -> dict[str, Any]:
    """The cluster of a small group at each level, and its caption."""
    found: dict[str, Any] = {}
    for level, captions in enumerate(job.captions):
        cluster = int(job.levels.clusters[group, level])
        found |= {f"cluster_l{level + 1}": cluster}
        found |= {f"cluster_l{level + 1}_caption": captions[cluster]}
    return found


def relabel(
    shard: dict[str, Any], target: IO[bytes], labels: list[dict[str, Any]], max_sample_bytes: int
) -> int:
    """Copy a shard, adding each sample's label to its json; returns the number of samples read.

    `labels` are in the order of the tar. Excluded samples are left out. Member names, bytes and
    order of the others do not change. At most `max_sample_bytes` of a sample are held; larger
    members are copied in pieces. RuntimeError if samples and labels do not match.
    """
    count = 0
    stream = compressed.open_tar(shard["url"], shard["size"], version_now(shard))
    with stream as source, ShardWriter(target) as writer:
        for sample, label in zip_longest(ShardReader(source, max_sample_bytes), labels):
            found = sample and f"{label['shard'] if label else '?'}/{sample.id}"
            if found != (label and label["sample_id"]):
                raise RuntimeError(
                    f"write: sample {count} is {found}, its label is of "
                    f"{label and label['sample_id']}: the shard changed since it was embedded"
                )
            count += 1
            if label["status"] == "excluded":
                continue
            for name, data in labelled(sample, _json_label(label)):
                if isinstance(data, bytes):
                    writer.add(name, data)
                else:
                    with compressed.open_tar(shard["url"]) as again:
                        compressed.skip(again, data.offset)
                        writer.add_from(name, again, data.size)
    return count


def _json_label(label: dict[str, Any]) -> dict[str, Any]:
    """The value of "ratecluster" in a sample's json: the fields that are not null."""
    found = {name: label[name] for name in schemas.IN_JSON if label[name] is not None}
    return {n: round(v, 6) if isinstance(v, float) else v for n, v in found.items()}


def write_shards(shards: list[dict[str, Any]], job: WriteJob) -> list[int]:
    """Write labels and labelled tars of some shards; returns the number of samples of each."""
    counts = []
    for shard in shards:
        stem = shard["stem"]
        table = label_rows(stem, job)
        if job.shards:
            storage.retry(partial(_copy, shard, table, job))
        tables.write(
            job.paths.labels.file(f"{stem}.parquet"),
            table,
            made_of=job.made_of,
            rows=table.num_rows,
            excluded=pc.sum(pc.equal(table["status"], "excluded")).as_py() or 0,
        )
        counts.append(table.num_rows)
    return counts


def _copy(shard: dict[str, Any], table: pa.Table, job: WriteJob) -> None:
    wanted = ["sample_id", "shard", *schemas.IN_JSON]
    target = job.paths.labeled.file(f"{shard['stem']}.tar")
    labels = table.select(wanted).to_pylist()
    with storage.commit(target) as file:
        relabel(shard, file, labels, job.max_sample_bytes)


def cluster_rows(paths: layout.RunPaths) -> pa.Table:
    """CLUSTERS: size, captions, tightness, neighbours and typical members of each cluster."""
    prototypes = tables.read(paths.clusters.file("prototypes.parquet"))
    captions = tables.read(paths.captions.file("captions.parquet")).to_pylist()
    names = ["cluster_id", "kind", "sample_id"]
    exemplars = tables.read(paths.clusters.file("exemplars.parquet"), names)
    exemplars = exemplars.filter(pc.equal(exemplars["kind"], "typical")).to_pylist()
    manifest = paths.clusters.manifest()
    vectors, cluster_of = (prototypes[name] for name in ("vector", "cluster_id"))
    nearest = assignment.nearest_clusters(tables.to_matrix(vectors), cluster_of.to_numpy(), NEAREST)
    rows = []
    for cluster, size in enumerate(manifest["sizes"]):
        own = [row for row in captions if row["cluster_id"] == cluster]
        typical = [row["sample_id"] for row in exemplars if row["cluster_id"] == cluster]
        rows.append(
            {
                "cluster_id": cluster,
                "size": size,
                "cluster_caption": own[0]["caption"] if own else None,
                "captions": [row["caption"] for row in own],
                "caption_shares": [row["share"] for row in own],
                "bits_per_sample": manifest["cluster_bits"][cluster] / size if size else None,
                "nearest_clusters": nearest[cluster],
                "typical_samples": typical[:TYPICAL],
            }
        )
    return pa.Table.from_pylist(rows, schema=schemas.CLUSTERS)


def level_rows(found: Levels, made: outputs.Manifests, paths: layout.RunPaths) -> pa.Table:
    """LEVELS: the clusters of every level; those of cluster_id have their best captions."""
    groups, best = made["clusters"]["groups"], made["captions"]["captions"]
    captions = {
        (row["level"] - 1, row["cluster_id"]): row
        for row in tables.read(paths.captions.file("levels.parquet")).to_pylist()
    }
    for row in tables.read(paths.captions.file("captions.parquet")).to_pylist():
        if row["rank"] == 0:
            own = {"caption": best[row["cluster_id"]], "share": row["share"]}
            captions[found.default, row["cluster_id"]] = own
    rows = []
    for level in range(found.clusters.shape[1]):
        parents = found.within(level, level - 1) if level else None
        for cluster, size in enumerate(found.sizes(level, groups)):
            caption = captions.get((level, cluster), {})
            rows.append(
                {
                    "level": level + 1,
                    "cluster_id": cluster,
                    "parent": None if parents is None else int(parents[cluster]),
                    "size": size,
                    "cluster_caption": caption.get("caption"),
                    "share": caption.get("share"),
                }
            )
    return pa.Table.from_pylist(rows, schema=schemas.LEVELS)


def run_facts(paths: layout.RunPaths) -> dict[str, Any]:
    """Versions, shards, and the settings, counts and fingerprint of each stage."""
    facts = {stage.name: paths.folder(stage.folder).manifest() for stage in chain_to("write")}
    urls = [shard["shard"]["url"] for shard in facts["embed"].pop("shards")]
    shards = {"count": len(urls), "first": urls[0], "last": urls[-1]}
    return {"versions": outputs.versions(), "shards": shards, "stages": facts}


def run(cfg: Config, paths: layout.RunPaths) -> dict[str, Any]:
    """Write the missing labels and shards, check the counts, commit the tables."""
    made = outputs.upstream(paths, "captions")
    embedded, clustered, captioned = made["embeddings"], made["clusters"], made["captions"]
    lists = digests(cfg)  # once: the lists may change while the stage runs
    want = expected(cfg, made, paths, lists)
    if manifest := want.if_done():
        return manifest
    exclude_lists.check(cfg.exclude, made)  # before any earlier result is removed
    shards, made_of = [s["shard"] for s in embedded["shards"]], want.made_of
    done = want.parts(paths.labels)
    _remove_others(paths, done)
    last = {"run.json", "clusters.parquet", "levels.parquet"}
    paths.top.remove(last)  # written last: never of another run
    todo = [shard for shard in shards if shard["stem"] not in done]
    limit = embedded["config"]["max_sample_bytes"]
    listed = exclude_lists.run(cfg.exclude, lists, made, paths)
    found = levels.read(paths)
    every = level_rows(found, made, paths)
    named: list[list[str | None]] = [[] for _ in clustered["levels"]]
    for row in every.to_pylist():
        named[row["level"] - 1].append(row["cluster_caption"])
    known = (embedded["columns"], found, named)
    tars = cfg.shards and inputs.has_shards(embedded)
    job = WriteJob(paths, *known, tars, made_of, limit, frozenset(listed))
    chunks = tasks.chunks(todo, max(1, len(todo)))
    with StageProgress("write", len(todo), "shards") as progress:
        for chunk, counts in zip(chunks, tasks.results(write_shards, chunks, job), strict=True):
            progress.advance(len(chunk), sum(counts))
    excluded = _check_counts(embedded, paths, made_of)
    if (lost := (total := sum(listed.values())) - excluded) > 0:
        log.warning("write: %d of %d ids to exclude are of no sample of their shard", lost, total)
    tables.write(paths.clusters_table, cluster_rows(paths))
    tables.write(paths.top.file("levels.parquet"), every)
    card = CARD.format(samples=embedded["samples"], clusters=len(clustered["sizes"]))
    storage.write_bytes(paths.top.file("README.md"), card.encode())
    for folder in (paths.labeled, paths.top):
        folder.sweep()
    paths.labels.finish(
        made_of,
        upstream=captioned["fingerprint"],
        config=config.facts(cfg),
        labels=embedded["samples"],
        excluded=excluded,
        exclude=lists,
        clusters=len(clustered["sizes"]),
        seconds=round(progress.seconds, 2),
        samples_per_s=progress.samples_per_s,
    )
    text = json.dumps(run_facts(paths), indent=1, sort_keys=True, ensure_ascii=False)
    storage.write_bytes(paths.run_json, text.encode())
    counted = (f"{embedded['samples']:,} labels", f"{excluded:,} excluded")
    console.log_finished(log, "write", progress.seconds, *counted)
    return paths.labels.manifest()


def _remove_others(paths: layout.RunPaths, done: set[str]) -> None:
    """Remove labels and shards of another fingerprint, so that they are never mixed.

    Files that no run has written stay.
    """
    facts = outputs.part_facts(paths.labels, paths.labels.stems())
    ours = {stem for stem, own in facts.items() if "made_of" in own}
    paths.labels.remove({"manifest.json"} | {f"{stem}.parquet" for stem in ours - done})
    embedded = {facts["shard"]["stem"] for facts in paths.embeddings.manifest()["shards"]}
    paths.labeled.remove({f"{stem}.tar" for stem in (ours | embedded) - done})


def _check_counts(embedded: dict[str, Any], paths: layout.RunPaths, made_of: str) -> int:
    """The number of excluded samples; RuntimeError if the labels of a shard are not complete."""
    facts = outputs.part_facts(paths.labels, [s["shard"]["stem"] for s in embedded["shards"]])
    for shard in embedded["shards"]:
        stem = shard["shard"]["stem"]
        wanted = {"rows": shard["samples"], "made_of": made_of}
        found = {name: facts.get(stem, {}).get(name) for name in wanted}
        if found != wanted:
            raise RuntimeError(f"write: {stem}: labels are {found}, not {wanted}: run again")
    return sum(part["excluded"] for part in facts.values())
