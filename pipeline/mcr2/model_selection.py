"""Which of the networks of a training to keep, chosen without labels.

N samples, m of them used, D input dimensions, q neighbours.
"""

import math
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor
from torch.nn.functional import normalize

from pipeline.mcr2 import spectral
from pipeline.mcr2.network import Network

FIRST_STEP = 10  # of the first validation after the start; the next ones at twice the step
CLUSTERS = (8, 16, 32, 64, 128)  # k of the k-means runs that a validation averages over
MEMBERS = 20  # least samples per cluster, on average
RESTARTS = 2  # of each k-means
NEIGHBOURS = 20  # of each sample
SAMPLES = 10_000  # most samples that a validation uses


def validation_steps(steps: int) -> set[int]:
    """The steps whose network is validated: 0, FIRST_STEP, its doublings, and the last."""
    doublings = range(max(0, math.ceil(math.log2(max(1, steps) / FIRST_STEP))))
    return {0, steps, *(FIRST_STEP * 2**i for i in doublings)}


@dataclass(frozen=True)
class Validator:
    """Whether neighbouring samples fall into the same clusters.

    The score is the mean, over several k, of the mutual information between the k-means clusters of
    Z and those of the neighbours in the network's input (`spectral.information`). Rate reduction
    needs it. If the features are subspaces, training finds them only after many steps. If the
    encoder is good, training helps at first and later separates similar samples.
    """

    x: Tensor  # (m, D)
    neighbours: Tensor  # (m, q), in the views of x
    seed: int

    @classmethod
    def of(cls, network: Network, x: Tensor, seed: int) -> "Validator":
        """A validator of all networks that see the samples x (N, D) as this one does."""
        kept = np.random.default_rng(seed).permutation(len(x))[:SAMPLES]
        x = x[torch.from_numpy(np.sort(kept))].float().to(network.mean.device)
        views = normalize(torch.cat([network.views(block) for block in x.split(4096)]), dim=1)
        q = min(NEIGHBOURS, len(x) - 1)
        return cls(x, spectral.neighbours(views.cpu(), q)[1], seed)

    def score(self, network: Network) -> float:
        """Mean information of the network's clusters, in nats."""
        was_training = network.training
        z = network.eval().features(self.x).cpu().numpy()
        network.train(was_training)
        ks = [k for k in CLUSTERS if k <= len(z) // MEMBERS] or [2]
        labels = (spectral.kmeans(z, k, RESTARTS, self.seed) for k in ks)
        return float(np.mean([spectral.information(found, self.neighbours) for found in labels]))
