import copy

import pytest
import torch
from torch import nn
from torch.nn import functional as F

from distiller.functional_modules import (
    DecomposedAttention,
    LeftOperations,
    ModulesReport,
    to_modules,
)
from distiller.graph import leaf_modules


class AttentionBlock(nn.Module):
    def __init__(self, **settings):
        super().__init__()
        self.norm = nn.LayerNorm(8)
        self.attention = nn.MultiheadAttention(8, 2, batch_first=True, **settings)

    def forward(self, x):
        y = self.norm(x)
        y, _ = self.attention(y, y, y, need_weights=False)
        return x + y


def relative(expected, got):
    return ((expected - got).abs().max() / expected.abs().max()).item()


def test_attention_is_decomposed_and_the_forward_around_it_converted():
    model = nn.Sequential(AttentionBlock()).eval()
    before, x = copy.deepcopy(model), torch.randn(2, 5, 8)
    calls = []
    model[0].attention.register_forward_hook(lambda *args: calls.append(args))
    report = to_modules(model, x[:1])
    assert report == ModulesReport({"0.Add": "0.add"}, ("0.attention",), ())
    assert isinstance(model[0].attention, DecomposedAttention)
    calls.clear()
    assert relative(before(x), model(x)) <= 1e-6
    assert len(calls) == 1


def test_attention_of_another_kind_is_left_with_the_reason():
    model = nn.Sequential(AttentionBlock(add_zero_attn=True))
    report = to_modules(model, torch.randn(1, 5, 8))
    assert report.attentions == ()
    assert report.left == (
        LeftOperations(
            "0.attention",
            ("multi_head_attention_forward",),
            "the attention attends to a key of zeros too (add_zero_attn)",
        ),
    )


def test_layers_of_a_transformer_are_converted():
    model = nn.Transformer(8, 2, 1, 1, 16, batch_first=True).eval()
    before = copy.deepcopy(model)
    x, y = torch.randn(2, 5, 8), torch.randn(2, 4, 8)
    report = to_modules(model, (x, y))
    assert report.left == ()
    assert len(report.attentions) == 3
    assert "encoder.layers.0.Relu" in report.modules
    with torch.no_grad():
        assert relative(before(x, y), model(x, y)) <= 1e-6


def test_an_encoder_with_padding_stays_right_where_there_is_no_padding():
    class Net(nn.Module):
        def __init__(self):
            super().__init__()
            self.encoder = nn.TransformerEncoder(nn.TransformerEncoderLayer(8, 2, 16, batch_first=True), 1)

        def forward(self, x, padding):
            return self.encoder(x, src_key_padding_mask=padding)

    model = Net().eval()
    x, padding = torch.randn(2, 5, 8), torch.tensor([[False] * 5, [False] * 3 + [True] * 2])
    before = copy.deepcopy(model)
    before.encoder.use_nested_tensor = False
    to_modules(model, (x, padding))
    with torch.no_grad():
        assert relative(before(x, padding)[~padding], model(x, padding)[~padding]) <= 1e-6


class FunctionalAttention(nn.Module):
    def __init__(self, mask=None, **settings):
        super().__init__()
        self.qkv = nn.Linear(8, 24)
        self.mask, self.settings = mask, settings

    def forward(self, x):
        q, k, v = self.qkv(x).view(*x.shape[:2], 3, 2, 4).permute(2, 0, 3, 1, 4)
        mask = None
        if self.mask is not None:
            mask = torch.ones(x.shape[1], x.shape[1], dtype=self.mask, device=x.device).tril()
        y = F.scaled_dot_product_attention(q, k, v, attn_mask=mask, **self.settings)
        return y.transpose(1, 2).flatten(2)


@pytest.mark.parametrize(
    "settings",
    [{}, {"is_causal": True}, {"scale": 0.3}, {"mask": torch.bool}, {"mask": torch.float32}],
    ids=str,
)
def test_scaled_dot_product_attention_becomes_modules(settings):
    model = nn.Sequential(FunctionalAttention(**settings)).eval()
    x = torch.randn(2, 5, 8)
    before = model(x)
    assert to_modules(model, x[:1]).modules == {"0.Attention": "0.scaled_dot_product_attention"}
    assert relative(before, model(x)) <= 1e-6
    assert [name for name in leaf_modules(model) if "attention" in name] == [
        "0.scaled_dot_product_attention.scores",
        "0.scaled_dot_product_attention.softmax",
        "0.scaled_dot_product_attention.context",
    ]


def test_scaled_dot_product_attention_with_dropout_is_left():
    report = to_modules(nn.Sequential(FunctionalAttention(dropout_p=0.1)), torch.randn(1, 5, 8))
    assert report.left == (
        LeftOperations("0", ("scaled_dot_product_attention",), "it drops out in every mode"),
    )
