"""The neighbour graph of features, and its cuts: into small groups, and into k clusters.

m landmarks, d dimensions, q neighbours, c components, k clusters.
"""

import warnings
from collections.abc import Iterator

import numpy as np
import scipy.sparse as sp
import torch
from scipy.sparse.csgraph import connected_components
from scipy.sparse.linalg import eigsh
from sklearn.cluster import KMeans
from sklearn.exceptions import ConvergenceWarning
from torch import Tensor

BLOCK_ROWS = 2048  # rows of similarities computed together: memory is m × this, not m²
SMOOTHING = 4  # steps of the filter of `smooth`
RESTARTS = 10  # of k-means, of which `partition` keeps one
DENSE_ROWS = 1000  # up to here a dense eigendecomposition is fast, and safe for any `components`
PART_ITERATIONS = 50  # of k-means into parts of clusters


def neighbours(Z: Tensor, q: int) -> tuple[Tensor, Tensor]:
    """Cosine similarities and indices of the q nearest other rows, both (m, q); Z has unit rows."""
    found = []
    for start in range(0, len(Z), BLOCK_ROWS):
        similarity = Z[start : start + BLOCK_ROWS] @ Z.T
        rows = torch.arange(len(similarity))
        similarity[rows, rows + start] = -2  # not itself
        found.append(similarity.topk(q, dim=1))
    return torch.cat([f.values for f in found]), torch.cat([f.indices for f in found])


def affinity(Z: Tensor, q: int, eta: float) -> sp.csr_matrix:
    """Symmetric graph of the q nearest neighbours, weights exp((cos − 1)/η), (m, m) sparse."""
    return build_graph(*neighbours(Z, q), eta)


def build_graph(similarity: Tensor, index: Tensor, eta: float) -> sp.csr_matrix:
    """`affinity` from the results of `neighbours`, both (m, q)."""
    m, q = index.shape
    weights = torch.exp((similarity.double() - 1) / eta).numpy().ravel()
    rows = np.repeat(np.arange(m), q)
    graph = sp.csr_matrix((weights, (rows, index.numpy().ravel())), shape=(m, m))
    return graph.maximum(graph.T).tocsr()


def embedding(graph: sp.csr_matrix, components: int, seed: int) -> np.ndarray:
    """Leading eigenvectors of the normalised affinity D^-½ A D^-½, (m, c), rows of unit norm.

    [Ng, Jordan, Weiss 2001]. A cut into k clusters uses the first k columns. The eigenvectors of
    each connected component are computed separately: all have the eigenvalue 1, and Lanczos' method
    would find only one of its eigenvectors.
    """
    degree = np.asarray(graph.sum(axis=1)).ravel()
    scale = sp.diags(1 / np.sqrt(np.maximum(degree, np.finfo(float).tiny)))
    normalised = (scale @ graph @ scale).tocsr()
    parts, part_of = connected_components(graph, directed=False)
    pairs = []
    for part in range(parts):
        rows = np.flatnonzero(part_of == part)
        for value, own in _leading_eigenpairs(normalised[rows][:, rows], components, seed):
            pairs.append((value, rows, own))
    vectors = np.zeros((len(degree), components))
    for column, (_, rows, own) in enumerate(sorted(pairs, key=lambda p: -p[0])[:components]):
        vectors[rows, column] = own
    signs = np.sign(vectors[np.abs(vectors).argmax(axis=0), np.arange(components)])
    vectors = vectors * np.where(signs == 0, 1, signs)  # the sign of an eigenvector is arbitrary
    norms = np.linalg.norm(vectors, axis=1, keepdims=True)
    return np.asarray(vectors / np.maximum(norms, np.finfo(float).tiny))


def _leading_eigenpairs(
    matrix: sp.csr_matrix, most: int, seed: int
) -> Iterator[tuple[float, np.ndarray]]:
    """At most `most` largest eigenvalues of a symmetric matrix, and their eigenvectors."""
    m = matrix.shape[0]
    if m <= max(DENSE_ROWS, most):
        values, vectors = np.linalg.eigh(matrix.toarray())
    else:
        start = np.random.default_rng(seed).standard_normal(m)
        values, vectors = eigsh(matrix, k=most, which="LA", v0=start)
    for column in np.argsort(-values)[:most]:
        yield float(values[column]), vectors[:, column]


