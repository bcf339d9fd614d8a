"""Pruners of structures chosen at random: baselines for the ranked ones, and DropFilter.

All draws come from torch's generator for the CPU, so that `torch.manual_seed` and the state that a
checkpoint stores repeat them, on every device.
Knows nothing about when it is called or how masks are applied.
"""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Annotated, Literal

import torch
from torch import Tensor

from distiller.errors import DistillerError
from distiller.interfaces import StepContext
from distiller.norms import l1_norm
from distiller.pruning.criteria import refuse_nan
from distiller.pruning.ranked_structures import RankedStructurePruner
from distiller.pruning.ranking import count_structures, number_to_prune
from distiller.pruning.schedule import ConstantSparsity, GradualSparsity
from distiller.pruning.settings import Fraction, FractionBelowOne, Names
from distiller.pruning.structure_pruner import StructurePruner
from distiller.registry import PRUNERS
from distiller.signatures import Checked

__all__ = [
    "BernoulliFilterPruner",
    "BernoulliFilterPruner_AGP",
    "RandomLevelStructureParameterPruner",
    "RandomRankedFilterPruner",
    "RandomRankedFilterPruner_AGP",
    "bernoulli_structures",
    "random_structures",
]


def random_structures(count: int, fraction: float) -> Tensor:
    """Which of `count` structures stay when floor(fraction * count) of them, drawn at random, go.

    Args:
        count: how many there are.
        fraction: how much is to go, 0..1; never all unless it is 1.

    Returns:
        Booleans, shape (count,), True for a structure that stays.
    """
    stay = torch.ones(count, dtype=torch.bool)
    stay[torch.randperm(count)[: number_to_prune(fraction, count)]] = False
    return stay


def bernoulli_structures(count: int, fraction: float) -> Tensor:
    """Structures dropped independently of each other, and the others scaled up to make up for it.

    Each of `count` structures stays with probability 1 - fraction. Those that stay have the value
    1 / (fraction that stayed), so that the values have mean 1. If none would stay, one drawn at random
    does. (Distiller divided by zero then.)

    Args:
        count: how many there are.
        fraction: the probability to go, 0..1; at 1 all go.

    Returns:
        The values, shape (count,), float64; 0 for a structure that goes.

    Source: Pan et al., "DropFilter" (arXiv 1811.06783), section 3.
    """
    stay = torch.rand(count) >= fraction
    if fraction == 1:
        return stay.zero_().double()
    if not stay.any():
        stay[torch.randint(count, ())] = True
    return stay.double() / stay.double().mean()


def _refuse_no_pair(numbers: Sequence[float]) -> None:
    if len(numbers) != 2:
        raise DistillerError(f"must be [low, high], got {list(numbers)}")


_A_RANGE = Checked(_refuse_no_pair, {"minItems": 2, "maxItems": 2})


@dataclass(frozen=True, slots=True)
class _UniformSparsity:
    """A sparsity drawn anew each time it is asked for."""

    low: float
    high: float

    def at(self, ctx: StepContext) -> float:
        return self.low + (self.high - self.low) * float(torch.rand(()))


@PRUNERS.register
class RandomLevelStructureParameterPruner(RankedStructurePruner):
    """Prunes a random fraction of the structures of each weight, those of least mean magnitude first.

    The fraction is drawn for each weight each time masks are computed; with a leader, once for all.

    Args:
        name: the instance's name in the schedule.
        group_type: what a structure is: '3D' or 'Filters', 'Channels', 'Rows', 'Blocks'.
        sparsity_range: [low, high], between which the fraction is drawn uniformly, 0 <= low <= high <= 1.
        weights: parameter names and shell patterns, or a single one.
        group_dependency: 'Leader' to rank the first of the weights for all of them.
        kwargs: for 'Blocks', and only there: {'block_shape': [repetitions, depth, 1, 1]}.

    Raises:
        DistillerError: an argument out of range.
    """

    norm = l1_norm

    def __init__(
        self,
        name: str,
        group_type: Literal["3D", "Filters", "Channels", "Rows", "Blocks"],
        sparsity_range: Annotated[list[Fraction], _A_RANGE],
        weights: Names,
        group_dependency: Literal["Leader"] | None = None,
        kwargs: dict[str, list[int]] | None = None,
    ) -> None:
        if len(sparsity_range) != 2 or not 0 <= sparsity_range[0] <= sparsity_range[1] <= 1:
            raise DistillerError(
                f"sparsity_range must be [low, high] with 0 <= low <= high <= 1, got {list(sparsity_range)}"
            )
        sparsity = _UniformSparsity(*sparsity_range)
        super().__init__(name, group_type, weights, sparsity, group_dependency, kwargs)
        self.draws = True

    def target_sparsity(self, ctx: StepContext) -> Mapping[str, float]:
        """{}: it is drawn when masks are computed."""
        return {}

    def too_small(self, params: Mapping[str, Tensor], ctx: StepContext) -> tuple[str, ...]:
        """(): the fraction is drawn when masks are computed."""
        return ()


