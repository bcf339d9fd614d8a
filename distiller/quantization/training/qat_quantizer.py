"""What every training quantizer shares: where its modules go, and what the optimizer is told.

A training quantizer changes no parameter: the weight of a layer is computed from the full-precision
`Parameter` each time that the layer reads it (`torch.nn.utils.parametrize`), activations by modules in the
place of others, or on the inputs or outputs of layers. Parameters keep their canonical names, and those that
are learned with the quantization go to the optimizer in groups of their own.
Knows nothing about how anything is quantized.
"""

from __future__ import annotations

import enum
from collections.abc import Mapping
from typing import Any, ClassVar, NamedTuple, cast

from torch import nn
from torch.nn.utils import parametrize
from torch.optim import Optimizer

from distiller.errors import QuantizationError, did_you_mean, require
from distiller.names import named_modules, named_parameters, unwrap
from distiller.quantization.affine import LinearQuantMode
from distiller.quantization.quantizer import BITS_KEYS, QBits, Quantizer
from distiller.quantization.training.attachments import attach_input_quantizer, attach_output_quantizer
from distiller.quantization.training.bn_pairs import batch_norms_behind
from distiller.quantization.training.example_input import example_input
from distiller.quantization.training.sim_bn_fold import (
    FREEZE_BN_DELAY,
    SimulatedFoldedBatchNorm,
    check_freeze_bn_delay,
    pass_over,
)
from distiller.quantization.training.weight_quantizers import LinearWeightQuantizer

__all__ = ["QatQuantizer", "checked_width"]

_PARAMETER_LAYERS = (nn.modules.conv._ConvNd, nn.Linear, nn.Embedding)
_LARGEST_BITS = QBits(16, 16, 64)
_FULL_PRECISION = (None, 0, 32)
_FLOAT_BITS = 24  # a bias of so many bits is as fine as one of float32


