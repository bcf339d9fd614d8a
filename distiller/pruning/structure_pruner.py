"""What every pruner of a fraction of the structures (filters, channels, blocks) of its weights shares.

What a structure is, and how many there are, is in `pruning.ranking`; which of them go, in the subclasses.
Knows nothing about when it is called, how masks are applied, or physical removal.
"""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Mapping, Sequence

from torch import Tensor

from distiller.errors import DistillerError
from distiller.interfaces import StepContext
from distiller.names import named_parameters
from distiller.pruning.automated_gradual import SparsityTargetPruner
from distiller.pruning.blocks import read_block_shape
from distiller.pruning.criteria import refuse_nan
from distiller.pruning.ranking import (
    check_structure_type,
    count_structures,
    expand_structures,
    number_to_prune,
)
from distiller.pruning.schedule import SparsitySchedule
from distiller.pruning.settings import Names, is_listed, naming

__all__ = ["StructurePruner"]


class StructurePruner(SparsityTargetPruner):
    """Prunes a fraction of the structures of each of its weights.

    Args:
        name: the instance's name in the schedule.
        group_type: what a structure is: '3D' or 'Filters', 'Channels', 'Rows', 'Blocks'.
        weights: parameter names and shell patterns, or a single one.
        sparsity: the fraction of structures to prune when.
        group_dependency: 'Leader': the first of the weights decides, and the same structures go in all
            of them; each must have as many. None: each decides by itself.
        kwargs: for 'Blocks', and only there: {'block_shape': [repetitions, depth, 1, 1]}
            (`pruning.blocks`).

    Raises:
        DistillerError: an argument out of range, or no weights.
    """

    reads_dimensions = True

    draws = False
    """Whether which structures go is drawn at random."""

    def __init__(
        self,
        name: str,
        group_type: str,
        weights: Names,
        sparsity: SparsitySchedule,
        group_dependency: str | None = None,
        kwargs: Mapping[str, Sequence[int]] | None = None,
    ) -> None:
        super().__init__(name, weights, sparsity)
        check_structure_type(group_type)
        if group_dependency not in (None, "Leader"):
            raise DistillerError(f"group_dependency must be 'Leader' or left out, got '{group_dependency}'")
        if kwargs and group_type != "Blocks":
            raise DistillerError(f"kwargs is for group_type 'Blocks', got it for '{group_type}'")
        self.group_type = group_type
        self.group_dependency = group_dependency
        self.block_shape = read_block_shape(kwargs) if group_type == "Blocks" else None

    def check(self, params: Mapping[str, Tensor]) -> None:
        """Count the structures of each of `params`.

        Raises:
            DistillerError: one has no such structures, or not as many as its leader.
        """
        counts: dict[str, int] = {}
        for param_name, param in params.items():
            with naming(self.name, param_name):
                counts[param_name] = count_structures(param, self.group_type, self.block_shape)
                self._check_count(counts[param_name])
                if self.group_dependency == "Leader":
                    self._check_follower(*next(iter(counts.items())), counts[param_name])

    def _count_to_prune(self, param: Tensor, fraction: float) -> int:
        return number_to_prune(fraction, count_structures(param, self.group_type, self.block_shape))

    def _check_count(self, count: int) -> None:
        """Raise a DistillerError if so many structures cannot be pruned."""

    def _check_follower(self, leader_name: str, leaders: int, count: int) -> None:
        if count != leaders:
            raise DistillerError(
                f"with group_dependency 'Leader' all weights must have as many {self.group_type} as "
                f"the first, '{leader_name}' with {leaders}, got {count}; "
                "give it a pruner of its own"
            )

    @abstractmethod
    def _stay(self, param_name: str, param: Tensor, fraction: float) -> Tensor:
        """The value of the mask for each structure of `param`: 0 or False prunes it. Refuses NaN."""

    def _masks(self, params: Mapping[str, Tensor], ctx: StepContext) -> dict[str, Tensor]:
        if self.group_dependency == "Leader":
            return self._masks_of_leader(params, ctx) if params else {}
        masks: dict[str, Tensor] = {}
        for param_name, param in params.items():
            with naming(self.name, param_name):
                stay = self._stay(param_name, param, self.sparsity.at(ctx))
                masks[param_name] = expand_structures(stay, param, self.group_type, self.block_shape)
        return masks

    def _masks_of_leader(self, params: Mapping[str, Tensor], ctx: StepContext) -> dict[str, Tensor]:
        leader_name, leader = self._leader(params, ctx)
        with naming(self.name, leader_name):
            stay = self._stay(leader_name, leader, self.sparsity.at(ctx))
        masks: dict[str, Tensor] = {}
        for param_name, param in params.items():
            with naming(self.name, param_name):
                refuse_nan(param)
                count = count_structures(param, self.group_type, self.block_shape)
                self._check_follower(leader_name, stay.numel(), count)
                masks[param_name] = expand_structures(stay, param, self.group_type, self.block_shape)
        return masks

    def _leader(self, params: Mapping[str, Tensor], ctx: StepContext) -> tuple[str, Tensor]:
        """The first of the weights: among `params`, or in the model when only others are asked for."""
        first = self.weights[:1]
        for name, param in params.items():
            if is_listed(name, first):
                return name, param
        if self.draws:
            raise DistillerError(
                f"pruner '{self.name}': a leader's random structures are drawn for all weights at once; "
                f"compute the masks of '{first[0]}' and the others in one call"
            )
        for name, param in named_parameters(ctx.model):
            if is_listed(name, first):
                return name, param
        raise DistillerError(f"pruner '{self.name}': no parameter '{first[0]}' to lead the others")
