"""What every quantizer shares: which layer gets how many bits, and replacing layers, once.

`overrides` maps a layer's name, or a regular expression that matches whole names, to settings for
those layers. A key that is a layer's exact name wins; among patterns the first that matches does.
Knows nothing about how a layer is quantized.
"""

from __future__ import annotations

import re
import warnings
from abc import ABC, abstractmethod
from collections import OrderedDict
from collections.abc import Callable, Collection, Mapping
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.utils import _pytree as pytree

from distiller.errors import QuantizationError, UnknownNameError, did_you_mean
from distiller.functional_modules import to_modules
from distiller.graph import input_shape_of, is_leaf
from distiller.names import canonical, named_modules, strip_wrappers, unwrap
from distiller.quantization.affine import check_bits
from distiller.quantization.functional_operations import is_converted
from distiller.quantization.refinement.structure import repeat_changes
from distiller.registry import QUANTIZERS
from distiller.signatures import check_settings

BITS_KEYS = ("bits_activations", "bits_weights", "bits_bias")
_OLD_KEYS = {"acts": "bits_activations", "wts": "bits_weights", "bias": "bits_bias"}
_OPAQUE = (nn.MultiheadAttention, nn.TransformerEncoderLayer)
_METADATA: dict[str, Any] = {
    "class": str,
    "params": Mapping,
    "input_shape": list | tuple | None,
    "input_dtype": list | tuple | str | None,
    "functional_modules": bool | None,
}
_OPTIONAL_METADATA = ("input_dtype", "functional_modules")
_PARAMETER_LAYERS = (nn.modules.conv._ConvNd, nn.Linear, nn.Embedding)


class QBits(NamedTuple):
    """Bits of a layer's activations, weights and bias; None where it is not quantized."""

    acts: int | None = None
    wts: int | None = None
    bias: int | None = None


