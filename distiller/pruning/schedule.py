"""How much is to be pruned when: sparsity as a function of the epoch.

Knows nothing about tensors or which parameters are pruned.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Protocol

from distiller.errors import DistillerError
from distiller.interfaces import StepContext
from distiller.pruning.settings import check_fraction

__all__ = ["ConstantSparsity", "GradualSparsity", "SparsitySchedule", "agp_sparsity"]


def agp_sparsity(progress: float, initial: float, final: float) -> float:
    """The sparsity of automated gradual pruning: fast at first, slow towards the end.

        s = s_f + (s_i - s_f) (1 - progress)^3

    Args:
        progress: how much of the pruning has passed, 0..1 (`EpochWindow.progress`).
        initial: s_i, the sparsity at progress 0, a fraction.
        final: s_f, the sparsity at progress 1, a fraction.

    Returns:
        The sparsity, a fraction between `initial` and `final`.

    Source: Zhu and Gupta, "To prune, or not to prune" (arXiv 1710.01878), equation 1.
    """
    return final + (initial - final) * (1 - progress) ** 3


class SparsitySchedule(Protocol):
    """A sparsity that may depend on where training stands."""

    def at(self, ctx: StepContext) -> float:
        """The sparsity aimed at now, a fraction."""
        ...


@dataclass(frozen=True, slots=True)
class ConstantSparsity:
    """The same sparsity at all times.

    Attributes:
        sparsity: a fraction, 0..1.

    Raises:
        DistillerError: out of range.
    """

    sparsity: float

    def __post_init__(self) -> None:
        check_fraction("desired_sparsity", self.sparsity, one_allowed=True)

    def at(self, ctx: StepContext) -> float:
        """The sparsity; `ctx` is not looked at."""
        return self.sparsity


@dataclass(frozen=True, slots=True)
class GradualSparsity:
    """`agp_sparsity` over the epochs of the policy that is active.

    Attributes:
        initial_sparsity: at the policy's first epoch, a fraction in [0, 1).
        final_sparsity: at its last active epoch, a fraction in [0, 1), another than the initial one.

    Raises:
        DistillerError: out of range, or both alike.
    """

    initial_sparsity: float
    final_sparsity: float

    def __post_init__(self) -> None:
        check_fraction("initial_sparsity", self.initial_sparsity, one_allowed=False)
        check_fraction("final_sparsity", self.final_sparsity, one_allowed=False)
        if self.initial_sparsity == self.final_sparsity:
            raise DistillerError(
                f"final_sparsity must differ from initial_sparsity, got {self.final_sparsity!r} for both; "
                "a pruner without a schedule prunes at one level"
            )

    def at(self, ctx: StepContext) -> float:
        """The sparsity in epoch `ctx.epoch` of `ctx.window`."""
        return agp_sparsity(ctx.window.progress(ctx.epoch), self.initial_sparsity, self.final_sparsity)