class QatQuantizer(Quantizer):
    """Base class of the quantizers that a model is trained with.

    A subclass overrides what it needs of `weight_quantizer`, `bias_quantizer`, `activation_replacement`,
    `input_quantizer` and `output_quantizer`: each makes a module, or returns None to leave its place in full
    precision, and changes nothing. It also overrides `settings`, and `optimizer_groups` if what it learns
    needs other settings than the optimizer's own.

    The modules they return keep all their state in buffers and parameters; their parameters (those in
    submodules too) count as learned quantization parameters. `weight_quantizer` and `bias_quantizer` return a
    module whose `forward` maps the full-precision tensor to the quantized one, differentiably, and exactly 0
    to exactly 0; it has `right_inverse`, the identity. Whatever they return is put into the mode and on the
    device of the layer it is made for. For a deployed copy (`training.deploy`) modules of weights have
    `weight_grid(weight) -> Grid`, and those of activations a property `grid`; see `fake_quant.Grid`.

    Args:
        model: changed in place by `prepare_model`. If an equal quantizer has prepared it (a checkpoint that
            was loaded), it is taken over as it is.
        optimizer: of the model; learned quantization parameters are added to it.
        bits_activations: `smallest_bits.acts` to 16; 0, None or 32: full precision, the default.
        bits_weights: alike.
        bits_bias: alike; 24 and more are full precision.
        overrides: by layer name or pattern (see `Quantizer`), the bits and `override_names`.
        simulate_bn_folding: quantize the weights of layers that a batch norm follows with that folded in.
        freeze_bn_delay: training batches after which the statistics of those are frozen; None: never.

    Attributes:
        override_names: a subclass's own keys in `overrides` (beside the bits); they reach the five functions
            as keywords, and only where the user gave them.
        smallest_bits: the smallest widths that a subclass can do.
        optimizer: the optimizer that was given, or None.

    Raises:
        QuantizationError: a setting is wrong.
        UnknownNameError: an override matches no layer.
    """

    override_names: ClassVar[frozenset[str]] = frozenset()
    smallest_bits: ClassVar[QBits] = QBits(2, 2, 2)

    def __init__(
        self,
        model: nn.Module,
        optimizer: Optimizer | None = None,
        *,
        bits_activations: int | None = None,
        bits_weights: int | None = None,
        bits_bias: int | None = None,
        overrides: Mapping[str, Any] | None = None,
        simulate_bn_folding: bool = False,
        freeze_bn_delay: int | None = FREEZE_BN_DELAY,
    ) -> None:
        kind = type(self).__name__
        require(model, nn.Module, f"{kind}: model", "a torch.nn.Module")
        require(optimizer, (Optimizer, type(None)), f"{kind}: optimizer", "a torch.optim.Optimizer or None")
        require(simulate_bn_folding, bool, f"{kind}: simulate_bn_folding", "true or false")
        is_prepared = hasattr(unwrap(model), "quantizer_metadata")
        others, is_wellformed = _without_bits(overrides)
        # The layers of a prepared model are not those that the overrides are about.
        super().__init__(model, overrides=None if is_prepared and is_wellformed else others)
        self.optimizer = optimizer
        self.simulate_bn_folding = simulate_bn_folding
        self.freeze_bn_delay = check_freeze_bn_delay(freeze_bn_delay)
        self.overrides = {key: dict(given) for key, given in (overrides or {}).items()}
        default = {"bits_activations": bits_activations, "bits_weights": bits_weights, "bits_bias": bits_bias}
        self.default_qbits = self._checked_bits(default, "")
        self._check_overrides()
        for name, module in self.layers.items():
            given = self.overrides.get(self.override_keys.get(name, ""), {})
            bits = self._checked_bits({key: given.get(key, default[key]) for key in BITS_KEYS}, f"{name}: ")
            self.module_qbits_map[name] = bits if isinstance(module, _PARAMETER_LAYERS) else QBits(bits.acts)
        self._norms: dict[str, nn.Module] = {}

    def weight_quantizer(self, layer: nn.Module, name: str, bits: int, **overrides: Any) -> nn.Module | None:
        """The module that computes the weight of a convolution, linear layer or embedding.

        Args:
            layer: the layer; `layer.weight` is the full-precision weight.
            name: its canonical name, for messages.
            bits: width of its weight.
            overrides: those of `override_names` that the user gave for it.
        """
        return None

    def bias_quantizer(self, layer: nn.Module, name: str, bits: int, **overrides: Any) -> nn.Module | None:
        """The module that computes the bias of a layer, its own or a folded one; linear, symmetric."""
        return LinearWeightQuantizer(bits, LinearQuantMode.SYMMETRIC)

    def activation_replacement(
        self, module: nn.Module, name: str, bits: int, **overrides: Any
    ) -> nn.Module | None:
        """The module that takes the place of one without parameters, as a ReLU, and quantizes its output."""
        return None

    def input_quantizer(self, layer: nn.Module, name: str, bits: int, **overrides: Any) -> nn.Module | None:
        """The module that the first argument of a layer goes through; becomes its child `input_quantizer`.

        It may be one that another layer has, which reads the same tensor.
        """
        return None

    def output_quantizer(self, layer: nn.Module, name: str, bits: int, **overrides: Any) -> nn.Module | None:
        """The module that the output of a layer goes through; becomes its child `output_quantizer`."""
        return None

    def prepare_model(self, dummy_input: Any = None) -> None:
        """Put the quantizers into the model, or take over a model that an equal quantizer has prepared.

        Args:
            dummy_input: an input of the model, or a tuple of them, where the quantizer runs it; default
                of the model's `input_shape`.

        Raises:
            QuantizationError: called a second time, the model is prepared otherwise, or cannot be quantized
                as asked.
            DistillerError: an input is needed, and there is neither.
        """
        metadata = getattr(unwrap(self.model), "quantizer_metadata", None)
        needs_input = self.traces_model and dummy_input is None
        if metadata is None or self.is_prepared:
            if needs_input:
                dummy_input = example_input(
                    self.model, f"{type(self).__name__}.prepare_model without dummy_input"
                )
            super().prepare_model(dummy_input)
        else:
            self._check_prepared_alike(metadata)
            self.is_prepared = True
            self._put_weights_before_biases()
        self._join_optimizer()

    def learned_parameters(self) -> dict[str, nn.Parameter]:
        """The parameters of the modules that the quantizer has put into the model, by canonical name."""
        inner = unwrap(self.model)
        quantizers = [module for module in inner.modules() if getattr(module, "quantizes", None) is not None]
        learned = {id(parameter) for module in quantizers for parameter in module.parameters()}
        return {name: parameter for name, parameter in named_parameters(inner) if id(parameter) in learned}

    def optimizer_groups(self) -> list[dict[str, Any]]:
        """The groups for the optimizer: `{"params": [...]}` with whatever settings are not its defaults.

        By default one group of all learned parameters, or none. A parameter that the optimizer had in
        another group (as after a resume) is moved.
        """
        learned = list(self.learned_parameters().values())
        return [{"params": learned}] if learned else []

    def fitted(self, quantizer: nn.Module, module: nn.Module, role: str) -> nn.Module:
        """`quantizer`, marked as one, in the mode and on the device of the module it is for.

        Args:
            role: what it quantizes: weight, bias, activation, input or output.
        """
        some_parameter = next(module.parameters(), next(self.model.parameters(), None))
        quantizer.quantizes = role  # type: ignore[assignment]
        if some_parameter is not None:
            quantizer.to(some_parameter.device)
        return quantizer.train(module.training)

    def quantize_params(self) -> None:
        """Nothing: weights are quantized whenever they are read."""

    def settings(self) -> dict[str, Any]:
        """Bits and overrides, as plain data; a subclass adds its own: `{**super().settings(), ...}`."""
        bits = self.default_qbits
        return {
            "bits_activations": bits.acts,
            "bits_weights": bits.wts,
            "bits_bias": bits.bias,
            "overrides": _plain(self.overrides),
        }

    @property
    def traces_model(self) -> bool:
        """Whether `prepare_model` runs the model, and so needs an input."""
        return self.simulate_bn_folding

    def _before_replacement(self, dummy_input: Any) -> None:
        if self.simulate_bn_folding:
            self._norms = batch_norms_behind(self.model, dummy_input)

    def _replace_layers(self) -> None:
        modules = dict(named_modules(unwrap(self.model)))
        made = {modules[name]: self._made_for(modules[name], name) for name in self.layers}
        self.modules_processed.update(
            (module, (name, self._installed(module, name, made[module])))
            for module, name in ((modules[name], name) for name in self.layers)
        )
        self._put({module: new for module, (_, new) in self.modules_processed.items() if new is not None})

    def _made_for(self, module: nn.Module, name: str) -> _Made:
        """The quantizers of one layer; nothing is changed yet."""
        bits, given = self.module_qbits_map[name], self.module_overrides_map[name]
        weight = bias = replacement = before = after = None
        if bits.wts is not None:
            weight = self.weight_quantizer(module, name, bits.wts, **given)
        gets_bias = getattr(module, "bias", None) is not None or (weight is not None and name in self._norms)
        if bits.bias is not None and gets_bias:
            bias = self.bias_quantizer(module, name, bits.bias, **given)
        if bits.acts is not None:
            replacement = self.activation_replacement(module, name, bits.acts, **given)
            before = self.input_quantizer(module, name, bits.acts, **given)
            after = self.output_quantizer(module, name, bits.acts, **given)
        return _Made(weight, bias, replacement, before, after)

    def _installed(self, module: nn.Module, name: str, made: _Made) -> nn.Module | None:
        """Give a layer its quantizers; returns what takes its place, if anything does."""
        for role, quantizer in made._asdict().items():
            if quantizer is not None:
                self.fitted(quantizer, module, role)
        replacement = made.activation
        norm = self._norms.get(name)
        if made.weight is not None and norm is not None:
            replacement = SimulatedFoldedBatchNorm(
                module,
                norm,
                self.freeze_bn_delay,
                made.weight,
                bias_quantization_fn=made.bias,
                owns_bn=False,
            )
            pass_over(norm)
        else:
            for tensor_name, quantizer in (("weight", made.weight), ("bias", made.bias)):
                if quantizer is not None:
                    parametrize.register_parametrization(module, tensor_name, quantizer)
                    cast(nn.Module, module.parametrizations).train(module.training)
        if made.input is not None:
            attach_input_quantizer(module if replacement is None else replacement, made.input)
        if made.output is not None:
            attach_output_quantizer(module if replacement is None else replacement, made.output)
        return replacement

    def _check_prepared_alike(self, metadata: Mapping[str, Any]) -> None:
        """Raise a QuantizationError unless an equal quantizer has prepared the model."""
        kind = type(self).__name__
        if metadata.get("class") != kind:
            raise QuantizationError(
                f"prepare_model: {metadata.get('class')} has prepared the model; "
                f"{kind} needs one in floating point"
            )
        before, now = _plain(metadata.get("params", {})), self.settings()
        for key in (*now, *before):
            if before.get(key) != now.get(key):
                raise QuantizationError(
                    f"prepare_model: the model was prepared with {key} {before.get(key)!r}, "
                    f"got {now.get(key)!r}; use the settings of the checkpoint, or a model in floating point"
                )

    def _join_optimizer(self) -> None:
        """Add the learned parameters to the optimizer, taking them out of groups they are in."""
        if self.optimizer is None:
            return
        groups = self.optimizer_groups()
        learned = {id(parameter) for group in groups for parameter in group["params"]}
        for group in self.optimizer.param_groups:
            group["params"][:] = [param for param in group["params"] if id(param) not in learned]
        for group in groups:
            self.optimizer.add_param_group(group)

    def _put_weights_before_biases(self) -> None:
        """Order the optimizer's parameters as in the unprepared model: parametrized ones come last."""
        if self.optimizer is None:
            return
        parameters = dict(named_parameters(unwrap(self.model)))
        for name, _ in named_modules(unwrap(self.model)):
            weight, bias = parameters.get(f"{name}.weight"), parameters.get(f"{name}.bias")
            for group in self.optimizer.param_groups:
                at = {id(param): index for index, param in enumerate(group["params"])}
                first, second = at.get(id(bias)), at.get(id(weight))
                if first is not None and second is not None and first < second:
                    group["params"][first], group["params"][second] = weight, bias

    def _check_overrides(self) -> None:
        for key, given in self.overrides.items():
            for setting in given:
                if setting not in (*BITS_KEYS, *self.override_names):
                    known = [*BITS_KEYS, *sorted(self.override_names)]
                    hint = (
                        did_you_mean(str(setting), known)
                        or f"; {type(self).__name__} takes {', '.join(known)}"
                    )
                    raise QuantizationError(f"overrides['{key}']: unknown key '{setting}'{hint}")

    def _checked_bits(self, given: Mapping[str, Any], prefix: str) -> QBits:
        widths = [
            checked_width(given[key], smallest, f"{prefix}{key}", largest)
            for key, smallest, largest in zip(BITS_KEYS, self.smallest_bits, _LARGEST_BITS, strict=True)
        ]
        acts, wts, bias = widths
        return QBits(acts, wts, None if bias is not None and bias >= _FLOAT_BITS else bias)


