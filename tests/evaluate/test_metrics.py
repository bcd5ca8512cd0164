"""Metrics: values worked out by hand, names that do not matter, and matching by brute force."""

from itertools import permutations

import numpy as np
import pytest

from pipeline.evaluate import metrics


def brute_force(truth, predicted) -> float:
    """The best of all one-to-one matchings."""
    classes, clusters = sorted(set(truth)), sorted(set(predicted))
    names = classes + [None] * max(0, len(clusters) - len(classes))
    return max(
        np.mean([dict(zip(clusters, order, strict=False)).get(p) == t for t, p in pairs])
        for pairs in [list(zip(truth, predicted, strict=True))]
        for order in permutations(names, len(clusters))
    )


def test_scores_by_hand():
    truth = ["a", "a", "a", "b", "b", "b"]
    predicted = [0, 0, 1, 1, 1, 1]
    # Table [[2, 1], [0, 3]]. Pairs together in both: 1 + 0 + 0 + 3 = 4; in truth 3 + 3 = 6; in
    # clusters 1 + 6 = 7; of 15; expected 6 · 7 / 15 = 2.8; ARI = (4 − 2.8) / (6.5 − 2.8).
    mutual = 2 / 6 * np.log(2) + 1 / 6 * np.log(0.5) + 3 / 6 * np.log(1.5)
    entropies = np.log(2), -(2 / 6 * np.log(2 / 6) + 4 / 6 * np.log(4 / 6))
    assert metrics.scores(truth, predicted) == pytest.approx(
        {"acc": 5 / 6, "nmi": mutual / np.mean(entropies), "ari": 1.2 / 3.7}
    )


def test_perfect_and_worthless():
    truth = np.repeat(["x", "y", "z"], 4)
    assert metrics.scores(truth, np.repeat([7, 3, 5], 4)) == {"acc": 1, "nmi": 1, "ari": 1}
    alone = metrics.scores(truth, np.zeros(12, int))
    assert alone == pytest.approx({"acc": 1 / 3, "nmi": 0, "ari": 0})


@pytest.mark.parametrize(("classes", "clusters"), [(3, 3), (2, 5), (5, 2), (4, 4), (1, 3), (3, 1)])
def test_accuracy_is_the_best_matching(classes, clusters):
    rng = np.random.default_rng(classes * 10 + clusters)
    truth, predicted = rng.integers(classes, size=40), rng.integers(clusters, size=40)
    expected = brute_force(truth.tolist(), predicted.tolist())
    assert metrics.accuracy(truth, predicted) == pytest.approx(expected)


def test_names_do_not_matter():
    rng = np.random.default_rng(0)
    truth, predicted = rng.integers(5, size=200), rng.integers(7, size=200)
    renamed = np.array([f"class {(3 * t) % 5}" for t in truth], dtype=object)
    moved = rng.permutation(7)[predicted] - 100
    order = rng.permutation(200)
    assert metrics.scores(renamed[order], moved[order]) == pytest.approx(
        metrics.scores(truth, predicted)
    )


def test_nothing_to_compare_is_refused():
    for truth, predicted in ([], []), ([1], [1, 2]):
        with pytest.raises(ValueError, match="give one of each"):
            metrics.scores(truth, predicted)
