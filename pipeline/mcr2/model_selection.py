"""Which candidate to keep, chosen without labels: by the clusters that it would deliver.

N samples, m of them used, D input dimensions, q neighbours, B bootstraps.
"""

import math
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from pipeline.mcr2 import assignment, choose_k, coding_rate, cut, spectral
from pipeline.mcr2.network import FeatureNetwork

FIRST_STEP = 10  # of the first validation after the start; the next ones at twice the step
AROUND = (1 / 1.5, 1.0, 1.5)  # the ks that are cut, over the k of the start
SAMPLES = 5_000  # most samples that a validation uses
BOOTSTRAPS = 20
GAIN = 1.02  # factor by which a candidate must be more informative to be worth a training
SURE = 0.05  # quantile, over bootstraps, of the gain of a candidate that must be positive
PATIENCE = 3  # validations in a row without a gain after which training stops
LEAVES = 128  # most small groups for the choice of k
EPS_SQ = 0.1  # ε² for the choice of k


def validation_steps(steps: int) -> set[int]:
    """The steps whose network is validated: 0, FIRST_STEP, its doublings, and the last."""
    doublings = range(max(0, math.ceil(math.log2(max(1, steps) / FIRST_STEP))))
    return {0, steps, *(FIRST_STEP * 2**i for i in doublings)}


def better(scores: np.ndarray, than: np.ndarray) -> bool:
    """Whether a candidate of `scores` (B,) is surely better, and by GAIN, than one of `than`."""
    return bool(np.quantile(scores - GAIN * than, SURE) > 0)


@dataclass(frozen=True)
class _Limits:
    k_min: int
    k_max: int
    leaves: int
    eps_sq: float
    seed: int


@dataclass(frozen=True)
class Validator:
    """Compares networks by the clusters that `cut.cut` would deliver from their features.

    The score is the information between the clusters of samples and those of their neighbours
    (`spectral.information`) in one fixed graph, that of the input views, over bootstraps of the
    samples. It is the mean over three ks, around the k that `choose_k` finds at the start. So a
    training is kept only where its clusters follow the neighbours better.
    """

    x: Tensor  # (m, D)
    neighbours: Tensor  # (m, q), in the views of x
    counts: np.ndarray  # (B, m): how often each bootstrap has each sample
    ks: tuple[int, ...]
    seed: int

    @classmethod
    def of(cls, network: FeatureNetwork, x: Tensor, seed: int) -> "Validator":
        """A validator of all networks that see the samples x (N, D) as this one does."""
        generator = np.random.default_rng(seed)
        kept = generator.permutation(len(x))[:SAMPLES]
        x = x[torch.from_numpy(np.sort(kept))].float().to(next(network.parameters()).device)
        views = torch.cat([network.views(block) for block in x.split(4096)])
        views = torch.nn.functional.normalize(views - views.mean(0), dim=1)
        counts = generator.multinomial(len(x), np.full(len(x), 1 / len(x)), size=BOOTSTRAPS)
        k = _choose_k(_features(network, x), seed)
        ks = tuple(sorted({min(max(2, round(k * around)), len(x) // 2) for around in AROUND}))
        return cls(x, cut.neighbours(views.cpu()), counts, ks, seed)

    def score(self, network: FeatureNetwork) -> np.ndarray:
        """Information of the network's clusters in nats, (B,), the mean over the ks.

        A network whose features are all alike has one cluster, and so no information.
        """
        z = _features(network, self.x)
        index, scores = cut.neighbours(z), np.zeros(len(self.counts))
        different = len(z.unique(dim=0))
        for k in self.ks:
            labels = cut.cut(z, min(k, different), self.seed, index).nearest(z).numpy()
            scores += [spectral.information(labels, self.neighbours, c) for c in self.counts]
        return scores / len(self.ks)


def _features(network: FeatureNetwork, x: Tensor) -> Tensor:
    was_training = network.training
    z = network.eval().features(x).cpu()
    network.train(was_training)
    return z


def _choose_k(z: Tensor, seed: int) -> int:
    """The k that fits the samples z (m, d)."""
    leaves = max(2, min(LEAVES, len(z) // 4))
    limits = _Limits(2, max(2, leaves // 2), leaves, EPS_SQ, seed)
    table = choose_k.over_segment(z, limits)
    stats = coding_rate.statistics(z, assignment.nearest(z, table), len(table))
    return choose_k.choose_k(z, table, stats, limits).k