class _RandomFilterPruner(StructurePruner):
    draws = True
    ranks_by_weight = False

    @staticmethod
    @abstractmethod
    def draw(count: int, fraction: float) -> Tensor:
        """The value of the mask for each of `count` filters; each class names the function it draws by."""

    def too_small(self, params: Mapping[str, Tensor], ctx: StepContext) -> tuple[str, ...]:
        """As others do; (), where each filter goes with a probability: any of them may."""
        return () if self.rescales else super().too_small(params, ctx)

    def _stay(self, param_name: str, param: Tensor, fraction: float) -> Tensor:
        refuse_nan(param)
        return self.draw(count_structures(param, self.group_type), fraction)


class _ConstantRandomFilterPruner(_RandomFilterPruner):
    def __init__(
        self,
        name: str,
        group_type: Literal["3D", "Filters"],
        desired_sparsity: Fraction,
        weights: Names,
        group_dependency: Literal["Leader"] | None = None,
    ) -> None:
        _check_filters(group_type)
        super().__init__(name, group_type, weights, ConstantSparsity(desired_sparsity), group_dependency)


class _GradualRandomFilterPruner(_RandomFilterPruner):
    def __init__(
        self,
        name: str,
        initial_sparsity: FractionBelowOne,
        final_sparsity: FractionBelowOne,
        group_type: Literal["3D", "Filters"],
        weights: Names,
        group_dependency: Literal["Leader"] | None = None,
    ) -> None:
        _check_filters(group_type)
        sparsity = GradualSparsity(initial_sparsity, final_sparsity)
        super().__init__(name, group_type, weights, sparsity, group_dependency)


@PRUNERS.register
class RandomRankedFilterPruner(_ConstantRandomFilterPruner):
    """Prunes a fraction of the filters of each weight, drawn at random each time masks are computed.

    Args:
        name: the instance's name in the schedule.
        group_type: '3D' or 'Filters', which are the same.
        desired_sparsity: the fraction of filters to prune, 0..1; all of them only if it is 1.
        weights: parameter names and shell patterns, or a single one.
        group_dependency: 'Leader' to prune the same filters in all of the weights.

    Raises:
        DistillerError: an argument out of range.
    """

    draw = staticmethod(random_structures)


@PRUNERS.register
class RandomRankedFilterPruner_AGP(_GradualRandomFilterPruner):
    """Prunes filters drawn at random, more of them from epoch to epoch (`agp_sparsity`).

    Args:
        name: the instance's name in the schedule.
        initial_sparsity: the fraction of filters at the policy's first epoch, in [0, 1).
        final_sparsity: the fraction of filters at its last active epoch, in [0, 1).
        group_type: '3D' or 'Filters', which are the same.
        weights: parameter names and shell patterns, or a single one.
        group_dependency: 'Leader' to prune the same filters in all of the weights.

    Raises:
        DistillerError: an argument out of range.
    """

    draw = staticmethod(random_structures)


@PRUNERS.register
class BernoulliFilterPruner(_ConstantRandomFilterPruner):
    """Drops each filter with a probability, and scales up the ones that stay (`bernoulli_structures`).

    DropFilter, with the policy's arguments `mini_batch_pruning_frequency`, `discard_masks_at_minibatch_end`,
    `use_double_copies`, `mask_on_forward_only` and `mask_gradients`. Masks hold 1 / (kept fraction) where
    they do not hold 0: without these arguments weights would grow at every step.

    Args:
        name: the instance's name in the schedule.
        group_type: '3D' or 'Filters', which are the same.
        desired_sparsity: the probability to drop a filter, 0..1.
        weights: parameter names and shell patterns, or a single one.
        group_dependency: 'Leader' to drop the same filters in all of the weights.

    Raises:
        DistillerError: an argument out of range.

    Source: Pan et al., "DropFilter" (arXiv 1811.06783).
    """

    rescales = True

    draw = staticmethod(bernoulli_structures)


@PRUNERS.register
class BernoulliFilterPruner_AGP(_GradualRandomFilterPruner):
    """Drops filters with a probability that changes from epoch to epoch (`agp_sparsity`).

    As `BernoulliFilterPruner`, with the arguments and errors of `RandomRankedFilterPruner_AGP`.
    """

    rescales = True

    draw = staticmethod(bernoulli_structures)


def _check_filters(group_type: str) -> None:
    if group_type not in ("3D", "Filters"):
        raise DistillerError(f"group_type must be '3D' or 'Filters', got '{group_type}'")
