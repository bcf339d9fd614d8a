"""Settings of one layer in post-training quantization: defaults, overrides, and what is wrong with them.

Knows nothing about modules or statistics.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from enum import Enum
from typing import Any, NamedTuple, TypeVar

from distiller.errors import QuantizationError, did_you_mean
from distiller.quantization.activation_quant import QuantSettings
from distiller.quantization.affine import LinearQuantMode, check_bits
from distiller.quantization.clipping import ClipMode, check_n_stds
from distiller.quantization.ptq_precision import PRECISIONS
from distiller.quantization.quantizer import BITS_KEYS, QBits

_EnumT = TypeVar("_EnumT", bound=Enum)


class ModePair(NamedTuple):
    """The modes of activations and of weights."""

    activations: LinearQuantMode
    weights: LinearQuantMode


@dataclass(frozen=True, slots=True)
class LayerSettings:
    """How one layer is quantized; the fields are what the constructor of the quantizer takes.

    Attributes:
        fpq_module: the floating-point type that the layer is computed in; without `fake` nothing of it is
            quantized then.
        fake: compute the layer in floating point between its quantizers.
        input_overrides: by index of the input, its own settings, or None for those of the output.
        make_identity: drop the layer.
        quantize_inputs: of a layer that is computed in floating point, quantize the inputs too.
    """

    bits: QBits
    mode: ModePair
    clip_acts: ClipMode = ClipMode.NONE
    clip_n_stds: float | None = None
    clip_half_range: bool = False
    per_channel_wts: bool = False
    scale_approx_mult_bits: int | None = None
    inputs_quant_auto_fallback: bool = True
    also_clip_weights: bool = False
    fpq_module: int | str | None = None
    fake: bool = False
    input_overrides: Mapping[int, QuantSettings | None] = field(default_factory=dict)
    make_identity: bool = False
    quantize_inputs: bool = False

    @property
    def is_float(self) -> bool:
        """Whether the layer is computed in `fpq_module`, and nothing of it quantized."""
        is_quantized = self.fake and (self.bits.acts is not None or self.bits.wts is not None)
        return self.fpq_module is not None and not is_quantized

    def output(self) -> QuantSettings:
        """How the output is quantized (it is)."""
        assert self.bits.acts is not None
        return QuantSettings(
            self.bits.acts, self.mode.activations, self.clip_acts, self.clip_n_stds, self.clip_half_range
        )

    def input(self) -> QuantSettings:
        """How an input is quantized that was not before: as the output, without its ReLU."""
        return dataclasses.replace(self.output(), clip_half_range=False)

    def weight(self) -> QuantSettings:
        """How the weight is quantized (it is)."""
        assert self.bits.wts is not None
        clip = (self.clip_acts, self.clip_n_stds) if self.also_clip_weights else (ClipMode.NONE, None)
        return QuantSettings(self.bits.wts, self.mode.weights, *clip, per_channel=self.per_channel_wts)

    def with_output(self, grid: QuantSettings) -> LayerSettings:
        """The same with an output that is on a grid of another layer."""
        return dataclasses.replace(
            self,
            bits=self.bits._replace(acts=grid.num_bits),
            mode=self.mode._replace(activations=grid.quant_mode),
            clip_acts=grid.clip_mode,
            clip_n_stds=grid.clip_n_stds,
            clip_half_range=grid.clip_half_range,
        )

    def as_parameters(self) -> dict[str, Any]:
        """The settings as Distiller's `layer_quant_params.yaml` has them, plain data."""
        parameters = {
            **dict(zip(BITS_KEYS, self.bits, strict=True)),
            "mode": {"activations": self.mode.activations.name, "weights": self.mode.weights.name},
            "clip_acts": self.clip_acts.name,
            "clip_n_stds": self.clip_n_stds,
            "clip_half_range": self.clip_half_range,
            "per_channel_wts": self.per_channel_wts,
            "scale_approx_mult_bits": self.scale_approx_mult_bits,
        }
        rare = {"fpq_module": self.fpq_module, "fake": self.fake}
        return {**parameters, **{key: value for key, value in rare.items() if value}}


_COMMON = ("mode", "clip_acts", "clip_n_stds", "clip_half_range", "fpq_module", "fp16", "fake")
_WITH_INPUTS = (*_COMMON, "scale_approx_mult_bits", "inputs_quant_auto_fallback", "input_overrides")
OVERRIDE_KEYS = {
    "param": (*_WITH_INPUTS, "per_channel_wts"),
    "embedding": _COMMON,
    "elementwise": _WITH_INPUTS,
    "other": (*_COMMON, "make_identity", "quantize_inputs"),
}
_OF_QUANTIZED = (
    *BITS_KEYS,
    "input_overrides",
    "per_channel_wts",
    "scale_approx_mult_bits",
    "quantize_inputs",
)
_OF_INTEGERS = ("bits_bias", "scale_approx_mult_bits")


