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

from pipeline.artifacts import outputs as artifacts
from pipeline.mcr2 import coding_rate, objective
from pipeline.mcr2.collectives import Collectives
from pipeline.mcr2.model_selection import Judge, look_steps
from pipeline.mcr2.network import Network, Words
from pipeline.mcr2.threads import one_thread
from pipeline.runtime import cluster, config, console
from pipeline.runtime.config import setting
from pipeline.runtime.errors import UserError
from pipeline.runtime.progress import StageProgress, waiting_for
from pipeline.store import storage, tables
from pipeline.train.checkpoints import Checkpoints, State
from pipeline.train.sampling import Plan, Share, gathered, plan, read_ids, shares
from pipeline.vision import text_encoding, vocabulary

log = logging.getLogger(__name__)
FILES = ("network.safetensors", "network.json", "history.parquet", "sample.parquet")
SEEN = 16_384  # samples that all workers see, at least: where there are no more, all see all
SMALLER = 0.1  # the step after a failed one, where it was 1
RESTARTS = 2  # of the workers of one training


@dataclass(frozen=True, kw_only=True)
class Config:
    """How the network is trained. 0 where it says "fit" is chosen from the number of samples."""

    words: int = setting(4096, "words beside each image: those likeliest in the sample; 0: none")
    vocabulary: tuple[str, ...] = setting(
        (), "imagenet, wordnet, pico-clip or files of one word per line; none: fit to the model"
    )
    hidden_dim: int = setting(0, "width of the hidden layer; 0: fit, 4 × input up to 4096")
    feature_dim: int = setting(0, "dimensions of the features z; 0: fit, about √N, 32 to 128")
    batch_size: int = setting(1024, "samples in a global batch, over all workers")
    steps: int = setting(240, "to train for; the best network on the way is kept")
    learning_rate: float = setting(3e-4, "of Adam")
    eps_sq: float = setting(0.1, "ε², squared distortion allowed per unit-norm feature")
    eta: float = setting(0.1, "η, temperature of the Sinkhorn membership")
    sinkhorn_half_steps: int = setting(5, "row and column normalisations of the membership")
    columns: int = setting(64, "of Π sampled for the compression term per step; 0: all")
    max_samples: int = setting(
        500_000, "training samples at most, spread over the parts; fewer if steps need no more"
    )
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
        for name in ("words", "hidden_dim", "feature_dim", "steps", "columns"):
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
    fit_dim = 2 ** int(math.log2(samples) / 2)  # so that a cluster has more members than that
    return replace(
        cfg,
        hidden_dim=cfg.hidden_dim or min(4096, 4 * input_dim),
        batch_size=batch,
        feature_dim=cfg.feature_dim or min(128, max(32, fit_dim)),
        columns=min(cfg.columns or batch, batch) // cfg.workers * cfg.workers or cfg.workers,
    )


def wanted_samples(cfg: Config) -> int:
    """N at most: what the steps see once, and no fewer than what all workers see."""
    return min(cfg.max_samples, max(cfg.steps * cfg.batch_size, _all_see(cfg)))


def _all_see(cfg: Config) -> int:
    """m at most."""
    return max(SEEN, cfg.landmarks)


