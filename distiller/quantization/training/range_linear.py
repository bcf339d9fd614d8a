"""Training with linear quantization over ranges: of weights as they are, of activations as they were tracked.

    weight        nearest value on a grid over [min W, max W], per tensor or output channel
    activation    clamped to the tracked range (`range_tracking`), then the nearest value on a grid over it

Gradients pass straight through the rounding, and not where activations were clamped.
Source: Jacob et al., arXiv 1712.05877; as in Distiller.
Knows nothing about data or training loops.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, ClassVar

from torch import nn
from torch.optim import Optimizer

from distiller.errors import QuantizationError, require
from distiller.modules import Concat, EltwiseMult
from distiller.names import unwrap
from distiller.quantization.affine import LinearQuantMode
from distiller.quantization.ptq_settings import parse_mode
from distiller.quantization.training.attachments import attach_input_quantizer
from distiller.quantization.training.qat_quantizer import QatQuantizer, checked_width
from distiller.quantization.training.range_tracking import FakeLinearQuantization, check_decay
from distiller.quantization.training.sim_bn_fold import FREEZE_BN_DELAY
from distiller.quantization.training.weight_quantizers import LinearWeightQuantizer, OutputChannels
from distiller.registry import QUANTIZERS

__all__ = ["NCFQuantAwareTrainQuantizer", "QuantAwareTrainRangeLinearQuantizer"]

_Mode = str | LinearQuantMode | Mapping[str, str | LinearQuantMode]


@QUANTIZERS.register
class QuantAwareTrainRangeLinearQuantizer(QatQuantizer):
    """Trains with linear quantization of weights, of the outputs of ReLUs (and ReLU6s), and of the model's
    input.

    A module that is called several times has one range for all its calls. Distiller differs: its default
    width, 32, meant 32-bit integers (here full precision); it replaced the `forward` of the model's class to
    quantize the input (here the model has a child `input_quantizer`); its model ran on a single device.

    Args:
        model: changed in place by `prepare_model`.
        optimizer: of the model; nothing is added to it.
        bits_activations: 2 to 16; 0, None or 32: full precision, the default.
        bits_weights: alike.
        bits_bias: alike; symmetric over the range of the bias.
        overrides: by layer name or pattern, the bits, `mode`, `ema_decay` and `per_channel_wts`.
        mode: how ranges are laid onto integers, or `{activations: mode, weights: mode}`.
        ema_decay: decay of the moving averages that ranges of activations are, per batch, in [0, 1).
        per_channel_wts: a grid for each output channel of a weight.
        quantize_inputs: quantize the model's first input too, if activations are.
        num_bits_inputs: width of the input; None: `bits_activations`.
        simulate_bn_folding: quantize the weights of layers that a batch norm follows with that folded in.
        freeze_bn_delay: training batches after which the statistics of those are frozen; None: never.

    Raises:
        QuantizationError: a setting is wrong.
        UnknownNameError: an override matches no layer.
    """

    override_names: ClassVar[frozenset[str]] = frozenset({"mode", "ema_decay", "per_channel_wts"})

    def __init__(
        self,
        model: nn.Module,
        optimizer: Optimizer | None = None,
        bits_activations: int | None = None,
        bits_weights: int | None = None,
        bits_bias: int | None = None,
        overrides: Mapping[str, Any] | None = None,
        mode: _Mode = LinearQuantMode.SYMMETRIC,
        ema_decay: float = 0.999,
        per_channel_wts: bool = False,
        quantize_inputs: bool = True,
        num_bits_inputs: int | None = None,
        *,
        simulate_bn_folding: bool = False,
        freeze_bn_delay: int | None = FREEZE_BN_DELAY,
    ) -> None:
        super().__init__(
            model,
            optimizer,
            bits_activations=bits_activations,
            bits_weights=bits_weights,
            bits_bias=bits_bias,
            overrides=overrides,
            simulate_bn_folding=simulate_bn_folding,
            freeze_bn_delay=freeze_bn_delay,
        )
        kind = type(self).__name__
        require(quantize_inputs, bool, f"{kind}: quantize_inputs", "true or false")
        self.mode = parse_mode(mode, "mode")
        self.ema_decay = check_decay(ema_decay)
        self.per_channel_wts = _checked_flag(per_channel_wts, "per_channel_wts")
        self.quantize_inputs = quantize_inputs
        self.num_bits_inputs = checked_width(num_bits_inputs, self.smallest_bits.acts, "num_bits_inputs")
        for key, given in self.overrides.items():
            where = f"overrides['{key}']."
            parse_mode(given.get("mode", self.mode), f"{where}mode")
            check_decay(given.get("ema_decay", self.ema_decay), f"{where}ema_decay")
            _checked_flag(given.get("per_channel_wts", self.per_channel_wts), f"{where}per_channel_wts")

    def weight_quantizer(self, layer: nn.Module, name: str, bits: int, **overrides: Any) -> nn.Module:
        """A grid over the range of the weight."""
        mode = parse_mode(overrides.get("mode", self.mode), "mode").weights
        is_per_channel = overrides.get("per_channel_wts", self.per_channel_wts)
        return LinearWeightQuantizer(bits, mode, OutputChannels.of(layer) if is_per_channel else None)

    def activation_replacement(
        self, module: nn.Module, name: str, bits: int, **overrides: Any
    ) -> nn.Module | None:
        """A ReLU with its output on a grid over the tracked range."""
        if not isinstance(module, nn.ReLU | nn.ReLU6):
            return None
        ceiling = module.max_val if isinstance(module, nn.ReLU6) else None
        return self._activation_quantizer(name, bits, overrides, is_relu=True, ceiling=ceiling)

    def settings(self) -> dict[str, Any]:
        """The constructor's arguments except model and optimizer, as plain data."""
        return {
            **super().settings(),
            "mode": {"activations": self.mode.activations.name, "weights": self.mode.weights.name},
            "ema_decay": self.ema_decay,
            "per_channel_wts": self.per_channel_wts,
            "quantize_inputs": self.quantize_inputs,
            "num_bits_inputs": self.num_bits_inputs,
            "simulate_bn_folding": self.simulate_bn_folding,
            "freeze_bn_delay": self.freeze_bn_delay,
        }

    def _after_replacement(self, dummy_input: Any) -> None:
        if self.quantize_inputs and self.default_qbits.acts is not None:
            bits = self.num_bits_inputs or self.default_qbits.acts
            quantizer = self._activation_quantizer("the model's input", bits, {})
            attach_input_quantizer(unwrap(self.model), self.fitted(quantizer, unwrap(self.model), "input"))

    def _activation_quantizer(
        self,
        where: str,
        bits: int,
        overrides: Mapping[str, Any],
        is_relu: bool = False,
        ceiling: float | None = None,
    ) -> FakeLinearQuantization:
        mode = parse_mode(overrides.get("mode", self.mode), "mode").activations
        decay = check_decay(overrides.get("ema_decay", self.ema_decay))
        return FakeLinearQuantization(bits, mode, decay, is_relu, ceiling, where)