def with_overrides(
    settings: LayerSettings, bits: QBits, overrides: Mapping[str, Any], kind: str, where: str
) -> LayerSettings:
    """The settings of one layer.

    Args:
        settings: the defaults.
        bits: the layer's bits.
        overrides: the layer's other settings; keys that are not for its kind are passed over
            (`check_keys` refuses those that are for none of the layers a pattern matches).
        kind: a key of `OVERRIDE_KEYS`.
        where: the layer, for messages.

    Raises:
        QuantizationError: a value is wrong.
    """
    changes = {key: value for key, value in overrides.items() if key in OVERRIDE_KEYS[kind]}
    for key, value in changes.items():
        changes[key] = _PARSERS[key](value, f"{where}: {key}")
    if "fp16" in changes:
        changes["fpq_module"] = with_fp16(changes.get("fpq_module"), changes.pop("fp16"), where)
    own_inputs = changes.pop("input_overrides", {})
    result = dataclasses.replace(settings, bits=bits, **changes)
    check_n_stds(result.clip_acts, result.clip_n_stds, where)
    if not own_inputs or bits.acts is None:
        return result
    parsed = {
        index: _input_settings(result, given, f"{where}: input_overrides[{index}]")
        for index, given in own_inputs.items()
    }
    return dataclasses.replace(result, input_overrides=parsed)


def check_conflicts(overrides: Mapping[str, Mapping[str, Any]]) -> None:
    """Refuse settings of a layer, or of the layers of a pattern, of which one makes another meaningless.

    Args:
        overrides: settings by name or pattern.

    Raises:
        QuantizationError: naming the setting that has no meaning.
    """
    for pattern, given in overrides.items():
        where, is_fake = f"overrides['{pattern}']", given.get("fake") is True
        precision = 16 if given.get("fp16") is True else given.get("fpq_module")
        if precision is not None and not is_fake:
            for key in _OF_QUANTIZED:
                if given.get(key):
                    raise QuantizationError(
                        f"{where}: {key}: with fpq_module {precision} nothing of the layer is quantized; "
                        "leave one of them out, or set fake: true"
                    )
        for key in _OF_INTEGERS:
            if is_fake and given.get(key):
                raise QuantizationError(
                    f"{where}: {key}: with fake the layer is computed in floating point, between its "
                    "quantizers; leave one of them out"
                )


def check_keys(overrides: Mapping[str, Mapping[str, Any]], kinds: Mapping[str, set[str]]) -> None:
    """Refuse settings that mean nothing to any layer they are for.

    Args:
        overrides: settings by name or pattern.
        kinds: by name or pattern, the kinds of the layers that it holds for.

    Raises:
        QuantizationError: naming the keys that are accepted.
    """
    for pattern, given in overrides.items():
        accepted = [*BITS_KEYS, *dict.fromkeys(key for kind in kinds[pattern] for key in OVERRIDE_KEYS[kind])]
        for key in given:
            if kinds[pattern] and key not in accepted:
                hint = did_you_mean(key, accepted) or f"; the layers it matches take {', '.join(accepted)}"
                raise QuantizationError(f"overrides['{pattern}']: unknown key '{key}'{hint}")


def check_no_rescaling(settings: Mapping[str, LayerSettings]) -> None:
    """Refuse the approximation of changes of scale, as ranges are dynamic.

    Args:
        settings: by layer.

    Raises:
        QuantizationError: naming the first layer that has it.
    """
    for name, layer in settings.items():
        if layer.scale_approx_mult_bits is not None and not layer.is_float:
            raise QuantizationError(
                f"{name}: scale_approx_mult_bits: needs model_activation_stats, dynamic scales are not "
                "known beforehand"
            )


def parse_mode(value: Any, where: str) -> ModePair:
    """A mode for both, or `{activations: mode, weights: mode}`; modes as members or by name.

    Raises:
        QuantizationError: neither.
    """
    if isinstance(value, ModePair):
        return value
    if not isinstance(value, Mapping):
        mode = _member(LinearQuantMode, value, where)
        return ModePair(mode, mode)
    if set(value) != {"activations", "weights"}:
        raise QuantizationError(
            f"{where}: needs the keys activations and weights, got {sorted(map(str, value))}"
        )
    return ModePair(*(_member(LinearQuantMode, value[key], f"{where}.{key}") for key in ModePair._fields))


