"""The neighbour graph against brute force; the embedding against what eigenvectors must be."""

import numpy as np
import pytest
import scipy.sparse as sp
import torch
from sklearn.metrics import adjusted_rand_score
from torch.nn.functional import normalize

from pipeline.mcr2 import spectral


def unit(m, d, seed=0):
    return normalize(torch.randn(m, d, generator=torch.Generator().manual_seed(seed)), dim=1)


def blobs(k, each, seed=0):
    """k tight groups about orthogonal directions, and their labels, in a random order."""
    centres = torch.eye(k + 3)[:k].repeat_interleave(each, dim=0)
    Z = normalize(centres + 0.1 * unit(k * each, k + 3, seed), dim=1)
    order = torch.randperm(k * each, generator=torch.Generator().manual_seed(seed + 1))
    return Z[order], torch.arange(k).repeat_interleave(each)[order].numpy()


@pytest.mark.parametrize("rows", [5, 16, 1000])
def test_neighbours_equal_brute_force(monkeypatch, rows):
    monkeypatch.setattr(spectral, "BLOCK_ROWS", rows)
    Z = unit(37, 5)
    index = spectral.neighbours(Z, 4)
    cosines = (Z.double() @ Z.double().T).numpy()
    np.fill_diagonal(cosines, -np.inf)
    expected = np.argsort(-cosines, axis=1)[:, :4]
    np.testing.assert_array_equal(index.numpy(), expected)


def graph_of(Z, q):
    return spectral.shared_neighbours(spectral.neighbours(Z, q))


def test_the_graph_has_the_jaccard_similarity_of_neighbour_lists():
    Z, q = unit(30, 4), 3
    index = spectral.neighbours(Z, q).tolist()
    lists = [{i, *row} for i, row in enumerate(index)]
    expected = np.zeros((30, 30))
    for i, row in enumerate(index):
        for j in row:
            share = len(lists[i] & lists[j]) / len(lists[i] | lists[j])
            expected[i, j] = expected[j, i] = share
    graph = graph_of(Z, q)
    np.testing.assert_allclose(graph.toarray(), expected)
    assert (graph != graph.T).nnz == 0 and (np.asarray(graph.sum(axis=1)) > 0).all()


def test_pairs_count_both_directions():
    index = torch.tensor([[1], [0], [1]])
    np.testing.assert_array_equal(
        spectral.pairs(index).toarray(), [[0, 2, 0], [2, 0, 1], [0, 1, 0]]
    )


@pytest.mark.parametrize("dense_rows", [1000, 0], ids=["dense", "sparse"])
def test_disconnected_blobs_are_recovered(monkeypatch, dense_rows):
    monkeypatch.setattr(spectral, "DENSE_ROWS", dense_rows)
    Z, truth = blobs(5, 40)
    graph = graph_of(Z, 8)
    assert sp.csgraph.connected_components(graph)[0] == 5
    vectors = spectral.embedding(graph, 5, 0)
    same = truth[:, None] == truth[None, :]
    # leading eigenspace = span of the components' indicators: rows equal within, orthogonal between
    np.testing.assert_allclose(vectors @ vectors.T, same, atol=1e-6)
    assert adjusted_rand_score(truth, spectral.over_segment(vectors, 5, 0)) == 1


def test_dense_and_sparse_span_the_same_space(monkeypatch):
    graph = graph_of(unit(120, 3), 6)
    dense = spectral.embedding(graph, 6, 0)
    monkeypatch.setattr(spectral, "DENSE_ROWS", 0)
    sparse = spectral.embedding(graph, 6, 0)
    np.testing.assert_allclose(dense @ dense.T, sparse @ sparse.T, atol=1e-6)
    np.testing.assert_allclose(np.linalg.norm(sparse, axis=1), 1, rtol=1e-12)


