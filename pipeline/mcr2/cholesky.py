"""Log-determinants and inverses of symmetric positive definite matrices, many at a time.

b matrices of s rows.
"""

import torch
from torch import Tensor
from torch.linalg import solve_triangular

NEAR_NUMBERS = 2**20  # numbers in the matrices that are processed together: about a CPU cache
LEAF = 32  # rows inverted at once


def logdet(M: Tensor) -> Tensor:
    """log det of symmetric positive definite matrices (..., d, d), by Cholesky: (...,).

    Raises torch.linalg.LinAlgError if a matrix is not positive definite.
    """
    return _log_det_of(torch.linalg.cholesky(M))


def _log_det_of(L: Tensor) -> Tensor:
    return 2 * L.diagonal(dim1=-2, dim2=-1).log().sum(-1)


def invert(M: Tensor) -> Tensor:
    """Invert symmetric positive definite matrices (b, s, s) in place; returns their log det (b,).

    Only their lower triangles are read. Raises torch.linalg.LinAlgError as `logdet` does.
    """
    parts = M.split(max(1, NEAR_NUMBERS // M.shape[1] ** 2))
    return torch.cat([_invert(part) for part in parts])


def _invert(M: Tensor) -> Tensor:
    """Invert [[A, Bᵀ], [B, C]]: A, which has LEAF rows, directly, then its Schur complement.

    Most of the work is then matrix multiplication. The complement is C − (B L⁻ᵀ)(B L⁻ᵀ)ᵀ, A = L Lᵀ.
    C − B A⁻¹ Bᵀ lost all digits of some matrices in float32.
    """
    A, B, C = M[:, :LEAF, :LEAF], M[:, LEAF:, :LEAF], M[:, LEAF:, LEAF:]
    L = torch.linalg.cholesky(A)
    A.copy_(torch.cholesky_inverse(L))
    if M.shape[1] <= LEAF:
        return _log_det_of(L)
    lower = solve_triangular(L.mT, B, upper=True, left=False)
    X = solve_triangular(L, lower, upper=False, left=False)  # B A⁻¹
    logdets = _log_det_of(L) + _invert(C.baddbmm_(lower, lower.mT, alpha=-1))
    torch.matmul(C, -X, out=B)
    A.baddbmm_(X.mT, B, alpha=-1)
    M[:, :LEAF, LEAF:] = B.mT
    return logdets
