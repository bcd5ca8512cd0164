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
import tempfile
import threading
import time
from collections.abc import Iterator
from dataclasses import asdict, dataclass, replace
from typing import Any

import numpy as np
import pyarrow as pa
import ray
import ray.train
import torch
from ray.train import FailureConfig, RunConfig, ScalingConfig
from ray.train.torch import TorchTrainer
from safetensors.torch import load as load_tensors
from safetensors.torch import save as save_tensors
from torch import Tensor

from pipeline import artifacts, cluster, config
from pipeline.config import setting
from pipeline.errors import UserError
from pipeline.mcr2 import objective
from pipeline.mcr2.collectives import Collectives
from pipeline.mcr2.network import Network
from pipeline.progress import StageProgress
from pipeline.store import storage, tables

log = logging.getLogger(__name__)
RESTARTS = 2  # of the workers of one training
OVERREAD = 4  # rows read for each row kept, where not all are: spreads the sample over more shards


@dataclass(frozen=True, kw_only=True)
class Config:
    """How the network is trained. 0 where it says "fit" is chosen from the number of samples."""

    hidden_dim: int = setting(0, "width of the hidden layers; 0: fit, 4 × input up to 4096")
    feature_dim: int = setting(128, "dimensions of the features z")
    batch_size: int = setting(1024, "samples in a global batch, over all workers")
    epochs: float = setting(0.0, "passes over the training sample, warm-up included; 0: fit")
    warm_up_steps: int = setting(-1, "steps of expansion alone at first; -1: fit, a tenth")
    learning_rate: float = setting(1e-4, "of SGD, both heads")
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
        positive = ("feature_dim", "learning_rate", "eps_sq", "eta", "max_samples", "workers")
        for name in (*positive, "checkpoint_steps", "sinkhorn_half_steps"):
            if getattr(self, name) <= 0:
                raise UserError(f"train.{name} = {getattr(self, name)}: give a positive number")
        if self.batch_size < 2 or self.landmarks < 2:
            raise UserError("train.batch_size and train.landmarks: give 2 or more")
        for name in ("hidden_dim", "epochs", "columns", "gamma", "regularizer"):
            if getattr(self, name) < 0:
                raise UserError(f"train.{name} = {getattr(self, name)}: give 0 or more")


def fitted(cfg: Config, samples: int, input_dim: int) -> Config:
    """The settings that say "fit", chosen for N samples; the batch a multiple of the workers."""
    if samples < max(2, cfg.workers):
        raise UserError(
            f"{samples} embedded samples are too few for train.workers = {cfg.workers}: "
            "training needs 2 samples at least, and one per worker"
        )
    batch = min(cfg.batch_size, samples) // cfg.workers * cfg.workers
    epochs = cfg.epochs or min(20.0, max(1.0, 100 * batch / samples))
    steps = total_steps(samples, batch, epochs)
    warm_up = cfg.warm_up_steps if cfg.warm_up_steps >= 0 else steps // 10
    return replace(
        cfg,
        hidden_dim=cfg.hidden_dim or min(4096, 4 * input_dim),
        batch_size=batch,
        epochs=epochs,
        warm_up_steps=min(warm_up, steps),
        columns=min(cfg.columns or batch, batch) // cfg.workers * cfg.workers or cfg.workers,
    )