def test_embedding_is_of_the_leading_eigenvectors():
    graph = graph_of(unit(60, 3), 6)
    dense = graph.toarray()
    scale = 1 / np.sqrt(dense.sum(1))
    values, vectors = np.linalg.eigh(scale[:, None] * dense * scale)
    leading = vectors[:, np.argsort(-values)[:4]]
    expected = leading / np.linalg.norm(leading, axis=1, keepdims=True)
    found = spectral.embedding(graph, 4, 0)
    np.testing.assert_allclose(np.abs(found), np.abs(expected), atol=1e-8)


@pytest.mark.parametrize("dense_rows", [1000, 0], ids=["dense", "sparse"])
def test_the_same_seed_gives_the_same_bits(monkeypatch, dense_rows):
    monkeypatch.setattr(spectral, "DENSE_ROWS", dense_rows)
    graph = graph_of(unit(150, 4), 6)
    a, b = (spectral.embedding(graph, 5, 7) for _ in range(2))
    np.testing.assert_array_equal(a, b)
    np.testing.assert_array_equal(spectral.over_segment(a, 12, 3), spectral.over_segment(b, 12, 3))


def test_over_segment_gives_as_many_groups_as_asked():
    groups = spectral.over_segment(np.random.default_rng(0).normal(size=(100, 4)), 12, 0)
    assert sorted(set(groups)) == list(range(12))
    assert groups.dtype == np.int64


def test_information_equals_its_formula_and_its_limits():
    labels = np.array([0, 0, 0, 1, 1, 2])
    index = torch.tensor([[1, 2], [0, 2], [0, 3], [4, 2], [3, 5], [4, 3]])
    joint = np.zeros((3, 3))
    for i, row in enumerate(index.tolist()):
        for j in row:
            joint[labels[i], labels[j]] += 0.5 / index.numel()
            joint[labels[j], labels[i]] += 0.5 / index.numel()
    p = joint.sum(0)
    cells = [(a, b) for a in range(3) for b in range(3) if joint[a, b]]
    expected = sum(joint[a, b] * np.log(joint[a, b] / (p[a] * p[b])) for a, b in cells)
    assert spectral.information(labels, index) == pytest.approx(expected)
    assert spectral.information(np.zeros(6, dtype=np.int64), index) == pytest.approx(0)

    Z, truth = blobs(5, 40)
    near = spectral.neighbours(Z, 8)
    assert spectral.information(truth, near) == pytest.approx(np.log(5))  # nobody is parted
    shuffled = np.random.default_rng(0).permutation(truth)
    assert spectral.information(shuffled, near) < 0.05


def test_information_asks_for_even_clusters():
    Z, truth = blobs(4, 30)
    near = spectral.neighbours(Z, 8)
    even, uneven = truth // 2, np.minimum(truth, 1)  # 60 + 60, 30 + 90
    assert spectral.information(even, near) > spectral.information(uneven, near)


def test_smoothing_draws_neighbours_together_and_centres():
    Z, truth = blobs(4, 30)
    Z = normalize(
        Z + 0.15 * torch.randn(Z.shape, generator=torch.Generator().manual_seed(3)), dim=1
    )
    rows = spectral.smooth(Z, graph_of(Z, 8))
    np.testing.assert_allclose(np.linalg.norm(rows, axis=1), 1, rtol=1e-6)

    def within(x):
        x = x - x.mean(0)
        return sum(x[truth == c].var(0).sum() for c in range(4)) / x.var(0).sum()

    assert within(rows) < within(Z.double().numpy()) / 2


def test_smoothing_of_equal_rows_is_zero():
    Z = torch.eye(3)[0].repeat(12, 1)
    np.testing.assert_array_equal(spectral.smooth(Z, graph_of(Z, 4)), 0)


@pytest.mark.parametrize("k", [1, 3, 5, 200])
def test_partition_follows_the_blobs(k):
    Z, truth = blobs(5, 40)
    index = spectral.neighbours(Z, 8)
    rows = spectral.smooth(Z, graph_of(Z, 8))
    labels = spectral.partition(rows, index, k, 0)
    assert labels.shape == (200,) and set(labels) == set(range(labels.max() + 1))
    assert labels.max() + 1 == min(k, 200)
    if k <= 5:
        assert len(set(zip(truth.tolist(), labels.tolist(), strict=True))) == 5
    np.testing.assert_array_equal(labels, spectral.partition(rows, index, k, 0))


