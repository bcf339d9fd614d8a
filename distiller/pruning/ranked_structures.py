"""Pruners of whole structures (filters, channels, rows, blocks): those of least norm first.

What a structure is, and how they are ranked, is in `pruning.ranking`.
Knows nothing about when they are called, how masks are applied, or physical removal.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from typing import Annotated, Any, ClassVar, Literal

from torch import Tensor

from distiller.norms import Norm, l1_norm, l2_norm
from distiller.pruning.ranking import (
    check_group_size,
    count_structures,
    expand_structures,
    number_to_prune,
    ranked_structures,
)
from distiller.pruning.schedule import ConstantSparsity, GradualSparsity, SparsitySchedule
from distiller.pruning.settings import (
    LONGEST,
    Fraction,
    FractionBelowOne,
    Names,
    check_fraction,
    check_whole_number,
    checked_whole_number,
)
from distiller.pruning.structure_pruner import StructurePruner
from distiller.registry import PRUNERS

__all__ = [
    "L1RankedStructureParameterPruner",
    "L1RankedStructureParameterPruner_AGP",
    "L2RankedStructureParameterPruner",
    "L2RankedStructureParameterPruner_AGP",
    "RankedStructurePruner",
]


class RankedStructurePruner(StructurePruner):
    """Prunes the structures of least norm of each of its weights.

    Args:
        name: the instance's name in the schedule.
        group_type: what a structure is: '3D' or 'Filters', 'Channels', 'Rows', 'Blocks'.
        weights: parameter names and shell patterns, or a single one.
        sparsity: the fraction of structures to prune when.
        group_dependency: 'Leader': the first of the weights is ranked, and the same structures go in all
            of them; each must have as many. None: each is ranked by itself.
        kwargs: for 'Blocks', and only there: {'block_shape': [repetitions, depth, 1, 1]}.
        noise: the probability that a ranking is disturbed at random, 0..1.
        group_size: how many neighbouring structures stand or fall together.
        rounding_fn: from the number of structures (groups) to prune, a float, to a whole number.

    Raises:
        DistillerError: an argument out of range, or no weights.
    """

    norm: ClassVar[Norm]

    def __init__(
        self,
        name: str,
        group_type: str,
        weights: Names,
        sparsity: SparsitySchedule,
        group_dependency: str | None,
        kwargs: Mapping[str, Sequence[int]] | None = None,
        noise: Fraction = 0.0,
        group_size: int = 1,
        rounding_fn: Callable[[float], int] = math.floor,
    ) -> None:
        super().__init__(name, group_type, weights, sparsity, group_dependency, kwargs)
        check_fraction("noise", noise, one_allowed=True)
        check_whole_number("group_size", group_size, least=1, most=LONGEST)
        self.draws = noise > 0
        self._ranking: dict[str, Any] = {
            "noise": noise,
            "group_size": group_size,
            "rounding_fn": rounding_fn,
            "block_shape": self.block_shape,
        }

    @classmethod
    def rank_and_prune_filters(
        cls,
        fraction_to_prune: float,
        param: Tensor,
        param_name: str | None = None,
        zeros_mask_dict: Mapping[str, Any] | None = None,
        *,
        binary_map: Tensor | None = None,
        group_size: int = 1,
        rounding_fn: Callable[[float], int] = math.floor,
    ) -> Tensor:
        """Rank filters and set their mask, as in Distiller; arguments of `rank_and_prune_channels`."""
        return cls._rank_and_prune(
            "Filters",
            fraction_to_prune,
            param,
            param_name,
            zeros_mask_dict,
            binary_map,
            group_size,
            rounding_fn,
        )

    @classmethod
    def rank_and_prune_channels(
        cls,
        fraction_to_prune: float,
        param: Tensor,
        param_name: str | None = None,
        zeros_mask_dict: Mapping[str, Any] | None = None,
        *,
        binary_map: Tensor | None = None,
        group_size: int = 1,
        rounding_fn: Callable[[float], int] = math.floor,
    ) -> Tensor:
        """Rank input channels by the class's norm and set their mask, as in Distiller.

        Args:
            fraction_to_prune: 0..1.
            param: the weights, (out, in, ...).
            param_name: whose entry in `zeros_mask_dict` gets the mask.
            zeros_mask_dict: entries with an attribute `mask`, by parameter name; None to rank only.
            binary_map: a result of an earlier call, to be used instead of ranking.
            group_size: how many neighbouring channels stand or fall together.
            rounding_fn: from the number of groups to prune, a float, to a whole number.

        Returns:
            One value per channel, dtype of `param`: 1 for a channel that stays.

        Raises:
            DistillerError: as `ranked_structures`.
        """
        return cls._rank_and_prune(
            "Channels",
            fraction_to_prune,
            param,
            param_name,
            zeros_mask_dict,
            binary_map,
            group_size,
            rounding_fn,
        )

    @classmethod
    def _rank_and_prune(
        cls,
        group_type: str,
        fraction: float,
        param: Tensor,
        param_name: str | None,
        zeros_mask_dict: Mapping[str, Any] | None,
        binary_map: Tensor | None,
        group_size: int,
        rounding_fn: Callable[[float], int],
    ) -> Tensor:
        if binary_map is None:
            stay = ranked_structures(
                param, group_type, fraction, cls.norm, group_size=group_size, rounding_fn=rounding_fn
            )
            binary_map = stay.to(param.dtype)
        if zeros_mask_dict is not None and param_name is not None:
            zeros_mask_dict[param_name].mask = expand_structures(binary_map, param, group_type)
        return binary_map

    def _count_to_prune(self, param: Tensor, fraction: float) -> int:
        groups = count_structures(param, self.group_type, self.block_shape) // self._ranking["group_size"]
        return number_to_prune(fraction, groups, self._ranking["rounding_fn"])

    def _check_count(self, count: int) -> None:
        check_group_size(self._ranking["group_size"], count, self.group_type)

    def _stay(self, param_name: str, param: Tensor, fraction: float) -> Tensor:
        return ranked_structures(param, self.group_type, fraction, self.norm, **self._ranking)


class _ConstantRankedStructurePruner(RankedStructurePruner):
    def __init__(
        self,
        name: str,
        group_type: Literal["3D", "Filters", "Channels", "Rows", "Blocks"],
        desired_sparsity: Fraction,
        weights: Names,
        group_dependency: Literal["Leader"] | None = None,
        kwargs: dict[str, list[int]] | None = None,
        noise: Fraction = 0.0,
        group_size: Annotated[int, checked_whole_number(1)] = 1,
        rounding_fn: Callable[[float], int] = math.floor,
    ) -> None:
        super().__init__(
            name,
            group_type,
            weights,
            ConstantSparsity(desired_sparsity),
            group_dependency,
            kwargs,
            noise,
            group_size,
            rounding_fn,
        )


class _GradualRankedStructurePruner(RankedStructurePruner):
    def __init__(
        self,
        name: str,
        initial_sparsity: FractionBelowOne,
        final_sparsity: FractionBelowOne,
        group_type: Literal["3D", "Filters", "Channels", "Rows", "Blocks"],
        weights: Names,
        group_dependency: Literal["Leader"] | None = None,
        kwargs: dict[str, list[int]] | None = None,
    ) -> None:
        super().__init__(
            name,
            group_type,
            weights,
            GradualSparsity(initial_sparsity, final_sparsity),
            group_dependency,
            kwargs,
        )


@PRUNERS.register
class L1RankedStructureParameterPruner(_ConstantRankedStructurePruner):
    """Prunes a fraction of the structures of each weight, those of least mean magnitude first.

    Args:
        name: the instance's name in the schedule.
        group_type: what a structure is: '3D' or 'Filters', 'Channels', 'Rows', 'Blocks'.
        desired_sparsity: the fraction of structures to prune, 0..1; all of them only if it is 1.
        weights: parameter names and shell patterns, or a single one.
        group_dependency: 'Leader' to rank the first of the weights for all of them.
        kwargs: for 'Blocks', and only there: {'block_shape': [repetitions, depth, 1, 1]}.
        noise: the probability that a ranking is disturbed, 0..1: each magnitude is multiplied by a draw
            from N(0, 1), of torch's generator.
        group_size: how many neighbouring structures stand or fall together, default 1.
        rounding_fn: from the number of structures (groups) to prune, a float, to a whole number.

    Raises:
        DistillerError: an argument out of range.

    Source: Li et al., "Pruning Filters for Efficient ConvNets" (arXiv 1608.08710), section 3.1.
    """

    norm = l1_norm


@PRUNERS.register
class L2RankedStructureParameterPruner(_ConstantRankedStructurePruner):
    """Prunes a fraction of the structures of each weight, those of least Euclidean norm first.

    Arguments and errors are those of `L1RankedStructureParameterPruner`.
    """

    norm = l2_norm


@PRUNERS.register
class L1RankedStructureParameterPruner_AGP(_GradualRankedStructurePruner):
    """Prunes the structures of least mean magnitude, more of them from epoch to epoch (`agp_sparsity`).

    Args:
        name: the instance's name in the schedule.
        initial_sparsity: the fraction of structures at the policy's first epoch, in [0, 1).
        final_sparsity: the fraction of structures at its last active epoch, in [0, 1).
        group_type: what a structure is: '3D' or 'Filters', 'Channels', 'Rows', 'Blocks'.
        weights: parameter names and shell patterns, or a single one.
        group_dependency: 'Leader' to rank the first of the weights for all of them.
        kwargs: for 'Blocks', and only there: {'block_shape': [repetitions, depth, 1, 1]}.

    Raises:
        DistillerError: an argument out of range.

    Source: Li et al. (arXiv 1608.08710) for the ranking, Zhu and Gupta (arXiv 1710.01878) for the rate.
    """

    norm = l1_norm


@PRUNERS.register
class L2RankedStructureParameterPruner_AGP(_GradualRankedStructurePruner):
    """Prunes the structures of least Euclidean norm, more of them from epoch to epoch (`agp_sparsity`).

    Arguments and errors are those of `L1RankedStructureParameterPruner_AGP`.
    """

    norm = l2_norm
