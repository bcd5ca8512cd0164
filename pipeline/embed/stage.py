"""Stage 1, embed: shards of images to CLIP embeddings, one part per shard.

reads   the input shards
writes  embeddings/{stem}.parquet  embeddings_schema  one row per readable sample
        rejects/{stem}.parquet     REJECTS            one row per unreadable one, and per damage
        embeddings/manifest.json   counts and facts of every shard, the json columns of the run

A part is committed after its rejects, and carries its own facts in its footer, so it is the record
that its shard is done. Core: `embed_shard` (no Ray). Worker: `Embedder`. Shell: `run`.
"""

import json
import logging
import math
import os
import time
import traceback
from collections import Counter, defaultdict
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict, dataclass
from typing import Any
from uuid import uuid4

import numpy as np
import pyarrow as pa
import ray
import torch
from ray.data import ActorPoolStrategy
from ray.exceptions import RayTaskError

from pipeline.artifacts import outputs as artifacts
from pipeline.embed.decoding import Batch, Limits, Prepare, Row, batches
from pipeline.runtime import cluster, config, console
from pipeline.runtime.config import setting
from pipeline.runtime.errors import UserError
from pipeline.runtime.progress import StageProgress, waiting_for
from pipeline.runtime.reject_reasons import Reason
from pipeline.store import columns, storage, tables
from pipeline.store.listing import Shard
from pipeline.vision import clip

log = logging.getLogger(__name__)
LOOKAHEAD_BATCHES = 2  # decoded ahead of the model, per shard
RETRIES = 3  # of a decode task whose node died
STARVING = 0.2  # of an encoder's time without images


@dataclass(frozen=True, kw_only=True)
class Config:
    """How images become vectors."""

    model: str = setting("pico-clip", "open_clip architecture, hf-hub:… or the bundled pico-clip")
    pretrained: str = setting("", "open_clip tag or checkpoint file; '' is pico-clip's own weights")
    precision: str = setting("auto", "auto, fp32, bf16 or fp16: arithmetic of the encoder")
    device: str = setting("auto", "auto, cpu or cuda: where the encoder runs", operational=True)
    compile: bool = setting(False, "torch.compile the encoder: for long runs; needs a compiler")
    batch_size: int = setting(64, "images in one call of the encoder")
    actors: int = setting(0, "encoder processes; 0: one per GPU, or one", operational=True)
    readers: int = setting(
        2, "shards read at once by each encoder; decode_slots, if given", operational=True
    )
    decode_threads: int = setting(0, "per shard being read; 0: one per core", operational=True)
    decode_slots: int = setting(
        0, "CPUs of any node that decode for each encoder; 0: its own threads", operational=True
    )
    threads: int = setting(0, "of the model on a CPU; 0: all cores", operational=True)
    max_image_pixels: int = setting(178_956_970, "pixels of an image; larger ones are rejected")
    max_sample_bytes: int = setting(67_108_864, "bytes of a sample's files; larger are rejected")
    decode_timeout_s: float = setting(60.0, "seconds for decoding a sample; slower are rejected")
    max_reject_fraction: float = setting(
        0.5, "of a shard's or the run's samples, 0 to 1; more rejected fails", operational=True
    )

    def __post_init__(self) -> None:
        for name in ("batch_size", "readers", "max_image_pixels", "max_sample_bytes"):
            if getattr(self, name) < 1:
                raise UserError(f"embed.{name} = {getattr(self, name)}: give 1 or more")
        for name in ("actors", "decode_threads", "decode_slots", "threads"):
            if getattr(self, name) < 0:
                raise UserError(f"embed.{name} = {getattr(self, name)}: give 0 (fit) or more")
        if self.decode_timeout_s <= 0:
            raise UserError(f"embed.decode_timeout_s = {self.decode_timeout_s}: give more than 0")
        if not 0 <= self.max_reject_fraction <= 1:
            raise UserError(f"embed.max_reject_fraction = {self.max_reject_fraction}: give 0 to 1")


Source = Callable[[Shard, Prepare, Config], Iterator[Batch]]


