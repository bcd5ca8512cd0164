"""The cut of landmarks: it finds subspaces and blobs, numbers them by size, refuses too many."""

import numpy as np
import pytest
import torch
from sklearn.metrics import adjusted_rand_score

from pipeline.mcr2 import assignment, cut, spectral
from tests import subspaces


def test_cut_finds_the_subspaces_and_numbers_them_by_size():
    x, truth = subspaces.union(4, 3, 60)
    kept = (truth > 0) | (np.arange(len(x)) % 2 == 0)  # cluster 0 of the truth is half as large
    z = torch.from_numpy(x[kept]).float()
    prototypes = cut.cut(z, 4, 0)
    labels = prototypes.nearest(z)
    assert adjusted_rand_score(truth[kept], labels) == 1
    sizes = torch.bincount(labels)
    assert (sizes[:-1] >= sizes[1:]).all()
    assert assignment.assign(z, prototypes, 1).confidence.mean() > 0.99  # as their neighbours do


def test_subspaces_that_no_prototype_can_hold_are_cut_along_the_graph():
    """Of 3 dimensions each, antipodes and all, seen through much noise: k-means finds nothing."""
    rng = np.random.default_rng(0)
    bases = [np.linalg.qr(rng.normal(size=(16, 3)))[0] for _ in range(4)]
    x = np.concatenate([rng.normal(size=(250, 3)) @ basis.T for basis in bases])
    x += 0.1 * rng.normal(size=x.shape)
    z = torch.from_numpy(x / np.linalg.norm(x, axis=1, keepdims=True)).float()
    truth = np.repeat(np.arange(4), 250)
    prototypes = cut.cut(z, 4, 0)
    assert prototypes.k == 4 and 32 <= len(prototypes.table) <= 4 * (1000 // (4 * cut.PART_ROWS))
    assert (prototypes.cluster_of.diff() >= 0).all()
    assert adjusted_rand_score(truth, prototypes.nearest(z)) > 0.9
    alone = spectral.kmeans(z.numpy(), 4, 10, 0)
    assert adjusted_rand_score(truth, alone) < 0.5


@pytest.mark.parametrize("k", [1, 2, 30])
def test_cut_of_any_k(k):
    z = torch.from_numpy(subspaces.union(3, 4, 10)[0]).float()
    prototypes = cut.cut(z, k, 0)
    assert prototypes.k == k
    assert len(prototypes.nearest(z).unique()) == k


def test_cut_of_equal_samples_into_more_is_refused():
    z = torch.eye(4)[0].repeat(30, 1)
    assert cut.cut(z, 1, 0).table.shape == (1, 4)
    with pytest.raises(ValueError, match="3 clusters"):
        cut.cut(z, 3, 0)


def test_an_outlier_is_no_prototype_of_its_own():
    """Three rows far from all others, in clusters of many parts, are not the most typical."""
    generator = torch.Generator().manual_seed(0)
    z = torch.eye(12)[:2].repeat(600, 1) + 0.05 * torch.randn(1200, 12, generator=generator)
    odd = torch.eye(12)[0] + 3 * torch.eye(12)[9:]
    z = torch.nn.functional.normalize(torch.cat([z, odd]), dim=1)
    scores = assignment.assign(z, cut.cut(z, 2, 0), 1).outlier_score
    assert set(scores.topk(3).indices.tolist()) == {1200, 1201, 1202}