class Quantizer(ABC):
    """Replaces layers of a model by quantized ones.

    A subclass fills `replacement_factory` (by type, looked up along the class's bases) and
    `default_replacement_fn` (other layers) with functions
    `(module, name, qbits, **overrides) -> module or None`; None keeps the layer as it is.

    Args:
        model: the model, changed in place by `prepare_model`.
        bits_activations: default width of activations, 2 to 16; 0 or None leaves them in floating point.
        bits_weights: default width of weights, alike.
        bits_bias: default width of biases, 2 to 64, or 0 or None.
        overrides: by layer name or pattern, `bits_activations`, `bits_weights`, `bits_bias` and
            what the subclass takes.
        awaited_layers: names of layers that the model has not yet, but gets in `prepare_model`; overrides may
            be for them.

    Attributes:
        module_qbits_map: bits of each layer, by canonical name.
        module_overrides_map: its other settings.
        modules_processed: layer -> (name, what replaced it or None), after `prepare_model`.

    Raises:
        QuantizationError: bits out of range, or overrides of the wrong form.
        UnknownNameError: an override matches no layer.
    """

    def __init__(
        self,
        model: nn.Module,
        *,
        bits_activations: int | None = None,
        bits_weights: int | None = None,
        bits_bias: int | None = None,
        overrides: Mapping[str, Any] | None = None,
        awaited_layers: Collection[str] = (),
    ) -> None:
        self.model = model
        self.overrides = _checked_overrides(overrides)
        default = {"bits_activations": bits_activations, "bits_weights": bits_weights, "bits_bias": bits_bias}
        self.default_qbits = _qbits(default, "")
        self._read_layers(awaited_layers)
        self.replacement_factory: dict[type[nn.Module], Callable[..., nn.Module | None]] = {}
        self.default_replacement_fn: Callable[..., nn.Module | None] | None = None
        self.replacement_blacklist: tuple[type[nn.Module], ...] = ()
        self.modules_processed: OrderedDict[nn.Module, tuple[str, nn.Module | None]] = OrderedDict()
        self.is_prepared = False

    def prepare_model(self, dummy_input: Any = None) -> None:
        """Replace the layers.

        Leaves the description from which `rebuild_quantized` does the same to another copy of the
        model in `model.quantizer_metadata`.

        Args:
            dummy_input: an input of the model, or a tuple of them, where the quantizer runs it.

        Raises:
            QuantizationError: called a second time, or the model cannot be quantized as asked.
        """
        if self.is_prepared:
            raise QuantizationError("prepare_model: the model is prepared already; a quantizer does it once")
        self.is_prepared = True
        self._before_replacement(dummy_input)
        self._replace_layers()
        self._after_replacement(dummy_input)
        unwrap(self.model).quantizer_metadata = {  # type: ignore[assignment]
            "class": type(self).__name__,
            "params": self.settings(),
            "input_shape": _of_each(dummy_input, lambda tensor: tuple(tensor.shape)),
            **_facts_of(dummy_input, unwrap(self.model)),
        }

    @abstractmethod
    def quantize_params(self) -> None:
        """Quantize the weights from their full-precision copies."""

    @abstractmethod
    def settings(self) -> dict[str, Any]:
        """The constructor's arguments except the model, as plain data."""

    def quantizer_metadata(self) -> dict[str, Any]:
        """How the model was prepared, as plain data for `rebuild_quantized`.

        Raises:
            QuantizationError: the model is not prepared yet.
        """
        metadata = getattr(unwrap(self.model), "quantizer_metadata", None)
        if not self.is_prepared or metadata is None:
            raise QuantizationError("quantizer_metadata: call prepare_model first")
        return metadata

    def _read_layers(self, awaited: Collection[str] = ()) -> None:
        """Take note of the model's layers, and of what the settings say of each."""
        self.layers = leaf_modules(self.model)
        if "" in self.layers:
            raise QuantizationError(
                f"the model is a single {type(self.model).__name__} without submodules; "
                "quantizers replace submodules: put it into an nn.Sequential"
            )
        names = [*self.layers, *(name for name in awaited if name not in self.layers)]
        containers = {
            name for name, _ in named_modules(unwrap(self.model)) if name and name not in self.layers
        }
        self.override_keys = match_overrides(self.overrides, names, containers)
        self.module_qbits_map: dict[str, QBits] = {}
        self.module_overrides_map: dict[str, dict[str, Any]] = {}
        default = dict(zip(BITS_KEYS, self.default_qbits, strict=True))
        for name, module in self.layers.items():
            given = self.overrides.get(self.override_keys.get(name, ""), {})
            bits = _qbits({**default, **{key: given[key] for key in BITS_KEYS if key in given}}, name)
            self.module_qbits_map[name] = bits if isinstance(module, _PARAMETER_LAYERS) else QBits(bits.acts)
            self.module_overrides_map[name] = {k: v for k, v in given.items() if k not in BITS_KEYS}

    def _before_replacement(self, dummy_input: Any) -> None:  # noqa: B027 - may be left out
        """What is done to the whole model first."""

    def _after_replacement(self, dummy_input: Any) -> None:  # noqa: B027 - may be left out
        """What is done to the whole model afterwards."""

    def _replacement_fn(self, module: nn.Module) -> Callable[..., nn.Module | None] | None:
        for cls in type(module).__mro__:
            if cls in self.replacement_factory:
                return self.replacement_factory[cls]
        return self.default_replacement_fn

    def _replace_layers(self) -> None:
        modules = dict(named_modules(unwrap(self.model)))
        for name in self.layers:
            module = modules[name]
            if isinstance(module, self.replacement_blacklist):
                continue
            replace, overrides = self._replacement_fn(module), self.module_overrides_map[name]
            replacement = replace(module, name, self.module_qbits_map[name], **overrides) if replace else None
            self.modules_processed[module] = (name, replacement)
        self._put({module: new for module, (_, new) in self.modules_processed.items() if new is not None})

    def _put(self, replacements: Mapping[nn.Module, nn.Module]) -> None:
        """Set each replacement at every name of the module it replaces."""
        inner = unwrap(self.model)
        first_names: dict[nn.Module, str] = {}
        for raw, module in list(inner.named_modules(remove_duplicate=False)):
            if module not in replacements:
                continue
            name = canonical(raw, inner)
            first = first_names.setdefault(module, name)
            if first != name:
                warnings.warn(f"Module '{name}' references to same module as '{first}'.", stacklevel=4)
            parent, _, child = raw.rpartition(".")
            setattr(inner.get_submodule(parent), child, replacements[module])


