"""The recipe of CPP as published, and the product's training, for benchmarks.accuracy.

Source: Chu, Tong et al., "Image clustering via the principle of rate reduction in the age of
pretrained models" (CPP), ICLR 2024; settings as its authors give them for CIFAR-10 and CIFAR-20.
N samples, D input dimensions, h hidden, d features, n samples in a batch, k clusters.
"""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn.functional import normalize

from pipeline.mcr2 import coding_rate, cut, sinkhorn, spectral
from pipeline.mcr2.collectives import Collectives
from pipeline.mcr2.threads import one_thread
from pipeline.mcr2.views import View
from pipeline.train import loop
from pipeline.train import settings as train_settings
from pipeline.train.state import State

HIDDEN = 2048  # CPP has 4096, which takes three times as long
FEATURES, BATCH, COLUMNS, WARM_UP_STEPS = 128, 1024, 64, 50
RATE, MOMENTUM, DECAY, CLUSTER_DECAY = 1e-4, 0.9, 1e-4, 5e-3
EPS_SQ, HALF_STEPS, REGULARIZER = 0.1, 5, 0.05  # λ, of ‖Π‖²/2


@dataclass(frozen=True)
class Words:
    """What stands beside the images: unit rows (V, D), and the encoder's logit scale."""

    table: Tensor
    scale: float

    def none(self) -> "Words":
        """No words."""
        return Words(self.table[:0], self.scale)


@dataclass(frozen=True)
class Setting:
    """What CPP sets apart for each data set."""

    eta: float  # η, temperature of the Sinkhorn membership
    epochs: int  # after the warm-up


class Heads(nn.Module):
    """Linear D→h, BatchNorm, ReLU, Linear h→h, ReLU, then two linear heads h→d."""

    def __init__(self, input_dim: int) -> None:
        super().__init__()
        self.trunk = nn.Sequential(
            nn.Linear(input_dim, HIDDEN),
            nn.BatchNorm1d(HIDDEN),
            nn.ReLU(),
            nn.Linear(HIDDEN, HIDDEN),
            nn.ReLU(),
        )
        self.feature = nn.Linear(HIDDEN, FEATURES)
        self.cluster = nn.Linear(HIDDEN, FEATURES)

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
        """(n, D) -> features Z and cluster codes C, both (n, d) with unit rows."""
        hidden = self.trunk(x)
        return normalize(self.feature(hidden), dim=1), normalize(self.cluster(hidden), dim=1)

    def optimizer(self) -> torch.optim.SGD:
        """SGD with the weight decay of the cluster head apart from the rest."""
        cluster = {"params": list(self.cluster.parameters()), "weight_decay": CLUSTER_DECAY}
        rest = [*self.trunk.parameters(), *self.feature.parameters()]
        groups = [{"params": rest, "weight_decay": DECAY}, cluster]
        return torch.optim.SGD(groups, lr=RATE, momentum=MOMENTUM)


def codes(x: Tensor, setting: Setting, seed: int) -> Tensor:
    """Cluster codes (N, d) of x (N, D) after CPP's training: R alone, then −R + R_c + λ/2 ‖Π‖²."""
    torch.manual_seed(seed)
    network = Heads(x.shape[1]).train()
    optimizer = network.optimizer()
    for step, rows in enumerate(_batches(len(x), WARM_UP_STEPS, setting.epochs)):
        if step == WARM_UP_STEPS:
            network.cluster.load_state_dict(network.feature.state_dict())
        optimizer.zero_grad()
        features, clusters = network(x[rows].float())
        if step < WARM_UP_STEPS:
            loss = -coding_rate.rate(features, EPS_SQ)
        else:
            loss = _loss(features, clusters, setting.eta)
        loss.backward()
        optimizer.step()
    network.eval()
    with torch.inference_mode():
        return torch.cat([network(block.float())[1] for block in x.split(4096)])


def _batches(samples: int, warm_up: int, epochs: int) -> Iterator[Tensor]:
    per_epoch = samples // BATCH
    left = warm_up + epochs * per_epoch
    while left:
        shuffled = torch.randperm(samples)[: per_epoch * BATCH].split(BATCH)
        yield from shuffled[:left]
        left -= min(left, per_epoch)


def _loss(Z: Tensor, C: Tensor, eta: float) -> Tensor:  # noqa: N803 - the paper's letters
    membership, _ = sinkhorn.membership((C @ C.T).abs(), eta, HALF_STEPS)
    columns = membership[:, torch.randperm(len(Z))[:COLUMNS]]
    share = coding_rate.compression(Z, columns, EPS_SQ) * (len(Z) / COLUMNS)
    size = 0.5 * membership.square().sum()
    return share - coding_rate.rate(Z, EPS_SQ) + REGULARIZER * size


def spectral_cut(z: Tensor, k: int, seed: int) -> np.ndarray:
    """Spectral clustering of the neighbour graph of z (N, d): labels (N,)."""
    with one_thread():
        graph = spectral.shared_neighbours(cut.neighbours(z))
        return spectral.kmeans(spectral.embedding(graph, k, seed), k, 10, seed)


def trained(
    x: Tensor, words: Words, seed: int, dims: Sequence[int] = (), recipe: str = "auto"
) -> tuple[State, list[View]]:
    """The product's training with its defaults on x (N, D) float16, and the views of it.

    `dims` are the dimensions of each encoder in x; (): of one.
    """
    cfg = train_settings.Config(seed=seed, recipe=recipe, words=4096 if len(words.table) else 0)
    cfg = train_settings.fit_settings(cfg, len(x))
    with one_thread():
        network, views = loop.new_network(cfg, x, words.table, words.scale, dims)
        state = loop.new_state(cfg, network)
        for _ in loop.fit(cfg, x, state, Collectives()):
            pass
    return state, views
