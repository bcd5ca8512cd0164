"""The workers of Ray Train: each reads its share and trains; rank 0 writes the network."""

import json
import signal
import tempfile
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from typing import Any

import pyarrow as pa
import ray
import ray.train
import ray.train.torch
import torch
from ray.train import FailureConfig, RunConfig, ScalingConfig
from ray.train.torch import TorchTrainer
from safetensors.torch import save as save_tensors
from torch import Tensor

from pipeline.artifacts import layout, schemas
from pipeline.mcr2.collectives import Collectives
from pipeline.mcr2.network import FeatureNetwork
from pipeline.mcr2.threads import one_thread
from pipeline.mcr2.views import View
from pipeline.store import storage, tables
from pipeline.train.checkpoints import Checkpoints
from pipeline.train.loop import (
    fit,
    landmark_rows,
    new_network,
    new_state,
    published_network,
    seen_rows,
)
from pipeline.train.sampling import SamplePlan, Share, gather_rows, read_ids, shares
from pipeline.train.settings import Config, fit_settings, shared_samples
from pipeline.train.state import State

RESTARTS = 2  # of the workers of one training


@dataclass(frozen=True)
class WorkerJob:
    """What every worker gets: settings, where its rows come from, where to write."""

    cfg: Config
    source: SamplePlan
    paths: layout.RunPaths
    made_of: str
    encoders: list[dict[str, Any]]  # column, dim, … of each, from the manifest of embeddings/
    words: Any  # reference to (V, D) float32 and the encoder's logit scale
    progress: Any  # actor handle of a ProgressActor


@ray.remote(num_cpus=0, max_restarts=-1, max_task_retries=-1)
class ProgressActor:
    """The number of steps done, from the workers to the driver."""

    def __init__(self) -> None:
        self.step, self.steps, self.samples = 0, 0, 0

    def note(self, step: int, steps: int, samples: int) -> None:
        """Record the steps done, all steps, and the samples trained on; rank 0 calls it."""
        self.step, self.steps, self.samples = step, steps, samples

    def read(self) -> tuple[int, int, int]:
        """What was recorded last."""
        return self.step, self.steps, self.samples


def worker(job: WorkerJob) -> None:
    """One process of Ray Train: read the share, train; rank 0 writes the network."""
    context = ray.train.get_context()
    workers = Collectives.join(context.get_world_rank(), context.get_world_size())
    device = ray.train.torch.get_device()
    samples = len(job.source)
    shared = samples > shared_samples(job.cfg)
    mine = shares(samples, workers.size)[workers.rank] if shared else range(samples)
    encoders = job.encoders[:1] if job.cfg.recipe == "cpp" else job.encoders
    share = Share.read(job.source, mine, [encoder["column"] for encoder in encoders])
    cfg = fit_settings(job.cfg, samples)
    rows = seen_rows(cfg, samples)
    seen = gather_rows(share, rows, workers, device) if shared else share.held
    words, scale = ray.get(job.words)
    with one_thread():
        dims = [encoder["dim"] for encoder in encoders]
        network: FeatureNetwork
        if cfg.recipe == "cpp":
            network, views = published_network(cfg, dims), list[View]()
        else:
            network, views = new_network(cfg, seen, torch.tensor(words), scale, dims)
    state = new_state(cfg, network.to(device))
    checkpoints = Checkpoints(job.paths, f"{job.made_of}-{cfg.batch_size}")  # which sets the steps
    checkpoints.restore(state)
    with one_thread():
        for _ in fit(cfg, share, state, workers, seen):
            if workers.rank == 0:
                job.progress.note.remote(state.step, cfg.steps, state.step * cfg.batch_size)
                if state.step % cfg.checkpoint_steps == 0:
                    checkpoints.save(state)
        if workers.rank == 0:
            kept = landmark_rows(cfg, samples)
            landmarks = seen[torch.searchsorted(rows, kept)]
            ids = read_ids(job.source, kept.numpy())
            write_network(cfg, state, views, ids, landmarks, job.paths)
    ray.train.report({"steps": state.step, "samples": samples})


def write_network(
    cfg: Config,
    state: State,
    views: list[View],
    ids: list[str],
    x: Tensor,
    paths: layout.RunPaths,
) -> None:
    """Commit the best network, the history, and the landmarks x (m, D) with their `ids`.

    Of the landmarks' embeddings, only those by the first encoder are kept, for the report.
    """
    network = state.best().eval().cpu()
    weights = {name: tensor.contiguous() for name, tensor in network.state_dict().items()}
    storage.write_bytes(paths.network.file("network.safetensors"), save_tensors(weights))
    facts = {"shape": network.shape, "config": asdict(cfg), "looks": state.validations}
    facts["views"] = [asdict(view) for view in views]
    text = json.dumps(facts, indent=1, sort_keys=True)
    storage.write_bytes(paths.network.file("network.json"), text.encode())
    history = pa.Table.from_pylist(state.history, schema=schemas.HISTORY)
    tables.write(paths.network.file("history.parquet"), history)
    z = network.features(x.float())
    sample = pa.table(
        {
            "sample_id": ids,
            "embedding": tables.from_matrix(x[:, : network.input_dims[0]].numpy()),
            "feature": tables.from_matrix(z.numpy(), pa.float32()),
        },
        schema=schemas.sample_schema(network.input_dims[0], cfg.feature_dim),
    )
    tables.write(paths.network.file("sample.parquet"), sample)


def train_workers(job: WorkerJob) -> None:
    """Run `worker` in Ray Train; workers that fail restart from the last checkpoint."""
    cfg = job.cfg
    gpu = ray.cluster_resources().get("GPU", 0) >= cfg.workers
    with tempfile.TemporaryDirectory(prefix="ratecluster-train-") as scratch:
        trainer = TorchTrainer(
            lambda: worker(job),
            scaling_config=ScalingConfig(
                num_workers=cfg.workers, use_gpu=gpu, resources_per_worker={"CPU": 1}
            ),
            run_config=RunConfig(
                storage_path=scratch, failure_config=FailureConfig(max_failures=RESTARTS)
            ),
        )
        with _keep_interrupt_handler():
            trainer.fit()


@contextmanager
def _keep_interrupt_handler() -> Iterator[None]:
    """Handle Ctrl-C as before: Ray Train exits without a message, and its handler stays."""
    before = signal.getsignal(signal.SIGINT)
    try:
        yield
    except SystemExit:
        raise KeyboardInterrupt from None
    finally:
        if threading.current_thread() is threading.main_thread():
            signal.signal(signal.SIGINT, before)
