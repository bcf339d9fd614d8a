"""What the pruners share that rank filters by scores collected in training.

Knows nothing about what the scores are, when it is called or how masks are applied.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, Literal

import torch
from torch import Tensor, nn

from distiller.errors import DistillerError
from distiller.interfaces import DataDrivenPruner
from distiller.pruning.activation_statistics import RunningMean
from distiller.pruning.criteria import lowest, refuse_nan
from distiller.pruning.ranking import number_to_prune
from distiller.pruning.schedule import ConstantSparsity, GradualSparsity, SparsitySchedule
from distiller.pruning.settings import Fraction, FractionBelowOne, Names
from distiller.pruning.structure_pruner import StructurePruner
from distiller.tensor_cuts import TensorCuts

__all__ = ["ConstantForm", "GradualForm", "ScoredFilterPruner", "filters_to_keep", "zeros_first"]


def filters_to_keep(scores: Tensor, weights: Tensor, fraction: float) -> Tensor:
    """Which filters stay when those of lowest score go.

    Of N filters exactly floor(fraction * N) go, but never all of them unless fraction is 1. Filters that are
    zero go first, so that what is pruned stays pruned: batch norm can make a lively activation of an output
    that is zero. Of equal scores the ones of lower index go.

    Args:
        scores: shape (N,).
        weights: shape (N, ...).
        fraction: how much is to go, 0..1.

    Returns:
        Booleans, shape (N,), True for a filter that stays.

    Raises:
        DistillerError: NaN in the scores or weights.
    """
    refuse_nan(weights)
    ranked = zeros_first(scores, weights.detach().flatten(1).ne(0).any(dim=1))
    return ~lowest(ranked, number_to_prune(fraction, ranked.numel()))


def zeros_first(scores: Tensor, is_nonzero: Tensor) -> Tensor:
    """Scores by which what is zero already ranks lowest.

    Args:
        scores: any shape.
        is_nonzero: booleans of that shape.

    Raises:
        DistillerError: NaN in the scores.
    """
    if scores.isnan().any():
        raise DistillerError(
            f"cannot rank by scores, got {int(scores.isnan().sum())} NaN in {scores.numel()} of them; "
            "training has diverged: resume from an earlier checkpoint with a lower learning rate"
        )
    return torch.where(is_nonzero, scores, -torch.inf)


class ScoredFilterPruner(StructurePruner, DataDrivenPruner):
    """Prunes the filters of lowest mean score of each of its weights.

    Args:
        name: the instance's name in the schedule.
        group_type: '3D' or 'Filters', which are the same.
        weights: parameter names and shell patterns, or a single one.
        sparsity: the fraction of filters to prune when.
        group_dependency: 'Leader': the scores of the first of the weights decide for all of them.

    Raises:
        DistillerError: an argument out of range, or no weights.
    """

    ranks_by_weight = False
    highest_go = False
    """Whether the filters of highest score go instead."""
    is_missing_because: str
    """Why scores of a parameter may be missing, and what to do."""

    def __init__(
        self,
        name: str,
        group_type: str,
        weights: Names,
        sparsity: SparsitySchedule,
        group_dependency: str | None,
        model: nn.Module | None = None,
    ) -> None:
        if group_type not in ("3D", "Filters"):
            raise DistillerError(f"group_type must be '3D' or 'Filters', got '{group_type}'")
        super().__init__(name, group_type, weights, sparsity, group_dependency)
        self._model = model
        self._means: dict[str, RunningMean] = {}

    def reset(self) -> None:
        """Forget the scores."""
        self.seen = 0
        self._means = {}

    def state_dict(self) -> dict[str, Any]:
        """Mini-batches seen, and sums of scores by parameter and device."""
        return {"seen": self.seen, "means": {name: mean.state_dict() for name, mean in self._means.items()}}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Go on with the scores in `state`."""
        self.seen = state["seen"]
        self._means = {name: RunningMean.from_state(part) for name, part in state["means"].items()}

    def follow_thinning(self, cuts: TensorCuts) -> None:
        """Go on with the scores of the filters that stay."""
        for name, mean in self._means.items():
            if 0 in (kept := cuts.get(name, {})):
                mean.follow_thinning({0: kept[0]})

    def scores(self, param_name: str) -> Tensor:
        """The mean scores of a parameter's filters so far, shape (filters,), float64.

        Raises:
            DistillerError: there are none.
        """
        if param_name not in self._means:
            raise DistillerError(
                f"there are no scores to rank by after {self.seen} mini-batches; {self.is_missing_because}"
            )
        return self._means[param_name].mean()

    def _add(self, param_name: str, total: Tensor, count: int) -> None:
        self._means.setdefault(param_name, RunningMean()).add(total, count)

    def _scored(self, param_names: Sequence[str]) -> tuple[str, ...]:
        """The parameters whose scores are needed, among all of the model's."""
        names = self.select(param_names)
        return names[:1] if self.group_dependency == "Leader" else names

    def _stay(self, param_name: str, param: Tensor, fraction: float) -> Tensor:
        scores = self.scores(param_name).to(param.device)
        return filters_to_keep(-scores if self.highest_go else scores, param, fraction)


class ConstantForm(ScoredFilterPruner):
    """The constructor of a pruner at one sparsity; stands before the pruner among its bases."""

    def __init__(
        self,
        name: str,
        group_type: Literal["3D", "Filters"],
        desired_sparsity: Fraction,
        weights: Names,
        group_dependency: Literal["Leader"] | None = None,
        model: nn.Module | None = None,
    ) -> None:
        sparsity = ConstantSparsity(desired_sparsity)
        super().__init__(name, group_type, weights, sparsity, group_dependency, model)


class GradualForm(ScoredFilterPruner):
    """The constructor of a pruner at a sparsity that grows; stands before the pruner among its bases."""

    def __init__(
        self,
        name: str,
        initial_sparsity: FractionBelowOne,
        final_sparsity: FractionBelowOne,
        group_type: Literal["3D", "Filters"],
        weights: Names,
        group_dependency: Literal["Leader"] | None = None,
        model: nn.Module | None = None,
    ) -> None:
        sparsity = GradualSparsity(initial_sparsity, final_sparsity)
        super().__init__(name, group_type, weights, sparsity, group_dependency, model)
