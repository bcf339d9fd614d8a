"""Operations as modules, so that statistics, quantizers and summaries can name them.

A network that says `self.residual_eltwiseadd(x, shortcut)` instead of `x + shortcut` has a
module there, with a name and hooks. None of them has parameters.
Knows nothing about quantization or graphs.
"""

from __future__ import annotations

import operator
from collections.abc import Callable, Sequence
from functools import reduce
from typing import Any

import torch
from torch import Tensor, nn

from distiller.branch_points import BranchPoint as BranchPoint  # Distiller has it here

__all__ = [
    "BatchMatmul",
    "Chunk",
    "Concat",
    "EltwiseAdd",
    "EltwiseDiv",
    "EltwiseMult",
    "EltwiseSub",
    "Matmul",
    "Mean",
    "Norm",
    "Split",
    "Stack",
]


class _Eltwise(nn.Module):
    """An element-wise operation on two or more tensors, taken from left to right."""

    _out_of_place: Callable[[Any, Any], Any]
    _in_place: Callable[[Any, Any], Any]

    def __init__(self, inplace: bool = False) -> None:
        super().__init__()
        self.inplace = inplace

    def forward(self, first: Tensor, *others: Tensor) -> Tensor:
        """The operation on `first` and each of `others` in turn; shapes broadcast."""
        return reduce(self._in_place if self.inplace else self._out_of_place, others, first)

    def extra_repr(self) -> str:
        """The settings, for `repr`."""
        return "inplace=True" if self.inplace else ""


class EltwiseAdd(_Eltwise):
    """`a + b + ...`

    Args:
        inplace: write the result into `a`; default False.
    """

    _out_of_place = staticmethod(operator.add)
    _in_place = staticmethod(operator.iadd)


class EltwiseSub(_Eltwise):
    """`a - b - ...`

    Args:
        inplace: write the result into `a`; default False.
    """

    _out_of_place = staticmethod(operator.sub)
    _in_place = staticmethod(operator.isub)


class EltwiseMult(_Eltwise):
    """`a * b * ...`

    Args:
        inplace: write the result into `a`; default False.
    """

    _out_of_place = staticmethod(operator.mul)
    _in_place = staticmethod(operator.imul)


class EltwiseDiv(_Eltwise):
    """`a / b / ...`

    Args:
        inplace: write the result into `a`; default False.
    """

    _out_of_place = staticmethod(operator.truediv)
    _in_place = staticmethod(operator.itruediv)


class Concat(nn.Module):
    """`torch.cat` of the inputs.

    Args:
        dim: along which they are joined; default 1, the channels.
    """

    def __init__(self, dim: int = 1) -> None:
        super().__init__()
        self.dim = dim

    def forward(self, *tensors: Tensor) -> Tensor:
        """Shapes (n, a, ...), (n, b, ...) -> (n, a + b, ...) for `dim` 1."""
        return torch.cat(tensors, dim=self.dim)

    def extra_repr(self) -> str:
        """The settings, for `repr`."""
        return f"dim={self.dim}"


class Stack(nn.Module):
    """`torch.stack` of the inputs.

    Args:
        dim: the new dimension; default 0.
    """

    def __init__(self, dim: int = 0) -> None:
        super().__init__()
        self.dim = dim

    def forward(self, *tensors: Tensor) -> Tensor:
        """k tensors of shape (a, ...) -> (k, a, ...) for `dim` 0."""
        return torch.stack(tensors, dim=self.dim)

    def extra_repr(self) -> str:
        """The settings, for `repr`."""
        return f"dim={self.dim}"


class Chunk(nn.Module):
    """`torch.chunk`: one tensor in a number of parts.

    Args:
        chunks: how many; the last may be smaller.
        dim: along which it is cut; default 0.
    """

    def __init__(self, chunks: int, dim: int = 0) -> None:
        super().__init__()
        self.chunks = chunks
        self.dim = dim

    def forward(self, x: Tensor) -> tuple[Tensor, ...]:
        """The parts, views of `x`."""
        return torch.chunk(x, self.chunks, dim=self.dim)

    def extra_repr(self) -> str:
        """The settings, for `repr`."""
        return f"chunks={self.chunks}, dim={self.dim}"


class Split(nn.Module):
    """`torch.split`: one tensor in parts of given sizes.

    Args:
        split_size_or_sections: the size of every part but perhaps the last, or all the sizes.
        dim: along which it is cut; default 0.
    """

    def __init__(self, split_size_or_sections: int | Sequence[int], dim: int = 0) -> None:
        super().__init__()
        self.split_size_or_sections = split_size_or_sections
        self.dim = dim

    def forward(self, x: Tensor) -> tuple[Tensor, ...]:
        """The parts, views of `x`."""
        return x.split(self.split_size_or_sections, dim=self.dim)  # type: ignore[arg-type]

    def extra_repr(self) -> str:
        """The settings, for `repr`."""
        return f"split_size_or_sections={self.split_size_or_sections}, dim={self.dim}"


class Matmul(nn.Module):
    """`torch.matmul` of two inputs."""

    def forward(self, a: Tensor, b: Tensor) -> Tensor:
        """Shapes (..., m, k), (..., k, n) -> (..., m, n)."""
        return torch.matmul(a, b)


class BatchMatmul(nn.Module):
    """`torch.bmm` of two inputs."""

    def forward(self, a: Tensor, b: Tensor) -> Tensor:
        """Shapes (batch, m, k), (batch, k, n) -> (batch, m, n)."""
        return torch.bmm(a, b)


class Mean(nn.Module):
    """`torch.mean`.

    Args:
        dim: the dimension or dimensions averaged over; default all.
        keepdim: whether they stay, with size 1; default False.
    """

    def __init__(self, dim: int | tuple[int, ...] | None = None, keepdim: bool = False) -> None:
        super().__init__()
        self.dim = dim
        self.keepdim = keepdim

    def forward(self, x: Tensor) -> Tensor:
        """The mean of `x` over `dim`."""
        return torch.mean(x, dim=self.dim, keepdim=self.keepdim)

    def extra_repr(self) -> str:
        """The settings, for `repr`."""
        return f"dim={self.dim}, keepdim={self.keepdim}"


class Norm(nn.Module):
    """The p-norm of vectors, `(sum |x|^p)^(1/p)`.

    Args:
        p: 'fro' (as 2), or any number, infinity included; default 'fro'.
        dim: the dimension or dimensions that hold the vectors; default all.
        keepdim: whether they stay, with size 1; default False.
    """

    def __init__(
        self, p: float | str = "fro", dim: int | tuple[int, ...] | None = None, keepdim: bool = False
    ) -> None:
        super().__init__()
        self.p = p
        self.dim = dim
        self.keepdim = keepdim

    def forward(self, x: Tensor) -> Tensor:
        """The norm of `x` over `dim`."""
        order = 2 if self.p == "fro" else self.p
        return torch.linalg.vector_norm(x, order, dim=self.dim, keepdim=self.keepdim)

    def extra_repr(self) -> str:
        """The settings, for `repr`."""
        return f"p={self.p}, dim={self.dim}, keepdim={self.keepdim}"
