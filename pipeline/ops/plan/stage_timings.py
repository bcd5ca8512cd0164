"""Measures the work of every stage on a few shards, by the stage's own functions, without Ray.

What a stage does once (training, the cut of the landmarks) is done on as many rows as the run will
have. Where the sampled images are fewer, rows are drawn again with noise. All files that it writes
are below the given root. N images of the whole run, D input dimensions, V words.
"""

import json
import os
import resource
import subprocess
import sys
import time
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict, dataclass, replace
from itertools import islice
from pathlib import Path
from typing import Any

import numpy as np
import torch

from pipeline.artifacts import layout
from pipeline.artifacts.levels import Levels
from pipeline.caption import settings as caption_settings
from pipeline.caption import stage as caption
from pipeline.embed import stage as embed
from pipeline.embed.worker import Embedder
from pipeline.mcr2 import assignment, choose_k, coding_rate, cut, levels
from pipeline.mcr2.collectives import Collectives
from pipeline.mcr2.threads import one_thread
from pipeline.runtime.config import Sections
from pipeline.runtime.errors import UserError
from pipeline.select_k import settings as select_k_settings
from pipeline.select_k.assign_parts import Assigner, assign_parts, load_network
from pipeline.select_k.full_passes import statistics
from pipeline.store import compressed, tables
from pipeline.store.listing import Shard
from pipeline.store.shard_writer import ShardWriter
from pipeline.store.shards import ShardReader
from pipeline.train import loop, sampling
from pipeline.train import settings as train_settings
from pipeline.train.worker import write_network
from pipeline.vision import clip, prompts, text_encoding
from pipeline.write import stage as write

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


