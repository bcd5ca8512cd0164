"""Command verify: reads every manifest and every part again and checks that they agree.

reads   everything below a run's root, and the input shards where they can still be read
writes  nothing

`row_checks` and `tar_checks` check one shard. This module checks the chain of the manifests, the
files in the folders, and the tables of the whole run.
"""

import json
import logging
from collections import Counter
from typing import Any

import numpy as np
import pyarrow as pa
from safetensors.numpy import load as load_tensors

from pipeline.artifacts import inputs, layout, schemas
from pipeline.artifacts.stages import chain, chain_to
from pipeline.ops.verify import level_checks, row_checks, tar_checks, tar_walk
from pipeline.ops.verify.row_checks import RunFacts, Shard
from pipeline.ops.verify.run_check import RunCheck
from pipeline.ops.verify.violations import Violations, open_part, read_part, vector_length
from pipeline.runtime import config, console, tasks
from pipeline.runtime.errors import UserError
from pipeline.runtime.progress import StageProgress
from pipeline.store import compressed, storage
from pipeline.store.listing import current, version_now
from pipeline.store.storage import PARTIAL

log = logging.getLogger(__name__)
OPENED = ("embeddings", "rejects", "clusters", "assignments", "captions", "labels", "exclude")
SPACES = {"clip": "embeddings", "z": "network"}  # space of an index -> folder of its input


def run(paths: layout.RunPaths) -> Violations:
    """Check a whole run; UserError if there is none."""
    check = RunCheck(paths)
    _chain(check)
    if "embeddings" not in check.made:
        if not paths.embeddings.names():
            raise UserError(f"{paths.root}: no run is there; give the --root of one")
        return check.found
    shards, facts = check.made["embeddings"]["shards"], _facts(check)
    for problem, (count, first) in check.made["embeddings"].get("text_problems", {}).items():
        check.found.note(f"texts of {count} samples were not read, such as {first}: {problem}")
    _folders(check, facts)
    sizes = np.zeros(facts.k, np.int64)
    with StageProgress("verify", len(shards), "shards") as progress:
        results = tasks.results(check_shard, shards, facts)
        for shard, (found, counts) in zip(shards, results, strict=True):
            check.found.merge(found)
            sizes += counts
            progress.advance(samples=shard["samples"])
    check.sizes = sizes.tolist()
    check.dim = facts.encoders[0]["dim"]
    _tables(check)
    console.log_finished(log, "verify", progress.seconds, f"{len(shards):,} shards")
    return check.found


def check_shard(facts: dict[str, Any], run: RunFacts) -> tuple[Violations, np.ndarray]:
    """Check one shard: its violations, the sizes of its clusters."""
    shard = row_checks.check_rows(facts, run)
    if run.shards and _is_there(shard):
        _input(shard)
        if run.tars and shard.labels is not None:
            _tar(shard, shard.labels)
    return shard.found, shard.sizes


def _is_there(shard: Shard) -> bool:
    """Whether the input shard is unchanged and can be read; adds a note otherwise."""
    was, not_compared = shard.facts["shard"], f"{shard.stem}: not compared with its input, which"
    try:
        if current(was["url"]) == (was["size"], version_now(was)):
            return True
        shard.found.note(f"{not_compared} has changed since: {was['url']}")
    except Exception as error:  # stores raise anything; it is no fault of the run
        shard.found.note(f"{not_compared} cannot be read: {error}")
    return False


def _input(shard: Shard) -> None:
    """Check that every file of the input shard is of a sample of the run, byte by byte."""
    was, place = shard.facts["shard"], f"embeddings/ and rejects/{shard.stem}"
    if shard.keys is None:  # reported by `check_rows`
        return
    try:
        with compressed.open_tar(was["url"], was["size"]) as stream:
            found = tar_walk.walk(stream)
    except OSError as error:
        shard.found.note(f"{shard.stem}: its input could not be read to its end: {error}")
        return
    for what in tar_walk.losses(found, shard.keys, shard.facts["end"]):
        shard.found.add(place, what)


