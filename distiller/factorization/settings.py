"""What is asked of each layer: settings by name or pattern, as a schedule or a dict has them.

A layer's settings are those of its exact name, else of the first pattern that it matches. `*` and other
patterns stand for the layers that can be factored (in the form asked for), exact names for any.
Knows nothing about ranks that a layer has room for.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, fields
from typing import Any, cast

from torch import nn

from distiller.errors import DistillerError, UnknownNameError, did_you_mean
from distiller.factorization.forms import FORMS, Form, default_form, refusal, require_factorable
from distiller.factorization.replacement import refuse_shared
from distiller.names import is_pattern, named_modules, resolve, strip_wrappers
from distiller.schedule_yaml import shown
from distiller.signatures import Checked

__all__ = ["LAYER_SETTINGS", "LayerSettings", "checked_settings", "layers_of"]

_RANKS = ("rank", "energy", "parameters", "macs")


@dataclass(frozen=True, slots=True)
class LayerSettings:
    """What is asked of one layer; at most one of rank, energy, parameters and macs.

    Attributes:
        form: svd of linear layers; channel, spatial or tucker2 of convolutions.
        rank: a number, or [in, out] of `tucker2`.
        energy: the fraction of the sum of squared singular values that is kept at least, in (0, 1].
        parameters: the fraction of the layer's parameters that it may keep, in (0, 1].
        macs: the same of its MACs.
        sparse: the fraction of the layer's elements that a sparse part beside the product has, in (0, 1).
        whitened: whether the error is least on the layer's inputs, not on its weight.
    """

    form: Form
    rank: int | tuple[int, int] | None = None
    energy: float | None = None
    parameters: float | None = None
    macs: float | None = None
    sparse: float | None = None
    whitened: bool = False

    @property
    def has_rank_of_its_own(self) -> bool:
        """Whether the rank follows from these settings, and not from a budget of all layers."""
        return any(getattr(self, key) is not None for key in _RANKS)


def checked_settings(value: Any) -> dict[str, Any]:
    """`value`, if it can be the settings of a layer.

    Raises:
        DistillerError: a key or a value that cannot be.
    """
    known = [field.name for field in fields(LayerSettings)]
    if not isinstance(value, Mapping):
        raise DistillerError(f"must be a mapping of settings, as {{rank: 40}}, got {shown(value)}")
    for key, given in value.items():
        if key not in known:
            hint = did_you_mean(str(key), known) or f"; there are {', '.join(known)}"
            raise DistillerError(f"'{key}' is unknown{hint}")
        fault = _fault(key, given)
        if fault is not None:
            raise DistillerError(f"'{key}' must be {fault}, got {shown(given)}")
    both = [key for key in _RANKS if value.get(key) is not None]
    if len(both) > 1:
        raise DistillerError(f"both '{both[0]}' and '{both[1]}' given; give one")
    if value.get("sparse") is not None and value.get("form") in ("spatial", "tucker2"):
        raise DistillerError(f"'sparse' goes with forms svd and channel, got form {value['form']}")
    if value.get("sparse") is not None and value.get("whitened"):
        raise DistillerError("both 'sparse' and 'whitened' given; give one")
    if value.get("whitened") and value.get("form") in ("spatial", "tucker2"):
        raise DistillerError(f"'whitened' goes with forms svd and channel, got form {value['form']}")
    if value.get("sparse") is not None and value.get("energy") is not None:
        raise DistillerError("'energy' is of a product alone; give 'rank' or 'parameters' beside 'sparse'")
    if value.get("sparse") is not None and value.get("macs") is not None:
        raise DistillerError("'sparse' saves no MACs, its zeros are multiplied; give 'rank' or 'parameters'")
    return dict(value)


_FRACTION = {"type": "number", "exclusiveMinimum": 0, "maximum": 1}
_WHOLE = {"type": "integer", "minimum": 1}
_SCHEMA: dict[str, dict[str, Any]] = {
    "form": {"enum": list(FORMS)},
    "rank": {"anyOf": [_WHOLE, {"type": "array", "items": _WHOLE, "minItems": 2, "maxItems": 2}]},
    "energy": _FRACTION,
    "parameters": _FRACTION,
    "macs": _FRACTION,
    "sparse": {"type": "number", "exclusiveMinimum": 0, "exclusiveMaximum": 1},
    "whitened": {"type": "boolean"},
}
LAYER_SETTINGS = Checked(
    checked_settings,
    {
        "additionalProperties": False,
        "properties": {key: {"anyOf": [schema, {"type": "null"}]} for key, schema in _SCHEMA.items()},
    },
)
"""For an annotation: what `checked_settings` checks."""


def layers_of(model: nn.Module, requested: Mapping[str, Mapping[str, Any]]) -> dict[str, LayerSettings]:
    """The settings of each layer that is asked for, in the model's order.

    Args:
        model: the model.
        requested: settings by name or pattern.

    Raises:
        UnknownNameError: a name or pattern stands for no layer.
        DistillerError: settings that cannot be, or a layer that cannot be factored.
    """
    if not requested:
        raise DistillerError("layers: at least one layer or pattern is wanted, got {}")
    modules = {name: module for name, module in named_modules(model) if name}
    found: dict[str, LayerSettings] = {}
    faults: dict[str, str] = {}
    for key in sorted(requested, key=_rank):
        try:
            own = checked_settings(requested[key])
        except DistillerError as error:
            raise DistillerError(f"layers['{key}']: {error}") from error
        form = cast("Form | None", own.get("form"))
        try:
            names = _named(model, modules, key, form)
        except UnknownNameError as error:
            faults[key] = str(error)
            continue
        for name in names:
            if name not in found:
                found[name] = _settings(own, form or default_form(modules[name]))
    if faults:
        raise UnknownNameError("\n".join(faults.values()), faults=faults)
    return {name: found[name] for name in modules if name in found}


def _named(
    model: nn.Module, modules: Mapping[str, nn.Module], key: str, form: Form | None
) -> tuple[str, ...]:
    if is_pattern(key):
        fitting = [name for name, module in modules.items() if refusal(module, form) is None]
        fitting = [name for name in fitting if not _is_shared(model, name)]
        return resolve(key, fitting, "layer that can be factored")
    (name,) = resolve(key, list(modules), "layer")
    require_factorable(name, modules[name], form)
    refuse_shared(model, [name])
    return (name,)


def _settings(own: Mapping[str, Any], form: Form) -> LayerSettings:
    rank = own.get("rank")
    given = {**own, "form": form, "rank": tuple(rank) if isinstance(rank, (list, tuple)) else rank}
    return LayerSettings(**given)


def _is_shared(model: nn.Module, name: str) -> bool:
    try:
        refuse_shared(model, [name])
    except DistillerError:
        return True
    return False


def _rank(key: str) -> int:
    """Exact names first, then names with wrapper parts, patterns, and `*` last."""
    return 3 if key == "*" else 2 if is_pattern(key) else int(strip_wrappers(key) != key)


def _fault(key: str, value: Any) -> str | None:
    """What a setting must be; None if it is."""
    if value is None:
        return None
    if key == "form":
        return None if value in FORMS else f"one of {', '.join(FORMS)}"
    if key == "whitened":
        return None if isinstance(value, bool) else "true or false"
    if key == "rank":
        ranks = value if isinstance(value, (list, tuple)) and len(value) == 2 else [value]
        fits = all(type(rank) is int and rank >= 1 for rank in ranks)
        return None if fits else "a whole number from 1, or two of them"
    is_number = isinstance(value, (int, float)) and not isinstance(value, bool)
    if key == "sparse":
        return None if is_number and 0 < value < 1 else "more than 0 and less than 1"
    return None if is_number and 0 < value <= 1 else "more than 0 and at most 1"
