"""Command verify: reads every manifest and every part again and checks that they agree.

reads   everything below a run's root, and the input shards where they can still be read
writes  nothing

`row_checks` and `tar_checks` check one shard. This module checks the chain of the manifests, the
files in the folders, and the tables of the whole run.
"""

import json
import logging
from collections import Counter
from dataclasses import dataclass
from typing import Any

import numpy as np
import pyarrow as pa
from safetensors.numpy import load as load_tensors

from pipeline.artifacts import layout, schemas
from pipeline.artifacts.stages import chain, chain_to
from pipeline.ops.verify import row_checks, tar_checks
from pipeline.ops.verify.row_checks import RunFacts, Shard
from pipeline.ops.verify.violations import Violations, open_part, read_part
from pipeline.runtime import config, console, tasks
from pipeline.runtime.errors import UserError
from pipeline.runtime.progress import StageProgress
from pipeline.store import storage
from pipeline.store.listing import current

log = logging.getLogger(__name__)
OPENED = ("embeddings", "rejects", "clusters", "assignments", "captions", "labels", "exclude")
SPACES = {"clip": "embeddings", "z": "network"}  # space of an index -> folder of its input
Manifests = dict[str, dict[str, Any]]


@dataclass(frozen=True)
class ShardJob:
    """What every task gets in addition to its shard."""

    run: RunFacts
    tars: bool  # whether there are labelled shards
    limit: int  # bytes of a sample that embed read


def run(paths: layout.RunPaths) -> Violations:
    """Check a whole run; UserError if there is none."""
    found = Violations()
    made = _chain(paths, found)
    if "embeddings" not in made:
        if not paths.embeddings.names():
            raise UserError(f"{paths.root}: no run is there; give the --root of one")
        return found
    shards, job = made["embeddings"]["shards"], _job(paths, made, found)
    _folders(paths, made, job, found)
    sizes = np.zeros(job.run.k, np.int64)
    with StageProgress("verify", len(shards), "shards") as progress:
        for facts, shard in zip(shards, tasks.results(check_shard, shards, job), strict=True):
            found.merge(shard.found)
            sizes += shard.sizes
            progress.advance(samples=facts["samples"])
    _tables(paths, made, sizes, found)
    console.log_finished(log, "verify", progress.seconds, f"{len(shards):,} shards")
    return found


def check_shard(facts: dict[str, Any], job: ShardJob) -> Shard:
    """Check one shard; the result is small, without its tables."""
    shard = row_checks.check_rows(facts, job.run)
    if job.tars and shard.labels is not None:
        _tar(shard, job)
    shard.labels = None
    return shard


def _tar(shard: Shard, job: ShardJob) -> None:
    """Compare the labelled tar with its input, if that is unchanged and can be read."""
    place, was = f"labeled/{shard.stem}", shard.facts["shard"]
    target = job.run.paths.labeled.file(f"{shard.stem}.tar")
    if shard.labels is None or not storage.exists(target):  # reported already, or by `_folders`
        return
    try:
        if current(was["url"]) != (was["size"], was["version"]):
            shard.found.note(f"{place}: not compared, its input has changed since: {was['url']}")
            return
    except Exception as error:  # stores raise anything; it is no fault of the run
        shard.found.note(f"{place}: not compared, its input cannot be read: {error}")
        return
    labels = shard.labels.select(["sample_id", "shard", *schemas.IN_JSON]).to_pylist()
    try:
        for key, what in tar_checks.differences(was, target, labels, job.limit):
            shard.found.add(place, what, [key])
    except OSError as error:
        shard.found.note(f"{place}: not compared to its end: {error}")


def _chain(paths: layout.RunPaths, found: Violations) -> Manifests:
    """The manifests up to the first gap; checks that each follows from the one before.

    Fingerprints of network and captions hold word lists, which do not lie below the root.
    """
    made: Manifests = {}
    for place, stage in enumerate(chain()):
        name, facts = stage.folder, stage.facts
        manifest = _manifest(paths, name, found)
        if manifest is None:
            found.note(f"{name}: not there, or not finished")
        elif missing := [fact for fact in ("fingerprint", *facts) if fact not in manifest]:
            found.add(f"{name}/manifest.json", f"lacks {', '.join(missing)}")
        elif len(made) < place:
            found.add(f"{name}/manifest.json", "what it was made from is not there, or unsound")
        elif (upstream := manifest.get("upstream")) != _last(made):
            found.add(
                f"{name}/manifest.json", f"was made from {upstream}, before it is {_last(made)}"
            )
        else:
            if (digest := _digest(name, manifest)) != manifest["fingerprint"]:
                found.add(f"{name}/manifest.json", f"its fingerprint is not {digest}")
            made[name] = manifest
    return made


def _manifest(paths: layout.RunPaths, name: str, found: Violations) -> dict[str, Any] | None:
    try:
        return paths.folder(name).peek()
    except storage.DamagedError as error:
        found.add(f"{name}/manifest.json", str(error))
        return None


