"""Pruners of filters by the activations that they lead to in training.

Where activations are looked at is in `pruning.activation_sites`.
Knows nothing about when it is called or how masks are applied.
"""

from __future__ import annotations

import weakref
from abc import abstractmethod
from collections.abc import Callable, Mapping

from torch import Tensor, nn
from torch.utils.hooks import RemovableHandle

from distiller.errors import DistillerError
from distiller.graph import model_graph
from distiller.interfaces import StepContext
from distiller.names import named_modules, named_parameters
from distiller.pruning.activation_sites import find_activation
from distiller.pruning.activation_statistics import (
    ActivationSite,
    observe,
    sums_per_channel,
    zeros_per_channel,
)
from distiller.pruning.schedule import SparsitySchedule
from distiller.pruning.scored_filters import ConstantForm, GradualForm, ScoredFilterPruner
from distiller.pruning.settings import Names, naming
from distiller.registry import PRUNERS

__all__ = [
    "ActivationAPoZRankedFilterPruner",
    "ActivationAPoZRankedFilterPruner_AGP",
    "ActivationMeanRankedFilterPruner",
    "ActivationMeanRankedFilterPruner_AGP",
]


class _ActivationRankedFilterPruner(ScoredFilterPruner):
    is_missing_because = "training did not call the layer: take a pruner that does not look at activations"

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
        self._handles: list[RemovableHandle] = []

    @staticmethod
    @abstractmethod
    def measure(activations: Tensor, channel_dim: int) -> Tensor:
        """What is summed up of each channel; each class names the function."""

    def check(self, params: Mapping[str, Tensor]) -> None:
        """Count the filters of each of `params` and, in the model if it was given, find its activations.

        Raises:
            DistillerError: one has no filters, or not as many as its leader, or activations not found.
        """
        super().check(params)
        if self._model is not None:
            self._find(self._model)

    def attach(self, model: nn.Module) -> None:
        """Begin to look at the activations of the weights' filters.

        Raises:
            DistillerError: they are not found.
        """
        self.detach()
        modules = dict(named_modules(model))
        for param_name, site in self._find(model).items():
            module = modules[site.module_name]
            self._handles.append(observe(self, model, module, site.of_input, self._taker(param_name, site)))

    def detach(self) -> None:
        """Look no longer."""
        while self._handles:
            self._handles.pop().remove()

    def after_backward(self, params: Mapping[str, nn.Parameter], ctx: StepContext) -> None:
        """Count the mini-batch."""
        self.seen += 1

    def _find(self, model: nn.Module) -> dict[str, ActivationSite]:
        graph, modules = model_graph(model, type(self).__name__), dict(named_modules(model))
        sites: dict[str, ActivationSite] = {}
        for param_name in self._scored([name for name, _ in named_parameters(model)]):
            with naming(self.name, param_name):
                layer_name, _, kind = param_name.rpartition(".")
                if kind != "weight":
                    raise DistillerError(f"only the weights of a layer have filters, got its '{kind}'")
                _refuse_tied(param_name, modules)
                sites[param_name] = find_activation(graph, modules, layer_name)
        return sites

    def _taker(self, param_name: str, site: ActivationSite) -> Callable[[Tensor], None]:
        me = weakref.proxy(self)

        def take(activations: Tensor) -> None:
            if site.activation is not None:
                activations = site.activation(activations)
            total = me.measure(activations, site.channel_dim)
            me._add(param_name, total, activations.numel() // total.numel())

        return take


def _refuse_tied(param_name: str, modules: Mapping[str, nn.Module]) -> None:
    """Raise a DistillerError if other layers have the parameter too: it has activations in several places."""
    owner_name, _, kind = param_name.rpartition(".")
    param = getattr(modules.get(owner_name), kind, None)
    sharing = [
        name
        for name, module in modules.items()
        if any(other is param for other in module.parameters(recurse=False))
    ]
    if len(sharing) > 1:
        raise DistillerError(
            f"the weight is shared by {' and '.join(sharing)}, and has the activations of all of them; take "
            "a pruner that does not look at activations"
        )


class _ConstantActivationPruner(ConstantForm, _ActivationRankedFilterPruner):
    """At one sparsity."""


class _GradualActivationPruner(GradualForm, _ActivationRankedFilterPruner):
    """At a sparsity that grows."""


@PRUNERS.register
class ActivationAPoZRankedFilterPruner(_ConstantActivationPruner):
    """Prunes a fraction of the filters of each weight, those first whose activations are zero most often.

        APoZ(filter) = zeros among its activations / their number

    Activations are those of the first ReLU behind the layer (over batch norm, dropout, element-wise addition
    and max-pooling), of all images and positions of the mini-batches of training seen since the last masks.

    Args:
        name: the instance's name in the schedule.
        group_type: '3D' or 'Filters', which are the same.
        desired_sparsity: the fraction of filters to prune, 0..1; all of them only if it is 1.
        weights: names and shell patterns, or a single one, of weights of convolutions and linear layers.
        group_dependency: 'Leader' to rank the first of the weights for all of them.
        model: where `check` looks for activations, so that a schedule is refused before it trains; a
            schedule's reader supplies it. Left out, what is wrong shows when the first epoch begins.

    Raises:
        DistillerError: an argument out of range.

    Source: Hu et al., "Network Trimming" (arXiv 1607.03250), equation 1.
    """

    highest_go = True
    measure = staticmethod(zeros_per_channel)


@PRUNERS.register
class ActivationAPoZRankedFilterPruner_AGP(_GradualActivationPruner):
    """Prunes the filters whose activations are zero most often, more of them from epoch to epoch.

    The fraction follows `agp_sparsity`, the ranking is that of `ActivationAPoZRankedFilterPruner`.

    Args:
        name: the instance's name in the schedule.
        initial_sparsity: the fraction of filters at the policy's first epoch, in [0, 1).
        final_sparsity: the fraction of filters at its last active epoch, in [0, 1).
        group_type: '3D' or 'Filters', which are the same.
        weights: names and shell patterns, or a single one, of weights of convolutions and linear layers.
        group_dependency: 'Leader' to rank the first of the weights for all of them.
        model: where `check` looks for activations; a schedule's reader supplies it.

    Raises:
        DistillerError: an argument out of range.

    Source: Hu et al. (arXiv 1607.03250) for the ranking, Zhu and Gupta (arXiv 1710.01878) for the rate.
    """

    highest_go = True
    measure = staticmethod(zeros_per_channel)


@PRUNERS.register
class ActivationMeanRankedFilterPruner(_ConstantActivationPruner):
    """Prunes a fraction of the filters of each weight, those of least mean activation first.

    Which activations these are, `ActivationAPoZRankedFilterPruner` says. (Distiller pruned the filters of
    highest mean activation.)

    Arguments and errors are those of `ActivationAPoZRankedFilterPruner`.

    Source: Molchanov et al., "Pruning Convolutional Neural Networks for Resource Efficient Inference"
    (arXiv 1611.06440), section 2.2, "Activation".
    """

    measure = staticmethod(sums_per_channel)


@PRUNERS.register
class ActivationMeanRankedFilterPruner_AGP(_GradualActivationPruner):
    """Prunes the filters of least mean activation, more of them from epoch to epoch (`agp_sparsity`).

    Arguments and errors are those of `ActivationAPoZRankedFilterPruner_AGP`.

    Source: Molchanov et al. (arXiv 1611.06440) for the ranking, Zhu and Gupta (arXiv 1710.01878) for the
    rate.
    """

    measure = staticmethod(sums_per_channel)
