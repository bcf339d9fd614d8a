"""Pruners of filters by the gradients that reach them in training.

Which parameters tell about a filter is in `pruning.filter_gates`.
Knows nothing about when it is called or how masks are applied.
"""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Mapping, Sequence

import torch
from torch import Tensor, nn

from distiller.errors import DistillerError
from distiller.interfaces import StepContext
from distiller.names import named_modules, named_parameters
from distiller.pruning.criteria import widened
from distiller.pruning.filter_gates import gate_parameters, graph_of_norms
from distiller.pruning.schedule import SparsitySchedule
from distiller.pruning.scored_filters import ConstantForm, GradualForm, ScoredFilterPruner
from distiller.pruning.settings import Names, naming
from distiller.registry import PRUNERS

__all__ = [
    "GradientRankedFilterPruner",
    "GradientRankedFilterPruner_AGP",
    "TaylorFORankedFilterPruner",
    "TaylorFORankedFilterPruner_AGP",
    "absolute_loss_removed",
    "loss_removed",
    "squared_loss_removed",
]


def loss_removed(params: Sequence[Tensor], gradients: Sequence[Tensor]) -> Tensor:
    """By how much the loss falls, to first order, when a filter goes: sum(p * g) over what is the filter's.

    It is the gradient of the loss by a gate, a factor of 1, on what the filter puts out.

    Args:
        params: those that the filter's output is linear in, as weight and bias, or gamma and beta; each of
            shape (filters, ...).
        gradients: of the loss by each of them, of its shape.

    Returns:
        One number, of either sign, for each filter; shape (filters,), float64.
    """
    parts = [widened(p) * widened(g) for p, g in zip(params, gradients, strict=True)]
    return torch.stack([part.reshape(len(part), -1).sum(dim=1, dtype=torch.float64) for part in parts]).sum(0)


def absolute_loss_removed(params: Sequence[Tensor], gradients: Sequence[Tensor]) -> Tensor:
    """By how much the loss changes, up or down, to first order, when a filter goes: |`loss_removed`|.

    Arguments and result are those of `loss_removed`.

    Source: Molchanov et al., "Pruning Convolutional Neural Networks for Resource Efficient Inference"
    (arXiv 1611.06440), section 2.2, "Taylor expansion".
    """
    return loss_removed(params, gradients).abs()


def squared_loss_removed(params: Sequence[Tensor], gradients: Sequence[Tensor]) -> Tensor:
    """The square of `loss_removed`, which large changes count more in.

    Arguments and result are those of `loss_removed`.

    Source: Molchanov et al., "Importance Estimation for Neural Network Pruning" (arXiv 1906.10771), the
    joint first-order importance of a set of parameters.
    """
    return loss_removed(params, gradients).square()


class _GradientRankedFilterPruner(ScoredFilterPruner):
    is_missing_because = (
        "no gradient reaches the parameter, or its bias, or the batch norm behind it: train them, or take "
        "another pruner"
    )

    def __init__(
        self,
        name: str,
        group_type: str,
        weights: Names,
        sparsity: SparsitySchedule,
        group_dependency: str | None,
        model: nn.Module | None,
    ) -> None:
        super().__init__(name, group_type, weights, sparsity, group_dependency)
        self._model = model
        self._gates: dict[str, tuple[str, ...]] = {}

    @staticmethod
    @abstractmethod
    def saliency(params: Sequence[Tensor], gradients: Sequence[Tensor]) -> Tensor:
        """The scores of one mini-batch; each class names the function."""

    def check(self, params: Mapping[str, Tensor]) -> None:
        """Count the filters of each of `params` and, in the model if it was given, find what gates them.

        Raises:
            DistillerError: one has no filters, or not as many as its leader, or what gates them is not
                trained, or is a batch norm that does not tell about them.
        """
        super().check(params)
        if self._model is None:
            return
        in_model = dict(named_parameters(self._model))
        for param_name, gate in self._find(self._model).items():
            frozen = [name for name in gate if not in_model[name].requires_grad]
            if frozen:
                with naming(self.name, param_name):
                    raise DistillerError(
                        f"'{frozen[0]}' is not trained (requires_grad is False), and has no gradients to "
                        "rank by; train it, or take another pruner"
                    )

    def attach(self, model: nn.Module) -> None:
        """Find what gates the weights' filters; the gradients come with `after_backward`.

        Raises:
            DistillerError: a batch norm behind them does not tell about them.
        """
        self._gates = self._find(model)

    def detach(self) -> None:
        """Nothing: nothing is on the model."""

    def after_backward(self, params: Mapping[str, nn.Parameter], ctx: StepContext) -> None:
        """Take in the gradients of a mini-batch; parameters that they have not all reached are left out."""
        self.seen += 1
        for name, gate in self._gates.items():
            gating = [ctx.masks.params[part] for part in gate]
            gradients = [param.grad for param in gating if param.grad is not None]
            if len(gradients) == len(gating):
                self._add(name, self.saliency(gating, gradients), 1)

    def _find(self, model: nn.Module) -> dict[str, tuple[str, ...]]:
        graph, modules = graph_of_norms(model, type(self).__name__), dict(named_modules(model))
        names = [name for name, _ in named_parameters(model)]
        gates: dict[str, tuple[str, ...]] = {}
        for param_name in self._scored(names):
            with naming(self.name, param_name):
                gates[param_name] = gate_parameters(param_name, names, graph, modules)
        return gates


