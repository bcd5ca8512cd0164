"""Stage 1, embed: shards of images to embeddings by one or more encoders, one part per shard.

reads   the input shards; where encoders were added to embed.also, the parts that lack their columns
        or, with --embeddings, files of given embeddings (`given/`), one part per file
writes  embeddings/{stem}.parquet  embeddings_schema  one row per readable sample
        rejects/{stem}.parquet     REJECTS            one row per unreadable one, and per damage
        embeddings/manifest.json   counts and facts of every shard, the json columns of the run

"""

import json
import logging
import math
import os
from collections import Counter, defaultdict
from collections.abc import Iterator
from dataclasses import asdict
from functools import partial
from typing import Any
from uuid import uuid4

import ray
from ray.data import ActorPoolStrategy

from pipeline.artifacts import layout, outputs
from pipeline.embed.given import importing
from pipeline.embed.settings import Config
from pipeline.embed.survey import AnyConfig, fingerprint, if_done, plan, settled
from pipeline.embed.worker import Embedder
from pipeline.runtime import cluster, config, console
from pipeline.runtime.progress import StageProgress, waiting_for
from pipeline.runtime.reject_reasons import Reason, ranked, top_reasons
from pipeline.store import columns
from pipeline.store.listing import Shard
from pipeline.store.shards import DAMAGED

log = logging.getLogger(__name__)
QUARANTINED = Reason.QUARANTINED.value
SURE = 100  # samples of a shard above which too many rejects end the stage at once
STARVING = 0.2  # share of an encoder's time without images, above which a warning is logged


def run(
    cfg: AnyConfig, paths: layout.RunPaths, shards: list[Shard], overwrite: bool = False
) -> dict[str, Any]:
    """Embed the shards that have no part yet, check the counts, commit the manifest.

    With the settings of given embeddings, `shards` are their files; these are imported.
    """
    shards = settled(shards, paths)
    if not _remove_quarantined(cfg, paths) and (before := if_done(cfg, shards, paths)):
        console.log_already_done(log, "embed", paths.embeddings.url)
        return before
    make = partial(embed_shards, cfg) if isinstance(cfg, Config) else importing.prepare(cfg, shards)
    done, todo = plan(cfg, shards, paths, overwrite)
    paths.embeddings.remove({"manifest.json"})
    failures, took, waiting = [], [], dict.fromkeys(shard.stem for shard in todo)
    unit = "shards" if isinstance(cfg, Config) else "files"
    with StageProgress("embed", len(todo), unit) as progress:
        waiting_for(waiting)
        for row in make(todo, paths) if todo else ():
            del waiting[row["stem"]]
            waiting_for(waiting)
            if row["error"]:
                failures.append(row["error"])
                continue
            facts = json.loads(row["facts"])
            progress.advance(samples=facts["samples"], rejected=facts["rejected"])
            if spent := facts.pop("took", None):  # of encoders
                took.append(spent)
            done.append(facts)
            if progress.units == 1:
                _check_weights(done)
            if facts["samples"] >= SURE and QUARANTINED not in facts["reasons"]:
                _check_rejects(facts["shard"]["url"], facts, cfg)
    if failures:
        raise RuntimeError(
            f"embed: {len(failures)} of {len(todo)} {unit} failed; run again to retry them. "
            f"First: {failures[0]}"
        )
    manifest = summary(done, cfg, progress.seconds)
    _report_problems(done, manifest)
    _check_counts(done, manifest, cfg)
    known = outputs.part_facts(paths.embeddings, [shard.stem for shard in shards])
    if odd := [s for s in shards if known.get(s.stem, {}).get("stage") != config.fingerprint(cfg)]:
        raise RuntimeError(f"embed: the part of {odd[0].url} was changed meanwhile: run again")
    paths.rejects.sweep()
    paths.attempts.clear()
    speed = progress.samples_per_s  # of this run, which may have done some of the shards alone
    load = {"samples_per_s": speed, **balance(took)}
    paths.embeddings.finish(fingerprint(cfg, shards), **manifest, **load)
    rejected = f"{manifest['rejected']:,} rejected"
    if reasons := ranked(manifest["reasons"]):
        rejected += f" ({', '.join(f'{count:,} {code}' for code, count in reasons)})"
    counts = (f"{manifest['samples']:,} samples", rejected)
    console.log_finished(log, "embed", progress.seconds, *counts, f"{speed:,.0f} samples/s")
    if isinstance(cfg, Config):
        _report_balance(load, cfg, manifest["precisions"])
    return paths.embeddings.manifest()


def _remove_quarantined(cfg: AnyConfig, paths: layout.RunPaths) -> bool:
    """Remove the parts of quarantined shards where these are to be tried again; whether any was."""
    if not isinstance(cfg, Config) or not cfg.retry_quarantined:
        return False
    known = outputs.part_facts(paths.embeddings, paths.embeddings.stems())
    again = {stem for stem, facts in known.items() if QUARANTINED in facts.get("reasons", {})}
    paths.embeddings.remove({f"{stem}.parquet" for stem in again})
    return bool(again)