def over_segment(vectors: np.ndarray, groups: int, seed: int) -> np.ndarray:
    """k-means of the spectral embedding (m, c) into small groups: labels (m,) in [0, groups)."""
    return kmeans(vectors, groups, 1, seed, iterations=50)


def kmeans(rows: np.ndarray, k: int, restarts: int, seed: int, iterations: int = 300) -> np.ndarray:
    """k-means labels (m,) of rows (m, d), the best of `restarts`; fewer than k if rows coincide."""
    with warnings.catch_warnings():  # of rows that coincide
        warnings.simplefilter("ignore", ConvergenceWarning)
        fit = KMeans(n_clusters=k, n_init=restarts, max_iter=iterations, random_state=seed)
        return np.asarray(fit.fit_predict(rows), dtype=np.int64)


def information(labels: np.ndarray, index: Tensor) -> float:
    """I(cluster of a sample; cluster of its neighbour), nats: how well labels follow the graph.

    labels (m,) from 0, index (m, q) from `neighbours`. It is 0 for labels that ignore the graph,
    and the entropy of the labels if all neighbours share their cluster. So it rewards even clusters
    and pure neighbourhoods, without ground truth. Neighbour-pair clustering maximises it: Adaloglou
    et al., "Exploring the limits of deep image clustering using pretrained models" (TEMI), BMVC
    2023.
    """
    k = int(labels.max()) + 1
    own = np.repeat(labels.astype(np.int64), index.shape[1])
    pairs = np.bincount(own * k + labels[index.numpy().ravel()], minlength=k * k).reshape(k, k)
    joint = (pairs + pairs.T) / (2 * len(own))
    marginal = joint.sum(axis=0)
    found = joint > 0
    return float((joint[found] * np.log(joint[found] / np.outer(marginal, marginal)[found])).sum())


def smooth(Z: Tensor, graph: sp.csr_matrix) -> np.ndarray:
    """Features Z (m, d) smoothed along the graph, centred, with unit rows: (m, d).

    Each of SMOOTHING steps moves a row half-way to the weighted mean of its neighbours.
    """
    degree = np.asarray(graph.sum(axis=1)).ravel()
    walk = sp.diags(1 / np.maximum(degree, np.finfo(float).tiny)) @ graph
    rows = Z.double().numpy()
    for _ in range(SMOOTHING):
        rows = (rows + walk @ rows) / 2
    rows = rows - rows.mean(axis=0)
    return rows / np.maximum(np.linalg.norm(rows, axis=1, keepdims=True), np.finfo(float).tiny)


def partition(
    rows: np.ndarray, index: Tensor, k: int, seed: int, begin: np.ndarray | None = None
) -> np.ndarray:
    """k clusters of rows (m, c), from `smooth` or `embedding`: labels (m,) from 0.

    Of RESTARTS runs of k-means, and one from the means of the clusters `begin` (m,), the run of
    most `information`. index (m, q) is from `neighbours`.
    """
    rows = rows.astype(np.float32)
    fits = [kmeans(rows, k, 1, seed + restart) for restart in range(RESTARTS)]
    if begin is not None and begin.max() + 1 == k:
        means = np.stack([rows[begin == cluster].mean(axis=0) for cluster in range(k)])
        fits.append(KMeans(n_clusters=k, init=means, n_init=1).fit_predict(rows).astype(np.int64))
    best = max(fits, key=lambda labels: information(labels, index))
    return np.unique(best, return_inverse=True)[1].ravel()  # fewer where rows coincide


def split_clusters(Z: Tensor, labels: np.ndarray, each: int, seed: int) -> np.ndarray:
    """Split the clusters of Z (m, d) by k-means into about `each` parts on average.

    Larger clusters get more. Returns part numbers (m,), ascending from cluster to cluster.
    """
    sizes = np.bincount(labels)
    found, first = np.empty_like(labels), 0
    for cluster, size in enumerate(sizes):
        rows = labels == cluster
        parts = min(max(1, round(each * len(sizes) * size / len(labels))), size)
        own = kmeans(Z[torch.from_numpy(rows)].numpy(), parts, 1, seed, PART_ITERATIONS)
        found[rows] = first + np.unique(own, return_inverse=True)[1]
        first = found[rows].max() + 1
    return found
