"""Stage 2, train: embeddings to a network whose features show the clusters (MCR², CPP).

reads   embeddings/            a sample of the row groups; each worker reads its share
writes  network/               network.safetensors, network.json, history.parquet, sample.parquet,
                               manifest.json, which is last
        network/checkpoint-*   during training; a rerun resumes from the last

`loop.fit` is the computation, without Ray; `worker` runs it in the processes of Ray Train.
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
from pipeline.train.settings import Config, expected, fit_settings, read_words, samples_to_read
from pipeline.train.worker import ProgressActor, WorkerJob, train_workers
from pipeline.vision import text_encoding

log = logging.getLogger(__name__)


def _follow(actor: Any, progress: StageProgress, over: threading.Event) -> None:
    """Show the steps that the workers report until training is over."""
    while not over.wait(0.5):
        try:
            step, steps, samples = ray.get(actor.read.remote())
        except ray.exceptions.RayError:  # its node is lost: Ray starts it on another
            continue
        if steps and step != progress.units:  # before that the workers are starting
            progress.total = steps
            progress.advance(step - progress.units, samples - progress.samples)
            waiting_for([f"step {step + 1} of {steps}" if step < steps else "the network's files"])


def _encode_words(words: list[str], embedded: dict[str, Any]) -> tuple[np.ndarray, float]:
    """Vectors (V, D) float32 of the words, and the logit scale of the encoder of the images."""
    made_with = embedded["config"]
    if not words:
        return np.zeros((0, 1), np.float32), 1.0
    return text_encoding.encode(words, (), made_with["model"], made_with["pretrained"])


def run(cfg: Config, paths: layout.RunPaths) -> dict[str, Any]:
    """Train on a sample of the embeddings; commit network, history and landmarks."""
    embedded = outputs.upstream(paths, "embeddings")["embeddings"]
    want = expected(cfg, {"embeddings": embedded}, paths)
    if manifest := want.if_done():
        Checkpoints(paths, want.made_of).drop()  # a driver may have been killed before it did
        return manifest
    made_of = want.made_of
    source = plan(embedded["shards"], paths, samples_to_read(cfg), cfg.seed)
    fit_settings(cfg, len(source))  # rejects too few samples before any work
    cluster.join()
    names = paths.network.names()
    paths.network.remove({name for name in names if not name.startswith("checkpoint-")})
    actor, over = ProgressActor.remote(), threading.Event()  # type: ignore[attr-defined]
    with StageProgress("train", 1, "steps") as progress:
        follower = threading.Thread(target=_follow, args=(actor, progress, over), daemon=True)
        follower.start()
        try:
            words = ray.put(_encode_words(read_words(cfg, embedded["config"]["model"]), embedded))
            waiting_for(["workers to start and to read their samples"])
            encoders = embedded["encoders"]
            train_workers(WorkerJob(cfg, source, paths, made_of, encoders, words, actor))
        finally:
            over.set()
            follower.join()
    history = tables.read(paths.network.file("history.parquet"))
    facts = json.loads(storage.read_bytes(paths.network.file("network.json")))
    looks, views = facts["looks"], facts["views"]
    further = embedded["encoders"][1:]  # their views are the last; the recipe cpp has no views
    for view, encoder in zip(views[-len(further) :] if further else [], further, strict=False):
        view["name"] = encoder["model"]
    kept = [look for look in looks if look["kept"]][-1]
    paths.network.finish(
        made_of,
        upstream=embedded["fingerprint"],
        config=config.facts(cfg),
        steps=history.num_rows,
        looks=looks,
        views=views,
        kept_step=kept["step"],
        seconds=round(progress.seconds, 2),
    )
    Checkpoints(paths, made_of).drop()
    for view in views[1:]:
        used = f"weight {view['weight']:.2f}" if view["weight"] else "not used"
        log.info("train: %s: agreement %.2f, %s", view["name"], view["agreement"], used)
    console.log_finished(
        *(log, "train", progress.seconds, f"{history.num_rows:,} steps"),
        f"kept the network of step {kept['step']:,}"
        if kept["step"]
        else "kept the input views: training did not help enough",
        f"neighbour information {kept['information']:.3f} ({looks[0]['information']:.3f} at first)",
    )
    return paths.network.manifest()
