"""Classes against clusters, and accuracy by confidence."""

import numpy as np

from pipeline.evaluate import confusion


def test_counts_of_every_pair_sorted_so_that_agreement_is_a_diagonal():
    truth = np.array(["b", "a", "a", "c", "b", "a", "b", "b"], dtype=object)
    clusters = np.array([7, 2, 2, 5, 7, 7, 7, 5])
    found = confusion.counts(truth, clusters)
    assert found["classes"] == ["b", "a", "c"]
    assert found["clusters"] == [7, 5, 2]
    assert found["counts"] == [[3, 1, 0], [1, 0, 2], [0, 1, 0]]
    assert found["shown"] == len(truth)


def test_only_the_largest_are_kept(monkeypatch):
    monkeypatch.setattr(confusion, "CLASSES", 2)
    monkeypatch.setattr(confusion, "CLUSTERS", 1)
    truth, clusters = np.array(["a"] * 3 + ["b"] * 2 + ["c"]), np.array([0, 0, 0, 0, 1, 1])
    found = confusion.counts(truth, clusters)
    assert (found["classes"], found["clusters"]) == (["a", "b"], [0])
    assert (found["counts"], found["shown"]) == ([[3], [1]], 4)


def test_tenths_by_confidence_are_as_right_as_their_samples():
    n = 200
    confidence = np.random.default_rng(0).permutation(n) / n
    clusters = np.zeros(n, dtype=int)
    truth = np.where(confidence < 0.2, "wrong", "right").astype(object)  # the commonest is "right"
    found = confusion.by_confidence(truth, clusters, confidence)
    assert [row["samples"] for row in found] == [20] * 10
    assert [row["right"] for row in found] == [0, 0] + [1] * 8
    expected = (np.arange(10) + 0.5) / 10 - 0.5 / n
    np.testing.assert_allclose([row["confidence"] for row in found], expected, atol=1e-6)


def test_fewer_samples_than_tenths():
    found = confusion.by_confidence(np.array(["a", "b"]), np.array([0, 1]), np.array([0.5, 0.4]))
    assert [row["samples"] for row in found] == [1, 1]
