"""Assignment: shares, margins and outliers by hand."""

import math

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


def test_prototypes_are_mean_directions():
    table = assignment.prototypes(at(0, 20, 90), torch.tensor([1, 1, 0]), 2)
    torch.testing.assert_close(table, at(90, 10))


def test_shares_margins_and_outlier_scores_equal_a_loop():
    Z, table = unit(40, 5), unit(9, 5, seed=1)
    cluster_of = torch.tensor([0, 1, 2, 3, 0, 1, 2, 3, 0])
    a = assignment.assign(Z, table, cluster_of, ETA, top=4)
    for i, z in enumerate(Z):
        cosines = (table @ z).tolist()
        weights = [math.exp(c / ETA) for c in cosines]
        shares = [
            sum(w for w, c in zip(weights, cluster_of.tolist(), strict=True) if c == cluster)
            / sum(weights)
            for cluster in range(4)
        ]
        own = int(cluster_of[cosines.index(max(cosines))])
        others = sorted((c for c in range(4) if c != own), key=lambda c: -shares[c])
        assert a.cluster[i] == own
        assert a.confidence[i].item() == pytest.approx(shares[own])
        assert a.margin[i].item() == pytest.approx(shares[own] - shares[others[0]])
        assert a.outlier_score[i].item() == pytest.approx(1 - max(cosines))
        assert a.top_clusters[i].tolist() == [own, *others]
        assert a.top_shares[i].tolist() == pytest.approx([shares[c] for c in (own, *others)])
    torch.testing.assert_close(a.top_shares.sum(1), torch.ones(40, dtype=torch.float64))


def test_its_own_cluster_stands_first_even_where_its_share_is_smaller():
    """Nearest to the one prototype of cluster 0, but three of cluster 1 are nearly as near."""
    a = assignment.assign(at(0), at(9, -10, 10, -10.5), torch.tensor([0, 1, 1, 1]), ETA, top=3)
    assert a.cluster.tolist() == [0]
    assert a.top_clusters.tolist() == [[0, 1]]
    assert a.top_shares[0, 0] < a.top_shares[0, 1]
    assert a.confidence[0] == a.top_shares[0, 0]
    assert -1 < a.margin[0] < 0


def test_a_sample_between_two_prototypes_goes_to_the_first():
    Z, table = at(0), at(45, -45)
    assert assignment.nearest(Z, table[[0, 0, 1]]).tolist() == [0]
    a = assignment.assign(Z, table[[0, 0]], torch.tensor([1, 0]), ETA, top=2)
    assert a.cluster.tolist() == [1]
    assert a.confidence.tolist() == pytest.approx([0.5])
    assert a.margin.tolist() == pytest.approx([0])


def test_nearest_and_assign_agree():
    Z, table = unit(300, 6), unit(20, 6, seed=1)
    cluster_of = torch.arange(20) % 7
    cluster = assignment.assign(Z, table, cluster_of, ETA, top=3).cluster
    assert torch.equal(cluster, cluster_of[assignment.nearest(Z, table)])


def test_of_many_clusters_only_the_top_are_named():
    a = assignment.assign(unit(5, 4), unit(10, 4, seed=1), torch.arange(10), ETA, top=3)
    assert a.top_clusters.shape == a.top_shares.shape == (5, 3)
    assert (a.top_shares[:, 1] >= a.top_shares[:, 2]).all()


def test_a_single_cluster_takes_all():
    a = assignment.assign(at(0, 90, 180), at(0, 30), torch.tensor([0, 0]), ETA, top=3)
    assert a.cluster.tolist() == [0, 0, 0]
    assert a.confidence.tolist() == a.margin.tolist() == pytest.approx([1, 1, 1])
    assert a.outlier_score.tolist() == pytest.approx([0, 0.5, 1 + math.cos(math.pi / 6)])
    assert a.top_clusters.tolist() == [[0], [0], [0]]