class _ConstantGradientPruner(ConstantForm, _GradientRankedFilterPruner):
    """At one sparsity."""


class _GradualGradientPruner(GradualForm, _GradientRankedFilterPruner):
    """At a sparsity that grows."""


@PRUNERS.register
class GradientRankedFilterPruner(_ConstantGradientPruner):
    """Prunes a fraction of the filters of each weight, those first that the loss depends on least.

        score(filter) = mean over mini-batches of |sum(w * gradient) + b * gradient of b|
        score(filter) = mean over mini-batches of |gamma * gradient of gamma + beta * gradient of beta|

    The second where a batch norm alone follows the layer, directly or over ReLUs and poolings. Either is, to
    first order, how much the loss changes when what the filter, or the batch norm, puts out is multiplied by
    zero. Mini-batches are those of training seen since the last masks.

    Distiller took the sums of one mini-batch, those of w also where a batch norm follows, and pruned the
    lowest. Two defects: the loss does not depend on the scale of a filter with a batch norm behind it, so the
    sums are zero there but for rounding; and removal changes the loss by about -sum, so the lowest are those
    whose removal raises it most. The highest sums are no remedy: how steep the loss is at a gate of 1 does
    not tell how far it falls on the way to 0, and in a trained network sums are near zero on average, their
    sign left to chance. What tells is how far from zero they are.

    Args:
        name: the instance's name in the schedule.
        group_type: '3D' or 'Filters', which are the same.
        desired_sparsity: the fraction of filters to prune, 0..1; all of them only if it is 1.
        weights: parameter names and shell patterns, or a single one.
        group_dependency: 'Leader' to rank the first of the weights for all of them.
        model: where `check` looks for batch norms, so that a schedule is refused before it trains; a
            schedule's reader supplies it. Left out, what is wrong shows when the first epoch begins.

    Raises:
        DistillerError: an argument out of range.

    Source: Molchanov et al., "Pruning Convolutional Neural Networks for Resource Efficient Inference"
    (arXiv 1611.06440), section 2.2, "Taylor expansion", for |sum|, there of each image; gates behind batch
    norms as in `TaylorFORankedFilterPruner`.
    """

    saliency = staticmethod(absolute_loss_removed)


@PRUNERS.register
class GradientRankedFilterPruner_AGP(_GradualGradientPruner):
    """Prunes the filters that the loss depends on least, more of them from epoch to epoch (`agp_sparsity`).

    The ranking is that of `GradientRankedFilterPruner`.

    Args:
        name: the instance's name in the schedule.
        initial_sparsity: the fraction of filters at the policy's first epoch, in [0, 1).
        final_sparsity: the fraction of filters at its last active epoch, in [0, 1).
        group_type: '3D' or 'Filters', which are the same.
        weights: parameter names and shell patterns, or a single one.
        group_dependency: 'Leader' to rank the first of the weights for all of them.
        model: where `check` looks for batch norms; a schedule's reader supplies it.

    Raises:
        DistillerError: an argument out of range.
    """

    saliency = staticmethod(absolute_loss_removed)


@PRUNERS.register
class TaylorFORankedFilterPruner(_ConstantGradientPruner):
    """Prunes a fraction of the filters of each weight, those first of least squared first-order importance.

        importance(filter) = mean over mini-batches of (sum(w * gradient) + b * gradient of b)^2
        importance(filter) = mean over mini-batches of (gamma * gradient of gamma + beta * gradient of beta)^2

    The second where a batch norm alone follows the layer, directly or over ReLUs and poolings: the paper's
    gate behind the batch norm. (The sum over the filter's own weights is zero there but for rounding.) It is
    the square of the first-order change of the loss when what the filter, or the batch norm, puts out is
    multiplied by zero, over the mini-batches of training seen since the last masks, and depends on their
    size.

    Arguments and errors are those of `GradientRankedFilterPruner`.

    Source: Molchanov et al., "Importance Estimation for Neural Network Pruning" (arXiv 1906.10771), section
    3, "Taylor-FO", and "Taylor-FO-BN" where a batch norm follows.
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
