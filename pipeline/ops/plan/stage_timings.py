"""Each stage's core once, timed: what the processes of a trial do.

reads   the sampled shards, then what the core before has left in the temporary folder
writes  what the stages would, there

N images of the whole run, D input dimensions, V words.
"""

import json
import os
import resource
import sys
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict, replace
from pathlib import Path
from statistics import median
from typing import Any

import numpy as np
import torch

from pipeline.artifacts import layout
from pipeline.caption import settings as caption_settings
from pipeline.caption import stage as caption
from pipeline.embed import encode_shard, survey
from pipeline.embed import settings as embed_settings
from pipeline.embed import stage as embed
from pipeline.embed import worker as embed_worker
from pipeline.embed.decoding import NO_PIXELS
from pipeline.mcr2 import assignment, coding_rate
from pipeline.mcr2.collectives import Collectives
from pipeline.mcr2.model_selection import look_steps
from pipeline.mcr2.threads import one_thread
from pipeline.runtime.errors import UserError
from pipeline.select_k import choose_k
from pipeline.select_k import settings as select_k_settings
from pipeline.select_k.assign_parts import Assigner, assign_parts, load_network
from pipeline.select_k.full_passes import statistics
from pipeline.store import tables
from pipeline.store.listing import Shard
from pipeline.train import loop, sampling, worker
from pipeline.train import settings as train_settings
from pipeline.vision import clip, prompts, text_encoding
from pipeline.write import settings as write_settings
from pipeline.write import stage as write

TIMED_S = 3.0  # seconds that the encoders of images and of texts are timed for, at least
STEPS = 10  # of training that are timed
NOISE = 0.1  # standard deviations added to a row that is drawn again
CLOCK = time.perf_counter
OWN = time.thread_time  # processor time of this thread


def peak_bytes() -> int:
    """Most memory that this process has held."""
    try:  # `getrusage` begins at what the parent had
        status = Path("/proc/self/status").read_text()
        return int(status.partition("VmHWM:")[2].split()[0]) * 1024
    except (OSError, IndexError):
        unit = 1 if sys.platform == "darwin" else 1024
        return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit


def embedding(
    cfg: embed_settings.Config, shards: list[Shard], paths: layout.RunPaths
) -> dict[str, Any]:
    """The encoder's actor: decoding alone, the model alone, then both as they will run."""
    began, threads = CLOCK(), os.cpu_count() or 1
    embedder = embed_worker.Embedder(replace(cfg, decode_cpus=0), paths, threads)  # no Ray to ask
    encoder, load_s = embedder.encoder, CLOCK() - began
    samples, spent, began, batch = 0, 0.0, OWN(), NO_PIXELS
    for shard in shards:
        for found in encode_shard.decoded(shard, encoder.prepare, replace(cfg, decode_cpus=1)):
            samples += len(found.rows) + len(found.rejects)
            spent += found.decode_s
            batch = max(batch, found.pixels, key=len)
    decode_s = (OWN() - began + spent) / samples
    if not len(batch):
        raise UserError("no image of the sampled shards can be decoded: correct --shards")
    times = timed_for(
        TIMED_S, lambda: embedder.thread.submit(encoder.encode_images, batch).result()
    )
    began, own = CLOCK(), time.process_time()
    with ThreadPoolExecutor(embed_settings.READERS) as pool:
        rows = list(pool.map(embedder, [{"shard": json.dumps(asdict(s))} for s in shards]))
    embed_s, embed_cpu_s = CLOCK() - began, time.process_time() - own
    if errors := [row["error"] for row in rows if row["error"]]:
        raise RuntimeError(f"plan: {errors[0]}")
    summary = embed.summary([json.loads(row["facts"]) for row in rows], cfg, embed_s)
    paths.embeddings.finish(survey.fingerprint(cfg, shards), **summary)
    return {
        "load_s": load_s,
        "decode_s": decode_s,
        "encode_s": median(times) / len(batch),
        "embed_s": embed_s / samples,
        "embed_cpu_s": embed_cpu_s / samples,
        "embedded": summary["embedded"] / samples,
        "dim": encoder.dim,
        "device": encoder.device,
        "precision": encoder.precision,
        "cores": os.cpu_count() or 1,
    }


def timed_for(seconds: float, call: Callable[[], Any]) -> list[float]:
    """Seconds of each of as many calls as they take, after a first that warms up."""
    call()
    times: list[float] = []
    while sum(times) < seconds:
        began = CLOCK()
        call()
        times.append(CLOCK() - began)
    return times


def encoding(
    cfg: embed_settings.Config, templates: tuple[str, ...], words: list[str]
) -> dict[str, Any]:
    """The text encoder's actor, over as many of the words as TIMED_S allow."""
    began = CLOCK()
    filled = prompts.templates(cfg.model, templates)
    encoder = text_encoding.TextEncoder(cfg.model, cfg.pretrained, filled)
    encoder({"index": 0, "words": words[:1]})
    load_s, began, vectors = CLOCK() - began, CLOCK(), []
    for start in range(0, len(words), clip.TEXTS_PER_BATCH):
        batch = words[start : start + clip.TEXTS_PER_BATCH]
        vectors.append(encoder({"index": start, "words": batch}))
        if CLOCK() - began > TIMED_S:
            break
    found = np.concatenate([row["vectors"] for row in vectors])
    return {
        "load_s": load_s,
        "word_s": (CLOCK() - began) / len(found),
        "vectors": found,
        "logit_scale": vectors[0]["logit_scale"],
    }


