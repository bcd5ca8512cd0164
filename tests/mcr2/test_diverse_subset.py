"""Greedy selection: against log-determinants of its definition, and against every subset."""

import math
from itertools import combinations

import pytest
import torch

from pipeline.mcr2 import coding_rate
from pipeline.mcr2.diverse_subset import most_spread

EPS_SQ = 0.1


def unit_rows(n: int, d: int, seed: int = 0) -> torch.Tensor:
    rows = torch.randn(n, d, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)
    return torch.nn.functional.normalize(rows, dim=1)


def value(Z: torch.Tensor, m: int) -> float:
    """log det(I + d/(m ε²) ZᵀZ) of the rows given."""
    d = Z.shape[1]
    return float(torch.logdet(torch.eye(d, dtype=Z.dtype) + d / (m * EPS_SQ) * Z.T @ Z))


def test_gains_are_the_growth_of_the_log_determinant_and_the_largest_at_each_step():
    Z, m = unit_rows(40, 6), 15
    taken, gains = most_spread(Z, m, EPS_SQ)
    assert len(set(taken.tolist())) == m
    for step in range(m):
        chosen = taken[:step].tolist()
        before = value(Z[chosen], m)
        left = [i for i in range(len(Z)) if i not in chosen]
        growth = {i: value(Z[[*chosen, i]], m) - before for i in left}
        assert float(gains[step]) == pytest.approx(growth[int(taken[step])], abs=1e-9)
        assert growth[int(taken[step])] == pytest.approx(max(growth.values()), abs=1e-4)
    assert (gains.diff() <= 1e-4).all()  # submodular: what is added shrinks


@pytest.mark.parametrize("seed", range(5))
def test_no_subset_is_better_by_more_than_the_guarantee(seed):
    Z, m = unit_rows(11, 3, seed), 4
    _, gains = most_spread(Z, m, EPS_SQ)
    best = max(value(Z[list(rows)], m) for rows in combinations(range(len(Z)), m))
    assert (1 - 1 / math.e) * best <= float(gains.sum()) <= best + 1e-9


def test_the_value_is_twice_the_coding_rate():
    Z = unit_rows(20, 5)
    taken, gains = most_spread(Z, 8, EPS_SQ)
    assert float(gains.sum()) == pytest.approx(2 * float(coding_rate.rate(Z[taken], EPS_SQ)))


def test_copies_are_taken_last():
    Z = torch.eye(4, dtype=torch.float32).repeat(3, 1)
    taken, gains = most_spread(Z, 8, EPS_SQ)
    assert sorted(taken[:4].tolist()) == [0, 1, 2, 3]
    assert gains[3] > gains[4] + 0.1


def test_of_rows_that_add_the_same_the_first_is_taken():
    Z = unit_rows(50, 8)
    order = torch.cat([torch.tensor([0]), 1 + torch.randperm(49)])  # all add the same at first
    taken, gains = most_spread(Z, 20, EPS_SQ)
    again, same = most_spread(Z[order], 20, EPS_SQ)
    assert taken[0] == 0 and order[again].tolist() == taken.tolist()
    assert torch.allclose(gains, same)


def test_where_fewer_rows_are_than_wanted_all_are_taken():
    taken, _ = most_spread(unit_rows(3, 5), 10, EPS_SQ)
    assert sorted(taken.tolist()) == [0, 1, 2]
    assert len(most_spread(torch.zeros(0, 5), 10, EPS_SQ)[0]) == 0
