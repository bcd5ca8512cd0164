"""Coding rates against closed forms and against the papers' formulas written out."""

import math

import numpy as np
import pytest
import torch
from torch.nn.functional import normalize

from pipeline.mcr2 import cholesky, coding_rate, sinkhorn

EPS_SQ = 0.3


def oracle_rate(Z, eps_sq):
    n, d = Z.shape
    sign, value = np.linalg.slogdet(np.eye(d) + d / (n * eps_sq) * Z.T @ Z)
    assert sign == 1
    return value / 2


def oracle_compression(Z, Pi, eps_sq):
    n, d = Z.shape
    total = 0.0
    for j in range(Pi.shape[1]):
        D = np.diag(Pi[:, j])
        M = np.eye(d) + d / (np.trace(D) * eps_sq) * Z.T @ D @ Z
        total += np.trace(D) / (2 * n) * np.linalg.slogdet(M)[1]
    return total


def naive_compression(Z, Pi, eps_sq):
    """The formula in torch, for autograd."""
    n, d = Z.shape
    terms = []
    for j in range(Pi.shape[1]):
        D = torch.diag(Pi[:, j])
        t = D.trace()
        M = torch.eye(d, dtype=Z.dtype) + d / (t * eps_sq) * Z.T @ D @ Z
        terms.append(t / (2 * n) * M.logdet())
    return torch.stack(terms).sum()


def unit(n, d, seed=0, dtype=torch.float64):
    generator = torch.Generator().manual_seed(seed)
    return normalize(torch.randn(n, d, generator=generator, dtype=dtype), dim=1)


def membership(n, seed=1, dtype=torch.float64):
    C = unit(n, 4, seed, dtype)
    return sinkhorn.membership((C @ C.T).abs(), 0.2, 5)[0]


def blocks(k, dim, each):
    """Rows of a union of k orthogonal coordinate subspaces, and their block membership."""
    Z = torch.zeros(k * each, k * dim, dtype=torch.float64)
    for c in range(k):
        for i in range(each):
            Z[c * each + i, c * dim + i % dim] = 1
    labels = torch.arange(k).repeat_interleave(each)
    Pi = (labels[:, None] == labels[None, :]).double() / each
    return Z, Pi, labels


def test_rate_of_orthonormal_rows_in_closed_form():
    for n, d in ((5, 5), (3, 8)):
        Z = torch.eye(d, dtype=torch.float64)[:n]
        expected = n / 2 * math.log(1 + d / (n * EPS_SQ))
        assert coding_rate.rate(Z, EPS_SQ).item() == pytest.approx(expected, abs=1e-12)


def test_rates_of_orthogonal_subspaces_in_closed_form():
    k, dim, each = 3, 2, 10
    Z, Pi, _ = blocks(k, dim, each)
    n, d = Z.shape
    R = d / 2 * math.log(1 + d / (n * EPS_SQ) * (each / dim))  # ZᵀZ = each/dim · I
    R_c = 0.5 * dim * math.log(1 + d / (dim * EPS_SQ))  # n columns of trace 1: Zᵀ Π_j Z = I/dim
    assert coding_rate.rate(Z, EPS_SQ).item() == pytest.approx(R, abs=1e-12)
    assert coding_rate.compression(Z, Pi, EPS_SQ).item() == pytest.approx(R_c, abs=1e-12)