def filled(rows: np.ndarray, count: int) -> np.ndarray:
    """`count` unit rows: some of these (n, D), or all and more like them."""
    rng = np.random.default_rng(0)
    if count <= len(rows):
        return rows[np.sort(rng.choice(len(rows), count, replace=False))]
    more = rows[rng.integers(len(rows), size=count - len(rows))].astype(np.float32)
    more += NOISE * rows.std(axis=0, dtype=np.float32) * rng.standard_normal(more.shape, np.float32)
    more /= np.linalg.norm(more, axis=1, keepdims=True)
    return np.concatenate([rows, more.astype(rows.dtype)])


def training(
    cfg: train_settings.Config, paths: layout.RunPaths, total: int, words: np.ndarray, scale: float
) -> dict[str, Any]:
    """A worker of Ray Train that trains alone: STEPS steps on the rows that all workers see."""
    began, most = CLOCK(), train_settings.wanted_samples(cfg)
    source = sampling.plan(paths.embeddings.manifest()["shards"], paths, most, cfg.seed)
    x = sampling.read_embeddings(source, range(len(source)))
    read_s, samples = (CLOCK() - began) / len(x), min(total, most)
    fit = train_settings.fitted(replace(cfg, workers=1), samples, x.shape[1])
    x = filled(x, max(fit.batch_size, len(loop.seen_rows(fit, samples))))
    seen = torch.from_numpy(x)
    with one_thread():
        began = CLOCK()
        network = loop.new_network(fit, seen, torch.from_numpy(words), scale)
        network_s = CLOCK() - began
        network.to("cuda" if torch.cuda.is_available() else "cpu")
        state, stamps = loop.new_state(fit, network), [CLOCK()]
        for _ in loop.fit(replace(fit, steps=STEPS), seen, state, Collectives()):
            stamps.append(CLOCK())
        looked = CLOCK()
        kept = loop.landmark_rows(fit, len(seen))
        worker.write_network(fit, state, [f"{row}" for row in kept.tolist()], seen[kept], paths)
        written_s = CLOCK() - looked
    paths.network.finish("trial", upstream=paths.embeddings.manifest()["fingerprint"], config={})
    step_s = median(np.diff(stamps[1:]).tolist())
    look_s = looked - stamps[-1]
    return {
        "read_s": read_s,
        "once_s": network_s + written_s,
        "judge_s": max(0.0, stamps[1] - stamps[0] - step_s - look_s),
        "step_s": step_s,
        "look_s": look_s,
        "looks": len(look_steps(cfg.steps)),
        "samples": samples,
        "rows": len(x),
        "words": len(words),
        "device": str(next(network.parameters()).device.type),
    }


def clustering(cfg: select_k_settings.Config, paths: layout.RunPaths, total: int) -> dict[str, Any]:
    """The driver of select_k, without its passes: what is decided on the landmarks."""
    sample = tables.read(paths.network.file("sample.parquet"), ["feature"])
    z = torch.from_numpy(tables.to_matrix(sample["feature"]).copy())
    fit = select_k_settings.fitted(cfg, total, *z.shape)
    with one_thread():
        began = CLOCK()
        leaves = choose_k.over_segment(z, fit)
        labels = assignment.nearest(z, leaves)
        stats = coding_rate.statistics(z, labels, len(leaves))
        for sums in stats:
            sums *= total / len(z)
        choice = choose_k.chosen(z, leaves, stats, fit)
        prototypes = choose_k.cut(z, choice.k, fit)
        seconds = CLOCK() - began
    return {
        "cut": (leaves, prototypes),
        "seconds": seconds,
        "landmarks": len(z),
        "leaves": len(leaves),
        "feature_dim": z.shape[1],
        "k": prototypes.k,
    }


def passing(
    cut: tuple[torch.Tensor, assignment.Prototypes],
    words: np.ndarray,
    captioning: caption_settings.Config,
    writing: write_settings.Config,
    paths: layout.RunPaths,
) -> dict[str, Any]:
    """A task's process: the passes over all parts, as each stage makes them; seconds per image."""
    leaves, prototypes = cut
    embedded = paths.embeddings.manifest()
    shards = [shard["shard"] for shard in embedded["shards"]]
    stems, network = [shard["stem"] for shard in shards], load_network(paths)
    urls = [paths.embeddings.file(f"{stem}.parquet") for stem in stems]
    assigner = Assigner(network, prototypes, "trial")
    captions: list[str | None] = ["a caption"] * prototypes.k
    limit = embedded["config"]["max_sample_bytes"]
    job = write.WriteJob(paths, embedded["columns"], captions, writing.shards, "trial", limit)
    steps: dict[str, Callable[[], Any]] = {
        "statistics_s": lambda: statistics(urls, network, leaves),
        "assign_s": lambda: assign_parts(stems, paths, assigner),
        "count_s": lambda: caption.count_ngrams(stems, paths, prototypes.k),
        "votes_s": lambda: caption.votes(stems, paths, words, prototypes.k, captioning.temperature),
        "write_s": lambda: write.write_shards(shards, job),
    }
    if not captioning.alt_texts:
        del steps["count_s"]
    found, peaks = {}, {}
    with one_thread():
        for name, step in steps.items():
            began = CLOCK()
            step()
            found[name] = (CLOCK() - began) / embedded["samples"]
            peaks[name] = peak_bytes()
    return {"count_s": 0.0, **found, "words": len(words), "peaks": peaks}
