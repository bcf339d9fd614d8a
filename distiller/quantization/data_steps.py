"""Which steps of post-training quantization look at data, beyond statistics, and with what settings.

Knows nothing about models.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, fields
from typing import Any, TypeVar

from distiller.errors import QuantizationError, UsageError, did_you_mean

T = TypeVar("T")

_EQUALIZATION = ("replace_relu6", "absorb_bias")
_CLIP_SEARCH = ("clip_modes",)
_MIXED_PRECISION = (
    *("average_bits", "weight_bytes", "bit_operations"),
    *("weight_widths", "activation_widths", "metric"),
)
BUDGETS = ("average_bits", "weight_bytes", "bit_operations")
"""The units of a budget of mixed precision."""
_LAPQ = (
    *("method", "maxiter", "maxfev", "basinhopping", "basinhopping_niter"),
    *("init_mode", "init_method", "search_clipping", "minimizer_kwargs"),
)
_ADAROUND = (
    *("iterations", "batch_size", "learning_rate", "regularization"),
    *("warm_start", "beta", "samples", "scales", "seed"),
)


@dataclass(frozen=True, slots=True)
class DataSteps:
    """The steps, in the order in which they are done; `from_plain` makes them of a schedule's mapping.

    A step is None where it is not to be done, else its settings: those that were given.

    Attributes:
        cross_layer_equalization: ranges of layers that follow each other made alike, before statistics are
            collected: {replace_relu6, absorb_bias}.
        mixed_precision: a width for each layer under a budget: one of average_bits (of the weights that are
            quantized), weight_bytes and bit_operations; weight_widths, activation_widths, metric.
        clip_search: the clip mode of each layer in turn: {clip_modes}.
        mse_weight_scales: scales of weights by least squared error; no settings.
        lapq: scales of all layers by the model's loss: the settings of `LapqSettings`.
        adaround: rounding of weights learned layer by layer: the settings of `AdaRoundSettings`.
        bias_correction: the mean error of each channel taken from its bias; no settings.
    """

    cross_layer_equalization: Mapping[str, Any] | None = None
    mixed_precision: Mapping[str, Any] | None = None
    clip_search: Mapping[str, Any] | None = None
    mse_weight_scales: Mapping[str, Any] | None = None
    lapq: Mapping[str, Any] | None = None
    adaround: Mapping[str, Any] | None = None
    bias_correction: Mapping[str, Any] | None = None

    @classmethod
    def from_plain(cls, plain: Mapping[str, Any] | None, where: str = "steps") -> DataSteps:
        """The steps that a mapping asks for: a step's name -> true, false, null or its settings.

        Args:
            plain: None: no steps.
            where: for messages.

        Raises:
            QuantizationError: no such step or setting, or a step that needs settings has none.
        """
        if plain is None:
            return cls()
        if not isinstance(plain, Mapping):
            raise QuantizationError(f"{where}: must map steps to true or their settings, got {plain!r}")
        known = [field.name for field in fields(cls)]
        for step in plain:
            if step not in known:
                hint = did_you_mean(str(step), known) or f"; there are {', '.join(known)}"
                raise QuantizationError(f"{where}: no step '{step}'{hint}")
        given = {step: _settings(step, value, where) for step, value in plain.items()}
        steps = cls(**given)
        budgets = [key for key in BUDGETS if key in (steps.mixed_precision or {})]
        if steps.mixed_precision is not None and len(budgets) != 1:
            raise QuantizationError(
                f"{where}.mixed_precision: needs one budget of {', '.join(BUDGETS)}, "
                f"got {' and '.join(budgets) or 'none'}"
            )
        return steps

    @property
    def names(self) -> tuple[str, ...]:
        """The steps that are to be done, in order."""
        return tuple(field.name for field in fields(self) if getattr(self, field.name) is not None)


_KNOWN: Mapping[str, tuple[str, ...]] = {
    "cross_layer_equalization": _EQUALIZATION,
    "mixed_precision": _MIXED_PRECISION,
    "clip_search": _CLIP_SEARCH,
    "mse_weight_scales": (),
    "lapq": _LAPQ,
    "adaround": _ADAROUND,
    "bias_correction": (),
}


def checked(kind: type[T], settings: Mapping[str, Any], where: str) -> T:
    """`kind(**settings)`; what is wrong with a setting is told with the step it is of.

    Raises:
        QuantizationError: a setting is wrong.
    """
    try:
        return kind(**settings)
    except (UsageError, QuantizationError) as error:
        raise QuantizationError(f"{where}: {error}") from error


def _settings(step: str, value: Any, where: str) -> Mapping[str, Any] | None:
    if value is None or value is False:
        return None
    if value is True:
        return {}
    known = _KNOWN[step]
    if not isinstance(value, Mapping):
        wanted = "true or false" if not known else f"true, false or some of {', '.join(known)}"
        raise QuantizationError(f"{where}.{step}: must be {wanted}, got {value!r}")
    for key in value:
        if key not in known:
            hint = did_you_mean(str(key), known) or (
                f"; it takes {', '.join(known)}" if known else "; it has none"
            )
            raise QuantizationError(f"{where}.{step}: no setting '{key}'{hint}")
    return dict(value)