def rebuild_quantized(model: nn.Module, metadata: Mapping[str, Any]) -> Quantizer:
    """Prepare a floating-point model as another one was, so that its `state_dict` fits.

    Args:
        model: the model as it was before quantization; changed in place.
        metadata: the other model's `quantizer_metadata`.

    Raises:
        UnknownNameError: no such quantizer is registered.
        QuantizationError: the description is not one, or does not fit the model.
    """
    for key, kind in _METADATA.items():
        if key not in metadata and key not in _OPTIONAL_METADATA:
            raise QuantizationError(f"quantizer_metadata: has no '{key}'; it is not of this library")
        if not isinstance(metadata.get(key), kind):
            raise QuantizationError(f"quantizer_metadata.{key}: is malformed, got {metadata[key]!r}")
    factory, params = QUANTIZERS.look_up(metadata["class"]), metadata["params"]
    for path, text in check_settings(factory, params):
        raise QuantizationError(f"quantizer_metadata.params.{'.'.join(map(str, path))}: {text}")
    dummy_input = _zeros(metadata["input_shape"], metadata.get("input_dtype"), model)
    if metadata.get("functional_modules") and not is_converted(unwrap(model)):
        to_modules(model, _input_of(model) if dummy_input is None else dummy_input)
    repeat_changes(model, metadata, dummy_input)
    quantizer = factory(model, **params)
    quantizer.prepare_model(dummy_input)
    return quantizer


def leaf_modules(model: nn.Module) -> dict[str, nn.Module]:
    """The modules without children of their own, by canonical name; shared ones once.

    Attention and transformer layers of torch.nn count as one: they read their children's weights
    past the children.
    """
    modules = list(named_modules(unwrap(model)))
    opaque = tuple(f"{name}." for name, module in modules if isinstance(module, _OPAQUE))
    return {
        name: module
        for name, module in modules
        if (is_leaf(module) or isinstance(module, _OPAQUE)) and not name.startswith(opaque)
    }


def match_overrides(
    overrides: Mapping[str, Any], layers: list[str], containers: set[str] | frozenset[str] = frozenset()
) -> dict[str, str]:
    """Which key of `overrides` holds for which layer.

    Args:
        overrides: keys are exact names or regular expressions that match whole names, with or
            without `module.`.
        layers: canonical names.
        containers: names of modules that are not layers, for messages.

    Returns:
        Layer name -> key, for the layers that have one.

    Raises:
        QuantizationError: a key is no regular expression, or two keys name one layer.
        UnknownNameError: keys that match no layer, one a line.
    """
    exact: dict[str, str] = {}
    by_pattern: dict[str, str] = {}
    faults: dict[str, str] = {}
    for key in overrides:
        plain = key if key in layers else strip_wrappers(key)
        if plain in layers:
            if plain in exact:
                raise QuantizationError(
                    f"overrides: '{exact[plain]}' and '{key}' are the same layer; give one"
                )
            exact[plain] = key
            continue
        pattern = _compiled(key)
        found = [name for name in layers if pattern.fullmatch(name)]
        if not found:
            faults[key] = _unmatched(key, pattern, layers, containers)
        for name in found:
            by_pattern.setdefault(name, key)
    if faults:
        raise UnknownNameError("\n".join(faults.values()), faults=faults)
    return {
        name: (exact.get(name) or by_pattern[name]) for name in layers if name in exact or name in by_pattern
    }


def _compiled(key: str) -> re.Pattern[str]:
    try:
        return re.compile(re.sub(r"^module\\?\.", "", key))
    except re.error as error:
        raise QuantizationError(
            f"overrides: '{key}' is neither a layer's name nor a regular expression: {error}"
        ) from error


def _unmatched(
    key: str, pattern: re.Pattern[str], layers: list[str], containers: set[str] | frozenset[str]
) -> str:
    inside = [name for name in sorted(containers) if name and pattern.fullmatch(name)]
    if inside:
        return (
            f"overrides: '{key}' matches no layer, only what contains layers ('{inside[0]}'); "
            f"write '{key}\\..*' for all layers in it"
        )
    return f"overrides: '{key}' matches no layer of the model{did_you_mean(strip_wrappers(key), layers)}"


