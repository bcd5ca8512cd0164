"""The published recipe: its two heads, its warm-up, its objective against the formulas."""

import numpy as np
import pytest
import torch
from torch.nn.functional import normalize

from pipeline.mcr2 import coding_rate, published, sinkhorn
from pipeline.mcr2.network import alone
from pipeline.mcr2.published import TwoHeads

EPS_SQ, ETA = 0.1, 0.2


def unit(n, d, seed=0):
    generator = torch.Generator().manual_seed(seed)
    return normalize(torch.randn(n, d, generator=generator, dtype=torch.float64), dim=1)


def heads(seed=0):
    torch.manual_seed(seed)
    return TwoHeads([5, 3], 16, 6)


def test_both_heads_have_unit_rows_and_codes_are_the_features_of_the_network():
    network, x = heads().eval(), unit(20, 8).float()
    Z, C = network.heads(x)
    for rows in (Z, C):
        torch.testing.assert_close(rows.norm(dim=1), torch.ones(20))
    torch.testing.assert_close(network.features(x), C)
    assert not torch.allclose(Z, C)
    assert (
        TwoHeads(**{k: v for k, v in network.shape.items() if k != "heads"}).shape == network.shape
    )


def test_the_optimizer_has_the_weight_decays_of_the_paper():
    groups = heads().optimizer(1e-4).param_groups
    assert [group["weight_decay"] for group in groups] == [1e-4, 5e-3]
    assert all((group["lr"], group["momentum"]) == (1e-4, 0.9) for group in groups)
    assert [len(group["params"]) for group in groups] == [8, 2]


def test_the_warm_up_is_expansion_alone():
    Z = unit(12, 4)
    terms = published.warm_up(Z, EPS_SQ, alone)
    assert terms.loss.item() == pytest.approx(-coding_rate.rate(Z, EPS_SQ).item())
    assert terms.compression.item() == 0


def test_the_objective_equals_its_formula():
    Z, C = unit(12, 4), unit(12, 4, seed=1)
    found = published.rate_reduction(Z, C, torch.arange(12), EPS_SQ, ETA, alone)
    Pi, _ = sinkhorn.membership((C @ C.T).abs(), ETA, 5)
    P, z = Pi.numpy(), Z.numpy()

    def logdet(matrix):
        return np.linalg.slogdet(matrix)[1]

    n, d = z.shape
    R = logdet(np.eye(d) + d / (n * EPS_SQ) * z.T @ z) / 2
    Rc = 0.0
    for column in P.T:
        size = column.sum()
        Rc += size / (2 * n) * logdet(np.eye(d) + d / (size * EPS_SQ) * (z.T * column) @ z)
    assert found.expansion.item() == pytest.approx(R)
    assert found.compression.item() == pytest.approx(Rc)
    assert found.loss.item() == pytest.approx(Rc - R + 0.025 * (P**2).sum())
