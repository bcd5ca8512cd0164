"""Merging by coding length: the true k on separated subspaces, and bits that add up."""

import itertools

import numpy as np
import pytest
import torch
from sklearn.metrics import adjusted_rand_score
from torch.nn.functional import normalize

from pipeline.mcr2 import coding_rate, tree

EPS_SQ = 0.1


def subspaces(k, dim, each, seed=0):
    """Rows of k orthogonal subspaces of `dim` dimensions, with a mean of their own; labels."""
    generator = torch.Generator().manual_seed(seed)
    Z = torch.zeros(k * each, k * dim, dtype=torch.float64)
    for c in range(k):
        rows = torch.randn(each, dim, generator=generator, dtype=torch.float64)
        rows[:, 0] += 2
        Z[c * each : (c + 1) * each, c * dim : (c + 1) * dim] = rows
    return normalize(Z, dim=1), torch.arange(k).repeat_interleave(each)


def leaves_of(labels, per_cluster, seed=0):
    """Every cluster cut at random into leaves, numbered in a random order."""
    rng = np.random.default_rng(seed)
    leaf = labels.numpy() * per_cluster + rng.integers(0, per_cluster, len(labels))
    _, leaf = np.unique(leaf, return_inverse=True)
    return torch.from_numpy(rng.permutation(leaf.max() + 1)[leaf])


def from_scratch(Z, labels, eps_sq=EPS_SQ):
    """L(X, cut) from the samples, in numpy."""
    Z, labels = np.asarray(Z), np.asarray(labels)
    total = 0.0
    for c in np.unique(labels):
        X = Z[labels == c]
        n, d = X.shape
        total += (n + d) / 2 * np.log2(1 + d / (n * eps_sq) * np.linalg.eigvalsh(X.T @ X)).sum()
        total -= n * np.log2(n / len(Z))
    return total


@pytest.fixture
def grown():
    Z, truth = subspaces(4, 3, 60)
    leaf = leaves_of(truth, 5)
    stats = coding_rate.statistics(Z, leaf, int(leaf.max()) + 1)
    return Z, truth, leaf, stats, tree.grow(*stats, EPS_SQ)


def test_separated_subspaces_are_recovered_and_saving_stops_at_the_true_k(grown):
    _, truth, leaf, stats, merges = grown
    leaves = len(stats[0])
    assert len(merges) == leaves - 1
    saved = [merge.bits_saved for merge in merges]
    assert all(bits > 0 for bits in saved[: leaves - 4])
    assert all(bits < 0 for bits in saved[leaves - 4 :])
    clusters = torch.tensor(tree.cut(merges, leaves, 4))[leaf]
    assert adjusted_rand_score(truth, clusters) == 1
    curve = tree.lengths_bits(merges, stats[0], stats[2], EPS_SQ)
    assert int(curve.argmin()) + 1 == 4


def test_the_curve_is_the_length_of_every_cut_from_scratch(grown):
    Z, _, leaf, (count, _, gram), merges = grown
    curve = tree.lengths_bits(merges, count, gram, EPS_SQ)
    assert len(curve) == len(count)
    for k in range(1, len(count) + 1):
        labels = torch.tensor(tree.cut(merges, len(count), k))[leaf]
        assert curve[k - 1].item() == pytest.approx(from_scratch(Z, labels), rel=1e-10)


def test_bits_saved_are_the_steps_of_the_curve(grown):
    *_, (count, _, gram), merges = grown
    curve = tree.lengths_bits(merges, count, gram, EPS_SQ)
    saved = torch.tensor([merge.bits_saved for merge in merges], dtype=torch.float64)
    torch.testing.assert_close(curve.diff().flip(0), saved, rtol=0, atol=1e-7)


def test_the_curve_of_a_resample_of_the_same_leaves(grown):
    Z, _, leaf, (count, _, _), merges = grown
    rows = torch.randint(len(Z), (len(Z),), generator=torch.Generator().manual_seed(5))
    rows = rows[leaf[rows] != 0]  # one leaf left without samples
    more = coding_rate.statistics(Z[rows], leaf[rows], len(count))
    curve = tree.lengths_bits(merges, more[0], more[2], EPS_SQ)
    for k in (1, 4, len(count)):
        labels = torch.tensor(tree.cut(merges, len(count), k))[leaf[rows]]
        assert curve[k - 1].item() == pytest.approx(from_scratch(Z[rows], labels), rel=1e-10)


