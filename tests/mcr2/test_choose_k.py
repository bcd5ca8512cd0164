"""The choice of k: from a curve of bits, its bands, and the small groups before it."""

from dataclasses import dataclass, replace

import numpy as np
import pytest
import torch

from pipeline.mcr2 import assignment, choose_k, coding_rate, tree
from tests import subspaces


@dataclass(frozen=True)
class Limits:
    k_min: int = 2
    k_max: int = 7
    leaves: int = 12
    eps_sq: float = 0.1
    seed: int = 0


LIMITS = Limits()


@pytest.mark.parametrize("samples", [2, 5, 9])
@pytest.mark.filterwarnings("ignore:Number of distinct clusters")
def test_over_segment_of_very_few_landmarks(samples):
    z = torch.from_numpy(subspaces.union(1, 4, samples)[0]).float()
    table = choose_k.over_segment(z, replace(LIMITS, leaves=max(1, samples // 4)))
    assert 1 <= len(table) <= samples
    torch.testing.assert_close(table.norm(dim=1), torch.ones(len(table)))


@pytest.mark.filterwarnings("ignore:Number of distinct clusters")
def test_over_segment_of_equal_landmarks_gives_groups_with_members():
    z = torch.eye(4)[0].repeat(30, 1)
    table = choose_k.over_segment(z, replace(LIMITS, leaves=7))
    torch.testing.assert_close(table, z[: len(table)])


def curve_of(*bits):
    return torch.tensor(bits, dtype=torch.float64)


def shaken(bits, draws=50, size=0.0):
    noise = torch.randn(draws, len(bits), generator=torch.Generator().manual_seed(0))
    return bits + 7 + size * noise.double()  # 7: a resample's bits may be off as a whole


MEASURES = {2: [0.1, 0.9, 0.2], 4: [0.3, 0.8, 0.4], 6: [0.2, 0.1, 0.3]}
CURVE = curve_of(1000, 700, 500, 417, 415, 440, 480)  # fewest at 5; FLAT of 585 is 2.9


def test_the_choice_describes_the_curve_and_has_the_measures():
    choice = choose_k.choose_from_curve(CURVE, shaken(CURVE), 4, MEASURES, LIMITS)
    assert (choice.k, choice.k_best, choice.k_low, choice.k_high) == (4, 5, 5, 5)
    assert (choice.flat_from, choice.flat_to) == (4, 5)
    np.testing.assert_allclose(choice.bits, CURVE)
    np.testing.assert_allclose(choice.bands, np.stack([CURVE, CURVE]))
    np.testing.assert_array_equal(choice.ks, [2, 4, 6])
    np.testing.assert_array_equal(choice.measures.T, list(MEASURES.values()))


def test_the_best_k_has_the_best_mean_rank_and_is_the_smaller_of_two_that_tie():
    assert choose_k.best_of(MEASURES) == 4  # ranks 3, 1, 3; 1, 2, 1; 2, 3, 2
    assert choose_k.best_of({5: [1.0, 2.0, 3.0], 3: [1.0, 2.0, 3.0]}) == 3


def test_the_grid_has_all_small_ks_and_ends_below_the_largest():
    assert choose_k.grid(2, 20) == [2, 3, 4, 5, 6, 7, 8, 9, 10, 12, 14, 16, 18]
    assert choose_k.grid(3, 3) == [3]


@pytest.mark.parametrize(("k", "dimension"), [(4, 3), (7, 2)])
def test_k_of_separated_subspaces_is_exact(k, dimension):
    """They intersect at the origin only, with noise: coding length has its least bits elsewhere."""
    rng = np.random.default_rng(0)
    bases = [np.linalg.qr(rng.normal(size=(24, dimension)))[0] for _ in range(k)]
    x = np.concatenate([rng.normal(size=(200, dimension)) @ basis.T for basis in bases])
    x += 0.1 * rng.normal(size=x.shape)
    z = torch.from_numpy(x / np.linalg.norm(x, axis=1, keepdims=True)).float()
    bits = torch.arange(30.0)  # coding length would have one cluster
    found, measures = choose_k.compare_ks(z, bits, replace(LIMITS, k_max=30))
    assert found == k
    assert all(len(values) == 3 and np.isfinite(values).all() for values in measures.values())
    assert choose_k.compare_ks(z, bits, replace(LIMITS, k_max=30)) == (found, measures)


@pytest.mark.parametrize("samples", [1, 2, 30, 41])
def test_k_of_few_landmarks(samples):
    z = torch.from_numpy(subspaces.union(3, 4, 20)[0]).float()[:samples]
    found, _ = choose_k.compare_ks(z, CURVE, LIMITS)
    assert 1 <= found <= max(1, samples // choose_k.MEMBERS)


@pytest.mark.parametrize(("k_min", "k_max", "best"), [(2, 4, 4), (6, 7, 6), (1, 1, 1), (2, 99, 5)])
def test_choose_searches_between_k_min_and_k_max_only(k_min, k_max, best):
    choice = choose_k.choose_from_curve(
        CURVE, shaken(CURVE), 4, MEASURES, replace(LIMITS, k_min=k_min, k_max=k_max)
    )
    assert choice.k_best == best
    assert k_min <= choice.flat_from <= best <= choice.flat_to <= k_max


@pytest.mark.parametrize("bits", [(9.0,), (9.0, 8.0)])
def test_choose_of_fewer_leaves_than_k_min(bits):
    choice = choose_k.choose_from_curve(
        curve_of(*bits), shaken(curve_of(*bits)), 1, {}, replace(LIMITS, k_min=4)
    )
    assert choice.k_best == len(bits) and choice.measures.shape == (3, 0)


def test_of_two_ks_of_equal_bits_the_smaller():
    flat = curve_of(9, 5, 5, 5, 8)
    choice = choose_k.choose_from_curve(flat, shaken(flat), 4, MEASURES, LIMITS)
    assert (choice.k_best, choice.flat_from, choice.flat_to) == (2, 2, 4)


def test_where_clustering_saves_nothing_only_the_best_is_flat():
    rising = curve_of(100, 110, 120, 130)
    choice = choose_k.choose_from_curve(rising, shaken(rising), 4, MEASURES, LIMITS)
    assert (choice.k_best, choice.flat_from, choice.flat_to) == (2, 2, 2)


def test_the_bands_widen_with_the_resamples():
    calm, wild = (
        choose_k.choose_from_curve(CURVE, shaken(CURVE, size=size), 4, MEASURES, LIMITS)
        for size in (1, 30)
    )
    for choice in (calm, wild):
        low, high = choice.bands
        assert (low < choice.bits).all() and (choice.bits < high).all()
        assert choice.k_low <= choice.k_best <= choice.k_high
    width = [np.mean(choice.bands[1] - choice.bands[0]) for choice in (calm, wild)]
    assert width[1] == pytest.approx(30 * width[0], rel=1e-6)
    assert wild.k_high - wild.k_low > calm.k_high - calm.k_low


def test_resamples_are_of_the_size_of_all_and_the_same_every_time():
    z = torch.from_numpy(subspaces.union(4, 3, 50)[0]).float()
    table = choose_k.over_segment(z, LIMITS)
    stats = coding_rate.statistics(z, assignment.nearest(z, table), len(table))
    merges = tree.grow(*stats, LIMITS.eps_sq)
    curves = choose_k.resample(z, table, merges, 200.0, LIMITS)
    assert curves.shape == (choose_k.RESAMPLES, len(table))
    assert torch.equal(curves, choose_k.resample(z, table, merges, 200.0, LIMITS))
    assert curves.std(dim=0).min() > 0
    whole = tree.lengths_bits(merges, stats[0], stats[2], LIMITS.eps_sq)
    torch.testing.assert_close(curves.mean(dim=0)[:4], whole[:4], rtol=0.05, atol=0)
    tenfold = choose_k.resample(z, table, merges, 2000.0, LIMITS)
    assert (tenfold.mean() / curves.mean()).item() > 5
