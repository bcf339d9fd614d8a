"""What each part of a checkpoint must look like, checked when it is written and before any of it is used.

Files are made by hand too, and by programs with errors: what is wrong is told with its place in the file.
Knows nothing about the model; whether shapes fit is found out when the checkpoint is loaded.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from functools import cache
from typing import Annotated, Any, TypeGuard, get_args, get_type_hints

import torch
from pydantic import (
    AfterValidator,
    BaseModel,
    BeforeValidator,
    ConfigDict,
    Field,
    TypeAdapter,
    ValidationError,
)
from torch import Tensor

from distiller.apputils.measurement import Measurement
from distiller.apputils.rng_state import numpy_generator, python_generator, torch_generator
from distiller.errors import CheckpointError, did_you_mean
from distiller.export.latency import Latency
from distiller.masks import PRUNER_SLOT


def check_document(document: Mapping[str, Any], where: str) -> None:
    """See to it that a checkpoint in our format has what it must have, in the types it must have.

    Args:
        document: without `format` and `format_version`.
        where: the file or function, for the message.

    Raises:
        CheckpointError: with the place of the first thing that is wrong, what is wanted and what was got.
    """
    _check(_Document, document, where)


def check_legacy(fields: Mapping[str, Any], where: str) -> None:
    """The same for the fields of a `Checkpoint` that were read from another format.

    Raises:
        CheckpointError: as `check_document`.
    """
    _check(_Legacy, fields, where)


def key_path(*parts: str | int) -> str:
    """A place in nested data: `scheduler.masks['conv.weight'].pruner`, `optimizer.param_names[0]`."""
    path = ""
    for part in parts:
        is_plain = isinstance(part, str) and part.isidentifier()
        path += (f".{part}" if path else str(part)) if is_plain else f"[{part!r}]"
    return path


def shown(value: Any) -> str:
    """A value in few words, for a message."""
    if isinstance(value, Tensor):
        return f"a tensor of shape {tuple(value.shape)}"
    name, text = type(value).__name__, repr(value)
    if len(text) <= 40:
        return f"{name} {text}"
    return f"a {name} of {len(value)}" if isinstance(value, dict | list | tuple) else f"{name} {text[:37]}..."


def unlike(value: Any, like: Any, *place: str | int) -> str | None:
    """What is wrong with a saved value, beside the one that a fresh object has in its place.

    Numbers stand for numbers, and stay finite (in 32 bits) and not negative where the fresh one is; lists
    and tuples have the fresh one's length; keys of a dict may be missing.

    Args:
        value: as it was saved.
        like: as it is in the fresh object; None stands for any single value.
        place: where it was saved, for the message.
    """
    pairs: list[tuple[Any, Any, str | int]] = []
    if isinstance(like, dict) and isinstance(value, dict):
        pairs = [(value[key], item, key) for key, item in like.items() if key in value]
    elif isinstance(like, list | tuple) and type(value) is type(like) and len(value) == len(like):
        pairs = list(zip(value, like, range(len(like)), strict=True))
    else:
        wanted = _wanted(value, like)
        return wanted and f"'{key_path(*place)}' must be {wanted}, got {shown(value)}"
    return next(filter(None, (unlike(one, other, *place, key) for one, other, key in pairs)), None)


def is_number(value: Any) -> TypeGuard[float]:
    """Whether a value is a real number that float64 can hold, or a tensor of one."""
    if isinstance(value, Tensor):
        return value.dim() == 0 and not value.is_complex() and value.dtype != torch.bool
    if isinstance(value, float):
        return not math.isnan(value)
    return isinstance(value, int) and not isinstance(value, bool) and abs(value) < 2**63


def _wanted(value: Any, like: Any) -> str | None:
    """What a single value must be to stand for another; None if it can."""
    if like is None:
        return "a single value" if isinstance(value, Tensor | list | tuple | dict | bytes) else None
    if isinstance(like, bool):
        return None if value is None or isinstance(value, bool) else "true, false or null"
    if is_number(like):
        is_bounded = abs(float(like)) <= _HIGHEST
        fits = is_number(value) and (not is_bounded or (math.isfinite(value) and (value >= 0 or like < 0)))
        if fits and is_bounded and abs(value) > _HIGHEST:
            return f"at most {_HIGHEST:.2g}"
        return None if fits else "a finite number from 0" if is_bounded and like >= 0 else "a number"
    if isinstance(like, list | tuple):
        return f"a {type(like).__name__} of {len(like)}"
    return None if type(value) is type(like) else f"a {type(like).__name__}"


_HIGHEST = torch.finfo(torch.float32).max
_Count = Annotated[int, Field(ge=0, lt=2**63)]


class _Form(BaseModel):
    model_config = ConfigDict(strict=True, extra="forbid", arbitrary_types_allowed=True)


class _ParamGroup(_Form, extra="allow"):
    params: list[_Count]


class _OptimizerState(_Form, extra="allow"):
    state: dict[int, dict[str, Any]]
    param_groups: list[_ParamGroup]


class _Optimizer(_Form):
    kind: str = Field(alias="class")
    state_dict: _OptimizerState
    param_names: list[list[str | None]]


class _Rules(_Form):
    forward_only: bool
    double_copies: bool
    mask_gradients: bool
    passing: bool = False


def _rules_by_slot(rules: Any) -> Any:
    """Rules without a slot, as checkpoints had them first, are those of all slots."""
    is_one = isinstance(rules, dict) and any(not isinstance(rule, dict) for rule in rules.values())
    return {PRUNER_SLOT: rules} if is_one else rules


class _Policy(_Form, extra="allow"):
    name: str
    state: dict[str, Any]
    settings: dict[str, Any] = {}
    epochs: Annotated[list[_Count], Field(min_length=3, max_length=3)] = []


class _Scheduler(_Form):
    masks: dict[str, dict[str, Tensor]]
    rules: dict[str, Annotated[dict[str, _Rules], BeforeValidator(_rules_by_slot)]] = {}
    dense: dict[str, Tensor] = {}
    policies: list[_Policy] = []


class _Quantizer(_Form, extra="allow"):
    kind: str = Field(alias="class")
    params: dict[str, Any] = {}


class _Recipe(_Form):
    modules: dict[str, dict[str, Any]]
    parameters: dict[str, list[Any]]
    classes: dict[str, str] = {}


class _Exit(_Form):
    layer: str
    pool: Annotated[list[_Count], Field(min_length=2, max_length=2)] | None


class _Generators(_Form):
    python: Annotated[tuple[Any, ...], AfterValidator(python_generator)]
    numpy: Annotated[tuple[Any, ...], AfterValidator(numpy_generator)]
    torch: Annotated[Tensor, AfterValidator(torch_generator)]
    cuda: list[Tensor] = []


def _finite(value: Any) -> Any:
    if isinstance(value, Tensor) or not is_number(value) or math.isinf(value):  # pydantic takes tensors
        raise ValueError("a finite number")
    return value


_Number = Annotated[float, BeforeValidator(_finite)]


class _Score(_Form):
    epoch: _Count
    top1: _Number
    top5: _Number
    loss: _Number
    sparsity: _Number
    nnz: _Count
    eligible: bool


class _Tracker(_Form):
    scores: list[_Score]


def _figures(value: dict[str, Any], record: type[Any] = Measurement) -> dict[str, Any]:
    """Refuse what cannot be the figures of a model."""
    for name, (hint, form) in _forms(record).items():
        figure = value.get(name)
        try:
            if isinstance(figure, dict) and Latency in get_args(hint):
                _figures(figure, Latency)
            elif isinstance(figure, Tensor) or name not in value:
                raise ValueError(name)
            else:
                form.validate_python(figure, strict=True)
        except ValueError as error:
            raise ValueError(f"a model's figures, with '{name}' as on a results card") from error
    return value


@cache
def _forms(record: type[Any]) -> dict[str, tuple[Any, TypeAdapter[Any]]]:
    return {name: (hint, TypeAdapter(hint)) for name, hint in get_type_hints(record).items()}


_Figures = Annotated[dict[str, Any], AfterValidator(_figures)]


class _Extras(_Form, extra="ignore"):
    """What the library and the program read of the extras; the rest is the writer's."""

    seed: _Count = 0
    validation_split: _Number | None = None
    tracker: _Tracker = _Tracker(scores=[])
    reference: _Figures | None = None
    before_quantization: _Figures | None = None
    best_top1: _Number | None = None
    quantized_top1: _Number | None = None


