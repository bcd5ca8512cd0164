"""Levels: nested, numbered by size, where the groups of the data are."""

import itertools

import numpy as np
import torch
from sklearn.metrics import adjusted_rand_score

from pipeline.mcr2 import coding_rate, cut, levels, tree

EPS_SQ = 0.1


def blobs(seed: int = 0) -> tuple[torch.Tensor, np.ndarray]:
    """z (m, d) of 4 kinds with 5 sorts of 4 varieties each, unit rows; their numbers (m, 3)."""
    rng, rows, truth = np.random.default_rng(seed), [], []
    for kind in range(4):
        of_kind = 4 * np.eye(32)[kind]
        for sort in range(5):
            of_sort = of_kind + 1.5 * np.eye(32)[4 + 5 * kind + sort]
            for variety in range(4):
                own = rng.normal(size=32)
                mean = of_sort + 0.8 * own / np.linalg.norm(own)
                count = 14 + sort
                rows.append(mean + 0.03 * rng.normal(size=(count, 32)))
                truth += [(kind, 5 * kind + sort, 20 * kind + 4 * sort + variety)] * count
    z = torch.from_numpy(np.concatenate(rows)).float()
    return torch.nn.functional.normalize(z, dim=1), np.array(truth)


def marks_of(z: torch.Tensor, k: int) -> levels.Landmarks:
    return levels.Landmarks.of(z, cut.cut(z, k, 0), cut.neighbours(z))


def found_in(marks: levels.Landmarks) -> tuple[levels.Groups, np.ndarray, np.ndarray]:
    """The groups, the levels, and the group of each landmark."""
    groups = levels.split(marks, 500, 0)
    own = groups.nearest(marks.z, marks.clusters)
    sizes = torch.bincount(own, minlength=len(groups.table)).double()
    stats = coding_rate.statistics(marks.z, marks.clusters, groups.k)
    return groups, levels.find(marks, groups, tree.grow(*stats, EPS_SQ), sizes, EPS_SQ), own.numpy()


def test_levels_are_the_kinds_the_sorts_and_the_varieties():
    z, truth = blobs()
    groups, found, own = found_in(marks_of(z, 20))
    assert (found.max(axis=1) + 1).tolist()[:2] == [4, 20]
    for level, numbers in zip(found, truth.T, strict=False):
        assert adjusted_rand_score(numbers, level[own]) > (1 - 1e-9 if level.max() < 20 else 0.7)
    assert groups.k == 20 and (found[1] == groups.cluster_of.numpy()).all()


def test_levels_are_nested_and_their_largest_cluster_is_the_first():
    z, _ = blobs(1)
    _, found, own = found_in(marks_of(z, 20))
    for coarse, fine in itertools.pairwise(found):
        assert len(set(zip(coarse, fine, strict=True))) == fine.max() + 1 > coarse.max() + 1
    for level in found:
        sizes = np.bincount(level[own])
        assert (sizes[:-1] >= sizes[1:]).all()


def test_a_group_is_of_the_cluster_of_its_members_and_none_is_empty():
    z, _ = blobs()
    marks = marks_of(z, 7)
    groups = levels.split(marks, 500, 0)
    own = groups.nearest(z, marks.clusters)
    assert torch.equal(groups.cluster_of[own], marks.clusters)
    assert own.unique().tolist() == list(range(len(groups.table)))
    assert len(levels.split(marks, 7, 0).table) == 7  # no more groups than asked for


def test_few_samples_have_one_level():
    z, _ = blobs()
    groups, found, _ = found_in(marks_of(z[:40], 2))
    assert found.tolist() == [groups.cluster_of.tolist()]


def test_a_resample_has_as_many_of_each_cluster():
    z, _ = blobs()
    marks = marks_of(z, 20)
    drawn = marks.resample(np.random.default_rng(0))
    assert torch.equal(drawn.clusters, marks.clusters)
    assert len(drawn.z.unique(dim=0)) < len(z)
    assert {tuple(row) for row in drawn.z.tolist()} <= {tuple(row) for row in z.tolist()}


def test_the_same_levels_every_time():
    z, _ = blobs()
    assert np.array_equal(found_in(marks_of(z, 20))[1], found_in(marks_of(z, 20))[1])
