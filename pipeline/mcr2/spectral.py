"""The neighbour graph of features, and what is cut along it: small groups, and k clusters.

m landmarks, d dimensions, q neighbours, c components, k clusters.
"""

import warnings

import numpy as np
import scipy.sparse as sp
import torch
from scipy.sparse.linalg import eigsh
from sklearn.cluster import KMeans
from sklearn.exceptions import ConvergenceWarning
from torch import Tensor

BLOCK_ROWS = 2048  # rows of similarities at a time: memory is landmarks × this, not landmarks²
SMOOTHING = 4  # steps of the filter of `smoothed`
RESTARTS = 10  # of k-means, of which `partition` keeps one
DENSE_ROWS = 1000  # up to here a dense eigendecomposition is quick, and safe for any `components`


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
    return _graph(*neighbours(Z, q), eta)


def _graph(similarity: Tensor, index: Tensor, eta: float) -> sp.csr_matrix:
    m, q = index.shape
    weights = torch.exp((similarity.double() - 1) / eta).numpy().ravel()
    rows = np.repeat(np.arange(m), q)
    graph = sp.csr_matrix((weights, (rows, index.numpy().ravel())), shape=(m, m))
    return graph.maximum(graph.T).tocsr()


def embedding(graph: sp.csr_matrix, components: int, seed: int) -> np.ndarray:
    """Leading eigenvectors of the normalised affinity D^-½ A D^-½, (m, c), rows of unit norm.

    [Ng, Jordan, Weiss 2001]. The first k columns serve the cut into k clusters.
    """
    degree = np.asarray(graph.sum(axis=1)).ravel()
    scale = sp.diags(1 / np.sqrt(np.maximum(degree, np.finfo(float).tiny)))
    normalised = scale @ graph @ scale
    if len(degree) <= DENSE_ROWS:
        values, vectors = np.linalg.eigh(normalised.toarray())
    else:
        start = np.random.default_rng(seed).standard_normal(len(degree))
        values, vectors = eigsh(normalised, k=components, which="LA", v0=start)
    vectors = vectors[:, np.argsort(-values)[:components]]
    signs = np.sign(vectors[np.abs(vectors).argmax(axis=0), np.arange(components)])
    vectors = vectors * np.where(signs == 0, 1, signs)  # eigenvectors have no sign of their own
    norms = np.linalg.norm(vectors, axis=1, keepdims=True)
    return np.asarray(vectors / np.maximum(norms, np.finfo(float).tiny))


def over_segment(vectors: np.ndarray, groups: int, seed: int) -> np.ndarray:
    """k-means of the spectral embedding into many small groups: (m,) numbers in [0, groups)."""
    return kmeans(vectors, groups, 1, seed, iterations=50)


def kmeans(rows: np.ndarray, k: int, restarts: int, seed: int, iterations: int = 300) -> np.ndarray:
    """Labels (m,) of k-means of rows (m, d), the best of some restarts; fewer if rows coincide."""
    with warnings.catch_warnings():  # of rows that coincide
        warnings.simplefilter("ignore", ConvergenceWarning)
        fit = KMeans(n_clusters=k, n_init=restarts, max_iter=iterations, random_state=seed)
        return np.asarray(fit.fit_predict(rows), dtype=np.int64)


def information(labels: np.ndarray, index: Tensor) -> float:
    """I(cluster of a sample; cluster of its neighbour), nats: how well labels follow the graph.

    labels (m,) from 0, index (m, q) of `neighbours`. 0 for labels that ignore the graph, the
    entropy of the labels where no neighbours are parted: it asks for even clusters and for pure
    neighbourhoods at once, and for no ground truth. What neighbour-pair clustering maximises:
    Adaloglou et al., "Exploring the limits of deep image clustering using pretrained models"
    (TEMI), BMVC 2023.
    """
    k = int(labels.max()) + 1
    own = np.repeat(labels.astype(np.int64), index.shape[1])
    pairs = np.bincount(own * k + labels[index.numpy().ravel()], minlength=k * k).reshape(k, k)
    joint = (pairs + pairs.T) / (2 * len(own))
    marginal = joint.sum(axis=0)
    found = joint > 0
    return float((joint[found] * np.log(joint[found] / np.outer(marginal, marginal)[found])).sum())


def smoothed(Z: Tensor, graph: sp.csr_matrix) -> np.ndarray:
    """Features drawn towards their neighbours', centred, of unit length: (m, d).

    SMOOTHING steps half-way to the weighted mean of the neighbours, a low-pass filter on the graph.
    """
    degree = np.asarray(graph.sum(axis=1)).ravel()
    walk = sp.diags(1 / np.maximum(degree, np.finfo(float).tiny)) @ graph
    rows = Z.double().numpy()
    for _ in range(SMOOTHING):
        rows = (rows + walk @ rows) / 2
    rows = rows - rows.mean(axis=0)
    return rows / np.maximum(np.linalg.norm(rows, axis=1, keepdims=True), np.finfo(float).tiny)


def partition(Z: Tensor, k: int, q: int, eta: float, seed: int) -> np.ndarray:
    """k clusters of the rows of Z (m, d): numbers (m,) in [0, k).

    RESTARTS of k-means of the `smoothed` features; the one whose labels follow the graph best.
    """
    similarity, index = neighbours(Z, q)
    rows = smoothed(Z, _graph(similarity, index, eta)).astype(np.float32)
    fits = [kmeans(rows, k, 1, seed + restart) for restart in range(RESTARTS)]
    return max(fits, key=lambda labels: information(labels, index))