def _tar(shard: Shard, labels: pa.Table) -> None:
    """Compare the labelled tar with its input."""
    place, was = f"labeled/{shard.stem}", shard.facts["shard"]
    target = shard.run.paths.labeled.file(f"{shard.stem}.tar")
    if not storage.exists(target):  # reported by `_folders`
        return
    rows = labels.select(["sample_id", "shard", *schemas.IN_JSON]).to_pylist()
    try:
        for key, what in tar_checks.differences(was, target, rows, shard.run.limit):
            shard.add("labeled", what, [key])
    except OSError as error:
        shard.found.note(f"{place}: not compared to its end: {error}")


def _chain(check: RunCheck) -> None:
    """Read the manifests up to the first gap; each must follow from the one before.

    Fingerprints of network and captions hold word lists, which do not lie below the root.
    """
    found, before = check.found, None
    for number, stage in enumerate(chain()):
        name, place = stage.folder, f"{stage.folder}/manifest.json"
        manifest = check.manifest(name)
        if manifest is None:
            found.note(f"{name}: not there, or not finished")
        elif missing := [fact for fact in ("fingerprint", *stage.facts) if fact not in manifest]:
            found.add(place, f"lacks {', '.join(missing)}")
        elif len(check.made) < number:
            found.add(place, "what it was made from is not there, or unsound")
        elif (upstream := manifest.get("upstream")) != before:
            found.add(place, f"was made from {upstream}, before it is {before}")
        else:
            if (digest := _digest(name, manifest)) != manifest["fingerprint"]:
                found.add(place, f"its fingerprint is not {digest}")
            check.made[name], before = manifest, manifest["fingerprint"]


def _digest(name: str, manifest: dict[str, Any]) -> str:
    """The fingerprint that a manifest should have, if it can be computed from the run."""
    if name == "embeddings":
        names = ("stem", "size", "version", "file_size", "file_version")  # of given embeddings
        shards = [s["shard"] for s in manifest["shards"]]
        made_from = [[shard[name] for name in names if name in shard] for shard in shards]
        return config.digest(manifest["config"], made_from)
    if name in ("clusters", "labels"):
        lists = manifest.get("exclude", [])  # digests of the lists
        version = next(stage.version for stage in chain() if stage.folder == name)
        return config.digest(manifest["config"], manifest["upstream"], *version, *lists)
    return str(manifest["fingerprint"])


def _facts(check: RunCheck) -> RunFacts:
    embedded, clustered = check.made["embeddings"], check.made.get("clusters", {})
    written = check.made.get("labels", {})
    lists = written.get("exclude", [])
    excluded = (check.manifest("exclude") if lists else None) or {}
    if excluded.get("digests", []) != lists:
        what = "is not of the lists that the labels were made with"
        check.found.add("exclude/manifest.json", what)
    cfg, encoders = embedded["config"], embedded["encoders"]
    made_by = [f"{each['model']}:{each['pretrained']}".rstrip(":") for each in encoders]
    wanted = [f"{cfg['model']}:{cfg['pretrained']}", *cfg.get("also", ())]
    if inputs.are_given(cfg):  # encoders are named by their columns
        wanted = cfg["columns"] or made_by
    if made_by != [name.rstrip(":") for name in wanted]:
        what = f"names other encoders than its settings: {made_by}"
        check.found.add("embeddings/manifest.json", what)
    again = RunCheck(check.paths)  # `_clusters` reports its violations
    groups = level_checks.read_groups(again) if clustered else []
    return RunFacts(
        paths=check.paths,
        embedded=config.digest(embedded["config"]),
        encoders=encoders or [{"column": "embedding", "dim": 1}],  # reported above
        columns=embedded["columns"],
        clustered=clustered.get("fingerprint"),
        k=len(clustered.get("sizes", ())),
        groups=groups,
        captions=check.made.get("captions", {}).get("captions"),
        levels=level_checks.captions_of(check, groups),
        written=written.get("fingerprint"),
        excluded=excluded.get("parts", {}),
        shards=inputs.has_shards(embedded),
        tars=bool(written.get("config", {}).get("shards")) and inputs.has_shards(embedded),
        limit=embedded["config"]["max_sample_bytes"],
    )


