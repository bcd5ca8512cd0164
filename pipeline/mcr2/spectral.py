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
SMOOTHING = 8  # steps of the filter of `smooth`
RUNS, LEAST_RUNS, MOST_RUNS = 300, 3, 30  # of k-means, over k: see `restarts`
REFINEMENTS = 40  # most steps of `refine`
SETTLED = 0.001  # share of the rows that move in a step of `refine` that is the last
LEAST_SHARE = 1e-9  # of the pairs, below which two clusters count as never neighbours
DENSE_ROWS = 1000  # up to here a dense eigendecomposition is fast, and safe for any `components`
PART_ITERATIONS = 50  # of k-means into parts of clusters


def neighbours(Z: Tensor, q: int) -> Tensor:
    """Indices of the q rows of largest cosine to each row, (m, q); Z (m, d) has unit rows."""
    found = []
    for start in range(0, len(Z), BLOCK_ROWS):
        similarity = Z[start : start + BLOCK_ROWS] @ Z.T
        rows = torch.arange(len(similarity))
        similarity[rows, rows + start] = -2  # not itself
        found.append(similarity.topk(q, dim=1).indices)
    return torch.cat(found)


def pairs(index: Tensor) -> sp.csr_matrix:
    """How often each row is a neighbour of each other, in either direction: (m, m), 0 to 2."""
    directed = _adjacency(index)
    return (directed + directed.T).tocsr()


def shared_neighbours(index: Tensor) -> sp.csr_matrix:
    """Symmetric graph (m, m) of neighbours: Jaccard similarity of the two rows' neighbour lists.

    Every list (q of `neighbours`) also has the row itself. Shared neighbours [Jarvis, Patrick 1973]
    depend on ranks only: unlike a kernel of the distance, they need no bandwidth.
    """
    m, q = index.shape
    directed = _adjacency(index)
    lists = directed + sp.identity(m, format="csr")
    graph = (lists @ lists.T).multiply(directed.maximum(directed.T)).tocsr()
    graph.data = graph.data / (2 * (q + 1) - graph.data)
    return graph


def _adjacency(index: Tensor) -> sp.csr_matrix:
    m, q = index.shape
    starts = np.arange(m + 1) * q
    return sp.csr_matrix((np.ones(m * q), index.numpy().ravel(), starts), shape=(m, m))


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


def information(labels: np.ndarray, index: Tensor, counts: np.ndarray | None = None) -> float:
    """I(cluster of a sample; cluster of its neighbour), nats: how well labels follow the graph.

    labels (m,) from 0, index (m, q) from `neighbours`, counts (m,) how often each sample counts
    (None: once). It is 0 for labels that ignore the graph, and the entropy of the labels if all
    neighbours share their cluster. So it rewards even clusters and pure neighbourhoods, without
    ground truth. Neighbour-pair clustering maximises it: Adaloglou et al., "Exploring the limits of
    deep image clustering using pretrained models" (TEMI), BMVC 2023.
    """
    k, q = int(labels.max()) + 1, index.shape[1]
    cells = np.repeat(labels.astype(np.int64), q) * k + labels[index.numpy().ravel()]
    weights = np.repeat(counts, q) if counts is not None else None
    found = np.bincount(cells, weights, minlength=k * k).reshape(k, k)
    joint = (found + found.T) / (2 * found.sum())
    marginal = joint.sum(axis=0)
    some = joint > 0
    return float((joint[some] * np.log(joint[some] / np.outer(marginal, marginal)[some])).sum())


def modularity(labels: np.ndarray, graph: sp.csr_matrix) -> float:
    """Share of the weight of a graph (m, m) within the clusters `labels` (m,), less that expected.

    Expected is the share in a random graph of the same degrees [Newman 2006].
    """
    members = sp.csr_matrix((np.ones(len(labels)), labels, np.arange(len(labels) + 1)))
    between = (members.T @ graph @ members).toarray() / max(graph.sum(), np.finfo(float).tiny)
    return float(between.trace() - np.square(between.sum(axis=0)).sum())


def smooth(Z: Tensor, graph: sp.csr_matrix) -> np.ndarray:
    """Features Z (m, d) smoothed along the graph, centred, with unit rows: (m, d) float32.

    Each of SMOOTHING steps moves a row half-way to the weighted mean of its neighbours.
    """
    degree = np.asarray(graph.sum(axis=1)).ravel()
    walk = sp.diags(1 / np.maximum(degree, np.finfo(float).tiny)) @ graph
    rows = Z.double().numpy()
    for _ in range(SMOOTHING):
        rows = (rows + walk @ rows) / 2
    rows = rows - rows.mean(axis=0)
    norms = np.linalg.norm(rows, axis=1, keepdims=True)
    return np.asarray(rows / np.maximum(norms, np.finfo(float).tiny), np.float32)


def partition(rows: np.ndarray, index: Tensor, k: int, seed: int) -> np.ndarray:
    """k clusters of rows (m, c), from `smooth` or `embedding`: labels (m,) from 0.

    The best of `restarts(k)` runs of k-means, by its own objective, then `refine`. index (m, q) is
    from `neighbours`.
    """
    found = refine(kmeans(rows, k, restarts(k), seed), index)
    return np.unique(found, return_inverse=True)[1].ravel()  # fewer where rows coincide


def restarts(k: int) -> int:
    """Runs of k-means for k clusters: single runs differ most where there are few clusters."""
    return int(np.clip(RUNS // k, LEAST_RUNS, MOST_RUNS))


def refine(labels: np.ndarray, index: Tensor) -> np.ndarray:
    """Labels (m,) moved to a local maximum of `information` in the neighbours index (m, q).

    A step finds for every row the cluster to which a move raises the information most, to first
    order, and moves about half of the rows that want to: if all moved, neighbours would swap. This
    is the objective of TEMI [Adaloglou et al. 2023] without a network.
    """
    graph, m, k = pairs(index), len(labels), int(labels.max()) + 1
    generator, best = np.random.default_rng(0), information(labels, index)
    found = labels
    for _ in range(REFINEMENTS):
        members = sp.csr_matrix((np.ones(m), labels, np.arange(m + 1)), shape=(m, k))
        votes = (graph @ members).toarray()  # neighbours of each row in each cluster
        joint = members.T @ votes
        joint = joint / joint.sum()
        logs = np.log(np.maximum(joint.sum(axis=0), LEAST_SHARE))
        gains = np.log(np.maximum(joint, LEAST_SHARE)) - logs - logs[:, None]
        wanted = (votes @ gains.T).argmax(axis=1)
        moved = (wanted != labels) & (generator.random(m) < 0.5)
        labels = np.where(moved, wanted, labels)
        if (value := information(labels, index)) > best:
            best, found = value, labels
        if moved.mean() < SETTLED:
            break
    return found


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