def choose(shards: list[Shard], count: int) -> list[Shard]:
    """`count` of the shards: the middle of each of as many even stretches of the list."""
    count = min(count, len(shards))
    return [shards[len(shards) * (2 * i + 1) // (2 * count)] for i in range(count)]


def sample(shard: Shard, images: int, folder: str, max_sample_bytes: int) -> Sampled:
    """Copy the first images of a shard."""
    target = Path(folder, f"{shard.stem}.tar")
    began, own, count, end = CLOCK(), time.thread_time(), 0, 0
    with compressed.open_tar(shard.url, shard.size) as stream:
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
    start_s = _start()  # this may read the modules from the disk
    found = _embed(cfg, [s.copy for s in sampled], paths)
    total = round(images * found["embedded"])
    known = train_settings.read_words(sections["train"], cfg.model)
    names = caption_settings.read_vocabulary(sections["caption"], cfg.model)
    vectors, scale, texts = _encode_words(sections, max(known, names, key=len))
    trained = _train(sections["train"], paths, total, redraw(vectors, len(known)), scale)
    labelled = _label(sections, paths, total, redraw(vectors, len(names)))
    unit = 1 if sys.platform == "darwin" else 1024
    return {
        **(found | texts | trained | labelled),
        "start_s": min(start_s, _start()),
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
    """One encoder over the sampled shards, as an actor of the run does it; commits a manifest."""
    began, cores, cfg = CLOCK(), os.cpu_count() or 1, replace(cfg, decode_cpus=0)  # without Ray
    embedder = Embedder(cfg, paths, cores, command="plan")
    loaded, cpu_s = CLOCK(), time.process_time()
    with ThreadPoolExecutor(cfg.readers) as pool:
        rows = list(pool.map(embedder, [{"shard": json.dumps(asdict(s))} for s in shards]))
    embed_s, cpu_s = CLOCK() - loaded, time.process_time() - cpu_s
    if errors := [row["error"] for row in rows if row["error"]]:
        raise RuntimeError(f"plan: {errors[0]}")
    done = [json.loads(row["facts"]) for row in rows]
    manifest = embed.summary(done, cfg, embed_s)
    if not manifest["embedded"]:
        raise UserError("no image of the sampled shards can be decoded: correct --shards")
    paths.embeddings.finish("plan", **manifest)
    took = {name: sum(facts["took"][name] for facts in done) for name in ("decode_s", "encode_s")}
    took |= {"embed_s": embed_s, "embed_cpu_s": cpu_s, "embedded": manifest["embedded"]}
    each = {name: value / manifest["samples"] for name, value in took.items()}
    return {**each, "load_s": loaded - began, "device": manifest["precisions"][0], "cores": cores}


def _encode_words(sections: Sections, words: list[str]) -> tuple[np.ndarray, float, Facts]:
    """Vectors (V, D) of the first words, and the encoder's logit scale."""
    began, cfg, words = CLOCK(), sections["embed"], words[: clip.TEXTS_PER_BATCH]
    templates = prompts.templates(cfg.model, sections["caption"].templates)
    encoder = text_encoding.TextEncoder(cfg.model, cfg.pretrained, templates)
    encoder({"index": 0, "words": words[:1]})
    loaded = CLOCK()
    row = encoder({"index": 0, "words": words})
    facts = {"load_text_s": loaded - began, "word_s": (CLOCK() - loaded) / len(words)}
    return row["vectors"], row["logit_scale"], facts


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
    x = sampling.read_embeddings(source, range(len(source)), ["embedding"])
    read_s, samples = (CLOCK() - began) / len(x), min(total, most)
    fit = train_settings.fit_settings(replace(cfg, workers=1), samples)
    seen = torch.from_numpy(redraw(x, max(fit.batch_size, len(loop.seen_rows(fit, samples)))))
    with one_thread():
        stamps = [CLOCK()]
        network, views = loop.new_network(fit, seen, torch.from_numpy(words), scale)
        network.to("cuda" if torch.cuda.is_available() else "cpu")
        state = loop.new_state(fit, network)
        for _ in loop.fit(replace(fit, steps=STEPS), seen, state, Collectives()):
            stamps.append(CLOCK())  # before the first step and after the last it validates
        step_s, validation_s = float(np.median(np.diff(stamps[1:]))), CLOCK() - stamps[-1]
        kept = loop.landmark_rows(fit, len(seen))
        write_network(fit, state, views, [f"{n}" for n in kept.tolist()], seen[kept], paths)
        once_s = CLOCK() - stamps[-1] + stamps[1] - stamps[0] - step_s - 2 * validation_s
    times = {"read_row_s": read_s, "once_s": once_s, "step_s": step_s, "validation_s": validation_s}
    return times | {"train_samples": samples, "train_words": len(words)}


def _label(sections: Sections, paths: layout.RunPaths, total: int, words: np.ndarray) -> Facts:
    """The choice of k on the landmarks, then the passes over all parts: seconds per image."""
    embedded, cfg = paths.embeddings.manifest(), sections["caption"]
    shards, network = [shard["shard"] for shard in embedded["shards"]], load_network(paths)
    stems = [shard["stem"] for shard in shards]
    sample = tables.read(paths.network.file("sample.parquet"), ["feature"])
    z = torch.from_numpy(tables.to_matrix(sample["feature"]).copy())
    fit = select_k_settings.fit_settings(sections["select_k"], total, *z.shape)
    with one_thread():
        began = CLOCK()
        leaves = choose_k.over_segment(z, fit)
        stats = coding_rate.statistics(z, assignment.nearest(z, leaves), len(leaves))
        for sums in stats:
            sums *= total / len(z)
        index = cut.neighbours(z)
        prototypes = cut.cut(z, choose_k.choose_k(z, leaves, stats, fit).k, fit.seed, index)
        decided = CLOCK()
        statistics([paths.embeddings.file(f"{stem}.parquet") for stem in stems], network, leaves)
        groups = levels.split(levels.Landmarks.of(z, prototypes, index), fit.leaves, fit.seed)
        own = groups.cluster_of.numpy()
        assign_parts(stems, paths, Assigner(network, prototypes, groups, "plan"))
        assigned = CLOCK()
        if cfg.alt_texts:
            caption.count_ngrams(stems, paths, own)
        caption.votes(stems, paths, words, own, cfg.temperature)
        voted = CLOCK()
        found = Levels(own, own[:, None], groups.table.numpy())
        tars, limit = sections["write"].shards, sections["embed"].max_sample_bytes
        names: list[str | None] = ["a caption"] * prototypes.k
        named = (embedded["columns"], found, [names])
        write.write_shards(shards, write.WriteJob(paths, *named, tars, "plan", limit))
        written = CLOCK()
    return {
        "cut_s": decided - began,
        "select_s": (assigned - decided) / embedded["samples"],
        "caption_s": (voted - assigned) / embedded["samples"],
        "write_s": (written - voted) / embedded["samples"],
        "leaf_bytes": len(leaves) * z.shape[1] ** 2 * 8,
        "caption_words": len(words),
    }
