"""Coding rates and coding lengths of features, the loss and the criterion for k.

n samples, d dimensions. Every Z is (n, d) with rows of unit norm (the papers write its transpose);
Pi is (n, n), doubly stochastic or nearly; `eps_sq` is the papers' ε².

Sources: [Ma07] Ma, Derksen, Hong, Wright, "Segmentation of multivariate mixed data via lossy data
coding and compression", TPAMI 2007; [Yu20] Yu, Chan, You, Song, Ma, "Learning diverse and
discriminative representations via the principle of maximal coding rate reduction", NeurIPS 2020;
[Chu24] Chu, Tong et al., "Image clustering via the principle of rate reduction in the age of
pretrained models" (CPP), ICLR 2024.
"""

import math
from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

BLOCK_NUMBERS = 2**24  # numbers in one temporary of `compression`: 64 MiB of float32


def logdet(M: Tensor) -> Tensor:
    """log det of symmetric positive definite matrices (..., d, d): twice the log of the Cholesky
    diagonal. Raises torch.linalg.LinAlgError where one is not."""
    diagonal = torch.linalg.cholesky(M).diagonal(dim1=-2, dim2=-1)
    return 2 * diagonal.log().sum(-1)


def rate(Z: Tensor, eps_sq: float) -> Tensor:
    """R(Z, ε) = ½ logdet(I + d/(n ε²) ZᵀZ), in nats [Yu20, eq. 2]; scalar.

    The determinant is taken on the smaller side: ZᵀZ and ZZᵀ share their non-zero eigenvalues.
    """
    n, d = Z.shape
    gram = Z.T @ Z if d <= n else Z @ Z.T
    eye = torch.eye(len(gram), dtype=Z.dtype, device=Z.device)
    return 0.5 * logdet(eye + (d / (n * eps_sq)) * gram)


def compression(Z: Tensor, Pi: Tensor, eps_sq: float) -> Tensor:
    """R_c(Z, Π) = Σ_j tr(Π_j)/(2n) logdet(I + d/(tr(Π_j) ε²) Zᵀ Π_j Z), in nats; scalar.

    Π_j is the diagonal matrix of column j of Pi [Chu24, the compression term]. Pi is (n, m): with
    m = n it is the whole sum; any m of the columns give their share of it, so that columns can be
    spread over workers or sampled (times n/m, which is unbiased). Value and gradients are exact,
    computed block by block: no (m, n, d) or (m, d, d) tensor is ever whole.
    """
    value: Tensor = _Compression.apply(Z, Pi, eps_sq)
    return value


class _Compression(torch.autograd.Function):
    """The sum over columns and both its gradients in one pass, since the value needs M_j⁻¹'s factor
    anyway. With M_j = I + α_j Zᵀ Π_j Z, t_j = tr(Π_j), α_j = d/(t_j ε²):

        ∂/∂z_i   = d/(n ε²) Σ_j π_ij M_j⁻¹ z_i
        ∂/∂π_ij  = [logdet M_j − (d − tr M_j⁻¹) + d/ε² · z_iᵀ M_j⁻¹ z_i] / (2n)
    """

    @staticmethod
    def forward(ctx: Any, Z: Tensor, Pi: Tensor, eps_sq: float) -> Tensor:
        n, d = Z.shape
        eye = torch.eye(d, dtype=Z.dtype, device=Z.device)
        block = max(1, BLOCK_NUMBERS // (n * d + 2 * d * d))
        total = Z.new_zeros(())
        grad_Z, grad_Pi = torch.zeros_like(Z), torch.empty_like(Pi)
        for start in range(0, Pi.shape[1], block):
            P = Pi[:, start : start + block].T  # (b, n)
            t = P.sum(1)  # (b,)
            weighted = P[:, :, None] * Z  # (b, n, d)
            M = eye + (d / (t * eps_sq))[:, None, None] * (Z.T @ weighted)  # (b, d, d)
            L = torch.linalg.cholesky(M)
            logdets = 2 * L.diagonal(dim1=-2, dim2=-1).log().sum(-1)
            total = total + (t * logdets).sum() / (2 * n)
            inverse = torch.cholesky_inverse(L)  # (b, d, d)
            torch.matmul(Z, inverse, out=weighted)  # rows M_j⁻¹ z_i: (b, n, d)
            lost = d - inverse.diagonal(dim1=-2, dim2=-1).sum(-1)
            quadratic = torch.einsum("bnd,nd->bn", weighted, Z)
            per_column = (logdets - lost)[:, None] + (d / eps_sq) * quadratic
            grad_Pi[:, start : start + block] = per_column.T / (2 * n)
            grad_Z += (d / (n * eps_sq)) * torch.einsum("bnd,bn->nd", weighted, P)
        ctx.save_for_backward(grad_Z, grad_Pi)
        return total

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *grad: Tensor) -> tuple[Tensor, Tensor, None]:
        grad_Z, grad_Pi = ctx.saved_tensors
        return grad[0] * grad_Z, grad[0] * grad_Pi, None


def length_bits(count: Tensor, gram: Tensor, eps_sq: float) -> Tensor:
    """L(X) = (n+d)/2 log₂ det(I + d/(n ε²) XᵀX): bits to code n vectors up to distortion ε².

    [Ma07, eq. 10, without its term for the mean]. From the sufficient statistics alone: `count`
    (...,) and `gram` = XᵀX (..., d, d), which are additive over parts and over merged groups. An
    empty group takes no bits. Returns (...,) in the dtype of `gram`.
    """
    d = gram.shape[-1]
    eye = torch.eye(d, dtype=gram.dtype, device=gram.device)
    count = count.to(gram.dtype)
    scale = d / (count.clamp(min=1) * eps_sq)
    bits = (count + d) / (2 * math.log(2)) * logdet(eye + scale[..., None, None] * gram)
    return torch.where(count > 0, bits, torch.zeros_like(bits))


def name_bits(count: Tensor, samples: Tensor) -> Tensor:
    """−n_c log₂(n_c / n): bits to say of a group's members, among n samples, that they are in it.

    L(X, cut) = Σ_c [L(X_c) − n_c log₂(n_c / n)] is the length of all [Ma07, eq. 13].
    """
    return -count * (count.clamp(min=1) / samples).log2()


Statistics = tuple[Tensor, Tensor, Tensor]  # count (k,), sum (k, d), Gram (k, d, d), float64


def no_statistics(k: int, d: int) -> Statistics:
    """Those of k groups without members."""
    f64 = torch.float64
    return torch.zeros(k, dtype=f64), torch.zeros(k, d, dtype=f64), torch.zeros(k, d, d, dtype=f64)


def accumulate(total: Statistics, Z: Tensor, labels: Tensor) -> None:
    """Add the rows of Z (n, d), of groups `labels` (n,) in [0, k), to the statistics, in place.

    They are additive: sums over parts are the statistics of the whole.
    """
    count, sums, gram = total
    Z = Z.double()
    count += torch.bincount(labels, minlength=len(count))
    sums.index_add_(0, labels, Z)
    order = labels.argsort(stable=True)
    groups, sizes = labels[order].unique_consecutive(return_counts=True)
    for group, rows in zip(groups.tolist(), order.split(sizes.tolist()), strict=True):
        gram[group] += Z[rows].T @ Z[rows]


def statistics(Z: Tensor, labels: Tensor, k: int) -> Statistics:
    """Statistics of k groups of the rows of Z (n, d)."""
    total = no_statistics(k, Z.shape[1])
    accumulate(total, Z, labels)
    return total