class ShardRows:
    """What one shard has become so far: rows, their embeddings, rejects."""

    def __init__(self, encoder: clip.Encoder, thread: ThreadPoolExecutor) -> None:
        self.encoder, self.thread = encoder, thread
        self.rows: list[Row] = []
        self.rejects: list[Row] = []
        self.embeddings: list[np.ndarray] = []
        self.encode_s = self.decode_s = 0.0

    def add(self, batch: Batch) -> None:
        """One batch through the model; a sample whose embedding is not finite is rejected."""
        self.rejects += batch.rejects
        self.decode_s += batch.decode_s
        if not batch.rows:
            return
        encoded, seconds = self.thread.submit(_timed, self.encoder, batch.pixels).result()
        self.encode_s += seconds
        finite = np.isfinite(encoded).all(axis=1)
        for row, good in zip(batch.rows, finite, strict=True):
            if good:
                self.rows.append(row)
            else:
                member, reason = row["image_member"], Reason.EMBEDDING_NOT_FINITE.because()
                self.rejects.append({**row, "member": member, "reason": reason})
        self.embeddings.append(encoded[finite].astype(np.float16))

    def matrix(self) -> np.ndarray:
        """(rows, dim) float16."""
        empty = np.zeros((0, self.encoder.dim), np.float16)
        return np.concatenate([empty, *self.embeddings])


def _timed(encoder: clip.Encoder, pixels: np.ndarray) -> tuple[np.ndarray, float]:
    started = time.perf_counter()
    encoded = encoder.encode_images(pixels)
    return encoded, time.perf_counter() - started


def embed_shard(
    shard: Shard,
    encoder: clip.Encoder,
    thread: ThreadPoolExecutor,
    cfg: Config,
    paths: artifacts.RunPaths,
    source: Source,
) -> dict[str, Any]:
    """Encode the batches of one shard, commit its rejects and its part; returns its facts.

    Batches are cut within the shard, so the bytes depend on nothing but the shard and `cfg`. The
    model runs in `thread`, a pool of one that all shards share: torch keeps a team of OpenMP
    threads for every thread that calls it, and idle teams spin.
    """
    began, end = time.time(), ""
    out = ShardRows(encoder, thread)
    for batch in source(shard, encoder.prepare, cfg):
        out.add(batch)
        end = batch.end
    met = sorted(row["index"] for row in (*out.rows, *out.rejects))
    if not end or met != list(range(len(met))):  # one that began anew may have cut other batches
        raise OSError(f"{shard.url}: its batches do not fit together; run again")
    facts = shard_facts(shard, out, end, cfg)
    _commit(shard.stem, out, facts, paths)
    spent = {"encode_s": out.encode_s, "decode_s": out.decode_s}
    return {**facts, "took": {**spent, "began": began, "ended": time.time()}}


def decoded(shard: Shard, prepare: Prepare, cfg: Config) -> Iterator[Batch]:
    """The batches of a shard, decoded in this process, ahead of being asked for."""
    threads = cfg.decode_threads or (1 if cfg.decode_slots else os.cpu_count() or 1)
    ahead = LOOKAHEAD_BATCHES * cfg.batch_size
    limits = Limits(cfg.max_image_pixels, cfg.decode_timeout_s, threads, ahead)
    yield from batches(shard, prepare, limits, cfg.batch_size, cfg.max_sample_bytes)


def decoded_elsewhere(shard: Shard, prepare: Prepare, cfg: Config) -> Iterator[Batch]:
    """The same batches from a task on any node that has a CPU to spare.

    It stays LOOKAHEAD_BATCHES ahead, and begins anew where its node dies.
    """
    task = ray.remote(decoded).options(
        num_cpus=cfg.decode_threads or 1,
        max_retries=RETRIES,
        num_returns="streaming",
        _generator_backpressure_num_objects=LOOKAHEAD_BATCHES,
    )
    batches: Any = task.remote(shard, prepare, cfg)
    try:
        for batch in batches:
            yield ray.get(batch)
    except RayTaskError as error:
        raise error.cause from None
    finally:
        ray.cancel(batches)  # where nobody asks for the rest


