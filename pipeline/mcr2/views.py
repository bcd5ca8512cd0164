"""Which views of the samples to use, and with what weight: by their agreement with the first.

A view is one description of the samples: the embeddings of an encoder, or the words that an image
is like. A second view that sees the same groups makes clusters much better; one that sees others
makes them much worse. Agreement tells one from the other without labels.

m samples, d dimensions of a view, q neighbours.
"""

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from pipeline.mcr2 import spectral

SAMPLES = 3000  # most samples that are compared
NEIGHBOURS = 20  # of each sample
CLUSTERS = (5, 10, 20, 40)  # ks of the clusters that the agreement is a mean over
RESTARTS = 3  # of each k-means
UNUSED, FULL = 0.4, 0.8  # agreement up to which a view has weight 0, and from which it has 1


@dataclass(frozen=True)
class View:
    """A view of the samples, how far it agrees with the first, and the weight that it has."""

    name: str
    agreement: float
    weight: float


class _Groups:
    """Neighbours of some samples in one view, and clusters for each of CLUSTERS."""

    def __init__(self, view: Tensor, seed: int) -> None:
        self.index = spectral.neighbours(view, min(NEIGHBOURS, len(view) - 1))
        rows = spectral.smooth(view, spectral.shared_neighbours(self.index))
        ks = [k for k in CLUSTERS if k <= len(view)]
        self.labels = [spectral.kmeans(rows, k, RESTARTS, seed) for k in ks]

    def kept_by(self, other: "_Groups") -> list[float]:
        """For each k, the share of the information of these clusters that the other's graph has."""
        return [
            spectral.information(labels, other.index)
            / max(spectral.information(labels, self.index), np.finfo(float).tiny)
            for labels in self.labels
        ]


def agreements(views: Sequence[Tensor], seed: int) -> list[float]:
    """Agreement of each view (m, d), unit rows, with the first: 0 (unrelated) to about 1 (a copy).

    Clusters of each view are compared with the neighbours in the other. The agreement is the mean,
    over both directions and several k, of I(labels; neighbours in the other view) over I(labels;
    neighbours in the own view); I is `spectral.information`. That of the first is 1.
    """
    rows = np.random.default_rng(seed).permutation(len(views[0]))[:SAMPLES]
    kept = torch.from_numpy(np.sort(rows))
    groups = [_Groups(view[kept], seed) for view in views] if len(views) > 1 else []
    return [1.0] + [
        float(np.mean(groups[0].kept_by(other) + other.kept_by(groups[0]))) for other in groups[1:]
    ]


def weight(agreement: float) -> float:
    """Weight of a view of that agreement: 0 up to UNUSED, 1 from FULL, linear between them.

    The bounds were found on scikit-learn's digits with views made of the same digits (gradients,
    Fourier magnitudes, halves, noise): see docs/decisions/views.md.
    """
    return float(np.clip((agreement - UNUSED) / (FULL - UNUSED), 0, 1))
