"""Pruners of single elements with a setting per parameter: a threshold, a sensitivity or a level.

Settings are found as `pruning.settings` says: exact name, patterns in order, `*`.
Knows nothing about when they are called or how masks are applied.
"""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Mapping, Sequence
from typing import Any

from torch import Tensor

from distiller.interfaces import Pruner, StepContext
from distiller.pruning.criteria import (
    create_mask_level_criterion,
    create_mask_sensitivity_criterion,
    create_mask_threshold_criterion,
    snap,
    standard_deviation,
)
from distiller.pruning.settings import LevelsByName, NumbersByName, SettingsByName, naming
from distiller.registry import PRUNERS

__all__ = ["MagnitudeParameterPruner", "SensitivityPruner", "SparsityLevelParameterPruner"]


class _SettingPerParameterPruner(Pruner):
    """A pruner whose mask of a parameter depends on one number for that parameter."""

    def __init__(self, name: str, settings: SettingsByName) -> None:
        self.name = name
        self._settings = settings

    def select(self, param_names: Sequence[str]) -> tuple[str, ...]:
        """Every parameter that has a setting."""
        return self._settings.select(param_names)

    def compute_masks(self, params: Mapping[str, Tensor], ctx: StepContext) -> dict[str, Tensor]:
        """Masks of the parameters in `params` that have a setting.

        Raises:
            DistillerError: a parameter holds NaN.
        """
        masks: dict[str, Tensor] = {}
        for param_name, param in params.items():
            setting = self._settings.get(param_name)
            if setting is not None:
                with naming(self.name, param_name):
                    masks[param_name] = self._mask(param_name, param, setting)
        return masks

    @abstractmethod
    def _mask(self, param_name: str, param: Tensor, setting: float) -> Tensor: ...


@PRUNERS.register
class MagnitudeParameterPruner(_SettingPerParameterPruner):
    """Prunes what is not larger in magnitude than a fixed threshold: keeps |w| > threshold.

    Args:
        name: the instance's name in the schedule.
        thresholds: threshold, 0 or more, by parameter name, pattern or `*`. (Distiller asked
            for a `*`; without one only the parameters named are pruned.)

    Raises:
        DistillerError: a threshold below 0.
    """

    def __init__(self, name: str, thresholds: NumbersByName) -> None:
        super().__init__(name, SettingsByName("thresholds", thresholds))

    def _mask(self, param_name: str, param: Tensor, setting: float) -> Tensor:
        return create_mask_threshold_criterion(param, setting)


@PRUNERS.register
class SensitivityPruner(_SettingPerParameterPruner):
    """Prunes what is small against the spread of the dense weights: keeps |w| > sensitivity * stddev.

    The standard deviation of a parameter is measured when its first mask is computed, on the weights
    of that moment, and kept from then on, also through checkpoints. (Distiller lost it on a resume
    and measured again, on weights pruned already.)

    Args:
        name: the instance's name in the schedule.
        sensitivities: sensitivity, 0 or more, by parameter name, pattern or `*`.

    Raises:
        DistillerError: a sensitivity below 0.

    Source: Han et al., "Learning both Weights and Connections for Efficient Neural Networks" (2015).
    """

    def __init__(self, name: str, sensitivities: NumbersByName) -> None:
        super().__init__(name, SettingsByName("sensitivities", sensitivities))
        self._stddevs: dict[str, float] = {}

    def state_dict(self) -> dict[str, Any]:
        """The standard deviation of each parameter seen so far."""
        return {"stddevs": dict(self._stddevs)}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Go on with the standard deviations in `state`."""
        self._stddevs = dict(state["stddevs"])

    def _mask(self, param_name: str, param: Tensor, setting: float) -> Tensor:
        if param_name not in self._stddevs:
            self._stddevs[param_name] = standard_deviation(param)
        return create_mask_sensitivity_criterion(param, setting, self._stddevs[param_name])


@PRUNERS.register
class SparsityLevelParameterPruner(_SettingPerParameterPruner):
    """Prunes a fraction of each parameter: the elements of least magnitude.

    Args:
        name: the instance's name in the schedule.
        levels: sparsity, a fraction in [0, 1), by parameter name, pattern or `*`; a parameter of
            level 0 is left alone.

    Raises:
        DistillerError: a level outside of [0, 1).
    """

    def __init__(self, name: str, levels: LevelsByName) -> None:
        super().__init__(name, _levels(levels))

    @property
    def levels(self) -> dict[str, float]:
        """The levels, by names as given; may be replaced while training (by a policy's `levels`)."""
        return dict(self._settings.values)

    @levels.setter
    def levels(self, levels: Mapping[str, float]) -> None:
        self._settings = _levels(levels)

    def select(self, param_names: Sequence[str]) -> tuple[str, ...]:
        """Every parameter that has a level above 0."""
        return tuple(name for name in super().select(param_names) if self._settings.get(name))

    def target_sparsity(self, ctx: StepContext) -> Mapping[str, float]:
        """The levels, by names as given."""
        return self.levels

    def too_small(self, params: Mapping[str, Tensor], ctx: StepContext) -> tuple[str, ...]:
        """Those of `params` that have too few elements for one to go at their level."""
        levels = {name: self._settings.get(name) or 0 for name in params}
        return tuple(name for name, param in params.items() if int(snap(levels[name] * param.numel())) == 0)

    def compute_masks(self, params: Mapping[str, Tensor], ctx: StepContext) -> dict[str, Tensor]:
        """Masks of the parameters in `params` that have a level above 0.

        Raises:
            DistillerError: a parameter holds NaN.
        """
        return super().compute_masks(
            {name: param for name, param in params.items() if self._settings.get(name)}, ctx
        )

    def _mask(self, param_name: str, param: Tensor, setting: float) -> Tensor:
        return create_mask_level_criterion(param, setting)


def _levels(levels: Mapping[str, float]) -> SettingsByName:
    return SettingsByName("levels", levels, below_one=True)