def _last(made: Manifests) -> str | None:
    return list(made.values())[-1]["fingerprint"] if made else None


def _digest(name: str, manifest: dict[str, Any]) -> str:
    """The fingerprint that a manifest should have, if it can be computed from the run."""
    if name == "embeddings":
        inputs = [[s["shard"][f] for f in ("stem", "size", "version")] for s in manifest["shards"]]
        return config.digest(manifest["config"], inputs)
    if name in ("clusters", "labels"):
        lists = manifest.get("exclude", [])  # digests of the lists
        return config.digest(manifest["config"], manifest["upstream"], *lists)
    return str(manifest["fingerprint"])


def _job(paths: layout.RunPaths, made: Manifests, found: Violations) -> ShardJob:
    embedded, clustered = made["embeddings"], made.get("clusters", {})
    written = made.get("labels", {})
    lists = written.get("exclude", [])
    excluded = (_manifest(paths, "exclude", found) if lists else None) or {}
    if excluded.get("digests", []) != lists:
        found.add("exclude/manifest.json", "is not of the lists that the labels were made with")
    cfg, encoders = embedded["config"], embedded["encoders"]
    made_by = [f"{each['model']}:{each['pretrained']}".rstrip(":") for each in encoders]
    wanted = [f"{cfg['model']}:{cfg['pretrained']}", *cfg.get("also", ())]
    if made_by != [name.rstrip(":") for name in wanted]:
        found.add("embeddings/manifest.json", f"names other encoders than its settings: {made_by}")
    facts = RunFacts(
        paths,
        config.digest(embedded["config"]),
        embedded["encoders"],
        embedded["columns"],
        clustered.get("fingerprint"),
        len(clustered.get("sizes", ())),
        made.get("captions", {}).get("captions"),
        written.get("fingerprint"),
        excluded.get("parts", {}),
    )
    tars = bool(written.get("config", {}).get("shards"))
    return ShardJob(facts, tars, embedded["config"]["max_sample_bytes"])


def _folders(paths: layout.RunPaths, made: Manifests, job: ShardJob, found: Violations) -> None:
    """Check that the folders hold all files of the finished stages, and no others."""
    stems = [shard["shard"]["stem"] for shard in made["embeddings"]["shards"]]
    twice = [stem for stem, times in Counter(stems).items() if times > 1]
    found.add("embeddings/manifest.json", "names a shard twice", twice)
    wanted: dict[str, set[str]] = {}
    for stage in chain():
        if stage.folder in made:
            wanted.setdefault(stage.folder, set()).update(stage.files)
            for name, suffix in stage.parts.items():
                wanted.setdefault(name, set()).update(f"{stem}{suffix}" for stem in stems)
    if "labels" in made:
        if not job.tars:
            wanted["labeled"] = set()
        wanted["exclude"] = {f"{stem}.parquet" for stem in job.run.excluded}
        missing = {"clusters.parquet", "run.json"} - paths.top.names()
        found.add("", "is missing", sorted(missing))
    for name, files in wanted.items():
        there = paths.folder(name).names() - {"manifest.json"}
        more = sorted(there - files)
        if name in ("embeddings", "rejects"):  # parts of shards that are no longer listed
            for part in more:
                found.note(f"{name}: {part} belongs to no shard of the run")
        else:
            found.add(name, "belongs to no shard of the run", more)
        if name not in OPENED:  # reading them finds those that are missing
            found.add(name, "is missing", sorted(files - there))
    found.add("", "is half a file", sorted(n for n in paths.top.names() if ".partial-" in n))


def _tables(paths: layout.RunPaths, made: Manifests, sizes: np.ndarray, found: Violations) -> None:
    """Check the tables of the whole run against its parts."""
    dim = made["embeddings"]["encoders"][0]["dim"]  # of texts and images by embed.model
    shards, manifest = made["embeddings"]["shards"], made["embeddings"]
    for name in ("samples", "embedded", "rejected"):
        if (total := sum(shard[name] for shard in shards)) != manifest[name]:
            found.add("embeddings/manifest.json", f"{name} is {manifest[name]}, of shards {total}")
    if "network" in made:
        _network(paths, dim, found)
    if "clusters" in made:
        _clusters(paths, made, sizes, found)
    if "captions" in made:
        _captions(paths, made, dim, found)
    if "labels" in made:
        _written(paths, made, found)
    for space in SPACES:
        _index(paths, made, space, found)


def _network(paths: layout.RunPaths, dim: int, found: Violations) -> None:
    try:
        shape = json.loads(storage.read_bytes(paths.network.file("network.json")))["shape"]
        load_tensors(storage.read_bytes(paths.network.file("network.safetensors")))
    except FileNotFoundError:
        return  # reported by `_folders`
    except Exception as error:  # safetensors has errors of its own
        found.add("network", f"cannot be read: {error}")
        return
    schema = schemas.sample_schema(dim, shape["feature_dim"])
    _table(paths, "network/sample.parquet", schema, found)
    _table(paths, "network/history.parquet", schemas.HISTORY, found)