def total_steps(samples: int, batch: int, epochs: float) -> int:
    """Steps of so many epochs; an epoch drops its last, incomplete batch."""
    return max(1, math.ceil(epochs * (samples // batch)))


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


@dataclass
class State:
    """All that training goes on from."""

    network: Network
    optimizer: torch.optim.SGD
    step: int
    history: list[dict[str, Any]]

    def tensors(self) -> dict[str, Tensor]:
        """Weights and momenta by name."""
        found = {f"network.{name}": t for name, t in self.network.state_dict().items()}
        for index, state in self.optimizer.state_dict()["state"].items():
            if (buffer := state["momentum_buffer"]) is not None:
                found[f"momentum.{index}"] = buffer
        return {name: tensor.contiguous() for name, tensor in found.items()}

    def restore(self, tensors: dict[str, Tensor], step: int, history: list[dict[str, Any]]) -> None:
        """Go on from what `tensors` and the checkpoint's json recorded."""
        prefix = "network."
        weights = {n.removeprefix(prefix): t for n, t in tensors.items() if n.startswith(prefix)}
        self.network.load_state_dict(weights)
        saved = self.optimizer.state_dict()
        saved["state"] = {
            int(name.removeprefix("momentum.")): {"momentum_buffer": tensor}
            for name, tensor in tensors.items()
            if name.startswith("momentum.")
        }
        self.optimizer.load_state_dict(saved)
        self.step, self.history = step, history


def fit(cfg: Config, x: Tensor, state: State, workers: Collectives) -> Iterator[State]:
    """Train to the last step, yielding the state after each.

    x (N, D) is the whole training sample, the same on every worker; `cfg` is `fitted`.
    """
    steps = total_steps(len(x), cfg.batch_size, cfg.epochs)
    network = state.network.train()
    network.gather_with(workers.gather)
    while state.step < steps:
        started = time.perf_counter()
        if state.step == cfg.warm_up_steps:
            network.start_cluster_head()
        rows = batch_rows(cfg, len(x), state.step, workers.rank, workers.size)
        terms = _terms(cfg, network, x[rows].float(), state.step, workers)
        state.optimizer.zero_grad()
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
        raise RuntimeError(
            f"train: step {step}: loss {terms.loss.item()}, gradient norm {norm}: not finite; "
            "lower train.learning_rate or raise train.eta"
        )


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
class Part:
    """Rows to read of one part: `take` of its `rows`, seeded by its place in the list."""

    url: str
    rows: int
    take: int


def plan(shards: list[dict[str, Any]], paths: artifacts.RunPaths, cfg: Config) -> list[Part]:
    """Which rows of which parts make the training sample: all, or `max_samples` spread evenly."""
    parts = [
        Part(paths.embeddings.file(f"{s['shard']['stem']}.parquet"), s["embedded"], s["embedded"])
        for s in shards
        if s["embedded"]
    ]
    total = sum(part.rows for part in parts)
    if total <= cfg.max_samples:
        return parts
    step = max(1, total // (OVERREAD * cfg.max_samples))
    chosen = parts[::step]
    share = cfg.max_samples / sum(part.rows for part in chosen)
    return [replace(part, take=max(1, int(part.rows * share))) for part in chosen]


def read_sample(parts: list[Part], seed: int) -> tuple[list[str], np.ndarray]:
    """(sample ids, (N, D) float16) of the planned rows, in the order of the parts."""
    ids: list[str] = []
    blocks = []
    for index, part in enumerate(parts):
        table = tables.read(part.url, ["sample_id", "embedding"])
        if part.take < part.rows:
            rng = np.random.default_rng((seed, index))
            table = table.take(np.sort(rng.choice(part.rows, part.take, replace=False)))
        ids += table["sample_id"].to_pylist()
        blocks.append(tables.to_matrix(table["embedding"]))
    return ids, np.concatenate(blocks)


class Checkpoints:
    """The last state of an unfinished training, in network/; rank 0 writes, all read."""

    def __init__(self, paths: artifacts.RunPaths, made_of: str) -> None:
        self.folder, self.made_of = paths.network, made_of

    def save(self, state: State) -> None:
        """Commit the weights, then the json that makes them count, then drop older ones."""
        name = f"checkpoint-{state.step}"
        storage.write_bytes(self.folder.file(f"{name}.safetensors"), save_tensors(state.tensors()))
        facts = {"made_of": self.made_of, "step": state.step, "history": state.history}
        storage.write_bytes(self.folder.file(f"{name}.json"), json.dumps(facts).encode())
        self.folder.remove({n for n in self._names() if n.rpartition(".")[0] != name})

    def restore(self, state: State) -> None:
        """The newest whole checkpoint of this very training, if there is one."""
        found = [n for n in self._names() if n.endswith(".json")]
        for name in sorted(found, key=lambda n: -int(n[len("checkpoint-") : -len(".json")])):
            facts = json.loads(storage.read_bytes(self.folder.file(name)))
            if facts["made_of"] == self.made_of:
                weights = self.folder.file(name.replace(".json", ".safetensors"))
                tensors = load_tensors(storage.read_bytes(weights))
                state.restore(tensors, facts["step"], facts["history"])
                return

    def drop(self) -> None:
        """Training is over."""
        self.folder.remove(self._names())

    def _names(self) -> set[str]:
        return {name for name in self.folder.names() if name.startswith("checkpoint-")}


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
    network = new_network(cfg, x.shape[1])
    state = State(network, new_optimizer(cfg, network), 0, [])
    checkpoints = Checkpoints(job.paths, job.made_of)
    checkpoints.restore(state)
    steps = total_steps(len(x), cfg.batch_size, cfg.epochs)
    for _ in fit(cfg, x, state, workers):
        if workers.rank == 0:
            job.board.note.remote(state.step, steps, state.step * cfg.batch_size)
            if state.step % cfg.checkpoint_steps == 0:
                checkpoints.save(state)
    if workers.rank == 0:
        _write(cfg, state, ids, x, job.paths)
    ray.train.report({"steps": state.step, "samples": len(x)})


def _write(cfg: Config, state: State, ids: list[str], x: Tensor, paths: artifacts.RunPaths) -> None:
    network = state.network.eval()
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
    with tempfile.TemporaryDirectory(prefix="ratecluster-train-") as scratch:
        trainer = TorchTrainer(
            lambda: worker(job),
            scaling_config=ScalingConfig(num_workers=cfg.workers, resources_per_worker={"CPU": 1}),
            run_config=RunConfig(
                storage_path=scratch, failure_config=FailureConfig(max_failures=RESTARTS)
            ),
        )
        trainer.fit()


def _follow(board: Any, progress: StageProgress, over: threading.Event) -> None:
    """Show the board until training is over."""
    while not over.wait(0.5):
        step, steps, samples = ray.get(board.read.remote())
        progress.total = steps
        progress.advance(step - progress.units, samples - progress.samples)


def run(cfg: Config, paths: artifacts.RunPaths) -> dict[str, Any]:
    """Train on a sample of the embeddings, commit network, history and landmarks."""
    embedded = paths.embeddings.manifest()
    made_of = config.fingerprint(cfg, embedded["fingerprint"])
    if paths.network.is_done(made_of):
        log.info("train: already done, %s", paths.network.url)
        return paths.network.manifest()
    fitted(cfg, embedded["embedded"], 1)  # refuses too few samples before any work
    cluster.join()
    names = paths.network.names()
    paths.network.remove({name for name in names if not name.startswith("checkpoint-")})
    board, over = Board.remote(), threading.Event()  # type: ignore[attr-defined]
    with StageProgress("train", 1, "steps") as progress:
        follower = threading.Thread(target=_follow, args=(board, progress, over), daemon=True)
        follower.start()
        try:
            _train(Job(cfg, plan(embedded["shards"], paths, cfg), paths, made_of, board))
        finally:
            over.set()
            follower.join()
    history = tables.read(paths.network.file("history.parquet"))
    last = history.slice(history.num_rows - 1).to_pylist()[0]
    paths.network.finish(
        made_of,
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
