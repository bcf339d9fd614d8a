"""The norms that structures are compared by, as callables with names.

Knows nothing about what is a structure.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

__all__ = ["Norm", "l1_norm", "l2_norm", "max_norm"]


@dataclass(frozen=True, slots=True)
class Norm:
    """A norm of the vectors along one dimension; `str()` gives its name.

    Attributes:
        name: as in Distiller: "L1", "L2" or "Max".
        of_vectors: (tensor, dimension) -> norms, without that dimension.
    """

    name: str
    of_vectors: Callable[[Tensor, int], Tensor]

    def __call__(self, t: Tensor, dim: int = 1) -> Tensor:
        """The norms of the vectors along `dim`; shape of `t` without `dim`."""
        return self.of_vectors(t, dim)

    def __str__(self) -> str:
        return self.name


l1_norm = Norm("L1", lambda t, dim: torch.linalg.vector_norm(t, 1, dim))
l2_norm = Norm("L2", lambda t, dim: torch.linalg.vector_norm(t, 2, dim))
max_norm = Norm("Max", lambda t, dim: torch.linalg.vector_norm(t, float("inf"), dim))
