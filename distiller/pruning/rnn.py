"""Pruning of recurrent networks by a threshold that rises from epoch to epoch.

Knows nothing about when it is called or how masks are applied.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Annotated

from torch import Tensor

from distiller.interfaces import EpochWindow, Pruner, StepContext
from distiller.names import resolve_all
from distiller.pruning.criteria import create_mask_threshold_criterion
from distiller.pruning.settings import (
    LONGEST,
    Names,
    NotNegative,
    as_names,
    check_number,
    check_whole_number,
    checked_whole_number,
    is_listed,
    naming,
)
from distiller.registry import PRUNERS

__all__ = ["BaiduRNNPruner", "rising_threshold"]


def rising_threshold(
    epoch: int, window: EpochWindow, q: float, ramp_epoch_offset: int, ramp_slope_mult: float
) -> float:
    """The threshold at an epoch: rising slowly at first, faster from the ramp on.

        slope = 2 q / (2 (ramp - start) + 3 (end - ramp))
        threshold = slope (epoch - start + 1)                                            before the ramp
        threshold = slope (ramp - start + 1) + ramp_slope_mult slope (epoch - ramp + 1)  from the ramp on

    with ramp = start + ramp_epoch_offset, and end the policy's (`EpochWindow.end`). With a multiplier of
    1.5 it comes to q (1 slope more, if there is a ramp) in the epoch before the end. The frequency of a
    policy does not enter: in the paper's equation the slope is proportional to it and then divided by it.

    Args:
        epoch: from `window.start` on.
        window: the policy's epochs.
        q: the threshold to come to, 0 or more.
        ramp_epoch_offset: epochs from the first one to the ramp, 0 or more; past the window's end it
            counts as the end, and there is no ramp.
        ramp_slope_mult: how many times steeper the ramp is.

    Returns:
        The threshold.

    Source: Narang et al., "Exploring Sparsity in Recurrent Neural Networks" (arXiv 1704.05119),
    section 3 and equation 1.
    """
    end = window.end
    ramp = min(window.start + ramp_epoch_offset, end)
    slope = 2 * q / (2 * (ramp - window.start) + 3 * (end - ramp))
    if epoch < ramp:
        return slope * (epoch - window.start + 1)
    return slope * (ramp - window.start + 1) + ramp_slope_mult * slope * (epoch - ramp + 1)


@PRUNERS.register
class BaiduRNNPruner(Pruner):
    """Prunes what is not larger in magnitude than a threshold that rises (`rising_threshold`).

    Works with a list of `epochs:` too. (Distiller had no frequency then and failed.)

    Args:
        name: the instance's name in the schedule.
        q: the threshold to come to, 0 or more: the magnitude under which 90 % of the weights of a
            trained dense model lie, where 90 % are to be pruned.
        ramp_epoch_offset: epochs from the policy's first one to the ramp, 0 or more; a quarter of them.
        ramp_slope_mult: how many times steeper the ramp is, 0 or more; 1.5 to 2.
        weights: parameter names and shell patterns, or a single one.

    Raises:
        DistillerError: a number below 0, or past all sense, or no weights.

    Source: Narang et al., "Exploring Sparsity in Recurrent Neural Networks" (arXiv 1704.05119).
    """

    def __init__(
        self,
        name: str,
        q: NotNegative,
        ramp_epoch_offset: Annotated[int, checked_whole_number(0)],
        ramp_slope_mult: NotNegative,
        weights: Names,
    ) -> None:
        self.name = name
        self.weights = as_names(weights)
        self.q = check_number("q", q)
        self.ramp_epoch_offset = check_whole_number(
            "ramp_epoch_offset", ramp_epoch_offset, least=0, most=LONGEST
        )
        self.ramp_slope_mult = check_number("ramp_slope_mult", ramp_slope_mult)

    def select(self, param_names: Sequence[str]) -> tuple[str, ...]:
        """The parameters that `weights` names, in its order."""
        return resolve_all(self.weights, param_names)

    def compute_masks(self, params: Mapping[str, Tensor], ctx: StepContext) -> dict[str, Tensor]:
        """Masks of the parameters in `params` that `weights` names.

        Raises:
            DistillerError: a parameter holds NaN.
        """
        threshold = rising_threshold(
            ctx.epoch, ctx.window, self.q, self.ramp_epoch_offset, self.ramp_slope_mult
        )
        masks: dict[str, Tensor] = {}
        for param_name, param in params.items():
            if is_listed(param_name, self.weights):
                with naming(self.name, param_name):
                    masks[param_name] = create_mask_threshold_criterion(param, threshold)
        return masks
