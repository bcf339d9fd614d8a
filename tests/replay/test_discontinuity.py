from __future__ import annotations

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torchvision.ops import deform_conv2d

from distiller.replay import read_program

OPERATIONS = {
    "sign": (torch.sign, ("sign",)),
    "round": (torch.round, ("round",)),
    "round to decimals": (lambda x: x.round(decimals=2), ("round",)),
    "straight-through estimator": (lambda x: x + (x.round() - x).detach(), ("round",)),
    "floor, ceil": (lambda x: x.floor() + x.ceil(), ("ceil", "floor")),
    "trunc, frac": (lambda x: x.trunc() + x.frac(), ("frac", "trunc")),
    "remainder": (lambda x: x % 1, ("remainder",)),
    "floor division": (lambda x: x // 0.1, ("floor_divide",)),
    "rounding division": (lambda x: torch.div(x, 0.1, rounding_mode="trunc"), ("div",)),
    "comparison": (lambda x: (x >= 0).float(), ("ge",)),
    "where": (lambda x: torch.where(x > 0.5, x, 0 * x), ("gt",)),
    "isnan": (lambda x: x.masked_fill(x.isnan(), 0), ("isnan",)),
    "phase": (lambda x: torch.fft.rfft(x).angle(), ("angle",)),
    "spectrum": (lambda x: torch.fft.rfft(x).abs(), ()),
    "threshold": (nn.Threshold(0.1, 20), ("threshold",)),
    "integers": (lambda x: x.int().float(), ("_to_copy",)),
    "half precision": (lambda x: x.half().float(), ("_to_copy",)),
    "bfloat16": (lambda x: x.bfloat16().float(), ("_to_copy",)),
    "argmax": (lambda x: x.argmax(1, keepdim=True).float(), ("argmax",)),
    "places of the largest": (lambda x: x.flatten(2).topk(4).indices.float(), ("topk",)),
    "place of the maximum": (lambda x: x.max(1).indices.float(), ("max",)),
    "order": (lambda x: x.flatten(2).sort().indices.float(), ("sort",)),
    "buckets": (lambda x: torch.bucketize(x, torch.arange(4.0)).float(), ("bucketize",)),
    "unpooling": (
        lambda x: F.max_unpool2d(*F.max_pool2d(x, 2, return_indices=True), 2),
        ("max_pool2d_with_indices",),
    ),
    "nearest sample": (
        lambda x: F.grid_sample(x, x[:, :2].permute(0, 2, 3, 1), mode="nearest", align_corners=False),
        ("grid_sampler",),
    ),
    "linear sample": (
        lambda x: F.grid_sample(x, x[:, :2].permute(0, 2, 3, 1), align_corners=False),
        (),
    ),
    "largest values": (lambda x: x.flatten(2).topk(4).values, ()),
    "sorted values": (lambda x: x.flatten(2).sort().values, ()),
    "maximum": (lambda x: x.max(1).values, ()),
    "pooling": (lambda x: F.max_pool2d(x, 2) + F.adaptive_max_pool2d(x, 4), ()),
    "division": (lambda x: x / 0.1, ()),
    "double precision": (lambda x: x.double().float(), ()),
    "activations": (lambda x: F.gelu(F.hardswish(F.relu6(x)).tanh()).clamp(-1, 1), ()),
    "norms": (lambda x: F.normalize(F.layer_norm(x, [8])), ()),
    "attention": (lambda x: F.scaled_dot_product_attention(x, x, x, is_causal=True), ()),
    "a mask of places": (lambda x: x * (torch.arange(8) > 3), ()),
    "a mask of a new tensor": (lambda x: x.masked_fill(x.new_zeros(8) != 0, 1), ()),
    "parity of the number of images": (lambda x: x + x.shape[0] % 2, ()),
}


class One(nn.Module):
    def __init__(self, operation):
        super().__init__()
        self.operation = operation
        self.conv = nn.Conv2d(1, 4, 3, padding=1)

    def forward(self, x: Tensor) -> Tensor:
        return self.operation(self.conv(x)).flatten(1)


class RoundedWeight(nn.Module):
    """Only its weight is rounded, to a share of its mean; sums of that come in several orders too."""

    def __init__(self):
        super().__init__()
        self.weight = nn.Parameter(torch.randn(10, 64))

    def forward(self, x: Tensor) -> Tensor:
        scale = self.weight.abs().mean()
        return F.linear(x.flatten(1), torch.round(self.weight / scale) * scale)


def found(model):
    return read_program(model.eval(), torch.randn(3, 1, 8, 8)).discontinuous


@pytest.mark.parametrize("name", OPERATIONS)
def test_operations_are_told_apart(name):
    operation, expected = OPERATIONS[name]
    assert found(One(operation)) == expected


def test_so_is_what_reads_the_state_alone():
    assert found(RoundedWeight()) == ("round",)


def test_an_operation_of_another_library_may_do_anything():
    """One of torchvision's, here; that it is a continuous one is not known."""
    offset, weight = torch.zeros(3, 18, 6, 6), torch.ones(4, 4, 3, 3)
    sampled = One(lambda x: deform_conv2d(x, offset, weight))
    assert found(sampled) == ("deform_conv2d",)