def batch_rows(cfg: Config, samples: int, step: int, rank: int, workers: int) -> Tensor:
    """This worker's rows of the global batch of a step, (n/W,).

    An order per epoch, seeded by (seed, epoch), whose last, incomplete batch is dropped: the same
    global batch for any W, and after any restart. Where all workers see all, it is a permutation;
    else the sample is cut into n runs and a batch has one row of each, so that a worker's are among
    the N/W that it holds.
    """
    per_epoch = samples // cfg.batch_size
    epoch, position = divmod(step, per_epoch)
    generator = _generator(cfg.seed, 1, epoch)
    if samples <= _all_see(cfg):
        order = torch.randperm(samples, generator=generator)
        rows = order[position * cfg.batch_size : (position + 1) * cfg.batch_size]
        return rows.chunk(workers)[rank]
    bounds = torch.arange(cfg.batch_size + 1) * samples // cfg.batch_size
    keys = torch.rand(cfg.batch_size, -(-samples // cfg.batch_size), generator=generator)
    keys[bounds.diff() < keys.shape[1], -1] = 2  # a run that is one row shorter
    order = keys.chunk(workers)[rank].argsort(dim=1, stable=True)[:, position]
    return bounds[:-1].chunk(workers)[rank] + order


def sampled_columns(cfg: Config, step: int, rank: int, workers: int) -> Tensor:
    """This worker's share of the step's sampled columns of Π, (m/W,)."""
    order = torch.randperm(cfg.batch_size, generator=_generator(cfg.seed, 2, step))
    return order[: cfg.columns].chunk(workers)[rank]


def _generator(*seeds: int) -> torch.Generator:
    state = np.random.SeedSequence(seeds).generate_state(2, np.uint32)
    return torch.Generator().manual_seed(int(state[0]) << 32 | int(state[1]))


def new_network(cfg: Config, x: Tensor, words: Tensor, scale: float) -> Network:
    """The network before training, for the samples x (N, D); the same for the same seed.

    Of the words (V, D), unit rows, `cfg.words` are kept: those that the encoder with its logit
    `scale` finds likeliest in the sample.
    """
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(cfg.seed)
        if len(words) > cfg.words:
            words = words[_likeliest(x, words, scale, cfg.words)]
        network = Network(x.shape[1], cfg.hidden_dim, cfg.feature_dim, len(words))
        network.start(x, words, scale)
    return network


def _likeliest(x: Tensor, words: Tensor, scale: float, most: int) -> Tensor:
    """Indices of the words of largest mean probability, in their order."""
    every = Words(*words.shape)
    every.begin(words, scale)
    rows = torch.randperm(len(x))[:SEEN]
    total = torch.zeros(len(words))
    for block in rows.split(1024):
        total += every.shares(x[block].float()).sum(0)
    return total.topk(most).indices.sort().values


def new_state(cfg: Config, network: Network) -> State:
    """The state before the first step."""
    return State(network, torch.optim.Adam(network.parameters(), lr=cfg.learning_rate))


def seen_rows(cfg: Config, samples: int) -> Tensor:
    """The rows that all workers see, (m,) ascending; the landmarks are among them."""
    return _drawn(cfg, samples)[: _all_see(cfg)].sort().values


def landmark_rows(cfg: Config, samples: int) -> Tensor:
    """The rows whose features are kept, ascending."""
    return _drawn(cfg, samples)[: cfg.landmarks].sort().values


def _drawn(cfg: Config, samples: int) -> Tensor:
    return torch.randperm(samples, generator=_generator(cfg.seed, 3))


def fit(
    cfg: Config, x: Tensor | Share, state: State, workers: Collectives, seen: Tensor | None = None
) -> Iterator[State]:
    """Train to the last step, yielding the state after each; `state.best` is the network to keep.

    x (N, D) is the whole training sample or this worker's share of it, seen (m, D) what all workers
    see of it, where that is not x; `cfg` is `fitted`. A step that fails is reported with its
    condition number, and training goes on from the last look (or from where it was resumed) with a
    smaller step, once. Raises RuntimeError the second time.
    """
    network = state.network.train()
    network.gather_with(workers.gather)
    if seen is None:
        assert isinstance(x, Tensor)
        seen = x
    judge = Judge.of(network, seen, cfg.seed) if workers.rank == 0 else None
    looks = look_steps(cfg.steps)
    good = state.saved()
    while True:
        if state.step in looks and not state.looked():
            state.note(judge.look(network) if judge else 0.0)
            good = state.saved()
        if state.step >= cfg.steps:
            return
        failure = _step(cfg, x, state, workers)
        if failure:
            if state.rescued:
                raise RuntimeError(
                    f"train: {failure}; lower train.learning_rate or raise train.eta"
                )
            state.restore(*good)
            state.slow_down(SMALLER)
            log.warning(
                "train: %s; going on from step %d with learning rate %g",
                *(failure, state.step, cfg.learning_rate * SMALLER),
            )
            good = state.saved()
            continue
        yield state


def _step(cfg: Config, x: Tensor | Share, state: State, workers: Collectives) -> str:
    """One step of all workers; returns what went wrong with any of them, if anything did."""
    started = time.perf_counter()
    device = next(state.network.parameters()).device
    rows = batch_rows(cfg, len(x), state.step, workers.rank, workers.size)
    columns = sampled_columns(cfg, state.step, workers.rank, workers.size).to(device)
    weights = objective.Weights(eps_sq=cfg.eps_sq, eta=cfg.eta, half_steps=cfg.sinkhorn_half_steps)
    state.optimizer.zero_grad()
    Z = state.network(x[rows].to(device).float())
    try:
        terms = objective.rate_reduction(Z, columns, weights, workers.gather)
        sound = terms.loss.isfinite()
    except torch.linalg.LinAlgError:  # of a determinant
        sound = torch.zeros((), dtype=torch.bool, device=device)
    if workers.mean(sound.float()) < 1:  # before the backward pass, which waits for all
        return _failure(cfg, Z, state.step, "loss")
    terms.loss.backward()
    norm = workers.average_gradients(state.network)
    if not math.isfinite(norm):
        return _failure(cfg, Z, state.step, "gradient")
    state.optimizer.step()
    if not all(parameter.isfinite().all() for parameter in state.network.parameters()):
        return _failure(cfg, Z, state.step, "new weight")
    compression = workers.mean(terms.compression).item()
    state.history.append(
        {
            "step": state.step,
            "loss": compression - terms.expansion.item(),
            "expansion": terms.expansion.item(),
            "compression": compression,
            "sinkhorn_residual": terms.residual.item(),
            "gradient_norm": norm,
            "samples_per_s": cfg.batch_size / (time.perf_counter() - started),
        }
    )
    state.step += 1
    return ""


def _failure(cfg: Config, z: Tensor, step: int, what: str) -> str:
    condition = coding_rate.condition(z.detach(), cfg.eps_sq)
    return f"step {step}: the {what} is not finite, condition number {condition:.3g}"


@dataclass(frozen=True)
class Job:
    """What every worker gets: settings, where its rows come from, where to write."""

    cfg: Config
    source: Plan
    paths: artifacts.RunPaths
    made_of: str
    words: Any  # reference to (V, D) float32 and the encoder's logit scale
    board: Any  # actor handle of a Board


@ray.remote(num_cpus=0, max_restarts=-1, max_task_retries=-1)
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
    device = ray.train.torch.get_device()
    samples = len(job.source)
    shared = samples > _all_see(job.cfg)
    mine = shares(samples, workers.size)[workers.rank] if shared else range(samples)
    share = Share.read(job.source, mine)
    cfg = fitted(job.cfg, samples, share.held.shape[1])
    rows = seen_rows(cfg, samples)
    seen = gathered(share, rows, workers, device) if shared else share.held
    words, scale = ray.get(job.words)
    with one_thread():
        network = new_network(cfg, seen, torch.tensor(words), scale)
    state = new_state(cfg, network.to(device))
    checkpoints = Checkpoints(job.paths, f"{job.made_of}-{cfg.batch_size}")  # it sets the steps
    checkpoints.restore(state)
    with one_thread():
        for _ in fit(cfg, share, state, workers, seen):
            if workers.rank == 0:
                job.board.note.remote(state.step, cfg.steps, state.step * cfg.batch_size)
                if state.step % cfg.checkpoint_steps == 0:
                    checkpoints.save(state)
        if workers.rank == 0:
            kept = landmark_rows(cfg, samples)
            landmarks = seen[torch.searchsorted(rows, kept)]
            ids = read_ids(job.source, kept.numpy())
            write_network(cfg, state, ids, landmarks, job.paths)
    ray.train.report({"steps": state.step, "samples": samples})


def write_network(
    cfg: Config, state: State, ids: list[str], x: Tensor, paths: artifacts.RunPaths
) -> None:
    """Commit what training has found; x (m, D) are the landmarks and `ids` theirs."""
    network = state.best().eval().cpu()
    weights = {name: tensor.contiguous() for name, tensor in network.state_dict().items()}
    storage.write_bytes(paths.network.file("network.safetensors"), save_tensors(weights))
    shape = {
        "input_dim": x.shape[1],
        "hidden_dim": cfg.hidden_dim,
        "feature_dim": cfg.feature_dim,
        "words": len(network.words.table),
    }
    facts = {"shape": shape, "config": asdict(cfg), "looks": state.looks}
    text = json.dumps(facts, indent=1, sort_keys=True)
    storage.write_bytes(paths.network.file("network.json"), text.encode())
    history = pa.Table.from_pylist(state.history, schema=artifacts.HISTORY)
    tables.write(paths.network.file("history.parquet"), history)
    z = network.features(x.float())
    sample = pa.table(
        {
            "sample_id": ids,
            "embedding": tables.from_matrix(x.numpy()),
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
        try:
            step, steps, samples = ray.get(board.read.remote())
        except ray.exceptions.RayError:  # its node is gone; it comes again on another
            continue
        if steps and step != progress.units:  # before that the workers are starting
            progress.total = steps
            progress.advance(step - progress.units, samples - progress.samples)
            waiting_for([f"step {step + 1} of {steps}" if step < steps else "the network's files"])


def check(cfg: Config, model: str) -> list[str]:
    """The words to put beside images; UserError if their list is missing or empty."""
    return vocabulary.chosen(cfg.vocabulary, model) if cfg.words else []


def _encoded(words: list[str], embedded: dict[str, Any]) -> tuple[np.ndarray, float]:
    """(V, D) float32 and the logit scale of the encoder that made the embeddings."""
    made_with = embedded["config"]
    if not words:
        return np.zeros((0, 1), np.float32), 1.0
    return text_encoding.encode(words, (), made_with["model"], made_with["pretrained"])


def wanted(cfg: Config, made: artifacts.Made, paths: artifacts.RunPaths) -> artifacts.Wanted:
    """What training on these embeddings is to leave."""
    embedded = made["embeddings"]
    words = check(cfg, embedded["config"]["model"])
    made_of = config.fingerprint(cfg, embedded["fingerprint"], words)
    return artifacts.Wanted("train", paths.network, made_of, cfg, {paths.network: FILES})


def run(cfg: Config, paths: artifacts.RunPaths) -> dict[str, Any]:
    """Train on a sample of the embeddings, commit network, history and landmarks."""
    embedded = artifacts.upstream(paths, "embeddings")["embeddings"]
    want = wanted(cfg, {"embeddings": embedded}, paths)
    if manifest := want.finished():
        Checkpoints(paths, want.made_of).drop()  # of a driver killed just before it would have
        return manifest
    made_of = want.made_of
    source = plan(embedded["shards"], paths, wanted_samples(cfg), cfg.seed)
    fitted(cfg, len(source), 1)  # refuses too few samples before any work
    cluster.join()
    names = paths.network.names()
    paths.network.remove({name for name in names if not name.startswith("checkpoint-")})
    board, over = Board.remote(), threading.Event()  # type: ignore[attr-defined]
    with StageProgress("train", 1, "steps") as progress:
        follower = threading.Thread(target=_follow, args=(board, progress, over), daemon=True)
        follower.start()
        try:
            words = ray.put(_encoded(check(cfg, embedded["config"]["model"]), embedded))
            waiting_for(["workers to start and to read their samples"])
            _train(Job(cfg, source, paths, made_of, words, board))
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
    console.finished(
        *(log, "train", progress.seconds, f"{history.num_rows:,} steps"),
        f"kept the network of step {kept['step']:,}",
        f"neighbour information {kept['information']:.3f} ({looks[0]['information']:.3f} at first)",
    )
    return paths.network.manifest()
