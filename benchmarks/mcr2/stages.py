"""What comes after training: the k curve of the landmarks, the assignment, the tree."""

import time
from collections.abc import Callable, Iterator

import numpy as np
import torch
from scipy.sparse.linalg import eigsh
from sklearn.cluster import KMeans
from torch import Tensor
from torch.nn.functional import normalize

from benchmarks.mcr2.losses import EPS_SQ, ETA
from benchmarks.mcr2.measuring import alternating, fresh, line, mixture, title
from pipeline.mcr2 import assignment, coding_rate, spectral, tree
from pipeline.mcr2.network import Network

LANDMARKS, FEATURES, NEIGHBOURS, COMPONENTS = 15_000, 128, 20, 64
NOISE = 2.0  # neighbours of another cluster are common
CANDIDATES = range(5, 105, 5)
BLOCK_ROWS = 4096
BATCHES = 12


def make_curve() -> Callable[[], dict[int, float]]:
    """Bits of every candidate k, as select_k finds them: a graph, groups, a tree."""
    z = mixture(LANDMARKS, FEATURES, NOISE)

    def call() -> dict[int, float]:
        graph = spectral.shared_neighbours(spectral.neighbours(z, NEIGHBOURS))
        vectors = spectral.embedding(graph, COMPONENTS, seed=0)
        found = spectral.over_segment(vectors, 2 * max(CANDIDATES), seed=0)
        groups, labels = torch.from_numpy(found).unique(return_inverse=True)
        count, total, gram = coding_rate.statistics(z, labels, len(groups))
        merges = tree.grow(count, total, gram, EPS_SQ)
        bits = tree.lengths_bits(merges, count, gram, EPS_SQ)
        return {k: float(bits[k - 1]) for k in CANDIDATES}

    return call


def make_plain_curve() -> Callable[[], tuple[float, float]]:
    """Seconds of the same by spectral clustering of the dense affinity, anew for every k; and of
    that with the eigenvectors of the largest k for all."""
    z = mixture(LANDMARKS, FEATURES, NOISE)

    def call() -> tuple[float, float]:
        started = time.process_time()
        affinity = torch.exp((z @ z.T - 1) / ETA).fill_diagonal_(0).numpy()
        scale = 1 / np.sqrt(affinity.sum(0))
        affinity *= scale
        affinity *= scale[:, None]
        shared = time.process_time() - started
        every, last = shared, 0.0
        for k in CANDIDATES:
            started = time.process_time()
            start = np.random.default_rng(0).standard_normal(len(z)).astype(np.float32)
            vectors = eigsh(affinity, k=k, which="LA", v0=start)[1]
            last = time.process_time() - started
            labels = KMeans(k, n_init=10, random_state=0).fit_predict(
                vectors / np.linalg.norm(vectors, axis=1, keepdims=True)
            )
            count, _, gram = coding_rate.statistics(z, torch.from_numpy(labels).long(), k)
            coding_rate.length_bits(count, gram, EPS_SQ).sum()
            took = time.process_time() - started
            every, shared = every + took, shared + took - last
        return every, shared + last

    return call


def curve() -> None:
    """Ours against plain spectral clustering."""
    title(f"{LANDMARKS} landmarks, d = {FEATURES}: the curve of {len(CANDIDATES)} candidate k")
    ours, plain = fresh(make_curve), fresh(make_plain_curve)
    every, once = plain.result
    line("graph, embedding, groups, tree", f"{ours.cpu_s:.1f} s, {ours.peak_mb:.0f} MB")
    line("dense affinity, eigenvectors for every k", f"{every:.1f} s, {plain.peak_mb:.0f} MB")
    line("the same with the eigenvectors of the largest k for all", f"{once:.1f} s")
    line("times faster", f"{every / ours.cpu_s:.1f}", "≥ 10", every >= 10 * ours.cpu_s)
    line("times faster than with the eigenvectors for all", f"{once / ours.cpu_s:.1f}")
    for landmarks in (LANDMARKS, 2 * LANDMARKS):
        cost = fresh(make_embedding, landmarks)
        found = f"{cost.peak_mb:.0f} MB, {cost.result / landmarks:.1f}"
        line(f"graph and embedding of {landmarks}: peak, edges per landmark", found)


