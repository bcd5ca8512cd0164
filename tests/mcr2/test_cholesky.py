"""Log-determinants and inverses against those of NumPy, in either precision.

Not against those of torch: after `torch.set_num_threads(2)`, which other tests call, the LU of
torch 2.14 with MKL gives wrong numbers. The project itself uses no LU.
"""

import numpy as np
import pytest
import torch

from pipeline.mcr2 import cholesky


def stretched(s, n, along, seed=0):
    """I + ZᵀZ of n unit rows, and of rows around one direction where `along` is large."""
    generator = torch.Generator().manual_seed(seed)
    centre = torch.nn.functional.normalize(torch.randn(s, generator=generator).double(), dim=0)
    rows = along * centre + torch.randn(n, s, generator=generator).double() / s**0.5
    Z = torch.nn.functional.normalize(rows, dim=1)
    return torch.eye(s) + 20 * Z.T @ Z


def log_determinants(M):
    return torch.from_numpy(np.linalg.slogdet(M.numpy()).logabsdet)


def inverses(M):
    return torch.from_numpy(np.linalg.inv(M.numpy()))


def relative_error(found, expected):
    return float((found.double() - expected).norm() / expected.norm())


def test_logdet_refuses_what_has_none():
    for function in (cholesky.logdet, cholesky.invert):
        with pytest.raises(torch.linalg.LinAlgError):
            function(-torch.eye(100)[None])


@pytest.mark.parametrize(
    ("dtype", "tolerance"), [(torch.float64, 1e-10), (torch.float32, 1e-5)], ids=str
)
@pytest.mark.parametrize("near", [1, 2**20])
@pytest.mark.parametrize("s", [1, 5, 32, 33, 200])
def test_inverses_block_by_block(monkeypatch, s, near, dtype, tolerance):
    monkeypatch.setattr(cholesky, "NEAR_NUMBERS", near)
    M = torch.stack([stretched(s, 2 * s, 0, seed) for seed in (0, 1, 2)])
    above = torch.ones(s, s, dtype=torch.bool).triu(1)
    inverse = M.to(dtype).masked_fill(above, torch.nan)  # which is not read
    logdets = cholesky.invert(inverse)
    assert relative_error(logdets, log_determinants(M)) <= tolerance
    assert relative_error(cholesky.logdet(M.to(dtype)), logdets.double()) <= tolerance
    assert relative_error(inverse, inverses(M)) <= tolerance


def test_an_inverse_far_from_the_identity_keeps_its_digits():
    """One direction of 10⁴ in float32: blocks through an explicit A⁻¹ lose a hundred times more."""
    M = stretched(256, 500, along=10)[None]
    inverse, expected = M.float(), inverses(M)
    by_lapack = torch.cholesky_inverse(torch.linalg.cholesky(inverse))
    cholesky.invert(inverse)
    assert relative_error(inverse, expected) <= 3 * relative_error(by_lapack, expected)
