"""Stage 2, train: embeddings to the network that makes clusters visible (MCR², CPP).

reads   embeddings/{stem}.parquet       a sample of them
writes  network/network.safetensors     weights
        network/network.json            shape, settings
        network/history.parquet         HISTORY        one row per step
        network/sample.parquet          sample_schema  landmarks, before and after
        network/checkpoint-{step}.*     while it trains; a rerun goes on from the last

N training samples, D input dimensions, d feature dimensions, n samples in a global batch, W
workers. Core: `fit` and what it calls (tensors, no Ray). Shell: `worker` and `run` (Ray Train).
"""

import json
import logging
import math
import signal
import tempfile
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass, replace
from typing import Any

import numpy as np
import pyarrow as pa
import ray
import ray.train
import ray.train.torch
import torch
from ray.train import FailureConfig, RunConfig, ScalingConfig
from ray.train.torch import TorchTrainer
from safetensors.torch import save as save_tensors
from torch import Tensor

from pipeline import artifacts, cluster, config
from pipeline.checkpoints import Checkpoints, State
from pipeline.config import setting
from pipeline.errors import UserError
from pipeline.mcr2 import objective
from pipeline.mcr2.collectives import Collectives
from pipeline.mcr2.network import Network
from pipeline.mcr2.threads import one_thread
from pipeline.progress import StageProgress
from pipeline.sampling import Part, plan, read_sample
from pipeline.store import storage, tables

log = logging.getLogger(__name__)
FILES = ("network.safetensors", "network.json", "history.parquet", "sample.parquet")
LEAST_STEPS = 100  # of a training whose epochs are fit
RESTARTS = 2  # of the workers of one training


@dataclass(frozen=True, kw_only=True)
class Config:
    """How the network is trained. 0 where it says "fit" is chosen from the number of samples."""

    hidden_dim: int = setting(0, "width of the hidden layers; 0: fit, 4 × input up to 4096")
    feature_dim: int = setting(0, "dimensions of the features z; 0: fit, about √N, 32 to 128")
    batch_size: int = setting(1024, "samples in a global batch, over all workers")
    epochs: float = setting(0.0, "passes over the training sample; 0: fit, one, or 100 steps")
    warm_up_steps: int = setting(0, "steps of expansion alone at first")
    learning_rate: float = setting(1e-3, "of SGD, both heads")
    momentum: float = setting(0.9, "of SGD")
    weight_decay: float = setting(1e-4, "of the trunk and the feature head")
    cluster_weight_decay: float = setting(5e-3, "of the cluster head")
    eps_sq: float = setting(0.1, "ε², squared distortion allowed per unit-norm feature")
    eta: float = setting(0.1, "η, temperature of the Sinkhorn membership")
    gamma: float = setting(1.0, "γ, weight of the compression term")
    regularizer: float = setting(0.05, "λ, weight of ‖Π‖²/2")
    sinkhorn_half_steps: int = setting(5, "row and column normalisations of the membership")
    columns: int = setting(64, "of Π sampled for the compression term per step; 0: all")
    max_samples: int = setting(500_000, "training samples read at most, spread over the parts")
    landmarks: int = setting(15_000, "samples whose features are kept for select_k and report")
    seed: int = setting(0, "of the weights, the order of samples and the sampled columns")
    workers: int = setting(1, "processes that train together", operational=True)
    checkpoint_steps: int = setting(200, "steps between checkpoints", operational=True)

    def __post_init__(self) -> None:
        positive = ("learning_rate", "eps_sq", "eta", "max_samples", "workers")
        for name in (*positive, "checkpoint_steps", "sinkhorn_half_steps"):
            if getattr(self, name) <= 0:
                raise UserError(f"train.{name} = {getattr(self, name)}: give a positive number")
        if self.batch_size < 2 or self.landmarks < 2:
            raise UserError("train.batch_size and train.landmarks: give 2 or more")
        zero = ("hidden_dim", "feature_dim", "epochs", "warm_up_steps", "columns", "gamma")
        for name in (*zero, "regularizer"):
            if getattr(self, name) < 0:
                raise UserError(f"train.{name} = {getattr(self, name)}: give 0 or more")


