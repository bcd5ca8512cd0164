"""Coding rates and coding lengths of features: the loss of training and the criterion for k.

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

from pipeline.mcr2 import cholesky
from pipeline.mcr2.precision import full_precision

HELD_NUMBERS = 2**25  # most numbers that `compression` holds in its matrices: 128 MiB
STRIP = 8  # rows of a Gram matrix whose products are computed together
FLOOR = 1e-24  # of Π: far below its rounding, far above the smallest float32


@full_precision
def rate(Z: Tensor, eps_sq: float) -> Tensor:
    """R(Z, ε) = ½ logdet(I + d/(n ε²) ZᵀZ), in nats [Yu20, eq. 2]; scalar.

    The determinant is taken on the smaller side: ZᵀZ and ZZᵀ share their non-zero eigenvalues.
    """
    n, d = Z.shape
    gram = _small_gram(Z)
    eye = torch.eye(len(gram), dtype=Z.dtype, device=Z.device)
    return 0.5 * cholesky.logdet(eye + (d / (n * eps_sq)) * gram)


def condition(Z: Tensor, eps_sq: float) -> float:
    """Condition number of I + d/(n ε²) ZᵀZ, whose determinant `rate` takes; NaN if Z has any."""
    n, d = Z.shape
    Z = Z.detach().double()
    if not Z.isfinite().all():
        return math.nan
    eigenvalues = 1 + d / (n * eps_sq) * torch.linalg.eigvalsh(_small_gram(Z))
    return float(eigenvalues[-1] / (eigenvalues[0] if d <= n else 1))


def _small_gram(Z: Tensor) -> Tensor:
    """ZᵀZ or ZZᵀ, whichever is smaller: they share their non-zero eigenvalues."""
    n, d = Z.shape
    return Z.T @ Z if d <= n else Z @ Z.T


@full_precision
def compression(Z: Tensor, Pi: Tensor, eps_sq: float) -> Tensor:
    """R_c(Z, Π) = Σ_j tr(Π_j)/(2n) logdet(I + d/(tr(Π_j) ε²) Zᵀ Π_j Z), in nats; scalar.

    Π_j is the diagonal matrix of column j of Pi [Chu24, the compression term]. Pi is (n, m): with
    m = n it is the whole sum; any m of the columns give their share of it, so that columns can be
    spread over workers or sampled (times n/m, which is unbiased). Value and gradients are exact.
    Columns are processed in blocks, so that memory is at most HELD_NUMBERS for any n, m and d.
    """
    value: Tensor = _Compression.apply(Z, Pi, eps_sq)
    return value


class _Compression(torch.autograd.Function):
    """The sum over columns and both of its gradients in one pass: all need the factors of M_j.

    With M_j = I + α_j Zᵀ Π_j Z, t_j = tr(Π_j), α_j = d/(t_j ε²), q_ij = z_iᵀ M_j⁻¹ z_i:

        ∂/∂z_i   = d/(n ε²) Σ_j π_ij M_j⁻¹ z_i
        ∂/∂π_ij  = [logdet M_j − α_j Σ_l π_lj q_lj + d/ε² · q_ij] / (2n)

    (the middle term is d − tr M_j⁻¹). logdet M_j, q and the first sum are computed by features, in
    3nd² + 4/3 d³ operations per column, or by samples, in 4/3 n³; whichever is less.
    """

    @staticmethod
    def forward(ctx: Any, Z: Tensor, Pi: Tensor, eps_sq: float) -> Tensor:
        n, d = Z.shape
        P = Pi.T.clamp(min=FLOOR).contiguous()  # (m, n)
        t = P.sum(1)  # (m,)
        alpha = d / (t * eps_sq)
        sums = _by_samples if 4 * n**3 < 9 * n * d**2 + 4 * d**3 else _by_features
        logdets, quadratic, pulled = sums(Z, P, alpha)  # (m,), (m, n), (n, d)
        per_column = logdets - alpha * (P * quadratic).sum(1)
        grad_Pi = (per_column[:, None] + (d / eps_sq) * quadratic).T / (2 * n)
        ctx.save_for_backward((d / (n * eps_sq)) * pulled, grad_Pi)
        return (t * logdets).sum() / (2 * n)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *grad: Tensor) -> tuple[Tensor, Tensor, None]:
        grad_Z, grad_Pi = ctx.saved_tensors
        return grad[0] * grad_Z, grad[0] * grad_Pi, None


def _by_features(Z: Tensor, P: Tensor, alpha: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """logdet M_j (m,), q_ij (m, n) and Σ_j π_ij M_j⁻¹ z_i (n, d), from the (d, d) matrices M_j.

    All are sums over products z_ia z_ib: one matrix multiplication for many columns. They are
    symmetric, so only b ≤ a is computed, one strip of a at a time.
    """
    d = Z.shape[1]
    logdets, quadratic, pulled = torch.empty_like(alpha), torch.zeros_like(P), torch.zeros_like(Z)
    strips = [slice(a, min(a + STRIP, d)) for a in range(0, d, STRIP)]
    size = max(1, HELD_NUMBERS // d**2)
    for start in range(0, len(P), size):
        weights = P[start : start + size]  # (b, n)
        scaled = alpha[start : start + size, None] * weights
        M = P.new_empty(len(weights), d, d)
        for a in strips:
            products = Z[:, a, None] * Z[:, None, : a.stop]  # (n, w, a)
            M[:, a, : a.stop] = (scaled @ products.flatten(1)).unflatten(1, products.shape[1:])
        M.diagonal(dim1=1, dim2=2).add_(1)
        logdets[start : start + size] = cholesky.invert(M)
        mean = M.mean(0)  # separately, because sums of M − mean keep more digits
        pulled += weights.sum(0)[:, None] * (Z @ mean)
        quadratic[start : start + size] += (Z @ mean * Z).sum(1)
        for a in strips:
            products = Z[:, a, None] * Z[:, None, : a.stop]
            strip = M[:, a, : a.stop] - mean[a, : a.stop]  # (b, w, a)
            mixed = (weights.T @ strip.flatten(1)).view_as(products)  # Σ_j π_ij M_j⁻¹
            pulled[:, a] += torch.einsum("nwb,nb->nw", mixed, Z[:, : a.stop])
            pulled[:, : a.start] += torch.einsum("nwb,nw->nb", mixed[:, :, : a.start], Z[:, a])
            strip[:, :, : a.start] *= 2  # with their mirror image
            quadratic[start : start + size] += strip.flatten(1) @ products.flatten(1).T
    return logdets, quadratic, pulled


def _by_samples(Z: Tensor, P: Tensor, alpha: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """The same from the (n, n) matrices S_j = (I + α_j Π_j^½ ZZᵀ Π_j^½)⁻¹, of the same determinant.

    Since Π_j^½ Z M_j⁻¹ = S_j Π_j^½ Z, with W_j = Π_j^½ S_j Π_j^½ the sum is Σ_j W_j Z, and q_ij is
    (W_j ZZᵀ)_ii / π_ij. A small π_ij loses no digits of it.
    """
    n = len(Z)
    K = Z @ Z.T
    logdets, quadratic, total = torch.empty_like(alpha), torch.empty_like(P), torch.zeros_like(K)
    size = max(1, cholesky.NEAR_NUMBERS // n**2)
    for start in range(0, len(P), size):
        block = slice(start, start + size)
        scaled = alpha[block, None] * P[block]  # (b, n)
        root = scaled.sqrt()
        S = (K * root[:, :, None]).mul_(root[:, None, :])  # (b, n, n)
        S.diagonal(dim1=1, dim2=2).add_(1)
        logdets[block] = cholesky.invert(S)
        S.mul_(root[:, :, None]).mul_(root[:, None, :])  # α_j W_j
        total += torch.tensordot(1 / alpha[block], S, dims=1)
        quadratic[block] = S.mul_(K).sum(2) / scaled
    return logdets, quadratic, total @ Z


def length_bits(count: Tensor, gram: Tensor, eps_sq: float) -> Tensor:
    """L(X) = (n+d)/2 log₂ det(I + d/(n ε²) XᵀX): bits to code n vectors up to distortion ε².

    [Ma07, eq. 10, without its term for the mean]. From the sufficient statistics alone: `count`
    (...,) and `gram` = XᵀX (..., d, d), which are additive over parts and over merged groups. An
    empty group takes no bits. Returns (...,) in the dtype of `gram`.
    """
    d = gram.shape[-1]
    count = count.to(gram.dtype)
    M = (d / (count.clamp(min=1) * eps_sq))[..., None, None] * gram
    M.diagonal(dim1=-2, dim2=-1).add_(1)
    bits = (count + d) / (2 * math.log(2)) * cholesky.logdet(M)
    return torch.where(count > 0, bits, torch.zeros_like(bits))


def name_bits(count: Tensor, samples: Tensor) -> Tensor:
    """−n_c log₂(n_c / n): bits to say of a group's members, among n samples, that they are in it.

    L(X, cut) = Σ_c [L(X_c) − n_c log₂(n_c / n)] is the length of all [Ma07, eq. 13].
    """
    return -count * (count.clamp(min=1) / samples).log2()


Statistics = tuple[Tensor, Tensor, Tensor]  # count (k,), sum (k, d), Gram (k, d, d), float64


def no_statistics(k: int, d: int) -> Statistics:
    """Statistics of k groups without members."""
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
