"""How much a pruner of channel groups takes when: a share of units (of all or each), or the MACs to end with.

Knows nothing about models, groups or masks.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Annotated

from distiller.errors import DistillerError
from distiller.interfaces import StepContext
from distiller.pruning.schedule import agp_sparsity
from distiller.pruning.settings import SettingsByName, check_fraction, check_number, checked_number

__all__ = ["GroupTarget", "Share", "progress_within_epoch"]

Share = Annotated[float, checked_number(above=0, most=1)]
"""A fraction in (0, 1]."""


@dataclass(frozen=True, slots=True)
class GroupTarget:
    """A share to come to, from the beginning or by `agp_sparsity`.

    Attributes:
        is_of_macs: the share of MACs that is left, else the share of units that is gone.
        final: at the end of the policy's window; of several the largest.
        initial: at its beginning; None: `final` from the beginning on.
        levels: the final shares of units by name or pattern of a weight; empty: `final` is that of all.
    """

    is_of_macs: bool
    final: float
    initial: float | None
    levels: Mapping[str, float] = field(default_factory=dict)

    @classmethod
    def of(
        cls,
        final_sparsity: float | None,
        final_macs: float | None,
        initial_sparsity: float | None,
        initial_macs: float | None,
        max_sparsity: float,
        levels: Mapping[str, float] | None = None,
    ) -> GroupTarget:
        """The target that a pruner's arguments of these names say.

        Raises:
            DistillerError: not exactly one of the three targets is given, or a number out of range.
        """
        check_number("max_sparsity", max_sparsity, above=0, most=1)
        targets = {"final_sparsity": final_sparsity, "final_macs": final_macs, "levels": levels}
        given = [argument for argument, value in targets.items() if value is not None]
        if len(given) != 1:
            got = " and ".join(given) or "none of them"
            raise DistillerError(f"needs one of final_sparsity, final_macs and levels, got {got}")
        if final_macs is None:
            if initial_macs is not None:
                raise DistillerError(f"initial_macs goes with final_macs, got it with {given[0]}")
            if initial_sparsity is not None:
                check_fraction("initial_sparsity", initial_sparsity, one_allowed=False)
            if levels is not None:
                SettingsByName("levels", levels, below_one=True)  # refuses none, and what is no share
                for key, level in levels.items():
                    _check_share(f"levels['{key}']", level, max_sparsity)
                return cls(False, max(levels.values()), initial_sparsity, dict(levels))
            assert final_sparsity is not None
            _check_share("final_sparsity", final_sparsity, max_sparsity)
            target = cls(False, final_sparsity, initial_sparsity)
        else:
            if initial_sparsity is not None:
                raise DistillerError("initial_sparsity goes with final_sparsity, got it with final_macs")
            for argument, value in (("final_macs", final_macs), ("initial_macs", initial_macs)):
                if value is not None:
                    check_number(argument, value, above=0, most=1)
            target = cls(True, final_macs, initial_macs)
        if target.initial == target.final:
            kind = "macs" if target.is_of_macs else "sparsity"
            raise DistillerError(
                f"final_{kind} must differ from initial_{kind}, got {target.final!r} for both; "
                f"leave initial_{kind} out to prune at one level"
            )
        return target

    def at(self, ctx: StepContext, final: float) -> float:
        """The share aimed at now, on the way to one of the final shares."""
        if self.initial is None:
            return final
        return agp_sparsity(progress_within_epoch(ctx), self.initial, final)


def _check_share(argument: str, share: float, most: float) -> None:
    check_fraction(argument, share, one_allowed=False)
    if share > most:
        raise DistillerError(f"{argument} must be at most max_sparsity, {most:g}, got {share!r}")


def progress_within_epoch(ctx: StepContext) -> float:
    """How much of the policy's window has passed, 0..1, at this mini-batch.

    At the beginning of an epoch, and outside of the mini-batch loop, that of the epoch
    (`EpochWindow.progress`); from there straight to that of the next.
    """
    now = ctx.window.progress(ctx.epoch)
    if ctx.minibatch is None or not ctx.minibatches_per_epoch:
        return now
    return now + (ctx.window.progress(ctx.epoch + 1) - now) * ctx.minibatch / ctx.minibatches_per_epoch