def shard_facts(shard: Shard, out: ShardRows, end: str, cfg: Config) -> dict[str, Any]:
    """What is known of a finished shard; the same whenever and wherever it is made."""
    samples = len(out.rows) + len(out.rejects)
    kinds, clashes = columns.survey(row["json"] for row in (*out.rows, *out.rejects))
    return {
        "stage": config.fingerprint(cfg),
        "config": config.facts(cfg),
        "shard": asdict(shard),
        "samples": samples,
        "embedded": len(out.rows),
        "rejected": len(out.rejects),
        "reasons": dict(Counter(row["reason"].partition(":")[0] for row in out.rejects)),
        "end": end,
        "columns": kinds,
        "clashes": sorted(clashes),
        "device": out.encoder.device,
        "precision": out.encoder.precision,
    }


def _commit(stem: str, out: ShardRows, facts: dict[str, Any], paths: artifacts.RunPaths) -> None:
    rejects = sorted(out.rejects, key=lambda row: row["index"])
    if facts["end"] != "complete":  # damage is a row without a key: no sample, but a problem
        rejects.append({"shard": stem, "reason": Reason.SHARD.because(facts["end"])})
    table = pa.Table.from_pylist(rejects, schema=artifacts.REJECTS)
    tables.write(paths.rejects.file(f"{stem}.parquet"), table, stage=facts["stage"])
    schema = artifacts.embeddings_schema(out.encoder.dim)
    texts = {f.name: pa.array([r[f.name] for r in out.rows], f.type) for f in list(schema)[:-1]}
    part = pa.table({**texts, "embedding": tables.from_matrix(out.matrix())}, schema=schema)
    tables.write(paths.embeddings.file(f"{stem}.parquet"), part, **facts)


class Embedder:
    """An actor: the model is loaded once; each call does one shard. Calls may come in parallel."""

    def __init__(self, cfg: Config, paths: artifacts.RunPaths, threads: int) -> None:
        self.cfg, self.paths, self.name = cfg, paths, uuid4().hex
        self.thread = ThreadPoolExecutor(1, initializer=torch.set_num_threads, initargs=(threads,))
        self.encoder = clip.load(
            cfg.model,
            cfg.pretrained,
            device=cfg.device,
            precision=cfg.precision,
            threads=threads,
            compiled=cfg.compile,
        )
        if cfg.compile:  # always for the same sizes first: what it makes of others depends on them
            self.encoder.encode_images(
                np.zeros((cfg.batch_size, *self.encoder.image_size, 3), np.uint8)
            )

    def __call__(self, row: dict[str, Any]) -> dict[str, Any]:
        """The shard's facts as JSON, or the error that stopped it, for the driver to judge."""
        shard = Shard(**json.loads(row["shard"]))
        try:
            facts = storage.retry(lambda: self._embed(shard))
            return {"stem": shard.stem, "facts": json.dumps(facts), "error": ""}
        except Exception as error:  # a row, so that one shard does not stop the others
            log.error("embed: %s: %s", shard.url, traceback.format_exc())
            said = f"{shard.url}: {type(error).__name__}: {error}"
            return {"stem": shard.stem, "facts": "", "error": said}

    def _embed(self, shard: Shard) -> dict[str, Any]:
        source = decoded_elsewhere if self.cfg.decode_slots else decoded
        facts = embed_shard(shard, self.encoder, self.thread, self.cfg, self.paths, source)
        facts["took"]["encoder"] = self.name
        return facts


def check(cfg: Config) -> None:
    """Raise UserError for an unknown model, tag or checkpoint; loads nothing."""
    clip.check(cfg.model, cfg.pretrained)
    clip.choose_precision(cfg.model, "cpu", cfg.precision)


@dataclass(frozen=True)
class Survey:
    """What lies in embeddings/, seen from the shards that are to be embedded. Changes nothing."""

    done: list[dict[str, Any]]  # facts of the parts that stand
    todo: list[Shard]
    changed: list[Shard]  # of those to do: embedded once, when they held something else
    foreign: list[Shard]  # of those: the part was made from a file of another place
    other: dict[str, dict[str, Any]]  # stem -> facts of the parts that other settings made
    vanished: list[str]  # stems of parts whose shards are not among these


