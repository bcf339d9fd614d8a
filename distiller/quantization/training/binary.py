"""Binary weights, and binary activations if asked for: two values each, one bit.

    weight        sign(W) * mean |W|, of each output channel
    activation    sign(x), +1 at 0;  with the activation scale the output is multiplied by K

K is what mean |x| over the channels of the input is on average under the kernel, at each place of the output.
Gradients pass through the signs of weights unchanged, and through those of activations where |x| <= 1.
Source: Rastegari et al., XNOR-Net, ECCV 2016 (arXiv 1603.05279); Courbariaux et al., BinaryConnect (arXiv
1511.00363) and BinaryNet (arXiv 1602.02830).
Knows nothing about data or training loops.
"""

from __future__ import annotations

import copy
from collections.abc import Mapping
from typing import Any, ClassVar

import torch
from torch import Tensor, nn
from torch.optim import Optimizer

from distiller.errors import QuantizationError, require
from distiller.names import named_modules, unwrap
from distiller.quantization.quantizer import QBits
from distiller.quantization.training.attachments import INPUT_QUANTIZER
from distiller.quantization.training.binary_activations import (
    BinaryActivations,
    HandedOn,
    gradient_within_one,
    has_scaled_form,
    make_scaled,
)
from distiller.quantization.training.fake_quant import Grid
from distiller.quantization.training.qat_quantizer import QatQuantizer
from distiller.quantization.training.tensor_reads import trace_reads
from distiller.quantization.training.weight_quantizers import OutputChannels
from distiller.registry import QUANTIZERS

__all__ = [
    "BinaryQuantizer",
    "BinaryWeightQuantizer",
    "check_flags",
    "check_widths",
    "mean_magnitude",
    "sign_grid",
    "xnor_weight",
]


def mean_magnitude(weight: Tensor, channels: OutputChannels | None = None) -> Tensor:
    """Mean |w| of the weights that are not exactly 0; 0 where all are.

    Args:
        weight: any shape.
        channels: where the output channels are, for a mean of each; None for one in all.

    Returns:
        Scalar, or (output channels,); at least in single precision.
    """
    rows = (weight.flatten()[None] if channels is None else channels.rows(weight)).detach()
    kind = torch.promote_types(rows.dtype, torch.float32)
    nonzero = rows.sign().abs_().sum(1, dtype=kind)
    mean = rows.abs().sum(1, dtype=kind) / nonzero.clamp_min(1)
    return mean[0] if channels is None else mean


def xnor_weight(
    weight: Tensor, channels: OutputChannels | None = None, clips_gradients: bool = False
) -> Tensor:
    """sign(w) * mean |w|, the binary weight with the least squared error; the gradient passes unchanged.

    Exactly 0 stays 0 and does not count in the mean: what was pruned stays pruned.

    Args:
        weight: any shape.
        channels: where the output channels are, for a mean of each; None for one in all.
        clips_gradients: no gradient where |w| > 1, so that weights which only their signs matter of do not
            grow on and on (in BinaryConnect they are clipped).

    Source: Rastegari et al., arXiv 1603.05279, section 3.1.
    """
    scale = mean_magnitude(weight, channels)
    if channels is not None:
        scale = channels.spread(scale, weight)
    return _ScaledSign.apply(weight, scale.to(weight.dtype), clips_gradients)


class BinaryWeightQuantizer(nn.Module):
    """Maps a weight to its signs times its mean magnitude.

    Args:
        channels: where the output channels are, for a mean of each; None for one in all.
        clips_gradients: no gradient where |w| > 1.
    """

    num_bits = 1

    def __init__(self, channels: OutputChannels | None = None, clips_gradients: bool = False) -> None:
        super().__init__()
        self.channels = channels
        self.clips_gradients = clips_gradients

    def forward(self, weight: Tensor) -> Tensor:
        """The binary weight."""
        return xnor_weight(weight, self.channels, self.clips_gradients)

    def right_inverse(self, weight: Tensor) -> Tensor:
        """What a weight that is assigned to the layer becomes: the full-precision one."""
        return weight

    def weight_grid(self, weight: Tensor) -> Grid:
        """-1, 0 (of pruned weights) and 1 times the scale."""
        return sign_grid(mean_magnitude(weight, self.channels))

    def extra_repr(self) -> str:
        """The settings, for `print(model)`."""
        clipped = ", clipped gradients" if self.clips_gradients else ""
        return f"1 bit{', per channel' if self.channels else ''}{clipped}"


