"""Learned Step Size Quantization: the widths of the steps of weights and activations are parameters.

    v' = clamp(round(v / s), qmin, qmax) * s,    the gradient of s scaled by g = 1 / sqrt(N * qmax)

Weights are signed, [-2^(b-1), 2^(b-1) - 1]; activations unsigned, [0, 2^b - 1], where they cannot be negative
(what comes from a ReLU), else signed. N is the number of weights that share the step, or the number of
activations of one sample. A step begins as 2 * mean |v| / sqrt(qmax) of the weight as it is, or of the first
training batch.
Source: Esser et al., Learned Step Size Quantization, ICLR 2020 (arXiv 1902.08153).
Knows nothing about data or training loops.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any, ClassVar, cast

import torch
from torch import Tensor, nn
from torch.optim import Optimizer

from distiller.errors import QuantizationError, require
from distiller.names import named_modules, unwrap
from distiller.quantization.affine import get_quantized_range
from distiller.quantization.training.fake_quant import Grid, lsq_quantize, step_size
from distiller.quantization.training.qat_quantizer import QatQuantizer
from distiller.quantization.training.sim_bn_fold import FREEZE_BN_DELAY
from distiller.quantization.training.tensor_reads import TensorRead, trace_reads
from distiller.quantization.training.weight_quantizers import OutputChannels
from distiller.registry import QUANTIZERS

__all__ = ["LSQQuantizer", "LearnedStepActivations", "LearnedStepWeights", "initial_step"]


def initial_step(x: Tensor, qmax: int) -> Tensor:
    """2 * mean |x| / sqrt(qmax) over the last dimension; 1 where x is all zeros.

    Args:
        x: (..., values).
        qmax: the largest integer of the grid.
    """
    step = 2 * x.abs().mean(-1) / math.sqrt(qmax)
    return torch.where(step < torch.finfo(step.dtype).tiny, torch.ones_like(step), step)


class LearnedStepWeights(nn.Module):
    """Maps a weight to the nearest values on a signed grid with learned steps.

    The first weight that it is given sets the step: mean |v| is that of the weights that are not exactly
    zero, so that masked ones do not make it small.

    Args:
        num_bits: 2 to 16.
        channels: where the output channels are, for a step of its own for each; None for one step.
        outputs: how many output channels there are.
    """

    def __init__(self, num_bits: int, channels: OutputChannels | None = None, outputs: int = 1) -> None:
        super().__init__()
        self.num_bits = num_bits
        self.channels = channels
        self.step_size = nn.Parameter(torch.ones(() if channels is None else outputs))
        self._has_step = False

    def forward(self, weight: Tensor) -> Tensor:
        """The quantized weight."""
        if not self._has_step:
            self._begin(weight.detach())
        qmin, qmax = get_quantized_range(self.num_bits)
        step = self.step_size if self.channels is None else self.channels.spread(self.step_size, weight)
        sharing = weight.numel() / self.step_size.numel()
        return lsq_quantize(weight, step, qmin, qmax, 1 / math.sqrt(sharing * qmax))

    def right_inverse(self, weight: Tensor) -> Tensor:
        """What a weight that is assigned to the layer becomes: the full-precision one."""
        return weight

    def weight_grid(self, weight: Tensor) -> Grid:
        """The grid that a full-precision weight is rounded to."""
        return _grid(self.step_size, *get_quantized_range(self.num_bits))

    def extra_repr(self) -> str:
        """The settings, for `print(model)`."""
        return f"{self.num_bits} bits{', per channel' if self.channels else ''}"

    def _begin(self, weight: Tensor) -> None:
        rows = weight.flatten()[None] if self.channels is None else self.channels.rows(weight)
        _, qmax = get_quantized_range(self.num_bits)
        nonzero = (rows != 0).to(rows.dtype).mean(1)  # share of each row
        step = initial_step(rows, qmax) / torch.where(nonzero > 0, nonzero, 1)
        with torch.no_grad():
            self.step_size.copy_(step.reshape(self.step_size.shape))
        self._has_step = True


class LearnedStepActivations(nn.Module):
    """Maps activations to the nearest values on a grid with a learned step, which the first training batch
    sets.

    Args:
        num_bits: 2 to 16.
        is_signed: whether they can be negative.
        where: whose they are, for messages.
    """

    has_step: Tensor

    def __init__(self, num_bits: int, is_signed: bool, where: str = "") -> None:
        super().__init__()
        self.num_bits = num_bits
        self.is_signed = is_signed
        self.where = where
        self.step_size = nn.Parameter(torch.tensor(1.0))
        self.register_buffer("has_step", torch.tensor(False))
        self._has_step = False
        self.register_load_state_dict_post_hook(_look_again)

    def forward(self, x: Tensor) -> Tensor:
        """The quantized activations, shape as x."""
        if not self._has_step:
            self._begin(x.detach())
        qmin, qmax = get_quantized_range(self.num_bits, self.is_signed)
        of_a_sample = x.numel() / max(x.shape[0] if x.dim() > 1 else 1, 1)
        return lsq_quantize(x, self.step_size, qmin, qmax, 1 / math.sqrt(max(of_a_sample, 1) * qmax))

    @property
    def grid(self) -> Grid:
        """The grid that activations are rounded to.

        Raises:
            QuantizationError: no training batch has set the step yet.
        """
        self._check_step()
        return _grid(self.step_size, *get_quantized_range(self.num_bits, self.is_signed))

    def extra_repr(self) -> str:
        """The settings, for `print(model)`."""
        return f"{self.num_bits} bits, {'signed' if self.is_signed else 'unsigned'}"

    def _begin(self, x: Tensor) -> None:
        """Set the step, unless it was set elsewhere (in another replica, or before a load)."""
        if torch.compiler.is_compiling():  # a program has no values yet
            return
        if self.training and not self.has_step:
            _, qmax = get_quantized_range(self.num_bits, self.is_signed)
            with torch.no_grad():
                self.step_size.copy_(initial_step(x.flatten().to(self.step_size.dtype), qmax))
                self.has_step.fill_(True)
        self._check_step()

    def _check_step(self) -> None:
        self._has_step = self._has_step or bool(self.has_step)
        if not self._has_step:
            raise QuantizationError(
                f"{self.where or type(self).__name__}: has seen no training batch, its step size is not "
                "known; train first, or load a trained checkpoint"
            )


@QUANTIZERS.register
class LSQQuantizer(QatQuantizer):
    """Trains with learned step sizes: of weights, and of the inputs of convolutions and linear layers.

    Layers that read the same tensor at the same width share its step. As in the paper, sums and what else
    lies between such layers stay in full precision; first and last layers are at 8 bits there, which
    `overrides` say.

    Args:
        model: changed in place by `prepare_model`, which runs it once, in evaluation mode, to see what layers
            read.
        optimizer: of the model; the step sizes are added to it as a group of their own.
        bits_activations: 2 to 16; 0, None or 32: full precision, the default.
        bits_weights: alike.
        bits_bias: alike; symmetric over the range of the bias.
        overrides: by layer name or pattern, the bits and `per_channel_wts`.
        per_channel_wts: a step for each output channel of a weight.
        step_size_lr_factor: the learning rate of the step sizes, as a multiple of the optimizer's first
            group's.
        step_size_weight_decay: their weight decay.
        simulate_bn_folding: quantize the weights of layers that a batch norm follows with that folded in.
        freeze_bn_delay: training batches after which the statistics of those are frozen; None: never.

    Raises:
        QuantizationError: a setting is wrong.
        UnknownNameError: an override matches no layer.
    """

    override_names: ClassVar[frozenset[str]] = frozenset({"per_channel_wts"})

    def __init__(
        self,
        model: nn.Module,
        optimizer: Optimizer | None = None,
        bits_activations: int | None = None,
        bits_weights: int | None = None,
        bits_bias: int | None = None,
        overrides: Mapping[str, Any] | None = None,
        per_channel_wts: bool = False,
        step_size_lr_factor: float = 1.0,
        step_size_weight_decay: float = 0.0,
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
        require(per_channel_wts, bool, "LSQQuantizer: per_channel_wts", "true or false")
        for key, given in self.overrides.items():
            where = f"LSQQuantizer: overrides['{key}'].per_channel_wts"
            require(given.get("per_channel_wts", per_channel_wts), bool, where, "true or false")
        self.per_channel_wts = per_channel_wts
        self.step_size_lr_factor = _checked_factor(step_size_lr_factor, "step_size_lr_factor")
        self.step_size_weight_decay = _checked_factor(step_size_weight_decay, "step_size_weight_decay")
        self._reads: dict[str, TensorRead] = {}
        self._of_tensors: dict[tuple[frozenset[int], int], LearnedStepActivations] = {}

    @property
    def traces_model(self) -> bool:
        """Whether `prepare_model` runs the model."""
        return super().traces_model or any(bits.acts is not None for bits in self.module_qbits_map.values())

    def weight_quantizer(self, layer: nn.Module, name: str, bits: int, **overrides: Any) -> nn.Module:
        """Learned steps for the weight."""
        if not overrides.get("per_channel_wts", self.per_channel_wts):
            return LearnedStepWeights(bits)
        channels, weight = OutputChannels.of(layer), cast(Tensor, layer.weight)
        return LearnedStepWeights(bits, channels, len(channels.rows(weight.detach())))

    def input_quantizer(self, layer: nn.Module, name: str, bits: int, **overrides: Any) -> nn.Module | None:
        """A learned step for what a convolution or linear layer reads, one for all that read the same."""
        if not isinstance(layer, _LAYERS) or name not in self._reads:
            return None
        read = self._reads[name]
        if (read.tensors, bits) not in self._of_tensors:
            self._of_tensors[read.tensors, bits] = LearnedStepActivations(bits, not read.is_nonnegative, name)
        return self._of_tensors[read.tensors, bits]

    def optimizer_groups(self) -> list[dict[str, Any]]:
        """One group of all step sizes, with a learning rate and weight decay of its own."""
        groups = super().optimizer_groups()
        assert self.optimizer is not None, "asked for when there is an optimizer"
        for group in groups:
            group["lr"] = self.optimizer.param_groups[0]["lr"] * self.step_size_lr_factor
            if "weight_decay" in self.optimizer.defaults:
                group["weight_decay"] = self.step_size_weight_decay
        return groups

    def settings(self) -> dict[str, Any]:
        """The constructor's arguments except model and optimizer, as plain data."""
        return {
            **super().settings(),
            "per_channel_wts": self.per_channel_wts,
            "step_size_lr_factor": self.step_size_lr_factor,
            "step_size_weight_decay": self.step_size_weight_decay,
            "simulate_bn_folding": self.simulate_bn_folding,
            "freeze_bn_delay": self.freeze_bn_delay,
        }

    def _before_replacement(self, dummy_input: Any) -> None:
        super()._before_replacement(dummy_input)
        modules = dict(named_modules(unwrap(self.model)))
        watched = {
            name: modules[name]
            for name, bits in self.module_qbits_map.items()
            if bits.acts is not None and isinstance(modules[name], _LAYERS)
        }
        if watched:
            self._reads = trace_reads(self.model, watched, dummy_input)


_LAYERS = (nn.modules.conv._ConvNd, nn.Linear)


def _grid(step: Tensor, qmin: int, qmax: int) -> Grid:
    scale = step_size(step).clone()
    return Grid(scale, torch.zeros_like(scale, dtype=torch.int32), qmin, qmax)


def _checked_factor(value: Any, where: str) -> float:
    if isinstance(value, bool) or not isinstance(value, int | float) or not 0 <= value < math.inf:
        raise QuantizationError(f"{where}: must be a number from 0, got {value!r}")
    return float(value)


def _look_again(quantizer: LearnedStepActivations, _incompatible_keys: Any) -> None:
    """After a load: whether the step was set; known from here on without waiting for a value."""
    quantizer._has_step = bool(quantizer.has_step)
