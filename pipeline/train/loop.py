"""The training loop: tensors in, a trained network out. No Ray, no files.

N training samples, m of them that all workers have, D input dimensions, V words, d feature
dimensions, n samples in a global batch, W workers.
"""

import logging
import math
import time
from collections.abc import Iterator, Sequence

import numpy as np
import torch
from torch import Tensor

from pipeline.mcr2 import coding_rate, objective, published, views
from pipeline.mcr2.collectives import Collectives
from pipeline.mcr2.model_selection import BOOTSTRAPS, PATIENCE, Validator, validation_steps
from pipeline.mcr2.network import FeatureNetwork, Network, Words
from pipeline.mcr2.published import TwoHeads
from pipeline.mcr2.views import View
from pipeline.runtime.errors import UserError
from pipeline.train.sampling import Share
from pipeline.train.settings import SEEN, Config, shared_samples
from pipeline.train.state import State

log = logging.getLogger(__name__)
MOST_HIDDEN = 4096  # width of the hidden layer, which is 4 × the input up to there
SMALLER = 0.1  # factor of the learning rate after a failed step


def batch_rows(cfg: Config, samples: int, step: int, rank: int, workers: int) -> Tensor:
    """This worker's rows of the global batch of a step, (n/W,).

    The global batch depends on (seed, epoch) alone: it is the same for any W and after any restart.
    The incomplete last batch of an epoch is dropped. If all workers have all rows, the order is a
    permutation. Otherwise the sample is cut into n runs and a batch has one row of each, so that a
    worker needs only its own N/W rows.
    """
    per_epoch = samples // cfg.batch_size
    epoch, position = divmod(step, per_epoch)
    generator = _generator(cfg.seed, 1, epoch)
    if samples <= shared_samples(cfg):
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


def new_network(
    cfg: Config, x: Tensor, words: Tensor, scale: float, dims: Sequence[int] = ()
) -> tuple[Network, list[View]]:
    """The network before training on the samples x (N, D), and its views; fixed by the seed.

    `dims` are the dimensions of each encoder in x; (): of one. The network has the `cfg.words` of
    the words (V, D1), unit rows, of largest mean probability in the sample, by the first encoder's
    logit `scale`; it has none if the view of the words has the weight 0.
    """
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(cfg.seed)
        dims = dims or (x.shape[1],)
        if len(words) > cfg.words:
            words = words[_likeliest_words(x[:, : dims[0]], words, scale, cfg.words)]
        some = x[torch.randperm(len(x))[: views.SAMPLES].sort().values].float()
        network = _centred(cfg, x, words, scale, dims)
        names = ["images", *(["words"] if len(words) else [])]
        names += [f"encoder {number}" for number in range(2, len(dims) + 1)]
        found = _weigh(cfg, dict(zip(names, network.each_view(some), strict=True)))
        if any(view.name == "words" and not view.weight for view in found):
            network = _centred(cfg, x, words[:0], scale, dims)
        network.start(x, [v.weight for v in found if v.weight or v.name != "words"])
    return network, found


def _centred(cfg: Config, x: Tensor, words: Tensor, scale: float, dims: Sequence[int]) -> Network:
    hidden = cfg.hidden_dim or min(MOST_HIDDEN, 4 * x.shape[1])
    network = Network(dims, hidden, cfg.feature_dim, len(words))
    network.centre(x, words, scale)
    return network


def _weigh(cfg: Config, rows: dict[str, Tensor]) -> list[View]:
    """The views by name (m, d), and their weights: the given ones, or by agreement."""
    agreements = views.agreements(list(rows.values()), cfg.seed)
    weights = [views.weight(agreement) for agreement in agreements]
    if cfg.view_weights:
        if len(cfg.view_weights) != len(rows):
            raise UserError(
                f"train.view_weights has {len(cfg.view_weights)} numbers: give one for each of "
                f"the {len(rows)} views: {', '.join(rows)}"
            )
        weights = list(cfg.view_weights)
    return [View(*facts) for facts in zip(rows, agreements, weights, strict=True)]


def _likeliest_words(x: Tensor, words: Tensor, scale: float, most: int) -> Tensor:
    """Indices of the words of largest mean probability, in their order."""
    every = Words(*words.shape)
    every.begin(words, scale)
    rows = torch.randperm(len(x))[:SEEN]
    total = torch.zeros(len(words))
    for block in rows.split(1024):
        total += every.shares(x[block].float()).sum(0)
    return total.topk(most).indices.sort().values


