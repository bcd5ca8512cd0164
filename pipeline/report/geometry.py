"""A map of the clusters, cosines between samples, and singular values of features.

m landmarks, d dimensions, p prototypes, k clusters. [Chu24] is Chu, Tong et al., "Image clustering
via the principle of rate reduction in the age of pretrained models" (CPP), ICLR 2024.
"""

from dataclasses import dataclass

import numpy as np
from scipy.linalg import eigh

from pipeline.mcr2 import assignment

HEAT_ROWS = 128  # landmarks in a heat map
HEAT_CLUSTERS = 24  # the largest; each then has five rows or more
VALUES = 64  # singular values shown
OWN_LINES = 10  # clusters with a line of singular values


def similarity(vectors: np.ndarray, cluster_of: np.ndarray) -> np.ndarray:
    """(k, k) cosines between the nearest prototypes of two clusters, 1 on the diagonal.

    vectors (p, d), unit rows; cluster_of (p,) ascending, with every cluster.
    """
    found = assignment.similarity(vectors.astype(np.float64), cluster_of)
    np.fill_diagonal(found, 1)
    return found


def plane(cosines: np.ndarray) -> tuple[np.ndarray, float]:
    """Positions of k clusters in two dimensions (k, 2), and the share of variation they show.

    Classical multidimensional scaling [Torgerson 1952] of the squared distances 2 − 2·cosine: the
    two leading eigenvectors of the doubly centred cosines. With one prototype per cluster these are
    the two principal components of the prototypes. The largest coordinate of each axis is positive.
    """
    k = len(cosines)
    centred = cosines - cosines.mean(axis=0) - cosines.mean(axis=1)[:, None] + cosines.mean()
    values, axes = eigh(centred, subset_by_index=(max(0, k - 2), k - 1))
    values, axes = np.maximum(values[::-1], 0), axes[:, ::-1]
    axes = axes * np.sign(axes[np.abs(axes).argmax(axis=0), range(axes.shape[1])])
    places = np.zeros((k, 2))
    places[:, : axes.shape[1]] = axes * np.sqrt(values)
    total = np.trace(centred)
    return places, float(values.sum() / total) if total > 1e-12 else 1.0


@dataclass(frozen=True)
class Landmarks:
    """Embeddings and features of a sample of images; unit rows."""

    embedding: np.ndarray  # (m, D) float32
    feature: np.ndarray  # (m, d) float32
    cluster: np.ndarray  # (m,) of the nearest prototype


def nearest(z: np.ndarray, vectors: np.ndarray, cluster_of: np.ndarray) -> np.ndarray:
    """The cluster of each row of z (m, d), by its nearest prototype."""
    blocks = np.array_split(z, max(1, len(z) // 4096))
    found: np.ndarray = cluster_of[np.concatenate([(b @ vectors.T).argmax(1) for b in blocks])]
    return found


def heat_rows(cluster: np.ndarray) -> np.ndarray:
    """Indices of at most HEAT_ROWS landmarks of the largest clusters, evenly, sorted by cluster."""
    counts = np.bincount(cluster)
    largest = np.argsort(-counts, kind="stable")[:HEAT_CLUSTERS]
    rows = np.flatnonzero(np.isin(cluster, largest))
    rows = rows[np.argsort(cluster[rows], kind="stable")]
    even = np.linspace(0, len(rows) - 1, min(HEAT_ROWS, len(rows)))
    return rows[even.round().astype(int)]


def heat(x: np.ndarray) -> np.ndarray:
    """|cosines| of the rows of x (r, D), [Chu24, figure 2], in percent: (r, r) uint8."""
    return np.abs(100 * (x @ x.T)).round().clip(0, 100).astype(np.uint8)


def contrast(percent: np.ndarray, cluster: np.ndarray) -> tuple[float, float]:
    """Mean |cosine| of two rows of one cluster, and of two rows of different clusters."""
    same = cluster[:, None] == cluster

    def mean(pairs: np.ndarray) -> float:
        return float(percent[pairs].mean()) / 100 if pairs.any() else 0.0

    return mean(same & ~np.eye(len(cluster), dtype=bool)), mean(~same)


def singular_values(x: np.ndarray) -> np.ndarray:
    """The first VALUES singular values of x (m, D), as shares of the largest [Chu24, figure 3]."""
    gram = x.T @ x if len(x) >= x.shape[1] else x @ x.T
    values = np.linalg.eigvalsh(gram.astype(np.float64))[::-1][:VALUES]
    found: np.ndarray = np.sqrt(np.maximum(values / max(values[0], 1e-12), 0))
    return found


def spectra(x: np.ndarray, cluster: np.ndarray) -> dict[str, np.ndarray]:
    """Singular values of all rows of x (m, D), key "", and of the OWN_LINES largest clusters."""
    counts = np.bincount(cluster)
    largest = np.argsort(-counts, kind="stable")[:OWN_LINES]
    own = {str(c): singular_values(x[cluster == c]) for c in largest if counts[c] > 1}
    return {"": singular_values(x), **own}
