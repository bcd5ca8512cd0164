"""The recipe of CPP as published, and the product's training, for benchmarks.accuracy.

Source: Chu, Tong et al., "Image clustering via the principle of rate reduction in the age of
pretrained models" (CPP), ICLR 2024; settings as its authors give them for CIFAR-10 and CIFAR-20.
N samples, D input dimensions, h hidden, d features, n samples in a batch, k clusters.
"""

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from torch import Tensor

from pipeline.mcr2 import cut, spectral
from pipeline.mcr2.collectives import Collectives
from pipeline.mcr2.threads import one_thread
from pipeline.mcr2.views import View
from pipeline.train import loop
from pipeline.train import settings as train_settings
from pipeline.train.state import State

HIDDEN = 2048  # CPP has 4096, which takes three times as long
FEATURES, BATCH, WARM_UP_STEPS, RATE = 128, 1024, 50, 1e-4


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


def codes(x: Tensor, setting: Setting, seed: int) -> Tensor:
    """Cluster codes (N, d) of x (N, D) by the product's recipe cpp."""
    cfg = train_settings.Config(
        recipe="cpp",
        words=0,
        hidden_dim=HIDDEN,
        feature_dim=FEATURES,
        learning_rate=RATE,
        eta=setting.eta,
        steps=WARM_UP_STEPS + setting.epochs * max(1, len(x) // BATCH),
        warm_up_steps=WARM_UP_STEPS,
        seed=seed,
    )
    cfg = train_settings.fit_settings(cfg, len(x))
    with one_thread():
        state = loop.new_state(cfg, loop.published_network(cfg, [x.shape[1]]))
        for _ in loop.fit(cfg, x, state, Collectives()):
            pass
    return state.network.eval().features(x)


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