def published_network(cfg: Config, dims: Sequence[int]) -> TwoHeads:
    """The network of the recipe cpp before training, at random weights; the same for a seed."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(cfg.seed)
        return TwoHeads(dims, cfg.hidden_dim or MOST_HIDDEN, cfg.feature_dim)


def new_state(cfg: Config, network: FeatureNetwork) -> State:
    """The state before the first step."""
    if isinstance(network, TwoHeads):
        return State(network, network.optimizer(cfg.learning_rate))
    return State(network, torch.optim.Adam(network.parameters(), lr=cfg.learning_rate))


def seen_rows(cfg: Config, samples: int) -> Tensor:
    """The rows that all workers have, (m,) ascending; the landmarks are among them."""
    return _shuffle(cfg, samples)[: shared_samples(cfg)].sort().values


def landmark_rows(cfg: Config, samples: int) -> Tensor:
    """The rows whose features are kept, ascending."""
    return _shuffle(cfg, samples)[: cfg.landmarks].sort().values


def _shuffle(cfg: Config, samples: int) -> Tensor:
    return torch.randperm(samples, generator=_generator(cfg.seed, 3))


def _validated(cfg: Config) -> list[int]:
    """The steps whose network is validated."""
    if cfg.recipe == "cpp":
        return [cfg.steps]  # the last network is the published one
    steps = sorted(validation_steps(cfg.steps))
    return steps[1:] if cfg.recipe == "mcr2" and cfg.steps else steps


def likely_validations(cfg: Config) -> list[int]:
    """The steps that `fit` validates where nothing gains; the last of them ends the training."""
    if cfg.recipe == "none":
        return [0]
    return _validated(cfg)[: PATIENCE + 1] if cfg.recipe == "auto" else _validated(cfg)


def fit(
    cfg: Config, x: Tensor | Share, state: State, workers: Collectives, seen: Tensor | None = None
) -> Iterator[State]:
    """Train to the last step, yielding the state after each; `state.best` is the network to keep.

    x (N, D) is the training sample or this worker's share of it. seen (m, D) are the rows that all
    workers have; None: all of x. `cfg` comes from `fit_settings`. After the first step that fails,
    training resumes from the last validation (or from where it was resumed) with a smaller learning
    rate. RuntimeError at the second one.
    """
    network = state.network.train()
    network.gather_with(workers.gather)
    if seen is None:
        assert isinstance(x, Tensor)
        seen = x
    validator = Validator.of(network, seen, cfg.seed) if workers.rank == 0 else None
    good, validated = state.snapshot(), _validated(cfg)
    while True:
        if state.step in validated and not state.validated():
            scores = validator.score(network) if validator else np.zeros(BOOTSTRAPS)
            state.record_validation(workers.mean(torch.from_numpy(scores)).numpy() * workers.size)
            good = state.snapshot()
        losing = state.losing() if cfg.recipe == "auto" else 0
        if state.step >= cfg.steps or losing >= PATIENCE:
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
                "train: %s; resuming from step %d with learning rate %g",
                *(failure, state.step, cfg.learning_rate * SMALLER),
            )
            good = state.snapshot()
            continue
        yield state


def _step(cfg: Config, x: Tensor | Share, state: State, workers: Collectives) -> str:
    """One step of all workers; returns what failed in any of them, "" if nothing did."""
    started = time.perf_counter()
    device = next(state.network.parameters()).device
    rows = batch_rows(cfg, len(x), state.step, workers.rank, workers.size)
    columns = sampled_columns(cfg, state.step, workers.rank, workers.size).to(device)
    state.optimizer.zero_grad()
    Z, C = _outputs(cfg, state, x[rows].to(device).float())
    try:
        if C is None:
            terms = objective.rate_reduction(Z, columns, cfg.eps_sq, cfg.eta, workers.gather)
        elif state.step < cfg.warm_up_steps:
            terms = published.warm_up(Z, cfg.eps_sq, workers.gather)
        else:
            how = (columns, cfg.eps_sq, cfg.eta, workers.gather)
            terms = published.rate_reduction(Z, C, *how)
        sound = terms.loss.isfinite()
    except torch.linalg.LinAlgError:  # of a determinant
        sound = torch.zeros((), dtype=torch.bool, device=device)
    if workers.mean(sound.float()) < 1:  # before the backward pass, which waits for all
        return _describe_failure(cfg, Z, state.step, "loss")
    terms.loss.backward()
    norm = workers.average_gradients(state.network)
    if not math.isfinite(norm):
        return _describe_failure(cfg, Z, state.step, "gradient")
    state.optimizer.step()
    if not all(parameter.isfinite().all() for parameter in state.network.parameters()):
        return _describe_failure(cfg, Z, state.step, "new weight")
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


def _outputs(cfg: Config, state: State, x: Tensor) -> tuple[Tensor, Tensor | None]:
    """Features of a batch and, of two heads, the codes; after the warm-up both heads are equal."""
    network = state.network
    if not isinstance(network, TwoHeads):
        return network(x), None
    if state.step == cfg.warm_up_steps:
        network.cluster.load_state_dict(network.feature.state_dict())
    return network.heads(x)


def _describe_failure(cfg: Config, z: Tensor, step: int, what: str) -> str:
    condition = coding_rate.condition(z.detach(), cfg.eps_sq)
    return f"step {step}: the {what} is not finite, condition number {condition:.3g}"