def survey(cfg: Config, shards: list[Shard], paths: artifacts.RunPaths) -> Survey:
    """Look at the footer of every part."""
    names = paths.embeddings.names()
    stems = [name.removesuffix(".parquet") for name in names if name.endswith(".parquet")]
    known = artifacts.part_facts(paths.embeddings, stems)
    rejects = paths.rejects.names()
    other = {stem: f for stem, f in known.items() if f.get("stage") != config.fingerprint(cfg)}
    found = Survey([], [], [], [], other, sorted(known.keys() - {shard.stem for shard in shards}))
    for shard in shards:
        facts = known.get(shard.stem)
        if not facts or shard.stem in other or f"{shard.stem}.parquet" not in rejects:
            found.todo.append(shard)
        elif identity(facts["shard"]) == identity(asdict(shard)):
            found.done.append({**facts, "shard": asdict(shard)})  # it may have moved
        else:
            found.todo.append(shard)
            found.changed.append(shard)
            if facts["shard"]["url"] != shard.url:
                found.foreign.append(shard)
    return found


def plan(
    cfg: Config, shards: list[Shard], paths: artifacts.RunPaths, overwrite: bool = False
) -> tuple[list[dict[str, Any]], list[Shard]]:
    """(facts of the parts that stand, shards to do). A shard that changed since is to do.

    Raises UserError where parts of other settings lie, unless they may be overwritten.
    """
    found = survey(cfg, shards, paths)
    if overwrite:
        for folder in (paths.embeddings, paths.rejects):
            folder.remove({f"{stem}.parquet" for stem in found.other})
    elif reason := refusal(cfg, found, paths):
        raise UserError(reason)
    if found.changed:
        log.info("embed: %d shards changed since they were embedded: redone", len(found.changed))
    if found.vanished:
        log.warning(
            "embed: %d parts are of shards that are not among these, the first %s: left where they "
            "are, and out of everything that follows",
            *(len(found.vanished), found.vanished[0]),
        )
    return found.done, found.todo


def fingerprint(cfg: Config, shards: list[Shard]) -> str:
    """Of what embedding these shards is to leave."""
    return config.fingerprint(cfg, [identity(asdict(shard)) for shard in shards])


def finished(cfg: Config, shards: list[Shard], paths: artifacts.RunPaths) -> dict[str, Any] | None:
    """The manifest, if it is of these shards where they lie now and every part is there."""
    manifest = paths.embeddings.peek()
    if manifest is None or manifest["fingerprint"] != fingerprint(cfg, shards):
        return None
    moved = [s["shard"]["url"] for s in manifest["shards"]] != [shard.url for shard in shards]
    parts = {f"{shard.stem}.parquet" for shard in shards}
    whole = parts <= paths.embeddings.names() and parts <= paths.rejects.names()
    return manifest if whole and not moved else None


def identity(shard: dict[str, Any]) -> tuple[Any, ...]:
    """What tells one content of a shard from another; where it lies does not."""
    return shard["stem"], shard["size"], shard["version"]


def refusal(cfg: Config, found: Survey, paths: artifacts.RunPaths) -> str:
    """Why days of work may not be thrown away by what may be a mistyped command; "" if none is."""
    remedy = "put that back, choose another --root, or pass --overwrite to make them again"
    if found.other:
        before = next(iter(found.other.values())).get("config", {})
        what = config.differences("embed", before, cfg) or "other settings"
        return (
            f"{paths.embeddings.url} holds {len(found.other)} parts made otherwise ({what}): "
            f"{remedy}"
        )
    if found.foreign:
        shard = found.foreign[0]
        return (
            f"{paths.embeddings.url} holds {len(found.foreign)} parts of other shards with the "
            f"same names, {shard.url} is not the {shard.stem} they were made from: {remedy}"
        )
    return ""


