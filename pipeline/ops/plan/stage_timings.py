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
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict, dataclass, replace
from itertools import islice, pairwise
from pathlib import Path
from statistics import median
from typing import Any

import numpy as np
import torch

from pipeline.artifacts import layout
from pipeline.caption import settings as caption_settings
from pipeline.caption import stage as caption
from pipeline.embed import settings as embed_settings
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
    found = _embed(cfg, [s.copy for s in sampled], paths)
    beside = train_settings.read_words(sections["train"], cfg.model)
    names = caption_settings.read_vocabulary(sections["caption"], cfg.model)
    longest = max(beside, names, key=len)
    vectors, scale, texts = _encode_words(cfg, sections["caption"].templates, longest)
    total, words = round(images * found["embedded"]), redraw(vectors, len(beside))
    trained = _train(sections["train"], paths, total, words, scale)
    leaves, prototypes, cut = _cluster(sections["select_k"], paths, total)
    passes = _pass_over(leaves, prototypes, redraw(vectors, len(names)), sections, paths)
    began = CLOCK()
    subprocess.run([sys.executable, "-c", WORKER], check=True)
    return {
        **(found | texts | trained | cut | passes),
        "start_s": CLOCK() - began,
        "images": count,
        "waited_s": sum(s.waited_s for s in sampled) / count,
        "peak_bytes": resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024,
        "part_bytes": {
            folder: sum(Path(f"{root}/{folder}/{name}").stat().st_size for name in files) / count
            for folder in ("embeddings", "rejects", "assignments", "labels", "labeled")
            if (files := paths.folder(folder).names() - {"manifest.json"})
        },
    }


def _embed(cfg: embed_settings.Config, shards: list[Shard], paths: layout.RunPaths) -> Facts:
    """One encoder over the sampled shards, as an actor of the run does it."""
    began, cores = CLOCK(), os.cpu_count() or 1
    embedder = embed_worker.Embedder(replace(cfg, decode_cpus=0), paths, cores)  # no Ray to ask
    load_s, began, own = CLOCK() - began, CLOCK(), time.process_time()
    with ThreadPoolExecutor(embed_settings.READERS) as pool:
        rows = list(pool.map(embedder, [{"shard": json.dumps(asdict(s))} for s in shards]))
    embed_s, embed_cpu_s = CLOCK() - began, time.process_time() - own
    if errors := [row["error"] for row in rows if row["error"]]:
        raise RuntimeError(f"plan: {errors[0]}")
    done = [json.loads(row["facts"]) for row in rows]
    summary = embed.summary(done, cfg, embed_s)
    if not summary["embedded"]:
        raise UserError("no image of the sampled shards can be decoded: correct --shards")
    paths.embeddings.finish(survey.fingerprint(cfg, shards), **summary)
    samples = summary["samples"]
    return {
        "load_s": load_s,
        "decode_s": sum(facts["took"]["decode_s"] for facts in done) / samples,
        "encode_s": sum(facts["took"]["encode_s"] for facts in done) / samples,
        "embed_s": embed_s / samples,
        "embed_cpu_s": embed_cpu_s / samples,
        "embedded": summary["embedded"] / samples,
        "device": summary["precisions"][0],
        "cores": cores,
    }


def _encode_words(
    cfg: embed_settings.Config, templates: tuple[str, ...], words: list[str]
) -> tuple[np.ndarray, float, Facts]:
    """Vectors (V, D) of as many of the words as TIMED_S allow, and the encoder's logit scale."""
    began = CLOCK()
    filled = prompts.templates(cfg.model, templates)
    encoder = text_encoding.TextEncoder(cfg.model, cfg.pretrained, filled)
    encoder({"index": 0, "words": words[:1]})
    load_s, starts, rows = CLOCK() - began, iter(range(0, len(words), clip.TEXTS_PER_BATCH)), []
    began = CLOCK()
    while CLOCK() - began < TIMED_S and (start := next(starts, None)) is not None:
        batch = words[start : start + clip.TEXTS_PER_BATCH]
        rows.append(encoder({"index": start, "words": batch}))
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


def _train(
    cfg: train_settings.Config, paths: layout.RunPaths, total: int, words: np.ndarray, scale: float
) -> Facts:
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
    step_s, validation_s = median(np.diff(stamps[1:]).tolist()), ends - stamps[-1]
    return {
        "read_row_s": read_s,
        "once_s": stamps[1] - stamps[0] - step_s - validation_s + CLOCK() - ends,
        "step_s": step_s,
        "validation_s": validation_s,
        "train_samples": samples,
        "train_words": len(words),
    }


def _cluster(
    cfg: select_k_settings.Config, paths: layout.RunPaths, total: int
) -> tuple[torch.Tensor, assignment.Prototypes, Facts]:
    """The choice of k on the landmarks, without the passes over all parts."""
    sample = tables.read(paths.network.file("sample.parquet"), ["feature"])
    z = torch.from_numpy(tables.to_matrix(sample["feature"]).copy())
    fit = select_k_settings.fit_settings(cfg, total, *z.shape)
    with one_thread():
        began = CLOCK()
        leaves = choose_k.over_segment(z, fit)
        stats = coding_rate.statistics(z, assignment.nearest(z, leaves), len(leaves))
        for sums in stats:
            sums *= total / len(z)
        prototypes = choose_k.cut(z, choose_k.choose_k(z, leaves, stats, fit).k, fit)
        seconds = CLOCK() - began
    sums_bytes = len(leaves) * z.shape[1] ** 2 * 8
    return leaves, prototypes, {"cut_s": seconds, "leaf_bytes": sums_bytes}


def _pass_over(
    leaves: torch.Tensor,
    prototypes: assignment.Prototypes,
    words: np.ndarray,
    sections: Sections,
    paths: layout.RunPaths,
) -> Facts:
    """The passes over all parts, as each stage makes them: seconds per image."""
    captioning, embedded = sections["caption"], paths.embeddings.manifest()
    shards = [shard["shard"] for shard in embedded["shards"]]
    stems, network = [shard["stem"] for shard in shards], load_network(paths)
    urls = [paths.embeddings.file(f"{stem}.parquet") for stem in stems]
    assigner = Assigner(network, prototypes, "plan")
    captions: list[str | None] = ["a caption"] * prototypes.k
    limit = embedded["config"]["max_sample_bytes"]
    job = write.WriteJob(
        paths, embedded["columns"], captions, sections["write"].shards, "plan", limit
    )
    steps: dict[str, Callable[[], Any]] = {
        "statistics_s": lambda: statistics(urls, network, leaves),
        "assign_s": lambda: assign_parts(stems, paths, assigner),
        "count_s": lambda: (
            captioning.alt_texts and caption.count_ngrams(stems, paths, prototypes.k)
        ),
        "votes_s": lambda: caption.votes(stems, paths, words, prototypes.k, captioning.temperature),
        "write_s": lambda: write.write_shards(shards, job),
    }
    stamps = [CLOCK()]
    with one_thread():
        for step in steps.values():
            step()
            stamps.append(CLOCK())
    each = np.diff(stamps) / embedded["samples"]
    return {"caption_words": len(words), **dict(zip(steps, each.tolist(), strict=True))}
