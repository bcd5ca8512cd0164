"""Spectral embedding of a neighbour graph: once, for every number of clusters.

m landmarks, d dimensions, q neighbours, c components.
"""

import numpy as np
import scipy.sparse as sp
import torch
from scipy.sparse.linalg import eigsh
from sklearn.cluster import KMeans
from torch import Tensor

BLOCK_ROWS = 2048  # rows of similarities at a time: memory is landmarks × this, not landmarks²
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
    similarity, index = neighbours(Z, q)
    m = len(Z)
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
    kmeans = KMeans(n_clusters=groups, n_init=1, max_iter=50, random_state=seed)
    return np.asarray(kmeans.fit_predict(vectors), dtype=np.int64)
