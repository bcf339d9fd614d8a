"""Single layers between quantizers, made and checked in one call."""

from __future__ import annotations

import copy
from collections.abc import Callable
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from distiller.quantization.activation_quant import ActivationQuantizer, QuantSettings
from distiller.quantization.affine import LinearQuantMode as Mode
from distiller.quantization.ptq_layers import RangeLinearQuantParamLayerWrapper
from distiller.quantization.ptq_weights import filters_first
from tests.quantization.integer_reference import assert_same_but_for_ties, convolution, integers, requantized


def limits(x: Tensor) -> dict[str, float]:
    return {"min": x.min().item(), "max": x.max().item()}


def wrapped(
    layer: Any,
    x: Tensor,
    bits: tuple[int, int] = (8, 8),
    act_mode: Mode = Mode.ASYMMETRIC_UNSIGNED,
    wts_mode: Mode = Mode.SYMMETRIC,
    per_channel: bool = False,
    half_range: bool = False,
    dynamic: bool = False,
    **kwargs,
) -> Any:
    layer = copy.deepcopy(layer).eval()
    with torch.no_grad():
        y = layer(x)
    settings = QuantSettings(bits[0], act_mode)
    source = ActivationQuantizer(settings, None if dynamic else limits(x), "input")
    output = ActivationQuantizer(
        QuantSettings(bits[0], act_mode, clip_half_range=half_range), None if dynamic else limits(y), "output"
    )
    weight = QuantSettings(bits[1], wts_mode, per_channel=per_channel)
    wrapper = RangeLinearQuantParamLayerWrapper(layer, "layer", weight, output, **{"bits_bias": 32, **kwargs})
    wrapper.connect({0: source}, {})
    return wrapper


def integer_weight(wrapper: Any) -> np.ndarray:
    """Integers of the weight with the zero point taken off, output channels first."""
    rows = filters_first(wrapper.wrapped_module.weight.detach(), wrapper.wrapped_module).double().numpy()
    scale = wrapper.weight_scale.double().numpy().reshape(-1, *[1] * (rows.ndim - 1))
    levels = rows / scale
    assert np.abs(levels - np.rint(levels)).max() < 1e-2
    zero_point = wrapper.weight_zero_point.numpy().reshape(-1, *[1] * (rows.ndim - 1))
    qmin, qmax = wrapper.wts_quant_settings.qrange
    q = np.rint(levels).astype(np.int64) + zero_point
    assert qmin <= q.min()
    assert q.max() <= qmax
    return q - zero_point


def check_against_integers(wrapper: Any, layer: Any, x: Tensor) -> None:
    """`layer` holds the bias in full precision, and says how the accumulators are computed."""
    with torch.no_grad():
        y = wrapper(x)
        x = wrapper.inputs_quant["0"](x)
    source, output = wrapper.input_grids[0], wrapper.output_quant
    assert output is not None
    q_x = integers(x, source) - int(source.zero_point)
    q_w = integer_weight(wrapper)
    scale = source.scale.double().numpy() * wrapper.weight_scale.double().numpy().reshape(
        -1
    )  # (1,) or (out,)
    is_linear = isinstance(layer, nn.Linear)
    accumulator = q_x @ q_w.T if is_linear else convolution(q_x, q_w, layer)
    scale = scale if is_linear else scale.reshape(-1, 1, 1)
    if layer.bias is not None:
        bias = layer.bias.detach().double().numpy().reshape(-1, *[1] * (0 if is_linear else 2))
        limit = 2**31
        accumulator = accumulator + np.clip(np.rint(bias / scale), -limit, limit - 1).astype(np.int64)
    limit = 2 ** (wrapper.bits_accum - 1)
    accumulator = np.clip(accumulator, -limit, limit - 1)
    expected, from_tie = requantized(accumulator, scale, output, output.settings.clip_half_range)
    assert_same_but_for_ties(integers(y, output), expected, from_tie)


LAYERS: dict[str, Callable[[], Any]] = {
    "conv": lambda: nn.Conv2d(4, 6, 3, padding=1),
    "strided, dilated, no bias": lambda: nn.Conv2d(
        4, 6, (3, 2), stride=2, padding=(2, 1), dilation=2, bias=False
    ),
    "grouped": lambda: nn.Conv2d(4, 6, 3, padding=1, groups=2),
    "depthwise": lambda: nn.Conv2d(4, 8, 3, padding=1, groups=4),
    "pointwise": lambda: nn.Conv2d(4, 6, 1),
}
X = torch.randn(3, 4, 7, 7, generator=torch.Generator().manual_seed(2)) + 0.4