def checked_width(bits: Any, smallest: int | None, what: str, largest: int | None = 16) -> int | None:
    """`bits` if it is a width from `smallest` to `largest`; None for what means full precision.

    Raises:
        QuantizationError: neither of these.
    """
    assert smallest is not None, "every quantizer says how small it goes"
    assert largest is not None, "a constant of this file"
    is_number = isinstance(bits, int) and not isinstance(bits, bool)
    if bits is None or (is_number and bits in _FULL_PRECISION):
        return None
    if not is_number or not smallest <= bits <= largest:
        raise QuantizationError(
            f"{what}: must be {smallest} to {largest} bits, or 0, 32 or null for full precision, got {bits!r}"
        )
    return bits


class _Made(NamedTuple):
    """The quantizers of one layer; the names of the fields are what they quantize."""

    weight: nn.Module | None
    bias: nn.Module | None
    activation: nn.Module | None
    input: nn.Module | None
    output: nn.Module | None


def _without_bits(overrides: Any) -> tuple[Any, bool]:
    """Overrides without the bits, and whether they have the form they must have; if not, as they are."""
    if overrides is None:
        return None, True
    if not isinstance(overrides, Mapping) or not all(
        isinstance(given, Mapping) for given in overrides.values()
    ):
        return overrides, False
    return {
        pattern: {key: value for key, value in given.items() if key not in BITS_KEYS}
        for pattern, given in overrides.items()
    }, True


def _plain(value: Any) -> Any:
    """`value` with plain dicts and lists, and names in the place of enumerated values."""
    if isinstance(value, Mapping):
        return {key: _plain(item) for key, item in value.items()}
    if isinstance(value, tuple | list):
        return [_plain(item) for item in value]
    return value.name if isinstance(value, enum.Enum) else value