@QUANTIZERS.register
class NCFQuantAwareTrainQuantizer(QuantAwareTrainRangeLinearQuantizer):
    """For neural collaborative filtering: the outputs of linear layers, products and concatenations too.

    The model's inputs are numbers of users and items, and not quantized.

    Args:
        model: changed in place by `prepare_model`.
        optimizer: of the model; nothing is added to it.
        bits_activations: 2 to 16; 0, None or 32: full precision, the default.
        bits_weights: alike.
        bits_bias: alike; symmetric over the range of the bias.
        overrides: by layer name or pattern, the bits, `mode`, `ema_decay` and `per_channel_wts`.
        mode: how ranges are laid onto integers, or `{activations: mode, weights: mode}`.
        ema_decay: decay of the moving averages that ranges of activations are, per batch, in [0, 1).
        per_channel_wts: a grid for each output channel of a weight.
    """

    def __init__(
        self,
        model: nn.Module,
        optimizer: Optimizer | None = None,
        bits_activations: int | None = None,
        bits_weights: int | None = None,
        bits_bias: int | None = None,
        overrides: Mapping[str, Any] | None = None,
        mode: _Mode = LinearQuantMode.SYMMETRIC,
        ema_decay: float = 0.999,
        per_channel_wts: bool = False,
    ) -> None:
        super().__init__(
            model,
            optimizer,
            bits_activations,
            bits_weights,
            bits_bias,
            overrides,
            mode,
            ema_decay,
            per_channel_wts,
            quantize_inputs=False,
        )

    def output_quantizer(self, layer: nn.Module, name: str, bits: int, **overrides: Any) -> nn.Module | None:
        """A grid over the tracked range of a linear layer's, product's or concatenation's output."""
        if not isinstance(layer, nn.Linear | EltwiseMult | Concat):
            return None
        return self._activation_quantizer(name, bits, overrides)

    def settings(self) -> dict[str, Any]:
        """The constructor's arguments except model and optimizer, as plain data."""
        inherited = super().settings()
        fixed = ("quantize_inputs", "num_bits_inputs", "simulate_bn_folding", "freeze_bn_delay")
        return {key: value for key, value in inherited.items() if key not in fixed}


def _checked_flag(value: Any, where: str) -> bool:
    if not isinstance(value, bool):
        raise QuantizationError(f"{where}: must be true or false, got {value!r}")
    return value