def run(
    cfg: Config, shards: list[Shard], paths: artifacts.RunPaths, overwrite: bool = False
) -> dict[str, Any]:
    """Embed the shards that have no part yet, check the counts, commit the manifest."""
    if before := finished(cfg, shards, paths):
        console.standing(log, "embed", paths.embeddings.url)
        return before
    done, todo = plan(cfg, shards, paths, overwrite)
    paths.embeddings.remove({"manifest.json"})
    failures, took, waiting = [], [], dict.fromkeys(shard.stem for shard in todo)
    with StageProgress("embed", len(todo), "shards") as progress:
        waiting_for(waiting)
        for row in embedded(cfg, todo, paths) if todo else ():
            del waiting[row["stem"]]
            waiting_for(waiting)
            if row["error"]:
                failures.append(row["error"])
                continue
            facts = json.loads(row["facts"])
            progress.advance(samples=facts["samples"], rejected=facts["rejected"])
            took.append(facts.pop("took"))
            done.append(facts)
    if failures:
        raise RuntimeError(
            f"embed: {len(failures)} of {len(todo)} shards failed; run again to retry them. "
            f"First: {failures[0]}"
        )
    manifest = summary(done, cfg, progress.seconds)
    _report_problems(done, manifest)
    _check_counts(done, manifest, cfg.max_reject_fraction)
    known = artifacts.part_facts(paths.embeddings, [shard.stem for shard in shards])
    if odd := [s for s in shards if known.get(s.stem, {}).get("stage") != config.fingerprint(cfg)]:
        raise RuntimeError(f"embed: the part of {odd[0].url} was changed meanwhile: run again")
    paths.rejects.sweep()
    speed = progress.samples_per_s  # of this run, which may have done some of the shards alone
    load = {"samples_per_s": speed, **balance(took)}
    paths.embeddings.finish(fingerprint(cfg, shards), **manifest, **load)
    counts = (f"{manifest['samples']:,} samples", f"{manifest['rejected']:,} rejected")
    console.finished(log, "embed", progress.seconds, *counts, f"{speed:,.0f} samples/s")
    _report_balance(load, cfg, manifest["precisions"])
    return paths.embeddings.manifest()


def embedded(cfg: Config, todo: list[Shard], paths: artifacts.RunPaths) -> Iterator[dict[str, Any]]:
    """Ray Data over the shards, one block each, through a pool of encoders; a row per shard."""
    cluster.join()
    gpus = int(ray.cluster_resources().get("GPU", 0)) if cfg.device != "cpu" else 0
    actors = min(cfg.actors or max(1, gpus), len(todo))
    readers = cfg.decode_slots or cfg.readers
    wanted = actors * cfg.decode_slots * (cfg.decode_threads or 1)
    if wanted > (spare := int(ray.cluster_resources().get("CPU", 0)) - actors):
        log.warning(
            "embed: %d encoders of embed.decode_slots = %d decode with %d CPUs at once, of which "
            "the cluster has %d beside theirs: %s",
            *(actors, cfg.decode_slots, wanted, max(spare, 0)),
            "they wait for each other" if spare > 0 else "they wait for ever unless it grows",
        )
    threads = cfg.threads or os.cpu_count() or 1  # whatever the actors: bytes depend on it
    items = [{"shard": json.dumps(asdict(shard))} for shard in todo]
    dataset = ray.data.from_items(items, override_num_blocks=len(items)).map(
        Embedder,  # type: ignore[arg-type]
        fn_constructor_args=(cfg, paths, threads),
        num_cpus=1,
        num_gpus=1 if gpus else 0,
        ray_remote_args_fn=cluster.actor_limits,
        compute=ActorPoolStrategy(
            size=actors,
            max_concurrent_calls_per_actor=readers,
            enable_true_multi_threading=True,
            max_tasks_in_flight_per_actor=readers + 1,
        ),
    )
    yield from dataset.iter_rows()


