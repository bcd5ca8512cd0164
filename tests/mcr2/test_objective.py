"""The objective against its formula written out in float64."""

from itertools import combinations

import pytest
import torch
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.nn.functional import normalize

from pipeline.mcr2 import objective
from pipeline.mcr2.network import Network, alone

EPS_SQ, ETA = 0.2, 0.15
N, D = 8, 5


def unit(n=N, d=D, seed=0, dtype=torch.float64):
    generator = torch.Generator().manual_seed(seed)
    return normalize(torch.randn(n, d, generator=generator, dtype=dtype), dim=1)


def naive_affinity(Z):
    return torch.stack(
        [
            torch.stack([-Z.new_ones(()) if i == j else (z @ y).relu() for j, y in enumerate(Z)])
            for i, z in enumerate(Z)
        ]
    )


def naive(Z, columns):
    """(R, R_c): every determinant by itself."""
    n, d = Z.shape
    Pi = (naive_affinity(Z) / ETA).exp()
    for step in range(objective.HALF_STEPS):
        Pi = Pi / Pi.sum(1 - step % 2, keepdim=True)
    eye = torch.eye(d, dtype=Z.dtype)
    R = torch.logdet(eye + d / (n * EPS_SQ) * Z.T @ Z) / 2
    R_c = Z.new_zeros(())
    for j in columns:
        p = Pi[:, j]
        M = eye + d / (p.sum() * EPS_SQ) * Z.T @ torch.diag(p) @ Z
        R_c = R_c + p.sum() / (2 * n) * torch.logdet(M)
    return R, R_c * n / len(columns)


def terms(Z, columns):
    return objective.rate_reduction(Z, torch.tensor(columns), EPS_SQ, ETA, alone)


def test_affinity_is_the_positive_part_of_cosines_with_the_own_below_all():
    Z = unit()
    torch.testing.assert_close(objective.affinity(Z), naive_affinity(Z))
    opposite = objective.affinity(torch.stack([Z[0], -Z[0], Z[0]]))
    expected = torch.tensor([[-1, 0, 1], [0, -1, 0], [1, 0, -1]], dtype=torch.float64)
    torch.testing.assert_close(opposite, expected)


@pytest.mark.parametrize(
    ("dtype", "tolerance"), [(torch.float64, 1e-10), (torch.float32, 1e-4)], ids=str
)
@pytest.mark.parametrize("columns", [list(range(N)), [5, 2]], ids=["all", "some"])
def test_the_loss_and_its_gradient_equal_the_formula(columns, dtype, tolerance):
    Z, twin = unit(dtype=dtype).requires_grad_(), unit(dtype=dtype).double().requires_grad_()
    found = terms(Z, columns)
    R, R_c = naive(twin, columns)
    assert found.expansion.item() == pytest.approx(R.item(), rel=tolerance)
    assert found.compression.item() == pytest.approx(R_c.item(), rel=tolerance)
    assert found.loss.item() == pytest.approx((R_c - R).item(), rel=tolerance)
    assert 0 <= found.residual < 0.1
    assert not found.expansion.requires_grad and not found.compression.requires_grad
    found.loss.backward()
    (R_c - R).backward()
    error = (Z.grad.double() - twin.grad).norm() / twin.grad.norm()
    assert error < tolerance


def test_some_columns_give_the_compression_of_all_on_the_mean():
    Z = unit()
    pairs = [terms(Z, list(pair)).compression for pair in combinations(range(N), 2)]
    whole = terms(Z, list(range(N))).compression
    torch.testing.assert_close(torch.stack(pairs).mean(), whole)
    assert torch.stack(pairs).std() > 1e-3  # they differ


def test_signs_rotations_and_the_order_of_samples_do_not_matter():
    Z, every = unit(), list(range(N))
    turn = torch.linalg.qr(unit(D, D, seed=1)).Q
    order = torch.randperm(N, generator=torch.Generator().manual_seed(2))
    whole = terms(Z, every).loss
    for same in (-Z, Z @ turn, Z[order]):
        torch.testing.assert_close(terms(same, every).loss, whole)
    one_turned = torch.cat([-Z[:1], Z[1:]])  # of one sample the sign is part of what it is
    assert abs(terms(one_turned, every).loss - whole) > 1e-3


def test_it_prefers_orthogonal_groups_to_a_crowd():
    groups = torch.eye(4, dtype=torch.float64).repeat_interleave(4, 0)
    crowd = normalize(1 + 0.1 * unit(16, 4), dim=1)
    every = list(range(16))
    assert terms(groups, every).loss < terms(crowd, every).loss - 0.5


def test_everything_is_made_where_the_features_are():
    """On a GPU that is not there: tensors without numbers, but with a device that must agree."""
    with FakeTensorMode():
        with torch.device("cuda"):
            network = Network([12], 16, D, 7)
        Z = network.train()(torch.zeros(N, 12, device="cuda"))
        columns = torch.zeros(4, dtype=torch.long, device="cuda")
        found = objective.rate_reduction(Z, columns, EPS_SQ, ETA, alone)
    scores = (found.loss, found.expansion, found.compression, found.residual)
    assert {tensor.device.type for tensor in scores} == {"cuda"}
