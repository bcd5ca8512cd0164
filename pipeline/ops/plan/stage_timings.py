"""Measures the work of every stage on a few shards: its own functions, without Ray.

reads   the first images of the sampled shards
writes  nothing that stays: the parts lie in a temporary folder until `measure` returns

What a stage does once (training, the cut of the landmarks) is done on as many rows as the run will
have. Where the sampled images are fewer, rows are drawn again with noise.
N images of the whole run, D input dimensions, V words.
"""

import json
import os
import random
import resource
import subprocess
import sys
import time
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict, dataclass, replace
from itertools import islice, pairwise
from pathlib import Path
from typing import Any

import numpy as np
import torch

from pipeline.artifacts import layout
from pipeline.caption import settings as caption_settings
from pipeline.caption import stage as caption
from pipeline.embed import stage as embed
from pipeline.embed import survey
from pipeline.embed import worker as embed_worker
from pipeline.mcr2 import assignment, coding_rate
from pipeline.mcr2.collectives import Collectives
from pipeline.mcr2.threads import one_thread
from pipeline.runtime.config import Sections
from pipeline.runtime.errors import UserError
from pipeline.select_k import choose_k
from pipeline.select_k import settings as select_k_settings
from pipeline.select_k.assign_parts import Assigner, assign_parts, load_network
from pipeline.select_k.full_passes import statistics
from pipeline.store import storage, tables
from pipeline.store.listing import Shard
from pipeline.store.shard_writer import ShardWriter
from pipeline.store.shards import ShardReader
from pipeline.train import loop, sampling, worker
from pipeline.train import settings as train_settings
from pipeline.vision import clip, prompts, text_encoding
from pipeline.write import stage as write

TIMED_S = 3.0  # seconds for which the text encoder is timed
STEPS = 10  # of training that are timed
NOISE = 0.1  # standard deviations added to a row that is drawn again
WORKER = "import ray, torch, pipeline.train.worker, pipeline.embed.worker"  # what a process imports
CLOCK = time.perf_counter
Facts = dict[str, Any]  # seconds per image, word, row or step, or once: as the name says


@dataclass(frozen=True)
class Sampled:
    """What was read of one shard."""

    shard: Shard
    copy: Shard  # its first images, on the local disk
    images: int
    bytes: int  # of the shard up to there
    whole: bool  # the shard has no more
    waited_s: float  # for the store