def parse_clip(value: Any, where: str) -> ClipMode:
    """A clip mode, as member or by name.

    Raises:
        QuantizationError: neither.
    """
    return _member(ClipMode, value, where)


def parse_precision(value: Any, where: str) -> int | str | None:
    """16, 32, 64 or "bf16", or None.

    Raises:
        QuantizationError: neither.
    """
    is_name = isinstance(value, int | str) and not isinstance(value, bool)
    if value is None or (is_name and value in PRECISIONS):
        return value
    raise QuantizationError(f"{where}: must be 16, 32, 64, 'bf16' or null, got {value!r}")


def with_fp16(fpq_module: int | str | None, fp16: bool, where: str) -> int | str | None:
    """`fpq_module` where the deprecated `fp16: true` may be given in its place.

    Raises:
        QuantizationError: they contradict each other.
    """
    if fp16 and fpq_module not in (None, 16):
        raise QuantizationError(
            f"{where}: fp16 and fpq_module {fpq_module} contradict each other; leave fp16 out"
        )
    return 16 if fp16 else fpq_module


def parse_multiplier_bits(value: Any, where: str) -> int | None:
    """Bits of an integer multiplier, 1 to 31, or None.

    Raises:
        QuantizationError: neither.
    """
    if value is None or (isinstance(value, int) and not isinstance(value, bool) and 1 <= value <= 31):
        return value
    raise QuantizationError(f"{where}: must be 1 to 31 bits, or null, got {value!r}")


def parse_accumulator_bits(value: Any, where: str) -> int:
    """Bits of an accumulator, 2 to 64.

    Raises:
        QuantizationError: out of range.
    """
    if isinstance(value, int) and not isinstance(value, bool) and 2 <= value <= 64:
        return value
    raise QuantizationError(f"{where}: must be 2 to 64 bits, got {value!r}")


def parse_flag(value: Any, where: str) -> bool:
    """True or false.

    Raises:
        QuantizationError: neither.
    """
    if isinstance(value, bool):
        return value
    raise QuantizationError(f"{where}: must be true or false, got {value!r}")


def _member(kind: type[_EnumT], value: Any, where: str) -> _EnumT:
    if isinstance(value, kind):
        return value
    names = list(kind.__members__)
    if isinstance(value, str) and value.upper() in names:
        return kind[value.upper()]
    hint = did_you_mean(value.upper(), names) if isinstance(value, str) else ""
    raise QuantizationError(f"{where}: must be one of {', '.join(names)}, got {value!r}{hint}")


def _number(value: Any, where: str) -> float | None:
    if value is None or (isinstance(value, int | float) and not isinstance(value, bool)):
        return value
    raise QuantizationError(f"{where}: must be a number, got {value!r}")


def _by_index(value: Any, where: str) -> Mapping[int, Mapping[str, Any]]:
    if isinstance(value, Mapping) and all(
        type(index) is int and index >= 0 and isinstance(given, Mapping) for index, given in value.items()
    ):
        return value
    raise QuantizationError(f"{where}: must map indices of inputs, from 0, to settings, got {value!r}")


_PARSERS: dict[str, Callable[[Any, str], Any]] = {
    "mode": parse_mode,
    "clip_acts": parse_clip,
    "clip_n_stds": _number,
    "clip_half_range": parse_flag,
    "per_channel_wts": parse_flag,
    "fpq_module": parse_precision,
    "fp16": parse_flag,
    "fake": parse_flag,
    "scale_approx_mult_bits": parse_multiplier_bits,
    "inputs_quant_auto_fallback": parse_flag,
    "make_identity": parse_flag,
    "quantize_inputs": parse_flag,
    "input_overrides": _by_index,
}


def _input_settings(layer: LayerSettings, given: Mapping[str, Any], where: str) -> QuantSettings | None:
    if set(given) == {"from_output"} and given["from_output"] is True:
        return None
    accepted = ("bits_activations", "mode", "clip_acts", "clip_n_stds")
    for key in given:
        if key not in accepted:
            raise QuantizationError(
                f"{where}: unknown key '{key}'; give from_output: true or some of {', '.join(accepted)}"
            )
    default = layer.input()
    bits = check_bits(given.get("bits_activations", default.num_bits), f"{where}: bits_activations")
    if bits is None:
        raise QuantizationError(
            f"{where}: bits_activations: the input of a quantized layer must be quantized"
        )
    clip = parse_clip(given.get("clip_acts", default.clip_mode), f"{where}: clip_acts")
    n_stds = check_n_stds(clip, given.get("clip_n_stds", default.clip_n_stds), where)
    mode = parse_mode(given.get("mode", default.quant_mode), f"{where}: mode").activations
    return QuantSettings(bits, mode, clip, n_stds or None)
