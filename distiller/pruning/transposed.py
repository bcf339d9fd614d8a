"""Weights of transposed convolutions: their first dimension is inputs, which most pruners take for filters.

Knows nothing about masks or schedules.
"""

from __future__ import annotations

from collections.abc import Iterable

from torch import nn
from torch.nn.modules.conv import _ConvTransposeNd

from distiller.names import named_modules, owner
from distiller.pruning.settings import ParameterError

__all__ = ["refuse_transposed"]


def refuse_transposed(model: nn.Module, param_names: Iterable[str]) -> None:
    """See to it that none of the parameters is the weight of a transposed convolution.

    Raises:
        ParameterError: one is; names it.
    """
    modules = dict(named_modules(model))
    for name in param_names:
        if isinstance(modules.get(owner(name)), _ConvTransposeNd):
            raise ParameterError(
                f"'{name}' is of a transposed convolution, which has its inputs along dimension 0 and its "
                "outputs along dimension 1: filters and channels would be mistaken for each other; take "
                "StructuredGroupPruner, which tells them apart, or a pruner of single elements",
                name,
            )