def balance(took: list[dict[str, Any]]) -> dict[str, float]:
    """Of the encoders that did these shards: the share of their time from the first shard to the
    last in which they did not encode, and the CPUs whose decoding keeps one busy.
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


def summary(done: list[dict[str, Any]], cfg: Config, seconds: float) -> dict[str, Any]:
    """The manifest: totals, the facts of every shard in order, the columns of all json."""
    done = sorted(done, key=lambda facts: str(facts["shard"]["url"]))
    kinds: dict[str, str] = {}
    clashes: set[str] = set()
    reasons: Counter[str] = Counter()
    for facts in done:
        clashes |= columns.merge(kinds, facts["columns"]) | set(facts["clashes"])
        reasons.update(facts["reasons"])
    per_shard = ("shard", "samples", "embedded", "rejected", "end")
    return {
        "config": config.facts(cfg),
        "samples": sum(facts["samples"] for facts in done),
        "embedded": sum(facts["embedded"] for facts in done),
        "rejected": sum(facts["rejected"] for facts in done),
        "reasons": dict(reasons),
        "damaged": sum(facts["end"] != "complete" for facts in done),
        "columns": dict(sorted(kinds.items())[: columns.MAX_COLUMNS]),
        "conflicting_columns": sorted(clashes),
        "precisions": sorted({f"{f['device']} {f['precision']}" for f in done}),
        "shards": [{key: facts[key] for key in per_shard} for facts in done],
        "seconds": round(seconds, 2),
    }


def _report_balance(load: dict[str, float], cfg: Config, precisions: list[str]) -> None:
    """Log how well encoders were fed; a warning where more CPUs would feed them better."""
    if "encoder_idle" not in load:
        return
    idle, cpus = load["encoder_idle"], load["decode_cpus_per_encoder"]
    said = (
        f"embed: encoders idle {idle:.0%} of the time; one at work needs {cpus:.1f} CPUs to decode"
    )
    apart = cfg.decode_slots or any(way.startswith("cuda") for way in precisions)
    slots = math.ceil(cpus) + 1
    if idle <= STARVING or not apart:  # a CPU that encodes is the one that decodes
        log.info(said)
    elif slots > cfg.decode_slots * (cfg.decode_threads or 1):
        log.warning("%s: set embed.decode_slots = %d, and add CPU nodes", said, slots)
    else:
        log.warning(
            "%s: it has them, so it waits for the store or for CPUs that the cluster lacks", said
        )


def _report_problems(done: list[dict[str, Any]], manifest: dict[str, Any]) -> None:
    """Log, once each, what a person should know."""
    for facts in done:
        if facts["end"] != "complete":
            log.warning("embed: %s: %s", facts["shard"]["url"], facts["end"])
    if clashes := manifest["conflicting_columns"]:
        log.warning(
            "embed: json columns of clashing types stay JSON text: %s", ", ".join(clashes[:5])
        )
    if len(manifest["precisions"]) > 1:
        log.warning("embed: parts were made in several ways: %s", manifest["precisions"])


def _check_counts(done: list[dict[str, Any]], manifest: dict[str, Any], limit: float) -> None:
    """Raise where rows do not add up, nothing was readable, or too much was rejected."""
    for facts in [*done, manifest]:
        name = facts["shard"]["url"] if "shard" in facts else "the run"
        if facts["embedded"] + facts["rejected"] != facts["samples"]:
            raise RuntimeError(f"embed: {name}: rows do not add up: {facts}")
        if facts["rejected"] > limit * facts["samples"]:
            raise RuntimeError(
                f"embed: {facts['rejected']} of {facts['samples']} samples of {name} were rejected "
                f"({facts['reasons']}), more than embed.max_reject_fraction = {limit}; see rejects/"
            )
    lost = [f for f in done if not f["samples"] and f["end"].startswith("damaged")]
    if len(lost) > limit * len(done):
        raise RuntimeError(
            f"embed: {len(lost)} of {len(done)} shards cannot be read at all, more than "
            f"embed.max_reject_fraction = {limit}; the first is {lost[0]['shard']['url']}: "
            f"{lost[0]['end']}"
        )
    if not manifest["embedded"]:
        raise RuntimeError("embed: no shard has a readable image; see rejects/ for the reasons")
