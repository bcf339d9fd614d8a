"""Dynamic network surgery: what is pruned may come back.

Knows nothing about when it is called or how masks are applied.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from distiller.errors import DistillerError
from distiller.interfaces import Pruner, StepContext
from distiller.masks import PRUNER_SLOT
from distiller.pruning.criteria import mask_like, refuse_nan, standard_deviation, widened
from distiller.pruning.settings import NotNegative, NumbersByName, SettingsByName, check_number, naming
from distiller.registry import PRUNERS

__all__ = ["SplicingPruner", "splicing_mask"]


def splicing_mask(t: Tensor, previous: Tensor | None, low: float, high: float) -> Tensor:
    """Prune what is small, restore what is large, and leave the rest as it was.

        mask = 0 where |t| < low; 1 where |t| >= high; the previous mask in between

    Args:
        t: any shape.
        previous: the mask so far, shape of `t`; None: nothing is pruned.
        low: 0 or more.
        high: `low` or more.

    Returns:
        The mask.

    Raises:
        DistillerError: `t` holds NaN.

    Source: Guo et al., "Dynamic Network Surgery for Efficient DNNs" (arXiv 1608.04493), equation 3.
    """
    refuse_nan(t)
    magnitudes = t.detach().abs()
    before = torch.ones_like(magnitudes, dtype=torch.bool) if previous is None else previous != 0
    return mask_like(t, (magnitudes >= high) | (before & (magnitudes >= low)))


@PRUNERS.register
class SplicingPruner(Pruner):
    """Prunes weights under a low threshold and restores those that have grown over a high one.

        low  = low_thresh_mult (mean + s stddev)
        high = hi_thresh_mult  (mean + s stddev)
        s = sensitivity (1 + sensitivity_multiplier (epoch - first epoch))

    Mean and standard deviation are those of |w| when the first mask is computed, and kept from then on,
    also through checkpoints. A weight can only come back if it goes on being trained while it is pruned:
    with the policy's `mask_on_forward_only`.

    Args:
        name: the instance's name in the schedule.
        sensitivities: sensitivity, 0 or more, by parameter name, pattern or `*`.
        low_thresh_mult: of the threshold under which weights are pruned, 0 or more.
        hi_thresh_mult: of the threshold from which on weights come back, `low_thresh_mult` or more.
        sensitivity_multiplier: by how much of itself the sensitivity grows each epoch, 0 or more.

    Raises:
        DistillerError: a number out of range.

    Source: Guo et al., "Dynamic Network Surgery for Efficient DNNs" (arXiv 1608.04493).
    """

    def __init__(
        self,
        name: str,
        sensitivities: NumbersByName,
        low_thresh_mult: NotNegative,
        hi_thresh_mult: NotNegative,
        sensitivity_multiplier: NotNegative = 0,
    ) -> None:
        self.name = name
        self._settings = SettingsByName("sensitivities", sensitivities)
        self.low_thresh_mult = check_number("low_thresh_mult", low_thresh_mult)
        self.hi_thresh_mult = check_number("hi_thresh_mult", hi_thresh_mult)
        if low_thresh_mult > hi_thresh_mult:
            raise DistillerError(
                f"low_thresh_mult must not be more than hi_thresh_mult, got {low_thresh_mult!r} and "
                f"{hi_thresh_mult!r}"
            )
        self.sensitivity_multiplier = check_number("sensitivity_multiplier", sensitivity_multiplier)
        self._moments: dict[str, tuple[float, float]] = {}

    def select(self, param_names: Sequence[str]) -> tuple[str, ...]:
        """Every parameter that has a sensitivity."""
        return self._settings.select(param_names)

    def compute_masks(self, params: Mapping[str, Tensor], ctx: StepContext) -> dict[str, Tensor]:
        """Masks of the parameters in `params` that have a sensitivity, from those in `ctx.masks`.

        Raises:
            DistillerError: a parameter holds NaN.
        """
        growth = 1 + self.sensitivity_multiplier * (ctx.epoch - ctx.window.start)
        masks: dict[str, Tensor] = {}
        for param_name, param in params.items():
            sensitivity = self._settings.get(param_name)
            if sensitivity is not None:
                with naming(self.name, param_name):
                    mean, stddev = self._moments_of(param_name, param)
                    threshold = mean + sensitivity * growth * stddev
                    masks[param_name] = splicing_mask(
                        param,
                        ctx.masks[param_name].slots.get(PRUNER_SLOT),
                        threshold * self.low_thresh_mult,
                        threshold * self.hi_thresh_mult,
                    )
        return masks

    def state_dict(self) -> dict[str, Any]:
        """Mean and standard deviation of the magnitudes of each parameter seen so far."""
        return {"moments": {name: list(moments) for name, moments in self._moments.items()}}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Go on with the moments in `state`."""
        self._moments = {name: (mean, stddev) for name, (mean, stddev) in state["moments"].items()}

    def _moments_of(self, param_name: str, param: Tensor) -> tuple[float, float]:
        if param_name not in self._moments:
            magnitudes = widened(param).abs()
            self._moments[param_name] = float(magnitudes.mean()), standard_deviation(magnitudes)
        return self._moments[param_name]