def _table(
    paths: layout.RunPaths, name: str, schema: pa.Schema, found: Violations
) -> list[dict[str, Any]]:
    """The rows of a table; none, and a violation, if it has another schema."""
    table = read_part(open_part(paths.top.file(name), name, found), schema, name, found)
    return [] if table is None else table.to_pylist()


def _clusters(
    paths: layout.RunPaths, made: Manifests, sizes: np.ndarray, found: Violations
) -> None:
    said = made["clusters"]
    if sizes.tolist() != said["sizes"] or said["samples"] != sum(said["sizes"]):
        off = [
            c for c, (n, m) in enumerate(zip(sizes.tolist(), said["sizes"], strict=True)) if n != m
        ]
        found.add("clusters/manifest.json", f"sizes are not those of assignments/: clusters {off}")
    curve = _table(paths, "clusters/curve.parquet", schemas.CURVE, found)
    _table(paths, "clusters/tree.parquet", schemas.TREE, found)
    exemplars = _table(paths, "clusters/exemplars.parquet", schemas.EXEMPLARS, found)
    if [row["k"] for row in curve] != list(range(1, len(curve) + 1)):
        found.add("clusters/curve.parquet", "is not of every k from 1")
    wanted = {(c, kind) for c, n in enumerate(said["sizes"]) if n for kind in schemas.KINDS}
    if odd := {(row["cluster_id"], row["kind"]) for row in exemplars} ^ wanted:
        listed = sorted({cluster for cluster, _ in odd})
        found.add("clusters/exemplars.parquet", f"is not of every kind and cluster: {listed}")
    place = "clusters/prototypes.parquet"
    if (file := open_part(paths.top.file(place), place, found)) is not None:
        kinds = [f.type for f in file.schema_arrow if pa.types.is_fixed_size_list(f.type)]
        schema = schemas.prototypes_schema(kinds[0].list_size if kinds else 1)
        table = read_part(file, schema, place, found)
        if table is not None and set(table["cluster_id"].to_pylist()) != set(range(len(sizes))):
            found.add(place, "is not of every cluster")


def _index(paths: layout.RunPaths, made: Manifests, space: str, found: Violations) -> None:
    """Check that an index that search accepts holds all embedded samples."""
    place = f"index/{space}"
    if (manifest := _manifest(paths, place, found)) is None:
        return
    if manifest["upstream"] != made.get(SPACES[space], {}).get("fingerprint"):
        found.note(f"{place}: is out of date, search refuses it: run `ratecluster index` again")
        return
    if (samples := manifest["samples"]) != (embedded := made["embeddings"]["embedded"]):
        found.add(f"{place}/manifest.json", f"has {samples} samples, {embedded} are embedded")
    found.add(place, "is missing", sorted(set(manifest["files"]) - paths.folder(place).names()))


def _captions(paths: layout.RunPaths, made: Manifests, dim: int, found: Violations) -> None:
    _table(paths, "captions/candidates.parquet", schemas.candidates_schema(dim), found)
    _table(paths, "captions/voted.parquet", schemas.CAPTIONS, found)
    rows = _table(paths, "captions/captions.parquet", schemas.CAPTIONS, found)
    best = {row["cluster_id"]: row["caption"] for row in rows if row["rank"] == 0}
    said = made["captions"]["captions"]
    if [best.get(c) for c in range(len(said))] != said or len(said) != len(
        made["clusters"]["sizes"]
    ):
        found.add("captions/captions.parquet", "is not what the manifest names the clusters")


def _written(paths: layout.RunPaths, made: Manifests, found: Violations) -> None:
    """Check clusters.parquet and run.json against the other tables and manifests."""
    if made["labels"]["labels"] != made["embeddings"]["samples"]:
        found.add("labels/manifest.json", "has not as many labels as there are samples")
    ranked: dict[int, list[str]] = {}
    for row in _table(paths, "captions/captions.parquet", schemas.CAPTIONS, Violations()):
        ranked.setdefault(row["cluster_id"], []).append(row["caption"])
    wanted = [
        (c, size, made["captions"]["captions"][c], ranked.get(c, []))
        for c, size in enumerate(made["clusters"]["sizes"])
    ]
    names = ("cluster_id", "size", "cluster_caption", "captions")
    rows = _table(paths, "clusters.parquet", schemas.CLUSTERS, found)
    if [tuple(row[name] for name in names) for row in rows] != wanted:
        found.add("clusters.parquet", "is not what sizes and captions of the clusters are")
    try:
        stages = json.loads(storage.read_bytes(paths.run_json))["stages"]
        said = {stage["fingerprint"] for stage in stages.values()}
    except FileNotFoundError:
        return
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        found.add("run.json", f"cannot be read: {error}")
        return
    if said != {made[stage.folder]["fingerprint"] for stage in chain_to("write")}:
        found.add("run.json", "names other fingerprints than the manifests")