@QUANTIZERS.register
class BinaryQuantizer(QatQuantizer):
    """Trains with binary weights of convolutions, linear layers and embeddings, and binary inputs of layers.

    Binary inputs are those of convolutions and linear layers; ReLUs (and ReLU6s) then hand on their input,
    for after them all signs would be +1.
    First and last layers are left in full precision by `overrides`: `fc: {bits_weights: null,
    bits_activations: null}`, and likewise a ReLU that is to stay. Batch norm before a binary input is what
    makes its signs tell something.

    The paper multiplies gradients of weights by mean |W| + 1/n; here they pass unchanged, so that learning
    rates are those of training in full precision. Zero padding of binary inputs stays 0.
    Distiller had no such quantizer.

    Args:
        model: changed in place by `prepare_model`, which runs it once if inputs are binary, to see whether
            their signs can differ.
        optimizer: of the model; nothing is added to it.
        bits_activations: 1; 0, None or 32: full precision, the default.
        bits_weights: 1, the default; 0, None or 32: full precision.
        bits_bias: 2 to 23, symmetric over the range of the bias; 0, None, 24 and more: full precision.
        overrides: by layer name or pattern, the bits and the three below.
        per_channel_wts: a scale for each output channel of a weight, as in the paper.
        clip_gradients: no gradient for weights beyond -+1.
        activation_scale: multiply what layers with binary inputs compute by K; not transposed convolutions.

    Raises:
        QuantizationError: a setting is wrong.
        UnknownNameError: an override matches no layer.
    """

    override_names: ClassVar[frozenset[str]] = frozenset(
        {"per_channel_wts", "clip_gradients", "activation_scale"}
    )
    smallest_bits: ClassVar[QBits] = QBits(1, 1, 2)

    def __init__(
        self,
        model: nn.Module,
        optimizer: Optimizer | None = None,
        bits_activations: int | None = None,
        bits_weights: int | None = 1,
        bits_bias: int | None = None,
        overrides: Mapping[str, Any] | None = None,
        per_channel_wts: bool = True,
        clip_gradients: bool = False,
        activation_scale: bool = False,
    ) -> None:
        super().__init__(
            model,
            optimizer,
            bits_activations=bits_activations,
            bits_weights=bits_weights,
            bits_bias=bits_bias,
            overrides=overrides,
        )
        self.flags = {
            "per_channel_wts": per_channel_wts,
            "clip_gradients": clip_gradients,
            "activation_scale": activation_scale,
        }
        check_flags(self.flags, self.overrides, "BinaryQuantizer")
        check_widths(self, QBits(acts=1, wts=1))

    def weight_quantizer(self, layer: nn.Module, name: str, bits: int, **overrides: Any) -> nn.Module:
        """Signs times the mean magnitude."""
        flags = {**self.flags, **overrides}
        channels = OutputChannels.of(layer) if flags["per_channel_wts"] else None
        return BinaryWeightQuantizer(channels, flags["clip_gradients"])

    def activation_replacement(
        self, module: nn.Module, name: str, bits: int, **overrides: Any
    ) -> nn.Module | None:
        """What hands on the input of a ReLU."""
        return HandedOn() if isinstance(module, _RELUS) else None

    def input_quantizer(self, layer: nn.Module, name: str, bits: int, **overrides: Any) -> nn.Module | None:
        """The signs of a layer's input; one with the activation scale takes them itself."""
        is_scaled = overrides.get("activation_scale", self.flags["activation_scale"])
        return BinaryActivations() if isinstance(layer, _LAYERS) and not is_scaled else None

    def settings(self) -> dict[str, Any]:
        """The constructor's arguments except model and optimizer, as plain data."""
        return {**super().settings(), **self.flags}

    @property
    def traces_model(self) -> bool:
        """Whether `prepare_model` runs the model."""
        return super().traces_model or any(bits.acts is not None for bits in self.module_qbits_map.values())

    def _before_replacement(self, dummy_input: Any) -> None:
        super()._before_replacement(dummy_input)
        self._check_signs_vary(dummy_input)
        scaled = [(name, layer) for name, layer in self._binary_inputs().items() if self._is_scaled(name)]
        for name, layer in scaled:
            if not has_scaled_form(layer):
                raise QuantizationError(
                    f"{name}: a {type(layer).__name__} has no activation scale, only plain convolutions "
                    "(1d to 3d) and linear layers have; set activation_scale: false for it"
                )
        for _, layer in scaled:
            make_scaled(layer)

    def _after_replacement(self, dummy_input: Any) -> None:
        for name, layer in self._binary_inputs().items():
            if self._is_scaled(name):
                layer.add_module(INPUT_QUANTIZER, self.fitted(BinaryActivations(), layer, "input"))

    def _check_signs_vary(self, dummy_input: Any) -> None:
        """Raise a QuantizationError if a layer has a binary input that cannot be negative."""
        layers = self._binary_inputs()
        if not layers:
            return
        twin = copy.deepcopy(unwrap(self.model))
        modules = dict(named_modules(twin))
        for name in self.layers:
            if self.module_qbits_map[name].acts is not None and isinstance(modules[name], _RELUS):
                modules[name].__class__ = HandedOn
        reads = trace_reads(twin, {name: modules[name] for name in layers}, dummy_input)
        constant = [name for name, read in reads.items() if read.is_nonnegative]
        if constant:
            raise QuantizationError(
                f"{constant[0]}: its input is never negative, all its signs would be +1; set "
                "bits_activations: 1 for the ReLU before it too, which then hands on its input (a ReLU in "
                "`forward` must become a module), or bits_activations: null for the layer"
            )

    def _binary_inputs(self) -> dict[str, nn.Module]:
        """The layers with binary inputs, by name."""
        return {
            name: module
            for name, module in named_modules(unwrap(self.model))
            if name in self.layers
            and isinstance(module, _LAYERS)
            and self.module_qbits_map[name].acts is not None
        }

    def _is_scaled(self, name: str) -> bool:
        return self.module_overrides_map[name].get("activation_scale", self.flags["activation_scale"])