def test_partition_is_the_best_kmeans_refined(monkeypatch):
    Z = unit(300, 4)
    index = spectral.neighbours(Z, 8)
    rows = spectral.smooth(Z, graph_of(Z, 8))
    found = spectral.partition(rows, index, 7, 0)
    best = spectral.kmeans(rows, 7, spectral.restarts(7), 0)
    assert spectral.information(found, index) >= spectral.information(best, index)
    assert adjusted_rand_score(found, spectral.refine(best, index)) == 1


def test_restarts_are_fewer_for_more_clusters():
    assert [spectral.restarts(k) for k in (1, 10, 30, 1000)] == [30, 30, 10, 3]


def test_refining_repairs_labels_and_keeps_the_best_it_has_seen():
    Z, truth = blobs(5, 40)
    index = spectral.neighbours(Z, 8)
    wrong = truth.copy()
    wrong[::7] = (truth[::7] + 1) % 5
    assert adjusted_rand_score(truth, spectral.refine(wrong, index)) == 1
    np.testing.assert_array_equal(spectral.refine(truth, index), truth)
    noise = np.random.default_rng(0).integers(0, 5, len(Z))
    refined = spectral.refine(noise, index)
    assert spectral.information(refined, index) >= spectral.information(noise, index)


def test_information_counts_samples_as_often_as_given():
    Z, truth = blobs(4, 30)
    labels = np.where(np.arange(len(Z)) % 5 == 0, 0, truth)
    index = spectral.neighbours(Z, 8)
    ones = np.ones(len(Z), np.int64)
    assert spectral.information(labels, index, ones) == pytest.approx(
        spectral.information(labels, index)
    )
    assert spectral.information(labels, index, 3 * ones) == pytest.approx(
        spectral.information(labels, index)
    )
    half = (labels == truth).astype(int)
    assert spectral.information(labels, index, half) != pytest.approx(
        spectral.information(labels, index)
    )


@pytest.mark.parametrize("dense_rows", [1000, 10])
def test_every_connected_component_has_its_eigenvectors(monkeypatch, dense_rows):
    monkeypatch.setattr(spectral, "DENSE_ROWS", dense_rows)
    Z, truth = blobs(6, 50)
    graph = graph_of(Z, 5)
    edges = graph.tocoo()
    assert (truth[edges.row] == truth[edges.col]).all()  # six components at least
    vectors = spectral.embedding(graph, 6, 0)
    index = spectral.neighbours(Z, 5)
    labels = spectral.partition(vectors, index, 6, 0)
    assert adjusted_rand_score(truth, labels) == 1


def test_parts_are_of_one_cluster_each_and_more_in_the_larger():
    Z, truth = blobs(4, 40)
    labels = np.where(truth < 3, 0, 1)  # 120 and 40
    parts = spectral.split_clusters(Z, labels, 4, 0)
    pairs = sorted(set(zip(labels.tolist(), parts.tolist(), strict=True)))
    assert pairs == [(0, part) for part in range(6)] + [(1, 6), (1, 7)]
    np.testing.assert_array_equal(parts, spectral.split_clusters(Z, labels, 4, 0))


def test_modularity_equals_its_formula():
    graph = graph_of(unit(30, 4), 3)
    labels = np.random.default_rng(0).integers(0, 3, 30)
    dense, same = graph.toarray(), labels[:, None] == labels[None, :]
    degree, total = dense.sum(1), dense.sum()
    expected = ((dense - np.outer(degree, degree) / total) * same).sum() / total
    assert spectral.modularity(labels, graph) == pytest.approx(expected)
    assert spectral.modularity(np.zeros(30, np.int64), graph) == pytest.approx(0)