def _folders(check: RunCheck, facts: RunFacts) -> None:
    """Check that the folders hold all files of the finished stages, and no others."""
    paths, found = check.paths, check.found
    stems = [shard["shard"]["stem"] for shard in check.made["embeddings"]["shards"]]
    twice = [stem for stem, times in Counter(stems).items() if times > 1]
    found.add("embeddings/manifest.json", "names a shard twice", twice)
    wanted: dict[str, set[str]] = {}
    for stage in chain():
        if stage.folder in check.made:
            wanted.setdefault(stage.folder, set()).update(stage.files)
            for name, suffix in stage.parts.items():
                wanted.setdefault(name, set()).update(f"{stem}{suffix}" for stem in stems)
    if "labels" in check.made:
        if not facts.tars:
            wanted["labeled"] = set()
        wanted["exclude"] = {f"{stem}.parquet" for stem in facts.excluded}
        missing = {"clusters.parquet", "levels.parquet", "run.json"} - paths.top.names()
        found.add("", "is missing", sorted(missing))
    for name, files in wanted.items():
        there = paths.folder(name).names() - {"manifest.json"}
        more = sorted(there - files)
        if name in ("embeddings", "rejects"):  # parts of shards that are no longer listed
            for part in more:
                found.note(f"{name}: {part} belongs to no shard of the run")
        else:
            own = [n for n in more if n.endswith((".parquet", ".tar", ".json")) or PARTIAL in n]
            found.add(name, "belongs to no shard of the run", own)
            for other in sorted(set(more) - set(own)):
                found.note(f"{name}: {other} is no file of the run")
        if name not in OPENED:  # reading them finds those that are missing
            found.add(name, "is missing", sorted(files - there))
    found.add("", "is half a file", sorted(n for n in paths.top.names() if ".partial-" in n))


def _tables(check: RunCheck) -> None:
    """Check the tables of the whole run against its parts."""
    manifest = check.made["embeddings"]
    for name in ("samples", "embedded", "rejected"):
        if (total := sum(shard[name] for shard in manifest["shards"])) != manifest[name]:
            text = f"{name} is {manifest[name]}, of shards {total}"
            check.found.add("embeddings/manifest.json", text)
    own = {"network": _network, "clusters": _clusters, "captions": _captions, "labels": _written}
    for name, check_tables in own.items():
        if name in check.made:
            check_tables(check)
    for space in SPACES:
        _index(check, space)


def _network(check: RunCheck) -> None:
    file = check.paths.network.file
    try:
        shape = json.loads(storage.read_bytes(file("network.json")))["shape"]
        load_tensors(storage.read_bytes(file("network.safetensors")))
    except FileNotFoundError:
        return  # reported by `_folders`
    except Exception as error:  # safetensors has errors of its own
        check.found.add("network", f"cannot be read: {error}")
        return
    check.rows("network/sample.parquet", schemas.sample_schema(check.dim, shape["feature_dim"]))
    check.rows("network/history.parquet", schemas.HISTORY)


