"""The validator: high if clusters follow the neighbours, zero if they do not."""

import math
from dataclasses import replace

import numpy as np
import pytest
import torch
from torch.nn.functional import normalize

from pipeline.mcr2 import cut, model_selection
from pipeline.mcr2.model_selection import Validator, better, validation_steps
from pipeline.mcr2.network import Network


def blobs(k=4, each=60, width=8, seed=0):
    generator = torch.Generator().manual_seed(seed)
    noise = torch.randn(k * each, width, generator=generator)
    x = torch.eye(width)[:k].repeat(each, 1) + 0.1 * noise
    return normalize(x, dim=1)


def started(x):
    torch.manual_seed(0)
    network = Network([x.shape[1]], 16, 6)
    network.centre(x, torch.zeros(0, 1), 1.0)
    network.start(x, [1.0])
    return network.eval()


@pytest.mark.parametrize(
    ("steps", "expected"),
    [
        (0, {0}),
        (1, {0, 1}),
        (10, {0, 10}),
        (12, {0, 10, 12}),
        (240, {0, 10, 20, 40, 80, 160, 240}),
        (320, {0, 10, 20, 40, 80, 160, 320}),
    ],
)
def test_validations_are_twice_as_far_apart_each_time_with_the_first_and_the_last(steps, expected):
    assert validation_steps(steps) == expected


def test_the_ks_are_around_that_of_coding_length():
    assert Validator.of(started(blobs()), blobs(), 0).ks == (3, 4, 6)


def test_the_score_of_separated_blobs_is_about_the_information_of_the_blob():
    x = blobs()
    found = Validator.of(started(x), x, 0).score(started(x))
    assert found.shape == (model_selection.BOOTSTRAPS,)
    assert math.log(3) - 0.1 <= found.min() and found.max() <= math.log(6)


def test_the_score_of_clusters_that_ignore_the_neighbours_is_near_zero():
    x = blobs()
    network = started(x)
    judge = Validator.of(network, x, 0)
    order = torch.randperm(len(x), generator=torch.Generator().manual_seed(3))
    assert 0 <= replace(judge, x=x[order]).score(network).max() < 0.1


def test_only_a_sure_and_clear_gain_is_better():
    base = np.linspace(1, 2, model_selection.BOOTSTRAPS)
    assert better(1.03 * base, base)
    assert not better(base, base) and not better(1.01 * base, base)
    sometimes = base * np.where(np.arange(len(base)) % 4 == 0, 0.9, 2)
    assert not better(sometimes, base)


def test_a_better_network_scores_more_than_a_worse():
    x = blobs()
    network, worse = started(x), started(x)
    with torch.no_grad():
        worse.project.weight[:3] = 0  # the directions of the blobs: noise is left
    found = Validator.of(network, x, 0)
    assert found.score(worse).max() < found.score(network).min() / 2


def test_neighbours_are_those_of_the_views():
    x = blobs(each=10)
    network = started(x)
    found = Validator.of(network, x, 0)
    views = network.views(x).double().numpy()
    views -= views.mean(0)
    views /= np.linalg.norm(views, axis=1, keepdims=True)
    cosines = views @ views.T
    np.fill_diagonal(cosines, -np.inf)
    expected = np.argsort(-cosines, axis=1)[:, : cut.NEIGHBOURS]
    assert found.neighbours.shape == expected.shape
    assert [set(row) for row in found.neighbours.tolist()] == [set(row) for row in expected]


@pytest.mark.parametrize("training", [True, False])
def test_a_validation_leaves_the_network_as_it_was(training):
    x = blobs()
    network = started(x).train(training)
    before = {name: t.clone() for name, t in network.state_dict().items()}
    found = Validator.of(network, x.half(), 0)
    np.testing.assert_array_equal(found.score(network), found.score(network))
    assert network.training is training
    assert all(torch.equal(before[name], t) for name, t in network.state_dict().items())


def test_no_more_than_so_many_samples_are_used(monkeypatch):
    monkeypatch.setattr(model_selection, "SAMPLES", 50)
    x = blobs()
    network = started(x)
    a, b, c = (Validator.of(network, x, seed) for seed in (0, 0, 1))
    assert len(a.x) == len(a.x.unique(dim=0)) == 50
    assert torch.equal(a.x, b.x) and not torch.equal(a.x, c.x)
    assert a.neighbours.shape == (50, cut.NEIGHBOURS) and a.neighbours.max() < 50


@pytest.mark.parametrize("samples", [2, 3, 4, 5, 21, 30])
@pytest.mark.parametrize("alike", [False, True])
def test_few_samples_can_be_validated(samples, alike):
    x = blobs()[:1].repeat(samples, 1) if alike else blobs()[:samples]
    found = Validator.of(started(x), x, 0).score(started(x))
    assert np.isfinite(found).all()
    assert not alike or found == pytest.approx(0, abs=1e-12)


def test_a_network_whose_features_are_all_alike_scores_zero():
    x = blobs()
    network = started(x)
    judge = Validator.of(network, x, 0)
    with torch.no_grad():
        network.project.weight.zero_()
    assert judge.score(network) == pytest.approx(0, abs=1e-12)