def embed_shards(
    cfg: Config, todo: list[Shard], paths: layout.RunPaths
) -> Iterator[dict[str, Any]]:
    """Map the shards over a pool of encoders by Ray Data, one block each; a row per shard."""
    cluster.join()
    gpus = int(ray.cluster_resources().get("GPU", 0)) if cfg.device != "cpu" else 0
    actors = min(cfg.actors or max(1, gpus), len(todo))
    wanted = actors * cfg.decode_cpus
    if wanted > (spare := int(ray.cluster_resources().get("CPU", 0)) - actors):
        log.warning(
            "embed: %d encoders want embed.decode_cpus = %d each, %d in all, but %d CPUs are free: "
            "decoding %s",
            *(actors, cfg.decode_cpus, wanted, max(spare, 0)),
            "will be slow" if spare > 0 else "cannot start until the cluster grows",
        )
    threads = os.cpu_count() or 1  # whatever the number of actors: the last bits depend on it
    items = [{"shard": json.dumps(asdict(shard))} for shard in todo]
    dataset = ray.data.from_items(items, override_num_blocks=len(items)).map(
        Embedder,  # type: ignore[arg-type]
        fn_constructor_args=(cfg, paths, threads, uuid4().hex),
        num_cpus=1,
        num_gpus=1 if gpus else 0,
        ray_remote_args_fn=cluster.actor_limits,
        compute=ActorPoolStrategy(
            size=actors,
            max_concurrent_calls_per_actor=cfg.readers,
            enable_true_multi_threading=True,
            max_tasks_in_flight_per_actor=cfg.readers + 1,
        ),
    )
    yield from dataset.iter_rows()


def balance(took: list[dict[str, Any]]) -> dict[str, float]:
    """How well the encoders of these shards were fed; empty without shards.

    encoder_idle             share of the time from the first shard to the last without encoding
    decode_cpus_per_encoder  CPUs that decode as fast as one busy encoder encodes
    """
    if not took:
        return {}
    spans: dict[str, list[float]] = defaultdict(list)
    for shard in took:
        spans[shard["encoder"]] += [shard["began"], shard["ended"]]
    encode_s = sum(shard["encode_s"] for shard in took)
    there_s = sum(max(times) - min(times) for times in spans.values())
    return {
        "encoder_idle": round(max(0.0, 1 - encode_s / max(there_s, 1e-9)), 3),
        "decode_cpus_per_encoder": round(
            sum(shard["decode_s"] for shard in took) / max(encode_s, 1e-9), 2
        ),
    }


def summary(done: list[dict[str, Any]], cfg: AnyConfig, seconds: float) -> dict[str, Any]:
    """The manifest: totals, the facts of every shard in order, the columns of all json."""
    done = sorted(done, key=lambda facts: str(facts["shard"]["url"]))
    kinds: dict[str, str] = {}
    clashes: set[str] = set()
    reasons: Counter[str] = Counter()
    problems: dict[str, list[Any]] = {}
    examples: dict[str, list[str]] = {}
    counts: Counter[str] = Counter()  # samples that have a column
    for facts in done:
        for problem, (count, first) in facts.get("text_problems", {}).items():
            problems.setdefault(problem, [0, first])[0] += count
        clashes |= columns.merge(kinds, facts["columns"]) | set(facts["clashes"])
        counts.update(facts.get("column_counts", dict.fromkeys(facts["columns"], facts["samples"])))
        reasons.update(facts["reasons"])
        examples = facts.get("examples", {}) | examples
    kept = columns.most_frequent(kinds, counts)
    rest = sum(f.get("columns_left_out", 0) for f in done) + len(kinds) - len(kept)
    per_shard = ("shard", "samples", "embedded", "rejected", "end")
    return {
        "config": config.facts(cfg),
        "samples": sum(facts["samples"] for facts in done),
        "embedded": sum(facts["embedded"] for facts in done),
        "rejected": sum(facts["rejected"] for facts in done),
        "reasons": dict(reasons),
        "examples": examples,
        "classes": sum(facts.get("classes", 0) for facts in done),  # samples with a .cls
        "text_problems": problems,
        "damaged": sum(facts["end"] != "complete" for facts in done),
        "columns": {**kept, columns.REST: "rest"} if rest else kept,
        "conflicting_columns": sorted(clashes & kept.keys()),
        "encoders": [
            {key: each[key] for key in ("column", "model", "pretrained", "dim")}
            for each in done[0]["encoders"]
        ],
        "precisions": sorted({_precision(facts["encoders"]) for facts in done}),
        "versions": outputs.versions(),  # of now: parts that were there may be of others
        "shards": [{key: facts[key] for key in per_shard} for facts in done],
        "seconds": round(seconds, 2),
    }


def _precision(encoders: list[dict[str, Any]]) -> str:
    """Where and how these encoded, such as "cpu fp32 + cpu bf16"; once where all are alike."""
    return " + ".join(dict.fromkeys(f"{each['device']} {each['precision']}" for each in encoders))