def _checked_overrides(overrides: Mapping[str, Any] | None) -> dict[str, dict[str, Any]]:
    if overrides is None:
        return {}
    if not isinstance(overrides, Mapping):
        raise QuantizationError(
            f"overrides: must map layer names or patterns to settings, got {type(overrides).__name__}"
        )
    checked: dict[str, dict[str, Any]] = {}
    for key, settings in overrides.items():
        if not isinstance(key, str):
            raise QuantizationError(
                f"overrides[{key!r}]: must be text, a layer's name or a pattern; write '{key}' in quotes"
            )
        if not isinstance(settings, Mapping):
            raise QuantizationError(f"overrides[{key!r}]: must be a mapping of settings, got {settings!r}")
        for old, new in _OLD_KEYS.items():
            if old in settings:
                raise QuantizationError(f"overrides['{key}']: key '{old}' is called '{new}' now")
        checked[key] = dict(settings)
    return checked


def _qbits(given: Mapping[str, Any], name: str) -> QBits:
    prefix = f"{name}: " if name else ""
    bias = given["bits_bias"]
    if bias is not None and (
        isinstance(bias, bool) or not isinstance(bias, int) or bias not in (0, *range(2, 65))
    ):
        raise QuantizationError(f"{prefix}bits_bias: must be 2 to 64 bits, or 0 or null, got {bias!r}")
    return QBits(
        check_bits(given["bits_activations"], f"{prefix}bits_activations"),
        check_bits(given["bits_weights"], f"{prefix}bits_weights"),
        bias or None,
    )


def _facts_of(dummy_input: Any, model: nn.Module) -> dict[str, Any]:
    """What else is to be known to prepare a model alike: `input_dtype` of integers, `functional_modules`."""
    dtypes = _of_each(dummy_input, _integer_type)
    facts: dict[str, Any] = {"functional_modules": True} if is_converted(model) else {}
    return facts if set(pytree.tree_leaves(dtypes)) <= {None} else {**facts, "input_dtype": dtypes}


def _of_each(dummy_input: Any, fact: Callable[[Tensor], Any]) -> Any:
    """A fact about a tensor, or about each of several, nested as they are."""
    if dummy_input is None:
        return None
    if isinstance(dummy_input, Tensor):
        return fact(dummy_input)
    if not isinstance(dummy_input, list | tuple):
        raise QuantizationError(
            f"prepare_model: the input must be a tensor, or tensors nested in tuples, got {dummy_input!r}"
        )
    return tuple(_of_each(item, fact) for item in dummy_input)


def _integer_type(tensor: Tensor) -> str | None:
    """`int64`, say; None for floating point, whose type is that of the model."""
    return None if tensor.is_floating_point() else str(tensor.dtype).removeprefix("torch.")


def _input_of(model: nn.Module) -> Any:
    """Zeros of the shape that the model says its input has."""
    return _zeros(input_shape_of(model, "making modules of functional operations"), None, model)


def _zeros(shape: Any, dtype: Any, model: nn.Module) -> Any:
    """Zeros of the shapes and types that `_of_each` found; without a type, that of the model."""
    if shape is None:
        return None
    if not isinstance(shape, list | tuple):
        raise QuantizationError(f"quantizer_metadata.input_shape: is malformed, got {shape!r}")
    if any(isinstance(item, list | tuple) for item in shape):
        dtypes = dtype if isinstance(dtype, list | tuple) else [dtype] * len(shape)
        if len(dtypes) != len(shape):
            raise QuantizationError(f"quantizer_metadata.input_dtype: must fit {shape!r}, got {dtype!r}")
        return tuple(_zeros(*pair, model) for pair in zip(shape, dtypes, strict=True))
    like = next((p for p in model.parameters() if p.is_floating_point()), torch.empty(0))
    kind = like.dtype if dtype is None else getattr(torch, str(dtype), None)
    if not isinstance(kind, torch.dtype):
        raise QuantizationError(f"quantizer_metadata.input_dtype: must be a type of numbers, got {dtype!r}")
    try:
        return torch.zeros(shape, device=like.device, dtype=kind)
    except (TypeError, RuntimeError) as error:
        raise QuantizationError(
            f"quantizer_metadata.input_shape: must be a tuple of sizes, got {shape!r}"
        ) from error