def sign_grid(scale: Tensor) -> Grid:
    """-1, 0 and 1 times a scale, scalar or (output channels,); 1 in the place of a scale of 0."""
    scale = scale + (scale == 0).to(scale.dtype)
    return Grid(scale, torch.zeros_like(scale, dtype=torch.int32), -1, 1)


def check_widths(quantizer: QatQuantizer, only: QBits) -> None:
    """Refuse widths of weights and activations other than the one that a quantizer has.

    Args:
        quantizer: its bits are read, those of each layer too.
        only: the widths that there are; None where there is none.

    Raises:
        QuantizationError: naming the setting and the layer.
    """
    kind = type(quantizer).__name__
    for name, bits in {"": quantizer.default_qbits, **quantizer.module_qbits_map}.items():
        where = f"{name}: " if name else ""
        for key, given, own in (
            ("bits_activations", bits.acts, only.acts),
            ("bits_weights", bits.wts, only.wts),
        ):
            if given not in (None, own):
                wanted = f"{own}, or " if own else ""
                raise QuantizationError(
                    f"{where}{key}: must be {wanted}0, 32 or null for full precision with {kind}, got {given}"
                )


def check_flags(flags: Mapping[str, Any], overrides: Mapping[str, Mapping[str, Any]], kind: str) -> None:
    """Refuse flags that are not true or false, those in `overrides` too.

    Raises:
        UsageError: naming the flag.
    """
    for flag, value in flags.items():
        require(value, bool, f"{kind}: {flag}", "true or false")
        for key, given in overrides.items():
            require(given.get(flag, value), bool, f"{kind}: overrides['{key}'].{flag}", "true or false")


_LAYERS = (nn.modules.conv._ConvNd, nn.Linear)
_RELUS = (nn.ReLU, nn.ReLU6)


class _ScaledSign(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, weight: Tensor, scale: Tensor, clips_gradients: bool) -> Tensor:
        if clips_gradients:
            ctx.save_for_backward(weight)
        return weight.sign().mul_(scale)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        weight = ctx.saved_tensors  # nothing, if all gradients pass
        return gradient_within_one(grads[0], *weight) if weight else grads[0], None, None