def test_the_true_blocks_reduce_the_rate_most():
    Z, _, labels = blocks(4, 2, 8)

    def reduction(groups):
        same = (groups[:, None] == groups[None, :]).double()
        P = same / same.sum(0)
        return (coding_rate.rate(Z, EPS_SQ) - coding_rate.compression(Z, P, EPS_SQ)).item()

    true = reduction(labels)
    shuffled = labels[torch.randperm(len(labels), generator=torch.Generator().manual_seed(0))]
    assert true > 0
    assert reduction(torch.zeros_like(labels)) == pytest.approx(0, abs=1e-12)
    assert reduction(labels // 2) < true  # neighbours merged
    assert reduction(shuffled) < true


@pytest.mark.parametrize(("n", "d"), [(20, 6), (6, 20), (9, 9)])
def test_rates_equal_the_formulas_in_numpy(n, d):
    Z, Pi = unit(n, d), membership(n)
    assert coding_rate.rate(Z, EPS_SQ).item() == pytest.approx(
        oracle_rate(Z.numpy(), EPS_SQ), abs=1e-12
    )
    assert coding_rate.compression(Z, Pi, EPS_SQ).item() == pytest.approx(
        oracle_compression(Z.numpy(), Pi.numpy(), EPS_SQ), abs=1e-12
    )


def clustered(n, d, dtype=torch.float64):
    """Unit rows of three clusters, two of the rows identical."""
    Z = normalize(unit(3, d, seed=7)[torch.arange(n) % 3] + 0.7 * unit(n, d), dim=1)
    Z[1] = Z[0]
    return Z.to(dtype)


def with_zeros(Pi):
    """Zeros and tiny entries in every column."""
    n, m = Pi.shape
    off = (torch.arange(n)[:, None] - torch.arange(m)) % n
    return torch.where(off == 2, 1e-12, torch.where(off == 3, 0, Pi))


def relative_error(found, expected):
    return float((found.double() - expected).norm() / expected.norm())


def assert_equals_naive(Z, Pi, tolerance):
    """Value and both gradients, by norm, against autograd of the formula in float64."""
    leaves = [t.clone().requires_grad_() for t in (Z, Pi)]
    twins = [t.double().clone().requires_grad_() for t in (Z, Pi)]
    value = coding_rate.compression(*leaves, EPS_SQ)
    expected = naive_compression(*twins, EPS_SQ)
    (3 * value).backward()  # a factor, so that the incoming gradient matters
    (3 * expected).backward()
    assert value.item() == pytest.approx(expected.item(), rel=tolerance)
    for leaf, twin in zip(leaves, twins, strict=True):
        assert leaf.grad.dtype == leaf.dtype
        assert relative_error(leaf.grad, twin.grad) <= tolerance


@pytest.fixture(params=["_by_features", "_by_samples"])
def side(request, monkeypatch):
    """Either way to the sums, whatever the shape."""
    chosen = getattr(coding_rate, request.param)
    for name in ("_by_features", "_by_samples"):
        monkeypatch.setattr(coding_rate, name, chosen)


DTYPES = pytest.mark.parametrize(
    ("dtype", "tolerance"), [(torch.float64, 1e-10), (torch.float32, 1e-5)], ids=str
)


@DTYPES
@pytest.mark.parametrize("columns", [slice(None), [3, 0, 7]], ids=["all", "some"])
@pytest.mark.parametrize(("n", "d"), [(24, 8), (24, 21), (12, 30), (70, 70)])
def test_compression_and_its_gradients_equal_autograd(side, n, d, columns, dtype, tolerance):
    Pi = membership(n, dtype=dtype)[:, columns]
    assert_equals_naive(clustered(n, d, dtype), Pi, tolerance)


@DTYPES
@pytest.mark.parametrize(("n", "d"), [(24, 8), (12, 30)])
def test_zeros_in_the_membership_have_their_exact_gradient(side, n, d, dtype, tolerance):
    assert_equals_naive(clustered(n, d, dtype), with_zeros(membership(n, dtype=dtype)), tolerance)


@DTYPES
@pytest.mark.parametrize(("n", "d"), [(200, 32), (150, 150)])
def test_gradients_through_sinkhorn_equal_autograd(n, d, dtype, tolerance):
    C = clustered(n, 16)
    found = []
    for compression, kind in ((coding_rate.compression, dtype), (naive_compression, torch.float64)):
        scores = (C @ C.T).abs().to(kind).requires_grad_()
        Pi, _ = sinkhorn.membership(scores, 0.1, 5)
        compression(clustered(n, d).to(kind), Pi, EPS_SQ).backward()
        found.append(scores.grad)
    assert relative_error(*found) <= tolerance


def test_a_column_of_zeros_adds_nothing(side):
    Z, Pi = clustered(12, 5), membership(12)
    more = torch.cat([Pi, torch.zeros(12, 1)], dim=1).requires_grad_()
    value = coding_rate.compression(Z, more, EPS_SQ)
    value.backward()
    assert value.item() == pytest.approx(coding_rate.compression(Z, Pi, EPS_SQ).item(), rel=1e-12)
    assert more.grad.isfinite().all()


def test_what_is_not_finite_fails_as_a_determinant_does(side):
    Z = clustered(12, 5)
    Z[3, 2] = math.nan
    with pytest.raises(torch.linalg.LinAlgError):
        coding_rate.compression(Z, membership(12), EPS_SQ)


@pytest.mark.parametrize(("n", "d"), [(40, 8), (10, 40)])
def test_half_precision_in_is_single_precision_inside(n, d):
    """bfloat16 is rounded once, on the way in; its gradients come back as bfloat16."""
    Z, Pi = clustered(n, d).bfloat16().requires_grad_(), membership(n).bfloat16().requires_grad_()
    for name, tensors in (("rate", [Z]), ("compression", [Z, Pi])):
        function = getattr(coding_rate, name)
        with torch.autocast("cpu", torch.bfloat16):
            half = function(*tensors, EPS_SQ)
        single = function(*[t.detach().float() for t in tensors], EPS_SQ)
        assert half.dtype == torch.float32
        assert half.item() == single.item()
        for grad in torch.autograd.grad(half, tensors):
            assert grad.dtype == torch.bfloat16 and grad.isfinite().all()


@pytest.mark.parametrize(("n", "d"), [(20, 6), (6, 20)])
def test_condition_by_eigenvalues(n, d):
    Z = unit(n, d)
    expected = torch.linalg.cond(torch.eye(d) + d / (n * EPS_SQ) * Z.T @ Z).item()
    assert coding_rate.condition(Z.float(), EPS_SQ) == pytest.approx(expected, rel=1e-5)
    Z[0, 0] = math.inf
    assert math.isnan(coding_rate.condition(Z, EPS_SQ))


def test_gradcheck_of_compression(side):
    Z, Pi = unit(7, 3).requires_grad_(), membership(7).detach().requires_grad_()
    assert torch.autograd.gradcheck(lambda z, p: coding_rate.compression(z, p, EPS_SQ), (Z, Pi))


def test_gradcheck_of_the_objective_through_sinkhorn():
    def objective(Z, C):
        Pi, _ = sinkhorn.membership((C @ C.T).abs(), 0.2, 5)
        return coding_rate.compression(Z, Pi, EPS_SQ) - coding_rate.rate(Z, EPS_SQ)

    inputs = unit(7, 3).requires_grad_(), unit(7, 3, seed=5).requires_grad_()
    assert torch.autograd.gradcheck(objective, inputs)


def test_a_second_derivative_is_refused_and_not_wrong():
    Z = unit(6, 3).requires_grad_()
    value = coding_rate.compression(Z, membership(6), EPS_SQ)
    (grad,) = torch.autograd.grad(value * value, Z, create_graph=True)
    with pytest.raises(RuntimeError, match="once_differentiable"):
        grad.sum().backward()


@pytest.mark.parametrize(("held", "near", "strip"), [(1, 1, 1), (100, 30, 2), (3000, 60, 8)])
def test_blocks_and_strips_change_nothing(side, monkeypatch, held, near, strip):
    def run():
        Z, Pi = unit(20, 5).requires_grad_(), membership(20).requires_grad_()
        value = coding_rate.compression(Z, Pi, EPS_SQ)
        value.backward()
        return value.detach(), Z.grad, Pi.grad

    whole = run()
    monkeypatch.setattr(coding_rate, "HELD_NUMBERS", held)
    monkeypatch.setattr(cholesky, "NEAR_NUMBERS", near)
    monkeypatch.setattr(coding_rate, "STRIP", strip)
    for a, b in zip(run(), whole, strict=True):
        torch.testing.assert_close(a, b, rtol=0, atol=1e-12)


def test_single_columns_sum_to_the_whole_in_value_and_gradient():
    Z, Pi = unit(16, 5).requires_grad_(), membership(16)
    whole = coding_rate.compression(Z, Pi, EPS_SQ)
    scaled = torch.stack(
        [16 * coding_rate.compression(Z, Pi[:, [j]], EPS_SQ) for j in range(16)]
    ).mean()
    assert scaled.item() == pytest.approx(whole.item(), abs=1e-12)
    grads = [torch.autograd.grad(v, Z)[0] for v in (whole, scaled)]
    torch.testing.assert_close(*grads, rtol=0, atol=1e-12)


def test_sampled_columns_are_unbiased():
    Z, Pi = unit(40, 4), membership(40)
    whole = coding_rate.compression(Z, Pi, EPS_SQ).item()
    generator = torch.Generator().manual_seed(0)
    draws = np.array(
        [
            40 / 5 * coding_rate.compression(Z, Pi[:, columns], EPS_SQ).item()
            for columns in (torch.randperm(40, generator=generator)[:5] for _ in range(400))
        ]
    )
    error = draws.std(ddof=1) / math.sqrt(len(draws))
    assert draws.std() > 0
    assert abs(draws.mean() - whole) < 4 * error
    assert error < 0.01 * whole


def test_rotation_and_permutation_leave_the_rates_alone():
    Z, Pi = unit(18, 6), membership(18)
    Q = torch.linalg.qr(torch.randn(6, 6, generator=torch.Generator().manual_seed(3)).double())[0]
    order = torch.randperm(18, generator=torch.Generator().manual_seed(4))
    R, R_c = coding_rate.rate(Z, EPS_SQ), coding_rate.compression(Z, Pi, EPS_SQ)
    for other, P in ((Z @ Q, Pi), (Z[order], Pi[order][:, order])):
        torch.testing.assert_close(coding_rate.rate(other, EPS_SQ), R, rtol=1e-12, atol=0)
        torch.testing.assert_close(
            coding_rate.compression(other, P, EPS_SQ), R_c, rtol=1e-12, atol=0
        )


@pytest.mark.parametrize(("n", "d"), [(12, 4), (4, 12)])
def test_length_bits_equals_ma_by_eigenvalues(n, d):
    X = unit(n, d).numpy()
    eigenvalues = np.linalg.eigvalsh(X.T @ X)
    expected = (n + d) / 2 * np.log2(1 + d / (n * EPS_SQ) * eigenvalues).sum()
    gram = torch.from_numpy(X.T @ X)
    bits = coding_rate.length_bits(torch.tensor(float(n)), gram, EPS_SQ)
    assert bits.item() == pytest.approx(expected, rel=1e-12)


def test_length_bits_of_a_batch_with_an_empty_group():
    Z, labels = unit(10, 3), torch.tensor([0, 2, 0, 2, 2, 0, 0, 2, 2, 2])
    count, _, gram = coding_rate.statistics(Z, labels, 3)
    bits = coding_rate.length_bits(count, gram, EPS_SQ)
    assert bits[1] == 0
    for c in (0, 2):
        members = Z[labels == c]
        alone = coding_rate.length_bits(
            torch.tensor(float(len(members))), members.T @ members, EPS_SQ
        )
        assert bits[c].item() == pytest.approx(alone.item(), rel=1e-12)


def test_name_bits_are_the_entropy_of_the_labels():
    count = torch.tensor([1.0, 3.0, 0.0, 4.0])
    expected = [3.0, -3 * math.log2(3 / 8), 0.0, 4.0]
    assert coding_rate.name_bits(count, count.sum()).tolist() == pytest.approx(expected)


def test_statistics_equal_a_loop_and_add_up_over_any_split():
    Z = unit(50, 4, dtype=torch.float32)
    labels = torch.randint(0, 6, (50,), generator=torch.Generator().manual_seed(1))
    labels[labels == 3] = 4  # an empty group
    whole = coding_rate.statistics(Z, labels, 6)
    for c in range(6):
        members = Z[labels == c].double()
        for found, expected in zip(
            whole, (len(members), members.sum(0), members.T @ members), strict=True
        ):
            assert found.dtype == torch.float64
            torch.testing.assert_close(
                found[c], torch.as_tensor(expected).double(), rtol=0, atol=1e-12
            )
    mask = torch.rand(50, generator=torch.Generator().manual_seed(2)) < 0.3
    halves = [coding_rate.statistics(Z[m], labels[m], 6) for m in (mask, ~mask)]
    for a, b, both in zip(*halves, whole, strict=True):
        torch.testing.assert_close(a + b, both, rtol=0, atol=1e-12)
