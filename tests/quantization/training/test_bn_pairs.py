from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from torch import nn
from torchvision.ops import FrozenBatchNorm2d

from distiller.errors import GraphTraceError
from distiller.quantization.training.bn_pairs import batch_norms_behind
from tests.quantization.training.qat_networks import net


def test_pairs_are_found_whatever_forward_calls_and_the_model_stays():
    model = net()
    before = dict(model.named_modules())
    assert batch_norms_behind(model, torch.randn(1, 3, 8, 8)) == {"conv1": model.bn1, "right": model.bn2}
    assert dict(model.named_modules()) == before


class Cases(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.conv, self.frozen = nn.Conv2d(3, 4, 1), FrozenBatchNorm2d(4)
        self.twice, self.norm = nn.Conv2d(4, 4, 1), nn.BatchNorm2d(4)
        self.with_relu, self.after_relu = nn.Conv2d(4, 4, 1), nn.BatchNorm2d(4)
        self.tokens, self.over_tokens = nn.Linear(4, 5), nn.BatchNorm1d(5)
        self.fc, self.fc_norm = nn.Linear(5, 6), nn.BatchNorm1d(6)

    def forward(self, x):
        x = self.frozen(self.conv(x))
        y = self.twice(x)
        x = self.norm(y) + y  # another reader
        x = self.after_relu(F.relu(self.with_relu(x)))
        x = self.over_tokens(
            self.tokens(x.mean(-1)[:, :, :].transpose(1, 2)[:, :5])
        )  # (N, 5, 5): over dimension 1
        return self.fc_norm(self.fc(x.mean(1)))


def test_only_a_norm_over_the_output_channels_that_is_the_only_reader_counts():
    model = Cases().eval()
    assert batch_norms_behind(model, torch.randn(2, 3, 5, 5)) == {"conv": model.frozen, "fc": model.fc_norm}


def test_a_model_that_cannot_be_traced_says_what_for():
    class Branch(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.fc = nn.Linear(2, 2)

        def forward(self, x):
            return self.fc(x) if x.sum() > 0 else x

    with pytest.raises(GraphTraceError, match="simulated batch-norm folding"):
        batch_norms_behind(Branch(), torch.randn(1, 2))
