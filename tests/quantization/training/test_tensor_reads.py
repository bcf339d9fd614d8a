from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from distiller.quantization.training.tensor_reads import trace_reads
from tests.quantization.training.qat_networks import Net, net


def reads_of(model: nn.Module, x: torch.Tensor):
    layers = {name: m for name, m in model.named_modules() if isinstance(m, nn.Linear | nn.Conv2d)}
    return trace_reads(model, layers, x)


def test_who_reads_what():
    model = net()
    reads = reads_of(model, torch.randn(1, 3, 8, 8))
    assert list(reads) == ["conv1", "left", "right", "fc", "fc2"]
    assert reads["left"].tensors == reads["right"].tensors
    assert len({reads[name].tensors for name in ("conv1", "left", "fc", "fc2")}) == 4
    assert [name for name, read in reads.items() if read.is_nonnegative] == ["left", "right", "fc"]


class Function(nn.Module):
    def __init__(self, function) -> None:
        super().__init__()
        self.function, self.fc = function, nn.Linear(4, 2)

    def forward(self, x):
        return self.fc(self.function(x))


NONNEGATIVE = {
    "relu": F.relu,
    "in place": lambda x: F.relu(x.clone(), inplace=True),
    "relu6": F.relu6,
    "module": nn.ReLU6(),
    "hardtanh": lambda x: F.hardtanh(x, 0.0, 3.0),
    "clamp": lambda x: x.clamp(min=0),
    "clamp_min": lambda x: torch.clamp_min(x, 0.0),
    "sigmoid": torch.sigmoid,
    "softmax": lambda x: F.softmax(x, -1),
    "sum of two": lambda x: F.relu(x) + torch.sigmoid(x),
    "scaled": lambda x: 0.5 * F.relu(x),
    "joined": lambda x: torch.cat([F.relu(x[:, :2]), x[:, 2:].abs()], dim=1),
    "pooled": lambda x: F.max_pool1d(F.relu(x)[None], 1)[0],
    "dropout": lambda x: F.dropout(F.relu(x), training=False),
    "added in place": lambda x: F.relu(x).add_(1.0),
}
SIGNED = {
    "input": lambda x: x,
    "minus": lambda x: F.relu(x) - 1,
    "negated": lambda x: -F.relu(x),
    "times negative": lambda x: F.relu(x) * -1.0,
    "less": lambda x: torch.add(F.relu(x), F.relu(x), alpha=-1),
    "sum with signed": lambda x: F.relu(x) + x,
    "hardtanh": F.hardtanh,
    "clamp": lambda x: x.clamp(-1, 1),
    "leaky": F.leaky_relu,
    "gelu": F.gelu,
    "overwritten": lambda x: F.relu(x).copy_(x),
}


@pytest.mark.parametrize("kind", NONNEGATIVE)
def test_these_are_never_negative(kind):
    assert reads_of(Function(NONNEGATIVE[kind]), torch.randn(3, 4))["fc"].is_nonnegative


@pytest.mark.parametrize("kind", SIGNED)
def test_these_can_be_negative(kind):
    assert not reads_of(Function(SIGNED[kind]), torch.randn(3, 4).abs())["fc"].is_nonnegative


def test_a_layer_called_twice_reads_both_tensors():
    class Twice(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.fc, self.other = nn.Linear(4, 4), nn.Linear(4, 4)

        def forward(self, x):
            y = F.relu(self.fc(F.relu(x)))
            return self.other(self.fc(y)) + self.other(y)

    reads = reads_of(Twice(), torch.randn(2, 4))
    assert len(reads["fc"].tensors) == 2
    assert reads["fc"].is_nonnegative
    assert not reads["other"].is_nonnegative


def test_modes_and_hooks_of_the_model_stay_as_they_were():
    model: Net = net().train()
    model.bn1.eval()
    state = {key: value.clone() for key, value in model.state_dict().items()}
    reads_of(model, torch.randn(1, 3, 8, 8))
    assert model.training
    assert not model.bn1.training
    assert not any(m._forward_pre_hooks for m in model.modules())
    assert all(torch.equal(state[key], value) for key, value in model.state_dict().items())
