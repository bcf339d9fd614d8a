"""Batch norm folded into the layer before it while both go on training, as an integer model will have it.

    training    y = layer(x, Q(W * gamma / sigma)) * sigma / sigma_B + beta - gamma * mu_B / sigma_B
    frozen      y = layer(x, Q(W * gamma / sigma)) + beta - gamma * (mu - b) / sigma;  so in evaluation

mu_B and sigma_B are those of the batch, of layer(x, W); mu and sigma the running ones, which this batch has
updated, and which no gradient passes; b is the bias of the layer, if any. What is quantized moves with
the running statistics only, what the batch norm does is that of the batch: without Q it is layer and batch
norm.
Source: Krishnamoorthi, arXiv 1806.08342, section 3.2.2.
Knows nothing about how weights are quantized, or which batch norm follows which layer.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, cast

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm
from torch.nn.utils import parametrize
from torchvision.ops import FrozenBatchNorm2d

from distiller.errors import QuantizationError
from distiller.quantization.training.batch_statistics import (
    channel_statistics,
    per_channel,
    update_running_statistics,
)
from distiller.quantization.training.folded_parameters import FoldedParameters, affine_of, sigma_of
from distiller.quantization.training.weight_quantizers import OutputChannels

__all__ = [
    "FREEZE_BN_DELAY",
    "FoldedParameters",
    "SimulatedFoldedBatchNorm",
    "check_freeze_bn_delay",
    "pass_over",
]

FREEZE_BN_DELAY = 200_000
"""Training batches after which the statistics are frozen, unless said otherwise."""


class SimulatedFoldedBatchNorm(nn.Module):
    """A layer with the batch norm after it, quantized as if it were folded; made of both.

    It is a layer of the given one's kind: it has its parameters (the same ones) and its settings. The batch
    norm is not called; its parameters and running statistics are used, and the latter updated.

    Args:
        param_module: a convolution (1d to 3d, transposed too) or linear layer.
        bn: the batch norm over its output channels, with running statistics; FrozenBatchNorm2d is frozen at
            once.
        freeze_bn_delay: training batches after which the statistics are frozen; None: never.
        param_quantization_fn: quantizes the folded weight, differentiably; a module may have parameters.
        bias_quantization_fn: quantizes the folded bias, alike; None leaves it in full precision.
        owns_bn: whether `bn` becomes a submodule; otherwise it must stay one of the model's, see `pass_over`.

    Attributes:
        bn: the batch norm.
        batches_seen: training batches so far, a buffer.
        is_frozen: whether the statistics are frozen, a buffer.

    Raises:
        QuantizationError: the two do not go together, or the batch norm has no running statistics.
    """

    bn: _BatchNorm
    batches_seen: Tensor
    is_frozen: Tensor
    weight: Tensor
    bias: nn.Parameter | None

    def __new__(cls, param_module: nn.Module | None = None, *_args: Any, **_settings: Any) -> Any:
        """An object of the subclass for the kind of `param_module`."""
        return object.__new__(_folded_class(param_module) if cls is SimulatedFoldedBatchNorm else cls)

    def __init__(
        self,
        param_module: nn.Module,
        bn: nn.Module,
        freeze_bn_delay: int | None = FREEZE_BN_DELAY,
        param_quantization_fn: Callable[[Tensor], Tensor] | None = None,
        *,
        bias_quantization_fn: Callable[[Tensor], Tensor] | None = None,
        owns_bn: bool = True,
    ) -> None:
        _check_pair(param_module, bn)
        _share(param_module, self)
        self.freeze_bn_delay = check_freeze_bn_delay(freeze_bn_delay)
        if owns_bn:
            self.bn = cast(_BatchNorm, bn)
        else:
            object.__setattr__(self, "bn", bn)  # not registered: it keeps its name in the model
        device = next(param_module.parameters()).device
        self.register_buffer("batches_seen", torch.tensor(0, device=device))
        is_frozen = isinstance(bn, FrozenBatchNorm2d) or freeze_bn_delay == 0
        self.register_buffer("is_frozen", torch.tensor(is_frozen, device=device))
        self._state: tuple[int, bool] | None = (0, is_frozen)
        self.register_load_state_dict_post_hook(_forget_state)
        folded = FoldedParameters(
            cast(_BatchNorm, bn), OutputChannels.of(param_module), param_quantization_fn, bias_quantization_fn
        )
        parametrize.register_parametrization(self, "weight", folded)
        cast(nn.Module, self.parametrizations).train(self.training)

    def forward(self, x: Tensor) -> Tensor:
        """What the layer and the batch norm make of x, with the folded weight quantized."""
        if self.bn.running_var is not None and self.bn.running_var.device != x.device:
            raise QuantizationError(
                f"simulated batch-norm folding: the input is on {x.device}, the batch norm on "
                f"{self.bn.running_var.device}; on several devices use DistributedDataParallel, "
                "not DataParallel"
            )
        if self.training and self.bn.training and not self._freezes_now():
            return self._with_batch_statistics(x)
        weight = self.weight
        return self._run(x, weight, self.folding.folded_bias(self.bias).to(weight.dtype))

    def freeze(self) -> None:
        """From here on use the running statistics as they are, in training too."""
        self.is_frozen.fill_(True)
        self._state = (int(self.batches_seen), True)

    @property
    def frozen(self) -> bool:
        """Whether the statistics are frozen."""
        return bool(self.is_frozen)

    @property
    def param_module(self) -> nn.Module:
        """The layer: itself (Distiller's name)."""
        return self

    @property
    def full_precision_weight(self) -> Tensor:
        """The parameter W, neither folded nor quantized."""
        return self.parametrizations.weight.original  # type: ignore[union-attr]

    @property
    def folding(self) -> FoldedParameters:
        """What computes the folded weight and bias."""
        return self.parametrizations.weight[0]  # type: ignore[union-attr]

    def unfolded_layer(self, weight: Tensor, bias: Tensor) -> nn.Module:
        """A plain layer of its kind with other parameters, without the batch norm."""
        kind = next(kind for kind, folded, _ in _KINDS if isinstance(self, folded))
        plain = object.__new__(kind)
        _share(self, plain)
        for key in ("bn", "freeze_bn_delay", "_state"):
            plain.__dict__.pop(key, None)
        for key in ("batches_seen", "is_frozen"):
            del plain._buffers[key]
        for key in ("parametrizations", "bn"):
            plain._modules.pop(key, None)
        plain._load_state_dict_post_hooks.clear()
        plain._parameters = {"weight": nn.Parameter(weight), "bias": nn.Parameter(bias)}
        return plain

    def _freezes_now(self) -> bool:
        """Count a training batch; whether the statistics are frozen for it."""
        seen, is_frozen = self._state or (int(self.batches_seen), bool(self.is_frozen))
        if not is_frozen and self.freeze_bn_delay is not None and seen >= self.freeze_bn_delay:
            is_frozen = True
            self.is_frozen.fill_(True)
        if not is_frozen:
            seen += 1
            self.batches_seen.add_(1)
        self._state = (seen, is_frozen)
        return is_frozen

    def _with_batch_statistics(self, x: Tensor) -> Tensor:
        unfolded = self._run(x, self.full_precision_weight, None)
        mean, variance = channel_statistics(unfolded)
        values = unfolded.numel() // mean.numel()
        if values < 2:
            raise QuantizationError(
                "simulated batch-norm folding: a training batch needs more than one value per channel, "
                f"got {tuple(unfolded.shape)} from the layer"
            )
        bias = 0 if self.bias is None else self.bias.detach()
        update_running_statistics(self.bn, mean.detach() + bias, variance.detach() * (values / (values - 1)))
        inverse_sigma = torch.rsqrt(variance + self.bn.eps)
        gamma, beta = affine_of(self.bn)
        shift = self.folding.quantized_bias(beta - gamma * mean * inverse_sigma)
        y = self._run(x, self.weight, None)
        correction = sigma_of(self.bn) * inverse_sigma
        return torch.addcmul(per_channel(shift, y), y, per_channel(correction, y))

    def _run(self, x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
        """The layer's operation with other parameters."""
        raise NotImplementedError


def pass_over(bn: nn.Module) -> None:
    """Make a batch norm hand on its input: it is folded into the layer before it. Its state stays.

    Raises:
        QuantizationError: there is no such form of this class.
    """
    cls = _PASSED_OVER.get(type(bn))
    if cls is None:
        raise QuantizationError(f"a {type(bn).__name__} cannot be folded; it must be a plain batch norm")
    bn.__class__ = cls


def is_passed_over(module: nn.Module) -> bool:
    """Whether it is a batch norm that hands on its input."""
    return isinstance(module, _PassedOver)


def check_freeze_bn_delay(delay: int | None) -> int | None:
    """`delay` if it is a number of batches, or None for never, else a QuantizationError."""
    if delay is not None and (isinstance(delay, bool) or not isinstance(delay, int) or delay < 0):
        raise QuantizationError(
            f"freeze_bn_delay: must be a number of batches from 0, or null, got {delay!r}"
        )
    return delay


class _PassedOver(nn.Module):
    """A batch norm that hands on its input."""

    def forward(self, input: Tensor) -> Tensor:
        return input


class _PassedOver1d(_PassedOver, nn.BatchNorm1d): ...


class _PassedOver2d(_PassedOver, nn.BatchNorm2d): ...


class _PassedOver3d(_PassedOver, nn.BatchNorm3d): ...


class _PassedOverFrozen(_PassedOver, FrozenBatchNorm2d): ...


_PASSED_OVER: dict[type[nn.Module], type[nn.Module]] = {
    nn.BatchNorm1d: _PassedOver1d,
    nn.BatchNorm2d: _PassedOver2d,
    nn.BatchNorm3d: _PassedOver3d,
    FrozenBatchNorm2d: _PassedOverFrozen,
}


class _FoldedConv(SimulatedFoldedBatchNorm):
    def _run(self, x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
        return self._conv_forward(x, weight, bias)  # type: ignore[operator]


class _FoldedConv1d(_FoldedConv, nn.Conv1d): ...


class _FoldedConv2d(_FoldedConv, nn.Conv2d): ...


class _FoldedConv3d(_FoldedConv, nn.Conv3d): ...


class _FoldedTransposed(SimulatedFoldedBatchNorm):
    _operation: Callable[..., Tensor]

    def _run(self, x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
        layer = cast(nn.modules.conv._ConvTransposeNd, self)
        operation = type(self)._operation
        return operation(
            x, weight, bias, layer.stride, layer.padding, layer.output_padding, layer.groups, layer.dilation
        )


class _FoldedConvTranspose1d(_FoldedTransposed, nn.ConvTranspose1d):
    _operation = staticmethod(F.conv_transpose1d)


class _FoldedConvTranspose2d(_FoldedTransposed, nn.ConvTranspose2d):
    _operation = staticmethod(F.conv_transpose2d)


class _FoldedConvTranspose3d(_FoldedTransposed, nn.ConvTranspose3d):
    _operation = staticmethod(F.conv_transpose3d)


class _FoldedLinear(SimulatedFoldedBatchNorm, nn.Linear):
    def _run(self, x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
        return F.linear(x, weight, bias)


# Layer, its form with a folded batch norm, and the batch norms that go with it.
_KINDS: tuple[tuple[type[nn.Module], type[SimulatedFoldedBatchNorm], tuple[type[nn.Module], ...]], ...] = (
    (nn.Conv1d, _FoldedConv1d, (nn.BatchNorm1d,)),
    (nn.Conv2d, _FoldedConv2d, (nn.BatchNorm2d, FrozenBatchNorm2d)),
    (nn.Conv3d, _FoldedConv3d, (nn.BatchNorm3d,)),
    (nn.ConvTranspose1d, _FoldedConvTranspose1d, (nn.BatchNorm1d,)),
    (nn.ConvTranspose2d, _FoldedConvTranspose2d, (nn.BatchNorm2d, FrozenBatchNorm2d)),
    (nn.ConvTranspose3d, _FoldedConvTranspose3d, (nn.BatchNorm3d,)),
    (nn.Linear, _FoldedLinear, (nn.BatchNorm1d,)),
)


def _folded_class(layer: nn.Module | None) -> type[SimulatedFoldedBatchNorm]:
    for kind, folded, _ in _KINDS:
        if type(layer) is kind:
            return folded
    raise QuantizationError(
        f"SimulatedFoldedBatchNorm: a {type(layer).__name__} cannot take in a batch norm; "
        "it must be a convolution (1d to 3d, transposed too) or linear layer of torch.nn, with a plain weight"
    )


def _check_pair(layer: Any, bn: Any) -> None:
    norms = next(norms for kind, _, norms in _KINDS if type(layer) is kind)
    if type(bn) not in norms:
        raise QuantizationError(
            f"SimulatedFoldedBatchNorm: a {type(layer).__name__} goes with {norms[0].__name__}, "
            f"got {type(bn).__name__}"
        )
    if bn.running_mean is None or bn.running_var is None:
        raise QuantizationError(
            "SimulatedFoldedBatchNorm: the batch norm has no running statistics; "
            "make it with track_running_stats=True"
        )
    outputs = layer.out_features if isinstance(layer, nn.Linear) else layer.out_channels
    if outputs != bn.running_mean.numel():
        raise QuantizationError(
            f"SimulatedFoldedBatchNorm: the layer has {outputs} outputs, the batch norm is over "
            f"{bn.running_mean.numel()} channels; they must be as many"
        )


def _share(layer: nn.Module, copy: nn.Module) -> None:
    """Make `copy` hold all that `layer` holds, in containers of its own."""
    for key, value in layer.__dict__.items():
        copy.__dict__[key] = value.copy() if isinstance(value, dict) else value


def _forget_state(layer: SimulatedFoldedBatchNorm, _incompatible_keys: Any) -> None:
    layer._state = None
