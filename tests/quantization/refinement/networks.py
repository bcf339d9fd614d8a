"""A small depthwise network, and quantizing a copy of a model in one call."""

from __future__ import annotations

import copy
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from distiller.data_loggers.quant_stats import collect_quant_stats
from distiller.quantization.post_train import PostTrainLinearQuantizer


def conv_norm_relu(
    inputs: int, outputs: int, kernel: int, groups: int = 1, stride: int = 1
) -> list[nn.Module]:
    conv = nn.Conv2d(inputs, outputs, kernel, stride, kernel // 2, groups=groups, bias=False)
    return [conv, nn.BatchNorm2d(outputs), nn.ReLU()]


class Depthwise(nn.Module):
    """conv 3x3, then twice depthwise 3x3 and pointwise, pool, fc; for 1x8x8 images and 10 classes."""

    def __init__(self, width: int = 12) -> None:
        super().__init__()
        self.input_shape = (1, 1, 8, 8)
        self.features = nn.Sequential(
            *conv_norm_relu(1, width, 3),
            *conv_norm_relu(width, width, 3, groups=width),
            *conv_norm_relu(width, 2 * width, 1),
            *conv_norm_relu(2 * width, 2 * width, 3, groups=2 * width, stride=2),
            *conv_norm_relu(2 * width, 2 * width, 1),
        )
        self.pool = nn.AdaptiveAvgPool2d(1)
        self.fc = nn.Linear(2 * width, 10)

    def forward(self, x: Tensor) -> Tensor:
        return self.fc(torch.flatten(self.pool(self.features(x)), 1))


def calibrated(model: nn.Module, x: Tensor) -> Any:
    """In evaluation mode, batch norms with statistics of `x` and random weights."""
    for norm in model.modules():
        if isinstance(norm, nn.BatchNorm2d):
            nn.init.uniform_(norm.weight, 0.5, 1.5)
            nn.init.uniform_(norm.bias, -0.3, 0.3)
            norm.momentum = None
    with torch.no_grad():
        model.train()(x)
    return model.eval()


def quantized(model: nn.Module, x: Tensor, bits: int = 4, dynamic: bool = False, **settings: Any) -> Any:
    """A copy of the model, quantized to `bits` bits of weights and 8 of activations, calibrated on x."""
    twin = copy.deepcopy(model)
    stats = None
    if not dynamic:
        with torch.no_grad():
            stats = collect_quant_stats(model, lambda model: model(x))
    mode = {"activations": "ASYMMETRIC_UNSIGNED", "weights": settings.pop("weights_mode", "SYMMETRIC")}
    arguments = {"bits_activations": 8, "mode": mode, "model_activation_stats": stats, **settings}
    PostTrainLinearQuantizer(twin, bits_parameters=bits, **arguments).prepare_model(x[:1])
    return twin


def distance(model: nn.Module, other: nn.Module, x: Tensor) -> float:
    """Mean squared difference of their outputs."""
    with torch.no_grad():
        return F.mse_loss(model(x), other(x)).item()


def wrappers(model: nn.Module) -> dict[str, Any]:
    """The quantized convolutions and linear layers, by name."""
    return {
        name: module
        for name, module in model.named_modules()
        if type(module).__name__ == "RangeLinearQuantParamLayerWrapper"
    }