def fitted(cfg: Config, samples: int, input_dim: int) -> Config:
    """The settings that say "fit", chosen for N samples; the batch a multiple of the workers."""
    if samples < max(2, cfg.workers):
        raise UserError(
            f"{samples} embedded samples are too few: training needs 2 at least, and one for each "
            f"of train.workers = {cfg.workers}"
        )
    if cfg.batch_size < cfg.workers:
        raise UserError(
            f"train.batch_size = {cfg.batch_size} is less than one sample for each of "
            f"train.workers = {cfg.workers}: raise the one or lower the other"
        )
    batch = min(cfg.batch_size, samples) // cfg.workers * cfg.workers
    epochs = cfg.epochs or max(1.0, LEAST_STEPS / (samples // batch))
    fit_dim = 2 ** int(math.log2(samples) / 2)  # so that a cluster has more members than that
    return replace(
        cfg,
        hidden_dim=cfg.hidden_dim or min(4096, 4 * input_dim),
        batch_size=batch,
        epochs=epochs,
        feature_dim=cfg.feature_dim or min(128, max(32, fit_dim)),
        warm_up_steps=min(cfg.warm_up_steps, total_steps(samples, batch, epochs)),
        columns=min(cfg.columns or batch, batch) // cfg.workers * cfg.workers or cfg.workers,
    )


def total_steps(samples: int, batch: int, epochs: float) -> int:
    """Steps of so many epochs; an epoch drops its last, incomplete batch."""
    return max(1, round(epochs * (samples // batch)))


def batch_rows(cfg: Config, samples: int, step: int, rank: int, workers: int) -> Tensor:
    """This worker's rows of the global batch of a step, (n/W,).

    A permutation per epoch, seeded by (seed, epoch): the same global batch for any W, and after any
    restart.
    """
    per_epoch = samples // cfg.batch_size
    epoch, position = divmod(step, per_epoch)
    order = torch.randperm(samples, generator=_generator(cfg.seed, 1, epoch))
    rows = order[position * cfg.batch_size : (position + 1) * cfg.batch_size]
    return rows.chunk(workers)[rank]


def sampled_columns(cfg: Config, step: int, rank: int, workers: int) -> Tensor:
    """This worker's share of the step's sampled columns of Π, (m/W,)."""
    order = torch.randperm(cfg.batch_size, generator=_generator(cfg.seed, 2, step))
    return order[: cfg.columns].chunk(workers)[rank]


def _generator(*seeds: int) -> torch.Generator:
    state = np.random.SeedSequence(seeds).generate_state(2, np.uint32)
    return torch.Generator().manual_seed(int(state[0]) << 32 | int(state[1]))


def new_network(cfg: Config, input_dim: int) -> Network:
    """The network before training; the same for the same seed, whatever was drawn before."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(cfg.seed)
        return Network(input_dim, cfg.hidden_dim, cfg.feature_dim)


def new_optimizer(cfg: Config, network: Network) -> torch.optim.SGD:
    """SGD with the weight decay of the cluster head apart from the rest."""
    cluster = list(network.cluster.parameters())
    rest = [p for p in network.parameters() if not any(p is c for c in cluster)]
    groups = [
        {"params": rest, "weight_decay": cfg.weight_decay},
        {"params": cluster, "weight_decay": cfg.cluster_weight_decay},
    ]
    return torch.optim.SGD(groups, lr=cfg.learning_rate, momentum=cfg.momentum)


def fit(cfg: Config, x: Tensor, state: State, workers: Collectives) -> Iterator[State]:
    """Train to the last step, yielding the state after each.

    x (N, D) is the whole training sample, the same on every worker; `cfg` is `fitted`.
    """
    steps = total_steps(len(x), cfg.batch_size, cfg.epochs)
    network = state.network.train()
    network.gather_with(workers.gather)
    device = next(network.parameters()).device
    while state.step < steps:
        started = time.perf_counter()
        if state.step == cfg.warm_up_steps:
            network.start_cluster_head()
        rows = batch_rows(cfg, len(x), state.step, workers.rank, workers.size)
        state.optimizer.zero_grad()
        try:
            terms = _terms(cfg, network, x[rows].to(device).float(), state.step, workers)
        except torch.linalg.LinAlgError as error:  # of a determinant of NaN
            raise _diverged(state.step, "features are not finite") from error
        terms.loss.backward()
        norm = workers.average_gradients(network)
        _check_finite(terms, norm, state.step)
        state.optimizer.step()
        compression = workers.mean(terms.compression)
        seconds = time.perf_counter() - started
        state.history.append(_row(cfg, state.step, terms, compression, norm, seconds))
        state.step += 1
        yield state


def _terms(
    cfg: Config, network: Network, x: Tensor, step: int, workers: Collectives
) -> objective.Terms:
    Z, C = network(x)
    if step < cfg.warm_up_steps:
        return objective.expand(Z, cfg.eps_sq, workers.gather)
    columns = sampled_columns(cfg, step, workers.rank, workers.size)
    weights = objective.Weights(
        eps_sq=cfg.eps_sq,
        eta=cfg.eta,
        gamma=cfg.gamma,
        regularizer=cfg.regularizer,
        half_steps=cfg.sinkhorn_half_steps,
    )
    return objective.cluster(Z, C, columns, weights, workers.gather)


def _check_finite(terms: objective.Terms, norm: float, step: int) -> None:
    if not (math.isfinite(terms.loss.item()) and math.isfinite(norm)):
        raise _diverged(step, f"loss {terms.loss.item()}, gradient norm {norm}: not finite")


def _diverged(step: int, what: str) -> RuntimeError:
    return RuntimeError(f"train: step {step}: {what}; lower train.learning_rate or raise train.eta")


def _row(
    cfg: Config, step: int, terms: objective.Terms, compression: Tensor, norm: float, seconds: float
) -> dict[str, Any]:
    warm_up = step < cfg.warm_up_steps
    expansion, size = terms.expansion.item(), terms.regularizer.item()
    loss = -expansion + cfg.gamma * compression.item() + cfg.regularizer * size
    return {
        "step": step,
        "phase": "warm_up" if warm_up else "cluster",
        "loss": loss,
        "expansion": expansion,
        "compression": compression.item(),
        "regularizer": size,
        "sinkhorn_residual": terms.residual.item(),
        "gradient_norm": norm,
        "samples_per_s": cfg.batch_size / seconds,
    }


@dataclass(frozen=True)
class Job:
    """What every worker gets: settings, the rows to read, where to write."""

    cfg: Config
    parts: list[Part]
    paths: artifacts.RunPaths
    made_of: str
    board: Any  # actor handle of a Board


@ray.remote(num_cpus=0)
class Board:
    """How far the workers are, for the driver to show."""

    def __init__(self) -> None:
        self.step, self.steps, self.samples = 0, 0, 0

    def note(self, step: int, steps: int, samples: int) -> None:
        """Rank 0 reports the steps done, of how many, and their samples."""
        self.step, self.steps, self.samples = step, steps, samples

    def read(self) -> tuple[int, int, int]:
        """The last note."""
        return self.step, self.steps, self.samples


def worker(job: Job) -> None:
    """One process of Ray Train: read the sample, train, and on rank 0 write what came of it."""
    context = ray.train.get_context()
    workers = Collectives.join(context.get_world_rank(), context.get_world_size())
    ids, sample = read_sample(job.parts, job.cfg.seed)
    x = torch.from_numpy(sample)
    cfg = fitted(job.cfg, len(x), x.shape[1])
    network = new_network(cfg, x.shape[1]).to(ray.train.torch.get_device())
    state = State(network, new_optimizer(cfg, network), 0, [])
    checkpoints = Checkpoints(job.paths, f"{job.made_of}-{cfg.batch_size}")  # it sets the steps
    checkpoints.restore(state)
    steps = total_steps(len(x), cfg.batch_size, cfg.epochs)
    with one_thread():
        for _ in fit(cfg, x, state, workers):
            if workers.rank == 0:
                job.board.note.remote(state.step, steps, state.step * cfg.batch_size)
                if state.step % cfg.checkpoint_steps == 0:
                    checkpoints.save(state)
        if workers.rank == 0:
            _write(cfg, state, ids, x, job.paths)
    ray.train.report({"steps": state.step, "samples": len(x)})


def _write(cfg: Config, state: State, ids: list[str], x: Tensor, paths: artifacts.RunPaths) -> None:
    network = state.network.eval().cpu()
    weights = {name: tensor.contiguous() for name, tensor in network.state_dict().items()}
    storage.write_bytes(paths.network.file("network.safetensors"), save_tensors(weights))
    shape = {"input_dim": x.shape[1], "hidden_dim": cfg.hidden_dim, "feature_dim": cfg.feature_dim}
    text = json.dumps({"shape": shape, "config": asdict(cfg)}, indent=1, sort_keys=True)
    storage.write_bytes(paths.network.file("network.json"), text.encode())
    history = pa.Table.from_pylist(state.history, schema=artifacts.HISTORY)
    tables.write(paths.network.file("history.parquet"), history)
    keep = torch.randperm(len(x), generator=_generator(cfg.seed, 3))[: cfg.landmarks].sort().values
    z = network.features(x[keep].float())
    sample = pa.table(
        {
            "sample_id": [ids[row] for row in keep.tolist()],
            "embedding": tables.from_matrix(x[keep].numpy()),
            "feature": tables.from_matrix(z.numpy(), pa.float32()),
        },
        schema=artifacts.sample_schema(x.shape[1], cfg.feature_dim),
    )
    tables.write(paths.network.file("sample.parquet"), sample)


def _train(job: Job) -> None:
    """Ray Train around `worker`; a worker that dies is started again, from the last checkpoint."""
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
        with _own_interrupt():
            trainer.fit()


@contextmanager
def _own_interrupt() -> Iterator[None]:
    """Ctrl-C as it was before: Ray Train ends the process on it without a word, and leaves a
    handler behind that swallows it."""
    before = signal.getsignal(signal.SIGINT)
    try:
        yield
    except SystemExit:
        raise KeyboardInterrupt from None
    finally:
        if threading.current_thread() is threading.main_thread():
            signal.signal(signal.SIGINT, before)


def _follow(board: Any, progress: StageProgress, over: threading.Event) -> None:
    """Show the board until training is over."""
    while not over.wait(0.5):
        step, steps, samples = ray.get(board.read.remote())
        if steps:  # before that the workers are starting
            progress.total = steps
            progress.advance(step - progress.units, samples - progress.samples)


def run(cfg: Config, paths: artifacts.RunPaths) -> dict[str, Any]:
    """Train on a sample of the embeddings, commit network, history and landmarks."""
    embedded = artifacts.upstream(paths, "embeddings")["embeddings"]
    made_of = config.fingerprint(cfg, embedded["fingerprint"])
    if manifest := artifacts.finished("train", paths.network, made_of, cfg, {paths.network: FILES}):
        return manifest
    parts = plan(embedded["shards"], paths, cfg.max_samples)
    fitted(cfg, sum(part.take for part in parts), 1)  # refuses too few samples before any work
    cluster.join()
    names = paths.network.names()
    paths.network.remove({name for name in names if not name.startswith("checkpoint-")})
    board, over = Board.remote(), threading.Event()  # type: ignore[attr-defined]
    with StageProgress("train", 1, "steps") as progress:
        follower = threading.Thread(target=_follow, args=(board, progress, over), daemon=True)
        follower.start()
        try:
            _train(Job(cfg, parts, paths, made_of, board))
        finally:
            over.set()
            follower.join()
    history = tables.read(paths.network.file("history.parquet"))
    last = history.slice(history.num_rows - 1).to_pylist()[0]
    paths.network.finish(
        made_of,
        upstream=embedded["fingerprint"],
        config=config.facts(cfg),
        steps=history.num_rows,
        last=last,
        seconds=round(progress.seconds, 2),
    )
    Checkpoints(paths, made_of).drop()
    log.info(
        "train: %d steps, loss %.2f = −R %.2f + R_c %.2f + …, %.1f s",
        *(history.num_rows, last["loss"], last["expansion"], last["compression"], progress.seconds),
    )
    return paths.network.manifest()