def _report_balance(load: dict[str, float], cfg: Config, precisions: list[str]) -> None:
    """Log how well encoders were fed; a warning where more CPUs would feed them better."""
    if "encoder_idle" not in load:
        return
    idle, cpus = load["encoder_idle"], load["decode_cpus_per_encoder"]
    line = f"embed: encoders were idle {idle:.0%} of the time; one needs {cpus:.1f} CPUs to decode"
    apart = cfg.decode_cpus or any(way.startswith("cuda") for way in precisions)
    needed = math.ceil(cpus) + 1
    if idle <= STARVING or not apart:  # without a GPU, encoding and decoding share the same CPUs
        log.info(line)
    elif needed > cfg.decode_cpus:
        log.warning("%s: set embed.decode_cpus = %d, and add CPU nodes", line, needed)
    else:
        log.warning("%s: it waits for the store, or for CPUs that the cluster lacks", line)


def _report_problems(done: list[dict[str, Any]], manifest: dict[str, Any]) -> None:
    """Log damaged shards, unread texts, clashing json columns and mixed precisions, once each."""
    for reason in top_reasons(manifest["reasons"], manifest["examples"]):
        log.info("embed: rejected: %s", reason)
    for facts in done:
        if facts["end"] != "complete":
            log.warning("embed: %s: %s", facts["shard"]["url"], facts["end"])
    if unmatched := [facts for facts in done if facts.get("unmatched")]:
        log.warning(
            "embed: %d rows of given embeddings are of no sample of their shard, the first of %s "
            "has the id %r",
            *(sum(facts["unmatched"] for facts in unmatched), unmatched[0]["shard"]["file_url"]),
            unmatched[0]["first_unmatched"],
        )
    if problems := manifest["text_problems"]:
        log.warning(
            "embed: texts of %d samples could not be read: %s; see `text_problem` in labels/",
            sum(count for count, _ in problems.values()),
            ", ".join(f"{what} ({n:,}, such as {first})" for what, (n, first) in problems.items()),
        )
    if columns.REST in manifest["columns"]:
        log.warning(
            "embed: the samples' json has more than %d fields; the most frequent are columns of "
            "labels/, and the others are in its column %s",
            *(columns.MAX_COLUMNS, columns.REST),
        )
    if clashes := manifest["conflicting_columns"]:
        log.warning(
            "embed: json columns of clashing types stay JSON text: %s", ", ".join(clashes[:5])
        )
    if len(manifest["precisions"]) > 1:
        log.warning(
            "embed: parts were made on different devices or precisions: %s", manifest["precisions"]
        )


def _check_rejects(name: str, facts: dict[str, Any], cfg: AnyConfig) -> None:
    """Raise RuntimeError where too many samples of a shard, or of the run, were rejected."""
    if facts["rejected"] > cfg.max_reject_fraction * facts["samples"]:
        why = ". ".join(top_reasons(facts["reasons"], facts.get("examples", {})))
        raise RuntimeError(
            f"embed: {facts['rejected']:,} of {facts['samples']:,} samples of {name} were "
            f"rejected, more than {cfg.section}.max_reject_fraction = {cfg.max_reject_fraction}: "
            f"{why}. See rejects/"
        )


def _check_weights(done: list[dict[str, Any]]) -> None:
    """Raise RuntimeError where one encoder had different weights for different parts."""
    first: dict[tuple[str, str], tuple[str, str]] = {}
    for facts in done:
        for each in facts["encoders"]:
            if weights := each.get("weights"):  # parts of earlier versions do not tell
                stem = str(facts["shard"]["stem"])
                other = first.setdefault((each["column"], each["precision"]), (weights, stem))
                if other[0] != weights:
                    raise RuntimeError(
                        f"embed: {other[1]} and {stem} were made with different weights of "
                        f"{each['model']} {each['pretrained']}: the checkpoint was replaced. "
                        "Restore it and delete the parts made since, or choose another --root"
                    )


def _check_counts(done: list[dict[str, Any]], manifest: dict[str, Any], cfg: AnyConfig) -> None:
    """Raise RuntimeError where rows do not add up, nothing is readable or too much is rejected."""
    limit, setting = cfg.max_reject_fraction, f"{cfg.section}.max_reject_fraction"
    for facts in [*done, manifest]:
        name = facts["shard"]["url"] if "shard" in facts else "the run"
        if facts["embedded"] + facts["rejected"] != facts["samples"]:
            raise RuntimeError(f"embed: {name}: rows do not add up: {facts}")
    _check_rejects("the run", manifest, cfg)
    _check_weights(done)
    lost = [f for f in done if not f["samples"] and DAMAGED in f["end"]]
    if len(lost) > limit * len(done):
        raise RuntimeError(
            f"embed: {len(lost)} of {len(done)} shards cannot be read at all, more than "
            f"{setting} = {limit}; the first is {lost[0]['shard']['url']}: "
            f"{lost[0]['end']}"
        )
    if not manifest["embedded"]:
        what = "no shard has a readable image"
        if not isinstance(cfg, Config):
            what = "no row has an id and whole vectors"
        raise RuntimeError(f"embed: {what}; see rejects/ for the reasons")