def _clusters(check: RunCheck) -> None:
    made, found = check.made["clusters"], check.found
    if check.sizes != made["sizes"] or made["samples"] != sum(made["sizes"]):
        pairs = enumerate(zip(check.sizes, made["sizes"], strict=True))
        off = [cluster for cluster, (there, wanted) in pairs if there != wanted]
        found.add("clusters/manifest.json", f"sizes are not those of assignments/: clusters {off}")
    curve = check.rows("clusters/curve.parquet", schemas.CURVE)
    check.rows("clusters/tree.parquet", schemas.TREE)
    exemplars = check.rows("clusters/exemplars.parquet", schemas.EXEMPLARS)
    if [row["k"] for row in curve] != list(range(1, len(curve) + 1)):
        found.add("clusters/curve.parquet", "is not of every k from 1")
    wanted = {(c, kind) for c, n in enumerate(made["sizes"]) if n for kind in schemas.KINDS}
    if odd := {(row["cluster_id"], row["kind"]) for row in exemplars} ^ wanted:
        listed = sorted({cluster for cluster, _ in odd})
        found.add("clusters/exemplars.parquet", f"is not of every kind and cluster: {listed}")
    place = "clusters/prototypes.parquet"
    if (file := open_part(check.paths.top.file(place), place, found)) is not None:
        schema = schemas.prototypes_schema(vector_length(file) or 1)
        table, every = read_part(file, schema, place, found), set(range(len(check.sizes)))
        if table is not None and set(table["cluster_id"].to_pylist()) != every:
            found.add(place, "is not of every cluster")

    level_checks.check_nested(check, level_checks.read_groups(check))


def _captions(check: RunCheck) -> None:
    check.rows("captions/levels.parquet", schemas.LEVEL_CAPTIONS)
    check.rows("captions/candidates.parquet", schemas.candidates_schema(check.dim))
    check.rows("captions/voted.parquet", schemas.CAPTIONS)
    rows = check.rows("captions/captions.parquet", schemas.CAPTIONS)
    best = {row["cluster_id"]: row["caption"] for row in rows if row["rank"] == 0}
    if check.made["captions"]["captions"] != [best.get(c) for c in range(len(check.sizes))]:
        check.found.add("captions/captions.parquet", "is not what the manifest names the clusters")


def _written(check: RunCheck) -> None:
    """Check clusters.parquet and run.json against the other tables and manifests."""
    made, found = check.made, check.found
    if made["labels"]["labels"] != made["embeddings"]["samples"]:
        found.add("labels/manifest.json", "has not as many labels as there are samples")
    ranked: dict[int, list[str]] = {}
    again = RunCheck(check.paths)  # `_captions` has reported its violations
    for row in again.rows("captions/captions.parquet", schemas.CAPTIONS):
        ranked.setdefault(row["cluster_id"], []).append(row["caption"])
    named = zip(made["clusters"]["sizes"], made["captions"]["captions"], strict=False)
    wanted = [(c, size, name, ranked.get(c, [])) for c, (size, name) in enumerate(named)]
    names = ("cluster_id", "size", "cluster_caption", "captions")
    rows = check.rows("clusters.parquet", schemas.CLUSTERS)
    if [tuple(row[name] for name in names) for row in rows] != wanted:
        found.add("clusters.parquet", "is not what sizes and captions of the clusters are")
    level_checks.check_table(check, again)
    try:
        stages = json.loads(storage.read_bytes(check.paths.run_json))["stages"]
        recorded = {stage["fingerprint"] for stage in stages.values()}
    except FileNotFoundError:
        return
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        found.add("run.json", f"cannot be read: {error}")
        return
    if recorded != {made[stage.folder]["fingerprint"] for stage in chain_to("write")}:
        found.add("run.json", "names other fingerprints than the manifests")


def _index(check: RunCheck, space: str) -> None:
    """Check that an index that search accepts holds all embedded samples."""
    place, made, found, paths = f"index/{space}", check.made, check.found, check.paths
    if (manifest := check.manifest(place)) is None:
        return
    if manifest["upstream"] != made.get(SPACES[space], {}).get("fingerprint"):
        found.note(f"{place}: is out of date, search refuses it: run `ratecluster index` again")
        return
    if (samples := manifest["samples"]) != (embedded := made["embeddings"]["embedded"]):
        found.add(f"{place}/manifest.json", f"has {samples} samples, {embedded} are embedded")
    found.add(place, "is missing", sorted(set(manifest["files"]) - paths.folder(place).names()))
