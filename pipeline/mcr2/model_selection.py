"""Which network on the way to keep, told without labels.

N samples, m of them looked at, D input dimensions, q neighbours.
"""

import math
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor
from torch.nn.functional import normalize

from pipeline.mcr2 import spectral
from pipeline.mcr2.network import Network

FIRST_LOOK = 10  # steps; the next looks are after twice as many each time
CLUSTERS = (8, 16, 32, 64, 128)  # of the k-means that a look takes the mean over
MEMBERS = 20  # samples per cluster at least
RESTARTS = 2
NEIGHBOURS = 20
SAMPLES = 10_000  # that a look is made on at most


def look_steps(steps: int) -> set[int]:
    """Before the first step, after FIRST_LOOK, twice as many and so on, after the last."""
    doublings = range(max(0, math.ceil(math.log2(max(1, steps) / FIRST_LOOK))))
    return {0, steps, *(FIRST_LOOK * 2**i for i in doublings)}


@dataclass(frozen=True)
class Judge:
    """Do neighbours fall into the same clusters?

    A look is the mean over several k of what the clusters of k-means in Z tell of the clusters of
    the neighbours in the network's input (`spectral.information`). Rate reduction needs a judge:
    where features are subspaces it finds, after many steps, what nothing else does; where the
    encoder is good it helps a little at first and then spreads what belongs together.
    """

    x: Tensor  # (m, D)
    neighbours: Tensor  # (m, q), in the views of x
    seed: int

    @classmethod
    def of(cls, network: Network, x: Tensor, seed: int) -> "Judge":
        """A judge of all networks that see the samples x (N, D) as this one does."""
        kept = np.random.default_rng(seed).permutation(len(x))[:SAMPLES]
        x = x[torch.from_numpy(np.sort(kept))].float().to(network.mean.device)
        views = normalize(torch.cat([network.views(block) for block in x.split(4096)]), dim=1)
        q = min(NEIGHBOURS, len(x) - 1)
        return cls(x, spectral.neighbours(views.cpu(), q)[1], seed)

    def look(self, network: Network) -> float:
        """Mean information, nats."""
        was_training = network.training
        z = network.eval().features(self.x).cpu().numpy()
        network.train(was_training)
        ks = [k for k in CLUSTERS if k <= len(z) // MEMBERS] or [2]
        labels = (spectral.kmeans(z, k, RESTARTS, self.seed) for k in ks)
        return float(np.mean([spectral.information(found, self.neighbours) for found in labels]))
