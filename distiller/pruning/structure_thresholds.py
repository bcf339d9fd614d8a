"""Pruning of whole structures by a threshold on their magnitude.

What a structure is, and how it is measured, is in `pruning.criteria`.
Knows nothing about when it is called or how masks are applied.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Annotated, Any, Literal

from torch import Tensor, nn

from distiller.errors import DistillerError, did_you_mean
from distiller.interfaces import Pruner, StepContext
from distiller.names import named_parameters, resolve_all, strip_wrappers
from distiller.pruning.criteria import group_count, group_threshold_mask
from distiller.pruning.settings import LARGEST, check_number, is_listed, naming, some_by_name
from distiller.registry import PRUNERS
from distiller.signatures import Checked

__all__ = ["StructureParameterPruner"]


_GROUPS = ("2D", "Rows", "Cols", "3D", "Filters", "Channels", "4D")


def _regime(value: Sequence[Any], where: str = "") -> tuple[float, str]:
    """(threshold, group type), checked; `where` begins the text of a refusal."""
    colon = f"{where}: " if where else ""
    is_pair = len(value) == 2 and isinstance(value[0], int | float) and isinstance(value[1], str)
    if not is_pair or isinstance(value[0], bool):
        raise DistillerError(f"{where} must be [threshold, group type], got {list(value)!r}".lstrip())
    threshold = check_number(f"{colon}the threshold", value[0])
    if value[1] not in _GROUPS:
        raise DistillerError(
            f"{colon}the group type must be one of {', '.join(_GROUPS)}, got '{value[1]}'"
            + did_you_mean(value[1], _GROUPS)
        )
    return float(threshold), value[1]


_PAIR = Checked(
    _regime,
    {
        "prefixItems": [{"type": "number", "minimum": 0, "maximum": LARGEST}, {"enum": list(_GROUPS)}],
        "minItems": 2,
        "maxItems": 2,
    },
)


@PRUNERS.register
class StructureParameterPruner(Pruner):
    """Prunes the structures whose magnitude is not larger than a fixed threshold.

    Args:
        name: the instance's name in the schedule.
        model: the model, whose weights must have the structures asked for.
        reg_regims: [threshold, group type] by parameter name or shell pattern; the threshold is 0 or more,
            the group type '2D', 'Rows', 'Cols', '3D', 'Filters', 'Channels' or '4D' (`pruning.criteria`).
            Of several patterns the first that fits counts.
        threshold_criteria: 'Max' for the largest magnitude within the structure, 'Mean_Abs' for the mean.

    Raises:
        DistillerError: an entry of another form, a threshold out of range, or a weight without
            such structures.
        UnknownNameError: a name or pattern that matches no parameter of the model.
    """

    reads_dimensions = True

    def __init__(
        self,
        name: str,
        model: nn.Module,
        reg_regims: Annotated[dict[str, Annotated[list[Any], _PAIR]], some_by_name],
        threshold_criteria: Literal["Max", "Mean_Abs"],
    ) -> None:
        self.name = name
        if not reg_regims:
            raise DistillerError(
                "reg_regims: at least one 'parameter: [threshold, group type]' is wanted, got {}"
            )
        if threshold_criteria not in ("Max", "Mean_Abs"):
            raise DistillerError(
                f"threshold_criteria must be 'Max' or 'Mean_Abs', got {threshold_criteria!r}"
            )
        self._regimes = {key: _regime(value, f"reg_regims['{key}']") for key, value in reg_regims.items()}
        self._exact = {strip_wrappers(key): regime for key, regime in self._regimes.items()} | self._regimes
        self.threshold_criteria = threshold_criteria
        params = dict(named_parameters(model))
        for param_name in self.select(list(params)):
            with naming(name, param_name):
                group_count(params[param_name], self._regime_of(param_name)[1])

    def select(self, param_names: Sequence[str]) -> tuple[str, ...]:
        """The parameters that `reg_regims` names, in its order."""
        return resolve_all(self._regimes, param_names)

    def compute_masks(self, params: Mapping[str, Tensor], ctx: StepContext) -> dict[str, Tensor]:
        """Masks of the parameters in `params` that `reg_regims` names.

        Raises:
            DistillerError: a parameter holds NaN.
        """
        masks: dict[str, Tensor] = {}
        for param_name, param in params.items():
            if is_listed(param_name, self._regimes):
                threshold, group_type = self._regime_of(param_name)
                with naming(self.name, param_name):
                    masks[param_name], _ = group_threshold_mask(
                        param, group_type, threshold, self.threshold_criteria
                    )
        return masks

    def _regime_of(self, param_name: str) -> tuple[float, str]:
        """The entry of a listed parameter: by its own name before any pattern."""
        if param_name in self._exact:
            return self._exact[param_name]
        return next(regime for key, regime in self._regimes.items() if is_listed(param_name, [key]))
