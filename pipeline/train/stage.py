"""Stage 2, train: embeddings to the network that makes clusters visible (MCR², CPP).

reads   embeddings/{stem}.parquet       a sample of their row groups, each worker its share
writes  network/network.safetensors     weights
        network/network.json            shape, settings
        network/history.parquet         HISTORY        one row per step
        network/manifest.json           looks: how well the neighbours agreed, and what was kept
        network/sample.parquet          sample_schema  landmarks, before and after
        network/checkpoint-{step}.*     while it trains; a rerun goes on from the last

N training samples, m that all workers see, D input dimensions, V words, d feature dimensions, n
samples in a global batch, W workers. Core: `fit` and what it calls (tensors, no Ray). Shell:
`worker` and `run` (Ray Train).
"""

import json
import logging
import threading
from typing import Any

import numpy as np
import ray
import ray.train
import ray.train.torch

from pipeline.artifacts import layout, outputs
from pipeline.runtime import cluster, config, console
from pipeline.runtime.progress import StageProgress, waiting_for
from pipeline.store import storage, tables
from pipeline.train.checkpoints import Checkpoints
from pipeline.train.sampling import plan
from pipeline.train.settings import Config, expected, fit_settings, read_words, wanted_samples
from pipeline.train.worker import ProgressActor, WorkerJob, _train
from pipeline.vision import text_encoding

log = logging.getLogger(__name__)


def _follow(board: Any, progress: StageProgress, over: threading.Event) -> None:
    """Show the board until training is over."""
    while not over.wait(0.5):
        try:
            step, steps, samples = ray.get(board.read.remote())
        except ray.exceptions.RayError:  # its node is gone; it comes again on another
            continue
        if steps and step != progress.units:  # before that the workers are starting
            progress.total = steps
            progress.advance(step - progress.units, samples - progress.samples)
            waiting_for([f"step {step + 1} of {steps}" if step < steps else "the network's files"])


def _encoded(words: list[str], embedded: dict[str, Any]) -> tuple[np.ndarray, float]:
    """(V, D) float32 and the logit scale of the encoder that made the embeddings."""
    made_with = embedded["config"]
    if not words:
        return np.zeros((0, 1), np.float32), 1.0
    return text_encoding.encode(words, (), made_with["model"], made_with["pretrained"])


def run(cfg: Config, paths: layout.RunPaths) -> dict[str, Any]:
    """Train on a sample of the embeddings, commit network, history and landmarks."""
    embedded = outputs.upstream(paths, "embeddings")["embeddings"]
    want = expected(cfg, {"embeddings": embedded}, paths)
    if manifest := want.if_done():
        Checkpoints(paths, want.made_of).drop()  # of a driver killed just before it would have
        return manifest
    made_of = want.made_of
    source = plan(embedded["shards"], paths, wanted_samples(cfg), cfg.seed)
    fit_settings(cfg, len(source), 1)  # refuses too few samples before any work
    cluster.join()
    names = paths.network.names()
    paths.network.remove({name for name in names if not name.startswith("checkpoint-")})
    board, over = ProgressActor.remote(), threading.Event()  # type: ignore[attr-defined]
    with StageProgress("train", 1, "steps") as progress:
        follower = threading.Thread(target=_follow, args=(board, progress, over), daemon=True)
        follower.start()
        try:
            words = ray.put(_encoded(read_words(cfg, embedded["config"]["model"]), embedded))
            waiting_for(["workers to start and to read their samples"])
            _train(WorkerJob(cfg, source, paths, made_of, words, board))
        finally:
            over.set()
            follower.join()
    history = tables.read(paths.network.file("history.parquet"))
    looks = json.loads(storage.read_bytes(paths.network.file("network.json")))["looks"]
    kept = max(looks, key=lambda look: look["information"])
    paths.network.finish(
        made_of,
        upstream=embedded["fingerprint"],
        config=config.facts(cfg),
        steps=history.num_rows,
        looks=looks,
        kept_step=kept["step"],
        seconds=round(progress.seconds, 2),
    )
    Checkpoints(paths, made_of).drop()
    console.log_finished(
        *(log, "train", progress.seconds, f"{history.num_rows:,} steps"),
        f"kept the network of step {kept['step']:,}",
        f"neighbour information {kept['information']:.3f} ({looks[0]['information']:.3f} at first)",
    )
    return paths.network.manifest()
