"""Pruners of filters by the gradients that reach them in training.

Knows nothing about when it is called or how masks are applied.
"""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Mapping
from typing import Literal

import torch
from torch import Tensor, nn

from distiller.interfaces import StepContext
from distiller.pruning.criteria import widened
from distiller.pruning.schedule import ConstantSparsity, GradualSparsity
from distiller.pruning.scored_filters import ScoredFilterPruner
from distiller.registry import PRUNERS

__all__ = [
    "GradientRankedFilterPruner",
    "GradientRankedFilterPruner_AGP",
    "TaylorFORankedFilterPruner",
    "TaylorFORankedFilterPruner_AGP",
    "loss_removed",
    "squared_loss_removed",
]


def loss_removed(weights: Tensor, gradients: Tensor) -> Tensor:
    """By how much the loss falls, to first order, when a filter goes: sum(w * g) over the filter.

    Args:
        weights: shape (filters, ...).
        gradients: of the loss by the weights, of their shape.

    Returns:
        One number, of either sign, for each filter; shape (filters,), float64.
    """
    return (widened(weights) * widened(gradients)).flatten(1).sum(dim=1, dtype=torch.float64)


def squared_loss_removed(weights: Tensor, gradients: Tensor) -> Tensor:
    """The square of `loss_removed`: how much the loss changes, up or down, when a filter goes.

    Arguments and result are those of `loss_removed`.

    Source: Molchanov et al., "Importance Estimation for Neural Network Pruning" (arXiv 1906.10771), the
    joint first-order importance of a set of parameters.
    """
    return loss_removed(weights, gradients).square()


class _GradientRankedFilterPruner(ScoredFilterPruner):
    is_missing_because = "no gradient reaches the parameter: train it, or take another pruner"

    @staticmethod
    @abstractmethod
    def saliency(weights: Tensor, gradients: Tensor) -> Tensor:
        """The scores of one mini-batch; each class names the function."""

    def attach(self, model: nn.Module) -> None:
        """Nothing: gradients come with `after_backward`."""

    def detach(self) -> None:
        """Nothing."""

    def after_backward(self, params: Mapping[str, nn.Parameter], ctx: StepContext) -> None:
        """Take in the gradients of a mini-batch; parameters that none has reached are left out."""
        self.seen += 1
        for name in self._scored(list(params)):
            gradients = params[name].grad
            if gradients is not None:
                self._add(name, self.saliency(params[name], gradients), 1)


class _ConstantGradientPruner(_GradientRankedFilterPruner):
    def __init__(
        self,
        name: str,
        group_type: Literal["3D", "Filters"],
        desired_sparsity: float,
        weights: list[str] | str,
        group_dependency: Literal["Leader"] | None = None,
    ) -> None:
        super().__init__(name, group_type, weights, ConstantSparsity(desired_sparsity), group_dependency)


class _GradualGradientPruner(_GradientRankedFilterPruner):
    def __init__(
        self,
        name: str,
        initial_sparsity: float,
        final_sparsity: float,
        group_type: Literal["3D", "Filters"],
        weights: list[str] | str,
        group_dependency: Literal["Leader"] | None = None,
    ) -> None:
        sparsity = GradualSparsity(initial_sparsity, final_sparsity)
        super().__init__(name, group_type, weights, sparsity, group_dependency)


@PRUNERS.register
class GradientRankedFilterPruner(_ConstantGradientPruner):
    """Prunes a fraction of the filters of each weight, those of least sum(w * gradient) first.

        score(filter) = mean over mini-batches of sum(w * gradient)

    Distiller's ranking; it looked at the gradient of one mini-batch, here it is the mean over those of
    training seen since the last masks. The score has a sign: of least score are filters that the loss, to
    first order, rises by removing. `TaylorFORankedFilterPruner` ranks by how much the loss changes, up or
    down.

    Args:
        name: the instance's name in the schedule.
        group_type: '3D' or 'Filters', which are the same.
        desired_sparsity: the fraction of filters to prune, 0..1; all of them only if it is 1.
        weights: parameter names and shell patterns, or a single one.
        group_dependency: 'Leader' to rank the first of the weights for all of them.

    Raises:
        DistillerError: an argument out of range.
    """

    saliency = staticmethod(loss_removed)


@PRUNERS.register
class GradientRankedFilterPruner_AGP(_GradualGradientPruner):
    """Prunes the filters of least sum(w * gradient), more of them from epoch to epoch (`agp_sparsity`).

    The ranking is that of `GradientRankedFilterPruner`.

    Args:
        name: the instance's name in the schedule.
        initial_sparsity: the fraction of filters at the policy's first epoch, in [0, 1).
        final_sparsity: the fraction of filters at its last active epoch, in [0, 1).
        group_type: '3D' or 'Filters', which are the same.
        weights: parameter names and shell patterns, or a single one.
        group_dependency: 'Leader' to rank the first of the weights for all of them.

    Raises:
        DistillerError: an argument out of range.
    """

    saliency = staticmethod(loss_removed)


@PRUNERS.register
class TaylorFORankedFilterPruner(_ConstantGradientPruner):
    """Prunes a fraction of the filters of each weight, those first that the loss depends on least.

        importance(filter) = mean over mini-batches of sum(w * gradient)^2

    The square of the first-order change of the loss when the filter goes, over the mini-batches of training
    seen since the last masks. It depends on the size of the mini-batches.

    Arguments and errors are those of `GradientRankedFilterPruner`.

    Source: Molchanov et al., "Importance Estimation for Neural Network Pruning" (arXiv 1906.10771),
    "Taylor-FO".
    """

    saliency = staticmethod(squared_loss_removed)


@PRUNERS.register
class TaylorFORankedFilterPruner_AGP(_GradualGradientPruner):
    """Prunes the filters of least first-order importance, more of them from epoch to epoch (`agp_sparsity`).

    The ranking is that of `TaylorFORankedFilterPruner`. Arguments and errors are those of
    `GradientRankedFilterPruner_AGP`.

    Source: Molchanov et al. (arXiv 1906.10771) for the ranking, Zhu and Gupta (arXiv 1710.01878) for the
    rate.
    """

    saliency = staticmethod(squared_loss_removed)
