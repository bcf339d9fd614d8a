"""Matrices and kernels as products of smaller ones: tensors in, factors out.

    truncated_svd            W (m, n)          ~ L (m, r) R (r, n)
    whitened_svd             the same, of least error on given inputs
    low_rank_plus_sparse     W (m, n)          ~ L R + S, S with a given number of non-zero elements
    spatial_svd              W (m, n, kh, kw)  ~ a vertical kernel, then a horizontal one
    channel_svd              W (m, n, *kernel) ~ the same kernel to r channels, then 1x1
    tucker2                  W (m, n, *kernel) ~ 1x1, a core with the kernel, 1x1

Everything is computed in float64 and returned in the type of the weight. The root of every singular value
goes into each factor of a pair.
Knows nothing about layers, models or how ranks are chosen.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor

from distiller.errors import DistillerError, UsageError
from distiller.schedule_yaml import shown

__all__ = [
    "channel_svd",
    "low_rank_plus_sparse",
    "mode_energies",
    "singular_values",
    "spatial_svd",
    "truncated_svd",
    "tucker2",
    "whitened_svd",
]

DAMPING = 1e-6
"""What is added to the second moments of inputs, as a fraction of their mean: directions never seen."""


def truncated_svd(weight: Tensor, rank: int) -> tuple[Tensor, Tensor]:
    """The product of rank `rank` that is nearest to a matrix: min ||W - L R||_F.

    Args:
        weight: (m, n).
        rank: 1 to min(m, n).

    Returns:
        L (m, rank) and R (rank, n).

    Raises:
        UsageError: there is no such rank.
        DistillerError: the weight holds NaN or infinity.

    Source: Eckart, Young, "The approximation of one matrix by another of lower rank" (1936).
    """
    left, values, right = _svd(weight, rank)
    root = values.sqrt()
    return (left * root).to(weight), (root[:, None] * right).to(weight)


def whitened_svd(
    weight: Tensor, rank: int, moments: Tensor, damping: float = DAMPING
) -> tuple[Tensor, Tensor]:
    """The product of rank `rank` of least error on inputs X: min ||X (W - L R)^T||_F.

    With C = X^T X + damping * mean(diag(X^T X)) I and C^(1/2) symmetric, the truncated SVD U S V^T of
    W C^(1/2) gives L = U S^(1/2) and R = S^(1/2) V^T C^(-1/2).

    Args:
        weight: (m, n).
        rank: 1 to min(m, n).
        moments: X^T X of the inputs X (samples, n), or a positive multiple of it; (n, n).
        damping: more than 0.

    Returns:
        L (m, rank) and R (rank, n).

    Raises:
        UsageError: there is no such rank.
        DistillerError: the weight or the moments hold NaN or infinity, or the moments are of another size.

    Source: Wang et al., "SVD-LLM: Truncation-aware Singular Value Decomposition for Large Language Model
    Compression" (2024), with the symmetric root in the place of Cholesky's.
    """
    n = weight.shape[1]
    if tuple(moments.shape) != (n, n) or not bool(moments.isfinite().all()):
        raise DistillerError(
            f"whitened SVD: the moments of the inputs must be finite, of shape ({n}, {n}), got shape "
            f"{tuple(moments.shape)}; collect them from inputs of this layer"
        )
    moments = moments.to("cpu", torch.float64)
    mean = float(moments.diagonal().mean())
    scale = mean if mean > 0 else 1.0
    values, vectors = torch.linalg.eigh(moments / scale + damping * torch.eye(n, dtype=torch.float64))
    values = values.clamp(min=damping)
    root = (vectors * values.sqrt()) @ vectors.T
    inverse = (vectors * values.rsqrt()) @ vectors.T
    left, singular, right = _svd(weight.detach().to("cpu", torch.float64) @ root, rank)
    half = singular.sqrt()
    first, second = (left * half), (half[:, None] * right) @ inverse
    return first.to(weight), second.to(weight)


def low_rank_plus_sparse(
    weight: Tensor, rank: int, nonzeros: int, sweeps: int = 20
) -> tuple[Tensor, Tensor, Tensor]:
    """A product of low rank and a sparse matrix that together are near to a matrix: W ~ L R + S.

    In turns, L R becomes the truncated SVD of W - S, and S the `nonzeros` largest elements of W - L R: each
    is the best that there is beside the other, so that ||W - L R - S||_F never rises.

    Args:
        weight: (m, n).
        rank: 1 to min(m, n).
        nonzeros: elements of S, 0 to m * n.
        sweeps: at least 1; fewer are done when the error no longer falls.

    Returns:
        L (m, rank), R (rank, n) and S (m, n).

    Raises:
        UsageError: there is no such rank, or no such number of elements.
        DistillerError: the weight holds NaN or infinity.

    Source: Zhou, Tao, "GoDec: Randomized Low-rank & Sparse Matrix Decomposition in Noisy Case" (2011), with
    an exact SVD in the place of the random one.
    """
    if not 0 <= nonzeros <= weight.numel():
        raise UsageError(
            f"low rank plus sparse: non-zero elements: must be 0 to {weight.numel()}, got {nonzeros}"
        )
    full = weight.detach().to("cpu", torch.float64)
    sparse = torch.zeros_like(full)
    error = math.inf
    for _ in range(sweeps):
        left, values, right = _svd(full - sparse, rank)
        rest = full - (left * values) @ right
        sparse = _largest(rest, nonzeros)
        now = float((rest - sparse).norm())
        if not now < error * (1 - 1e-4):
            break
        error = now
    left, values, right = _svd(full - sparse, rank)
    half = values.sqrt()
    return (left * half).to(weight), (half[:, None] * right).to(weight), sparse.to(weight)


def spatial_svd(weight: Tensor, rank: int) -> tuple[Tensor, Tensor]:
    """A 2-D kernel as a vertical one and then a horizontal one.

        W[o, i, y, x] ~ sum_r horizontal[o, r, 0, x] * vertical[r, i, y, 0]

    Args:
        weight: (m, n, kh, kw).
        rank: 1 to min(n * kh, m * kw).

    Returns:
        vertical (rank, n, kh, 1) and horizontal (m, rank, 1, kw): the nearest of all such pairs.

    Raises:
        UsageError: there is no such rank.
        DistillerError: the weight holds NaN or infinity.

    Source: Jaderberg, Vedaldi, Zisserman, "Speeding up Convolutional Neural Networks with Low Rank
    Expansions" (2014), scheme 2.
    """
    m, n, kh, kw = weight.shape
    left, right = truncated_svd(weight.permute(1, 2, 0, 3).reshape(n * kh, m * kw), rank)
    vertical = left.T.reshape(rank, n, kh, 1)
    horizontal = right.reshape(rank, m, kw).transpose(0, 1).unsqueeze(2)
    return vertical.contiguous(), horizontal.contiguous()


def channel_svd(weight: Tensor, rank: int, moments: Tensor | None = None) -> tuple[Tensor, Tensor]:
    """A kernel as one of the same size with fewer filters, and then a kernel of size 1.

    Args:
        weight: (m, n, *kernel).
        rank: 1 to min(m, n * elements of a kernel).
        moments: X^T X of the patches that the kernel sees, (n * kernel, n * kernel): the error is then least
            on these, as in `whitened_svd`. None: of the weight itself.

    Returns:
        first (rank, n, *kernel) and second (m, rank, 1, ...).

    Raises:
        UsageError: there is no such rank.
        DistillerError: the weight or the moments hold NaN or infinity, or the moments are of another size.

    Source: Zhang et al., "Accelerating Very Deep Convolutional Networks for Classification and Detection"
    (2015), the linear case.
    """
    flat = weight.flatten(1)
    left, right = truncated_svd(flat, rank) if moments is None else whitened_svd(flat, rank, moments)
    ones = [1] * (weight.dim() - 2)
    return right.reshape(rank, *weight.shape[1:]), left.reshape(weight.shape[0], rank, *ones)


def tucker2(weight: Tensor, rank_in: int, rank_out: int, sweeps: int = 10) -> tuple[Tensor, Tensor, Tensor]:
    """A kernel as a 1x1, a core of fewer channels on both sides, and a 1x1.

        W[o, i, ...] ~ sum_ab last[o, b] * core[b, a, ...] * first[a, i]

    The higher-order SVD, and then sweeps of orthogonal iteration, which never raise the error.

    Args:
        weight: (m, n, *kernel).
        rank_in: 1 to min(n, rank_out * elements of a kernel).
        rank_out: 1 to min(m, rank_in * elements of a kernel).
        sweeps: 0 is the higher-order SVD alone; fewer are done when the error no longer falls.

    Returns:
        first (rank_in, n, 1, ...), core (rank_out, rank_in, *kernel) and last (m, rank_out, 1, ...). `first`
        has orthonormal rows and `last` orthonormal columns.

    Raises:
        UsageError: there are no such ranks.
        DistillerError: the weight holds NaN or infinity.

    Source: Kim et al., "Compression of Deep Convolutional Neural Networks for Fast and Low Power Mobile
    Applications" (2016); De Lathauwer et al., "On the best rank-1 and rank-(R1, ..., RN) approximation of
    higher-order tensors" (2000).
    """
    m, n = weight.shape[:2]
    kernel = weight[0, 0].numel()
    most_in, most_out = min(n, rank_out * kernel), min(m, rank_in * kernel)
    if not (1 <= rank_in <= most_in and 1 <= rank_out <= most_out):
        raise UsageError(
            f"tucker2: ranks: must be 1 to {most_in} (in) and 1 to {most_out} (out) beside each other, got "
            f"{rank_in} and {rank_out}"
        )
    full = weight.detach().to("cpu", torch.float64).reshape(m, n, kernel)
    into = _svd(full.transpose(0, 1).reshape(n, m * kernel), rank_in)[0]
    out = _svd(full.reshape(m, n * kernel), rank_out)[0]
    kept = -math.inf
    for _ in range(sweeps):
        narrow = torch.einsum("oik,ia->oak", full, into)
        out = _svd(narrow.reshape(m, -1), rank_out)[0]
        narrow = torch.einsum("oik,ob->bik", full, out)
        into = _svd(narrow.transpose(0, 1).reshape(n, -1), rank_in)[0]
        now = float(torch.einsum("bik,ia->bak", narrow, into).norm())
        if not now > kept * (1 + 1e-9):
            break
        kept = now
    core = torch.einsum("oik,ia,ob->bak", full, into, out)
    ones = [1] * (weight.dim() - 2)
    return (
        into.T.reshape(rank_in, n, *ones).to(weight),
        core.reshape(rank_out, rank_in, *weight.shape[2:]).to(weight),
        out.reshape(m, rank_out, *ones).to(weight),
    )


def singular_values(matrix: Tensor) -> Tensor:
    """The singular values of a matrix, descending, float64 on the CPU.

    Raises:
        DistillerError: it holds NaN or infinity.
    """
    return torch.linalg.svdvals(_finite(matrix))


def mode_energies(weight: Tensor) -> tuple[Tensor, Tensor]:
    """The squared singular values of a kernel's input and output channels, descending, float64.

    Args:
        weight: (m, n, *kernel).
    """
    into = weight.detach().transpose(0, 1).flatten(1)
    return singular_values(into).square(), singular_values(weight.flatten(1)).square()


def _svd(matrix: Tensor, rank: int) -> tuple[Tensor, Tensor, Tensor]:
    """U (m, rank), S (rank,) and V^T (rank, n), float64 on the CPU."""
    most = min(matrix.shape)
    if not 1 <= rank <= most:
        raise UsageError(
            f"SVD: rank: must be 1 to {most} of a matrix {tuple(matrix.shape)}, got {shown(rank)}"
        )
    left, values, right = torch.linalg.svd(_finite(matrix), full_matrices=False)
    return left[:, :rank], values[:rank], right[:rank]


def _finite(matrix: Tensor) -> Tensor:
    if not bool(matrix.isfinite().all()):
        raise DistillerError(
            "SVD: the weight holds NaN or infinity; give weights from before the training diverged"
        )
    return matrix.detach().to("cpu", torch.float64)


def _largest(matrix: Tensor, count: int) -> Tensor:
    """A matrix with all but the `count` elements of largest magnitude at zero."""
    result = torch.zeros_like(matrix).flatten()
    chosen = matrix.abs().flatten().topk(count).indices
    result[chosen] = matrix.flatten()[chosen]
    return result.view_as(matrix)
