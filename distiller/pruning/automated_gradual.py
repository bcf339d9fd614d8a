"""Automated gradual pruning of single elements, and what every pruner with one sparsity shares.

Knows nothing about when it is called or how masks are applied.
"""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Iterable, Mapping, Sequence

from torch import Tensor

from distiller.interfaces import Pruner, StepContext
from distiller.names import resolve_all
from distiller.pruning.criteria import create_mask_level_criterion, snap
from distiller.pruning.schedule import GradualSparsity, SparsitySchedule
from distiller.pruning.settings import FractionBelowOne, Names, as_names, is_listed, naming
from distiller.registry import PRUNERS

__all__ = ["AutomatedGradualPruner", "SparsityTargetPruner"]


class SparsityTargetPruner(Pruner):
    """A pruner that brings each of its weights to one sparsity, constant or by a schedule.

    Args:
        name: the instance's name in the schedule.
        weights: parameter names and shell patterns, or a single one.
        sparsity: what to aim at when; `GradualSparsity` makes it an `_AGP` pruner.

    Raises:
        DistillerError: no weights.
    """

    def __init__(self, name: str, weights: Iterable[str] | str, sparsity: SparsitySchedule) -> None:
        self.name = name
        self.weights = as_names(weights)
        self.sparsity = sparsity

    def select(self, param_names: Sequence[str]) -> tuple[str, ...]:
        """The parameters that `weights` names, in its order."""
        return resolve_all(self.weights, param_names)

    def target_sparsity(self, ctx: StepContext) -> Mapping[str, float]:
        """The sparsity aimed at in this epoch, by names as given."""
        return dict.fromkeys(self.weights, self.sparsity.at(ctx))

    def too_small(self, params: Mapping[str, Tensor], ctx: StepContext) -> tuple[str, ...]:
        """Those of `params` that have too few elements, or structures, for one to go in this epoch."""
        fraction = self.sparsity.at(ctx)
        return tuple(name for name, param in params.items() if self._count_to_prune(param, fraction) == 0)

    def compute_masks(self, params: Mapping[str, Tensor], ctx: StepContext) -> dict[str, Tensor]:
        """Masks of the parameters in `params` that `weights` names.

        Raises:
            DistillerError: a parameter holds NaN, or has a shape that cannot be pruned so.
        """
        return self._masks({name: p for name, p in params.items() if is_listed(name, self.weights)}, ctx)

    def _count_to_prune(self, param: Tensor, fraction: float) -> int:
        """How many elements, or structures, of a parameter go."""
        return int(snap(fraction * param.numel()))

    @abstractmethod
    def _masks(self, params: Mapping[str, Tensor], ctx: StepContext) -> dict[str, Tensor]:
        """Masks of `params`, all of which are this pruner's."""


@PRUNERS.register
class AutomatedGradualPruner(SparsityTargetPruner):
    """Prunes the elements of least magnitude, more of them from epoch to epoch (`agp_sparsity`).

    Args:
        name: the instance's name in the schedule.
        initial_sparsity: at the policy's first epoch, a fraction in [0, 1).
        final_sparsity: at its last active epoch, a fraction in [0, 1).
        weights: parameter names and shell patterns, or a single one.

    Raises:
        DistillerError: a sparsity out of range, or both alike.

    Source: Zhu and Gupta, "To prune, or not to prune" (arXiv 1710.01878).
    """

    def __init__(
        self, name: str, initial_sparsity: FractionBelowOne, final_sparsity: FractionBelowOne, weights: Names
    ) -> None:
        super().__init__(name, weights, GradualSparsity(initial_sparsity, final_sparsity))

    def _masks(self, params: Mapping[str, Tensor], ctx: StepContext) -> dict[str, Tensor]:
        sparsity = self.sparsity.at(ctx)
        masks: dict[str, Tensor] = {}
        for param_name, param in params.items():
            with naming(self.name, param_name):
                masks[param_name] = create_mask_level_criterion(param, sparsity)
        return masks