def choose(shards: list[Shard], count: int, seed: int = 0) -> list[Shard]:
    """`count` of the shards, one at random out of each of as many even stretches of the list."""
    rng, count = random.Random(seed), min(count, len(shards))
    ends = [len(shards) * i // count for i in range(count + 1)]
    return [shards[rng.randrange(*stretch)] for stretch in pairwise(ends)]


def sample(shard: Shard, images: int, folder: Path, max_sample_bytes: int) -> Sampled:
    """Copy the first images of a shard."""
    target = folder / f"{shard.stem}.tar"
    began, own, count, end = CLOCK(), time.thread_time(), 0, 0
    with storage.open_read(shard.url, shard.size) as stream:
        with target.open("wb") as file, ShardWriter(file) as writer:
            samples = iter(ShardReader(stream, max_sample_bytes))
            for found in islice(samples, images):
                count, end = count + 1, max(m.offset + m.size for m in found.members)
                for member in found.members:
                    if member.whole:
                        writer.add(member.tar_name, member.data)
        waited, whole = CLOCK() - began - (time.thread_time() - own), next(samples, None) is None
    copy = Shard(shard.stem, str(target), target.stat().st_size, "")
    return Sampled(shard, copy, count, shard.size if whole else end, whole, waited)


def measure(sections: Sections, sampled: list[Sampled], images: int, root: str) -> Facts:
    """Every stage once over the samples, as it will be for N images."""
    cfg, paths, count = sections["embed"], layout.RunPaths(root), sum(s.images for s in sampled)
    starts = [_start()]
    found = _embed(cfg, [s.copy for s in sampled], paths)
    total = round(images * found["embedded"])
    known = train_settings.read_words(sections["train"], cfg.model)
    names = caption_settings.read_vocabulary(sections["caption"], cfg.model)
    vectors, scale, texts = _encode_words(sections, max(known, names, key=len))
    trained = _train(sections["train"], paths, total, redraw(vectors, len(known)), scale)
    labelled = _label(sections, paths, total, redraw(vectors, len(names)))
    starts.append(_start())
    unit = 1 if sys.platform == "darwin" else 1024
    return {
        **(found | texts | trained | labelled),
        "start_s": min(starts),  # the first may read the modules from the disk
        "images": count,
        "waited_s": sum(s.waited_s for s in sampled) / count,
        "peak_bytes": resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit,
        "part_bytes": {
            folder: sum(Path(f"{root}/{folder}/{name}").stat().st_size for name in files) / count
            for folder in ("embeddings", "rejects", "assignments", "labels", "labeled")
            if (files := paths.folder(folder).names() - {"manifest.json"})
        },
    }


def _start() -> float:
    """Seconds until a new process has imported what a worker imports."""
    began = CLOCK()
    subprocess.run([sys.executable, "-c", WORKER], check=True)
    return CLOCK() - began


def _embed(cfg: Any, shards: list[Shard], paths: layout.RunPaths) -> Facts:
    """One encoder over the sampled shards, as an actor of the run does it."""
    stamps, cores, cfg = [CLOCK()], os.cpu_count() or 1, replace(cfg, decode_cpus=0)  # without Ray
    embedder = embed_worker.Embedder(cfg, paths, cores)
    stamps, own = [*stamps, CLOCK()], time.process_time()
    with ThreadPoolExecutor(cfg.readers) as pool:
        rows = list(pool.map(embedder, [{"shard": json.dumps(asdict(s))} for s in shards]))
    stamps, own = [*stamps, CLOCK()], time.process_time() - own
    if errors := [row["error"] for row in rows if row["error"]]:
        raise RuntimeError(f"plan: {errors[0]}")
    load_s, embed_s = np.diff(stamps).tolist()
    done = [json.loads(row["facts"]) for row in rows]
    summary = embed.summary(done, cfg, embed_s)
    if not summary["embedded"]:
        raise UserError("no image of the sampled shards can be decoded: correct --shards")
    paths.embeddings.finish(survey.fingerprint(cfg, shards), **summary)
    took = {name: sum(facts["took"][name] for facts in done) for name in ("decode_s", "encode_s")}
    each = {**took, "embed_s": embed_s, "embed_cpu_s": own, "embedded": summary["embedded"]}
    rates = {name: value / summary["samples"] for name, value in each.items()}
    return {**rates, "load_s": load_s, "device": summary["precisions"][0], "cores": cores}


def _encode_words(sections: Sections, words: list[str]) -> tuple[np.ndarray, float, Facts]:
    """Vectors (V, D) of as many of the words as TIMED_S allow, and the encoder's logit scale."""
    began, cfg = CLOCK(), sections["embed"]
    templates = prompts.templates(cfg.model, sections["caption"].templates)
    encoder = text_encoding.TextEncoder(cfg.model, cfg.pretrained, templates)
    encoder({"index": 0, "words": words[:1]})
    load_s, began, rows = CLOCK() - began, CLOCK(), list[Facts]()
    for start in range(0, len(words), clip.TEXTS_PER_BATCH):
        batch = words[start : start + clip.TEXTS_PER_BATCH]
        rows.append(encoder({"index": start, "words": batch}))
        if CLOCK() - began > TIMED_S:
            break
    vectors = np.concatenate([row["vectors"] for row in rows])
    facts = {"load_text_s": load_s, "word_s": (CLOCK() - began) / len(vectors)}
    return vectors, rows[0]["logit_scale"], facts


def redraw(rows: np.ndarray, count: int) -> np.ndarray:
    """`count` unit rows: some of these (n, D), or all and more like them."""
    rng = np.random.default_rng(0)
    if count <= len(rows):
        return rows[np.sort(rng.choice(len(rows), count, replace=False))]
    more = rows[rng.integers(len(rows), size=count - len(rows))].astype(np.float32)
    more += NOISE * rows.std(axis=0, dtype=np.float32) * rng.standard_normal(more.shape, np.float32)
    more /= np.linalg.norm(more, axis=1, keepdims=True)
    return np.concatenate([rows, more.astype(rows.dtype)])


def _train(cfg: Any, paths: layout.RunPaths, total: int, words: np.ndarray, scale: float) -> Facts:
    """One worker that trains alone: STEPS steps on the rows that all workers see."""
    began, most = CLOCK(), train_settings.samples_to_read(cfg)
    source = sampling.plan(paths.embeddings.manifest()["shards"], paths, most, cfg.seed)
    x = sampling.read_embeddings(source, range(len(source)))
    read_s, samples = (CLOCK() - began) / len(x), min(total, most)
    fit = train_settings.fit_settings(replace(cfg, workers=1), samples)
    seen = torch.from_numpy(redraw(x, max(fit.batch_size, len(loop.seen_rows(fit, samples)))))
    with one_thread():
        stamps = [CLOCK()]
        network = loop.new_network(fit, seen, torch.from_numpy(words), scale)
        network.to("cuda" if torch.cuda.is_available() else "cpu")
        state = loop.new_state(fit, network)
        for _ in loop.fit(replace(fit, steps=STEPS), seen, state, Collectives()):
            stamps.append(CLOCK())  # before the first step and after the last it validates
        ends = CLOCK()
        kept = loop.landmark_rows(fit, len(seen))
        worker.write_network(fit, state, [f"{row}" for row in kept.tolist()], seen[kept], paths)
    paths.network.finish("plan", upstream=paths.embeddings.manifest()["fingerprint"], config={})
    step_s, validation_s = float(np.median(np.diff(stamps[1:]))), ends - stamps[-1]
    return {
        "read_row_s": read_s,
        "once_s": stamps[1] - stamps[0] - step_s - validation_s + CLOCK() - ends,
        "step_s": step_s,
        "validation_s": validation_s,
        "train_samples": samples,
        "train_words": len(words),
    }


def _label(sections: Sections, paths: layout.RunPaths, total: int, words: np.ndarray) -> Facts:
    """The choice of k on the landmarks, then the passes over all parts: seconds per image."""
    embedded, cfg = paths.embeddings.manifest(), sections["caption"]
    shards, network = [shard["shard"] for shard in embedded["shards"]], load_network(paths)
    stems = [shard["stem"] for shard in shards]
    sample = tables.read(paths.network.file("sample.parquet"), ["feature"])
    z = torch.from_numpy(tables.to_matrix(sample["feature"]).copy())
    fit = select_k_settings.fit_settings(sections["select_k"], total, *z.shape)
    with one_thread():
        stamps = [CLOCK()]
        leaves = choose_k.over_segment(z, fit)
        stats = coding_rate.statistics(z, assignment.nearest(z, leaves), len(leaves))
        for sums in stats:
            sums *= total / len(z)
        prototypes = choose_k.cut(z, choose_k.choose_k(z, leaves, stats, fit).k, fit)
        stamps.append(CLOCK())
        statistics([paths.embeddings.file(f"{stem}.parquet") for stem in stems], network, leaves)
        assign_parts(stems, paths, Assigner(network, prototypes, "plan"))
        stamps.append(CLOCK())
        if cfg.alt_texts:
            caption.count_ngrams(stems, paths, prototypes.k)
        caption.votes(stems, paths, words, prototypes.k, cfg.temperature)
        stamps.append(CLOCK())
        names: list[str | None] = ["a caption"] * prototypes.k
        tars, limit = sections["write"].shards, sections["embed"].max_sample_bytes
        job = write.WriteJob(paths, embedded["columns"], names, tars, "plan", limit)
        write.write_shards(shards, job)
        stamps.append(CLOCK())
    cut_s, *passes = np.diff(stamps).tolist()
    each = [seconds / embedded["samples"] for seconds in passes]
    return {
        **dict(zip(("select_s", "caption_s", "write_s"), each, strict=True)),
        "cut_s": cut_s,
        "leaf_bytes": len(leaves) * z.shape[1] ** 2 * 8,
        "caption_words": len(words),
    }