def make_embedding(landmarks: int) -> Callable[[], int]:
    """Graph and embedding alone; gives the numbers that the graph holds."""
    z = mixture(landmarks, FEATURES, NOISE)

    def call() -> int:
        graph = spectral.shared_neighbours(spectral.neighbours(z, NEIGHBOURS))
        spectral.embedding(graph, COMPONENTS, seed=0)
        return int(graph.nnz)

    return call


def blocks(rows: int, width: int) -> Iterator[Tensor]:
    """Synthetic embeddings, made as they are asked for."""
    generator = torch.Generator().manual_seed(0)
    for start in range(0, rows, BLOCK_ROWS):
        yield torch.randn(min(BLOCK_ROWS, rows - start), width, generator=generator)


def assigned(network: Network, table: Tensor, x: Tensor) -> assignment.Assignment:
    """Embeddings (b, D) through the network and to the nearest of the prototypes, one a cluster."""
    prototypes = assignment.Prototypes(table, torch.arange(len(table)), ETA)
    return assignment.assign(network.features(x), prototypes, top=3)


def make_assigning(rows: int) -> Callable[[], Tensor]:
    """Sizes of the clusters of so many embeddings as they stream by, of a narrow network."""
    network = Network([256], 256, 64).eval()
    table = normalize(torch.randn(100, 64), dim=1)

    def call() -> Tensor:
        sizes = torch.zeros(len(table), dtype=torch.int64)
        for x in blocks(rows, 256):
            found = assigned(network, table, x)
            sizes += torch.bincount(found.cluster, minlength=len(table))
        return sizes

    return call


def assigning() -> None:
    """Rows a second beside the bare network's, and memory by the number of rows."""
    width, clusters = 512, 1000
    title(f"assignment: network {width} → {4 * width} → {FEATURES}, {clusters} clusters")
    network = Network([width], 4 * width, FEATURES).eval()
    table = normalize(torch.randn(clusters, FEATURES), dim=1)
    batches = list(blocks(BATCHES * BLOCK_ROWS, width))

    def bare() -> None:
        for x in batches:
            network.features(x)

    def both() -> None:
        for x in batches:
            assigned(network, table, x)

    alone, together = (BATCHES * BLOCK_ROWS / s for s in alternating([bare, both], 3))
    line("the network alone", f"{alone:.0f} rows/s")
    line("network and assignment", f"{together:.0f} rows/s")
    line("share of the bare pass", f"{together / alone:.2f}", "≥ 0.8", together >= 0.8 * alone)
    for rows in (10**5, 10**6, 10**7):
        cost = fresh(make_assigning, rows)
        found = f"{cost.peak_mb:.0f} MB, {cost.process_mb:.0f} MB"
        line(f"{rows} rows: growth of the peak; peak of the process", found)


def make_tree(rows: int, leaves: int) -> Callable[[], tuple[float, float, float]]:
    """Seconds of the statistics, of growing, of all lengths."""
    centres = mixture(leaves, FEATURES, 0.5)
    generator = torch.Generator().manual_seed(1)

    def call() -> tuple[float, float, float]:
        total, adding = coding_rate.no_statistics(leaves, FEATURES), 0.0
        for _ in range(0, rows, BLOCK_ROWS):
            labels = torch.randint(leaves, (BLOCK_ROWS,), generator=generator)
            noise = torch.randn(BLOCK_ROWS, FEATURES, generator=generator) / FEATURES**0.5
            z = normalize(centres[labels] + 0.5 * noise, dim=1)
            started = time.process_time()
            coding_rate.accumulate(total, z, labels)
            adding += time.process_time() - started
        started = time.process_time()
        merges = tree.grow(*total, EPS_SQ)
        grown = time.process_time()
        tree.lengths_bits(merges, total[0], total[2], EPS_SQ)
        return adding, grown - started, time.process_time() - grown

    return call


def growing() -> None:
    """The tree over all data."""
    rows, leaves = 10**6, 1000
    title(f"coding-length tree: {rows} samples, {leaves} groups, d = {FEATURES}")
    cost = fresh(make_tree, rows, leaves)
    for what, seconds in zip(("statistics", "merging", "lengths"), cost.result, strict=True):
        line(what, f"{seconds:.1f} s")
    took = sum(cost.result)
    line("all", f"{took:.1f} s, {cost.peak_mb:.0f} MB", "≤ 120 s", took <= 120)