def test_growing_and_measuring_leave_the_statistics_alone(grown):
    Z, _, leaf, stats, merges = grown
    tree.lengths_bits(merges, stats[0], stats[2], EPS_SQ)
    for a, b in zip(stats, coding_rate.statistics(Z, leaf, len(stats[0])), strict=True):
        assert torch.equal(a, b)


def test_cuts_are_nested_and_named_by_first_leaf(grown):
    *_, (count, _, _), merges = grown
    cuts = [tree.cut(merges, len(count), k) for k in range(1, len(count) + 1)]
    for k, cut in enumerate(cuts, start=1):
        assert list(dict.fromkeys(cut)) == list(range(k))  # all k names, in order of appearance
    for coarse, fine in itertools.pairwise(cuts):
        assert len(set(zip(fine, coarse, strict=True))) == len(set(fine))


def test_every_step_takes_the_pair_that_saves_most(grown):
    Z, _, leaf, (count, _, _), merges = grown
    labels = leaf.clone()
    for merge in merges[:6]:
        here = from_scratch(Z, labels)
        alive = sorted(set(labels.tolist()))
        best = max(
            here - from_scratch(Z, torch.where(labels == b, a, labels))
            for i, a in enumerate(alive)
            for b in alive[i + 1 :]
        )
        assert merge.bits_saved == pytest.approx(best, rel=1e-8)
        labels[labels == merge.merged] = merge.kept
    assert len(set(labels.tolist())) == len(count) - 6


def test_near_candidates_give_the_merges_of_all_pairs(grown):
    *_, stats, merges = grown
    near = tree.grow(*stats, EPS_SQ, near=4)
    assert [(m.kept, m.merged) for m in near[:-3]] == [(m.kept, m.merged) for m in merges[:-3]]
    assert len(near) == len(merges)


@pytest.mark.parametrize("near", [1, 2])
def test_few_candidates_still_give_a_whole_tree(grown, near):
    *_, stats, _ = grown
    merges = tree.grow(*stats, EPS_SQ, near=near)
    assert len({m.merged for m in merges}) == len(stats[0]) - 1
    assert all(m.kept < m.merged for m in merges)
    assert tree.cut(merges, len(stats[0]), 1) == [0] * len(stats[0])


def test_blocks_of_pairs_change_nothing(grown, monkeypatch):
    *_, stats, merges = grown
    monkeypatch.setattr(tree, "BLOCK", 3)
    again = tree.grow(*stats, EPS_SQ)
    assert [(m.kept, m.merged) for m in again] == [(m.kept, m.merged) for m in merges]
    assert [m.bits_saved for m in again] == pytest.approx([m.bits_saved for m in merges])


def test_a_single_leaf():
    stats = coding_rate.statistics(subspaces(1, 3, 10)[0], torch.zeros(10, dtype=torch.int64), 1)
    assert tree.grow(*stats, EPS_SQ) == []
    assert tree.cut([], 1, 1) == [0]
    curve = tree.lengths_bits([], stats[0], stats[2], EPS_SQ)
    assert curve.item() == pytest.approx(from_scratch(subspaces(1, 3, 10)[0], np.zeros(10)))


def test_equal_leaves_merge_before_all_others():
    """Pairs of leaves with the same statistics: names are all that divides them."""
    Z, _ = subspaces(3, 2, 20)
    Z, leaf = (
        torch.cat([Z, Z]),
        torch.cat([torch.arange(3), torch.arange(3, 6)]).repeat_interleave(20),
    )
    stats = coding_rate.statistics(Z, leaf, 6)
    merges = tree.grow(*stats, EPS_SQ)
    assert sorted((m.kept, m.merged) for m in merges[:3]) == [(0, 3), (1, 4), (2, 5)]
    assert all(m.bits_saved >= 40 for m in merges[:3])  # a bit for each of the names, at least
    assert merges == tree.grow(*stats, EPS_SQ)