def _no_negative_sizes(shape: Any) -> Any:
    if isinstance(shape, tuple):
        return tuple(_no_negative_sizes(size) for size in shape)
    if isinstance(shape, bool) or not isinstance(shape, int) or shape < 0:
        raise ValueError("a tuple of whole numbers from 0, or of such tuples")
    return shape


_Shape = Annotated[tuple[Any, ...], AfterValidator(_no_negative_sizes)]


class _Document(_Form):
    epoch: _Count
    arch: str | None
    dataset: str | None
    input_shape: _Shape | None
    state_dict: dict[str, Any]  # of tensors: which, the model says
    optimizer: _Optimizer | None
    scheduler: _Scheduler | None
    quantizer: _Quantizer | None
    thinning_recipes: list[_Recipe]
    early_exits: list[_Exit] = []
    factorization_recipes: list[dict[str, Any]] = []  # of which form, FactorizationRecipe says
    rng: _Generators
    extras: _Extras


class _Legacy(_Form, extra="ignore"):
    epoch: _Count | None = None
    arch: str | None = None
    dataset: str | None = None
    quantizer: _Quantizer | None = None
    extras: _Extras = _Extras()


_WANTED = {
    "int_type": "a whole number",
    "greater_than_equal": "at least 0",
    "less_than": "less than 2**63",
    "float_type": "a number",
    "finite_number": "a finite number",
    "bool_type": "true or false",
    "string_type": "text",
    "tuple_type": "a tuple",
    "list_type": "a list",
    "too_short": "longer",
    "too_long": "shorter",
    "dict_type": "a dict",
    "model_type": "a dict",
    "is_instance_of": "a tensor",
}


def _check(form: type[_Form], content: Mapping[str, Any], where: str) -> None:
    try:
        form.model_validate(dict(content))
    except ValidationError as error:
        fault = error.errors(include_url=False)[0]
        raise CheckpointError(f"{where}: {_text(fault, form)}") from error


def _text(fault: Any, form: type[_Form]) -> str:
    kind, place, value = fault["type"], fault["loc"], fault["input"]
    if kind == "missing":
        return f"'{key_path(*place)}' is missing"
    if kind == "extra_forbidden":
        hint = did_you_mean(str(place[0]), form.model_fields) if len(place) == 1 else ""
        return f"'{key_path(*place)}' is unknown{hint}"
    if place[-1] == "[key]":
        return f"'{key_path(*place[:-2])}' must have text for its keys, got {shown(value)}"
    wanted = str(fault["ctx"]["error"]) if kind == "value_error" else _WANTED[kind]
    return f"'{key_path(*place)}' must be {wanted}, got {shown(value)}"
