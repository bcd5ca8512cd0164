"""Assignment: shares, margins and outliers by hand."""

import math

import numpy as np
import pytest
import torch
from torch.nn.functional import normalize

from pipeline.mcr2 import assignment

ETA = 0.1


def unit(n, d, seed=0):
    generator = torch.Generator().manual_seed(seed)
    return normalize(torch.randn(n, d, generator=generator, dtype=torch.float64), dim=1)


def at(*degrees):
    angles = torch.tensor(degrees, dtype=torch.float64) * math.pi / 180
    return torch.stack([angles.cos(), angles.sin()], dim=1)


def one_each(table, eta=ETA):
    """A prototype per cluster."""
    return assignment.Prototypes(table, torch.arange(len(table)), eta)


def test_directions_are_means():
    table = assignment.mean_directions(at(0, 20, 90), torch.tensor([1, 1, 0]), 2)
    torch.testing.assert_close(table, at(90, 10))


def test_shares_margins_and_outlier_scores_equal_a_loop():
    Z, table = unit(40, 5), unit(9, 5, seed=1)
    a = assignment.assign(Z, one_each(table), top=4)
    for i, z in enumerate(Z):
        cosines = (table @ z).tolist()
        weights = [math.exp(c / ETA) for c in cosines]
        shares = [w / sum(weights) for w in weights]
        ranked = sorted(range(9), key=lambda c: -shares[c])
        assert a.cluster[i] == ranked[0] == cosines.index(max(cosines))
        assert a.confidence[i].item() == pytest.approx(shares[ranked[0]])
        assert a.margin[i].item() == pytest.approx(shares[ranked[0]] - shares[ranked[1]])
        assert a.outlier_score[i].item() == pytest.approx(1 - max(cosines))
        assert a.top_clusters[i].tolist() == ranked[:4]
        assert a.top_shares[i].tolist() == pytest.approx([shares[c] for c in ranked[:4]])


def test_a_sample_between_two_prototypes_goes_to_one_with_half_its_confidence():
    a = assignment.assign(at(0), one_each(at(45, -45)), top=2)
    assert a.confidence.tolist() == pytest.approx([0.5])
    assert a.margin.tolist() == pytest.approx([0])
    assert assignment.nearest(at(0), at(0, 0, 45)).tolist() == [0]


def test_nearest_and_assign_agree():
    Z, table = unit(300, 6), unit(20, 6, seed=1)
    for prototypes in (one_each(table), assignment.Prototypes(table, torch.arange(20) // 3, ETA)):
        cluster = assignment.assign(Z, prototypes, 3).cluster
        assert torch.equal(cluster, prototypes.nearest(Z))
        assert torch.equal(cluster, prototypes.cluster_of[assignment.nearest(Z, table)])


def test_a_cluster_is_as_near_as_its_nearest_prototype():
    prototypes = assignment.Prototypes(at(0, 100, 50), torch.tensor([0, 0, 1]), ETA)
    assert prototypes.k == 2
    expected = torch.cat([at(0) @ at(0).T, at(0) @ at(50).T], dim=1)
    torch.testing.assert_close(prototypes.similarity(at(0)), expected)
    a = assignment.assign(at(0, 90, 49), prototypes, top=3)
    assert a.cluster.tolist() == [0, 0, 1]
    assert a.outlier_score.tolist() == pytest.approx(
        [1 - math.cos(t * math.pi / 180) for t in (0, 10, 1)]
    )
    shares = torch.softmax(prototypes.similarity(at(0, 90, 49)) / ETA, dim=1)
    torch.testing.assert_close(a.confidence, shares.amax(1))
    assert a.top_shares.shape == (3, 2)


def test_of_many_clusters_only_the_top_are_named():
    a = assignment.assign(unit(5, 4), one_each(unit(10, 4, seed=1)), top=3)
    assert a.top_clusters.shape == a.top_shares.shape == (5, 3)
    assert (a.top_shares[:, :-1] >= a.top_shares[:, 1:]).all()


def test_a_single_cluster_takes_all():
    a = assignment.assign(at(0, 90, 180), one_each(at(0)), top=3)
    assert a.cluster.tolist() == [0, 0, 0]
    assert a.confidence.tolist() == a.margin.tolist() == pytest.approx([1, 1, 1])
    assert a.outlier_score.tolist() == pytest.approx([0, 1, 2])
    assert a.top_clusters.tolist() == [[0], [0], [0]]


@pytest.mark.parametrize("agreement", [0.3, 0.6, 0.9])
def test_calibrated_confidence_is_the_agreement_of_neighbours(agreement):
    Z, table = unit(500, 6), unit(10, 6, seed=1)
    eta = assignment.calibrate_eta(Z @ table.T, agreement)
    mean = assignment.assign(Z, one_each(table, eta), 1).confidence.mean().item()
    assert mean == pytest.approx(agreement, abs=1e-3)


@pytest.mark.parametrize(("agreement", "eta"), [(0.0, "ETA_MOST"), (1.0, "ETA_LEAST")])
def test_an_agreement_out_of_reach_gives_the_nearest_eta(agreement, eta):
    found = assignment.calibrate_eta(unit(50, 6) @ unit(10, 6, seed=1).T, agreement)
    assert found == pytest.approx(getattr(assignment, eta), rel=0.5)


def test_nearest_clusters_are_by_cosine():
    vectors = np.array([[1, 0], [-0.96, 0.28], [0.8, 0.6], [-1, 0]])  # the first two of one cluster
    clusters = np.array([0, 0, 1, 2])
    assert assignment.nearest_clusters(vectors, clusters, 3) == [[2, 1], [0, 2], [0, 1]]
    assert assignment.nearest_clusters(vectors, clusters, 1) == [[2], [0], [0]]
    assert assignment.nearest_clusters(vectors[:2], clusters[:2], 3) == [[]]
