"""The membership: how far from doubly stochastic, and that it says so."""

import numpy as np
import pytest
import torch
from torch.nn.functional import normalize

from pipeline.mcr2.sinkhorn import membership


def scores(n=12, dtype=torch.float64):
    generator = torch.Generator().manual_seed(0)
    C = normalize(torch.randn(n, 4, generator=generator, dtype=dtype), dim=1)
    return (C @ C.T).abs()


def by_numpy(S, eta, half_steps):
    P = np.exp(S / eta)
    for step in range(half_steps):
        P = P / P.sum(axis=1 - step % 2, keepdims=True)
    return P


@pytest.mark.parametrize("half_steps", [1, 2, 5, 6])
def test_equals_alternate_division_and_says_its_residual(half_steps):
    Pi, residual = membership(scores(), 0.2, half_steps)
    expected = by_numpy(scores().numpy(), 0.2, half_steps)
    np.testing.assert_allclose(Pi.numpy(), expected, rtol=1e-12)
    exact, inexact = (1, 0) if half_steps % 2 else (0, 1)
    np.testing.assert_allclose(Pi.sum(exact).numpy(), 1, rtol=1e-12)
    assert residual.item() == pytest.approx(np.abs(expected.sum(inexact) - 1).max(), rel=1e-9)
    assert residual > 1e-4  # so that the comparison above is of something


def test_many_steps_make_it_doubly_stochastic_and_symmetric():
    S = scores()
    residuals = [membership(S, 0.2, steps)[1].item() for steps in (1, 5, 25, 301)]
    assert residuals == sorted(residuals, reverse=True)
    assert residuals[-1] < 1e-12
    Pi, _ = membership(S, 0.2, 301)
    torch.testing.assert_close(Pi, Pi.T, rtol=0, atol=1e-10)
    torch.testing.assert_close(Pi.sum(0), torch.ones(12, dtype=torch.float64))
    assert (Pi >= 0).all()


def test_a_small_eta_neither_overflows_nor_underflows_a_row():
    S = scores(200, torch.float32).requires_grad_()
    Pi, residual = membership(S, 0.005, 5)
    assert torch.isfinite(Pi).all() and torch.isfinite(residual)
    torch.testing.assert_close(Pi.sum(1), torch.ones(200))
    (Pi * Pi).sum().backward()
    assert torch.isfinite(S.grad).all()


@pytest.mark.parametrize("half_steps", [1, 4, 5])
def test_gradcheck(half_steps):
    S = scores(6).requires_grad_()
    assert torch.autograd.gradcheck(lambda s: membership(s, 0.2, half_steps)[0], (S,))


def test_the_residual_carries_no_gradient():
    assert not membership(scores().requires_grad_(), 0.2, 5)[1].requires_grad


def test_half_precision_in_is_single_precision_inside():
    S = scores().bfloat16().requires_grad_()
    with torch.autocast("cpu", torch.bfloat16):
        Pi, residual = membership(S, 0.05, 5)
    expected, _ = membership(S.detach().float(), 0.05, 5)
    assert Pi.dtype == residual.dtype == torch.float32
    assert torch.equal(Pi, expected)
    (Pi * Pi).sum().backward()
    assert S.grad.dtype == torch.bfloat16
