"""Layers that go on after channels were removed, held against PyTorch's own with the channels at zero."""

from __future__ import annotations

import itertools
import re

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import nn
from torch.nn import functional as F

from distiller.errors import UsageError
from distiller.thinned_layers import (
    ThinnedLayerNorm,
    ThinnedMultiheadAttention,
    ThinnedRMSNorm,
    zero_counting_layer_norm,
)


def padded(x, count):
    """With so many zeros behind the last dimension."""
    return F.pad(x, (0, count))


@given(n=st.integers(1, 6), removed=st.integers(0, 6), seed=st.integers(0, 99))
def test_layer_norm_is_that_of_the_input_with_the_removed_channels_at_zero(n, removed, seed):
    generator = torch.Generator().manual_seed(seed)
    x, weight, bias = (torch.randn(shape, generator=generator).double() for shape in ((3, 4, n), (n,), (n,)))
    expected = F.layer_norm(
        padded(x, removed), (n + removed,), padded(weight, removed), padded(bias, removed), 1e-5
    )
    found = zero_counting_layer_norm(x, [-1], n + removed, weight, bias, 1e-5)
    assert torch.allclose(found, expected[..., :n], rtol=1e-9, atol=1e-9)


def test_layer_norm_over_several_dimensions_and_without_scale():
    x = torch.randn(2, 3, 4)
    expected = F.layer_norm(padded(x, 2), (3, 6))[..., :4]
    assert torch.allclose(zero_counting_layer_norm(x, [1, 2], 18, None, None, 1e-5), expected, atol=1e-6)


@pytest.mark.parametrize(
    "kind, thinned", [(nn.LayerNorm, ThinnedLayerNorm), (nn.RMSNorm, ThinnedRMSNorm)], ids=["layer", "rms"]
)
@pytest.mark.parametrize("affine", [True, False])
def test_a_norm_turned_in_place_counts_what_was_removed(kind, thinned, affine):
    dense, norm = kind(7, elementwise_affine=affine), kind(5, elementwise_affine=affine)
    with torch.no_grad():
        for param in dense.parameters():
            param.normal_()
        for mine, theirs in zip(norm.parameters(), dense.parameters(), strict=True):
            mine.copy_(theirs[:5])
    norm.counted = 7
    norm.__class__ = thinned
    x = torch.randn(2, 3, 5)
    assert torch.allclose(norm(x), dense(padded(x, 2))[..., :5], atol=1e-6)
    assert repr(norm).endswith(", counted=7)")


def thin_twin(dense: nn.MultiheadAttention) -> ThinnedMultiheadAttention:
    """The same layer, of the thinned class."""
    twin = nn.MultiheadAttention(
        dense.embed_dim, dense.num_heads, bias=dense.in_proj_bias is not None, kdim=dense.kdim, vdim=dense.vdim,
        batch_first=dense.batch_first,
    )  # fmt: skip
    twin.load_state_dict(dense.state_dict())
    twin.__class__ = ThinnedMultiheadAttention
    return twin.eval()  # type: ignore[return-value]


def attention(**settings) -> nn.MultiheadAttention:
    layer = nn.MultiheadAttention(6, 2, **settings).eval()
    with torch.no_grad():
        for param in layer.parameters():
            param.normal_(0, 0.5)
    return layer


N, L, S = 2, 3, 4


def arguments(batched, batch_first, widths=(6, 6, 6)):
    query, key, value = (
        torch.randn(N, length, width) for length, width in zip((L, S, S), widths, strict=True)
    )
    if not batched:
        return query[0], key[0], value[0]
    return (query, key, value) if batch_first else tuple(x.transpose(0, 1) for x in (query, key, value))


def attention_masks(batched):
    heads = (N if batched else 1) * 2
    allowed = torch.zeros(L, S, dtype=torch.bool)
    allowed[0, 1] = allowed[2, 3] = True
    per_head = torch.zeros(heads, L, S, dtype=torch.bool)
    per_head[0, 0, 0] = per_head[-1, 2, 1] = True
    return [None, allowed, torch.randn(L, S), per_head, torch.randn(heads, L, S)]


@pytest.mark.parametrize("widths", [(6, 6, 6), (6, 5, 7)], ids=["one width", "kdim and vdim"])
@pytest.mark.parametrize("bias", [True, False])
@pytest.mark.parametrize("batch_first", [True, False])
@pytest.mark.parametrize("batched", [True, False])
def test_attention_is_that_of_pytorch_for_all_arguments(batched, batch_first, bias, widths):
    dense = attention(batch_first=batch_first, bias=bias, kdim=widths[1], vdim=widths[2])
    thinned = thin_twin(dense)
    inputs = arguments(batched, batch_first, widths)
    padding = torch.tensor([[False, True, False, False], [False, False, False, True]])
    paddings = [None, padding if batched else padding[0]]
    for mask, pad, need, average in itertools.product(
        attention_masks(batched), paddings, (True, False), (True, False)
    ):
        if pad is not None and mask is not None and mask.dtype != torch.bool:
            pad = torch.zeros(pad.shape).masked_fill(pad, -torch.inf)
        settings = {
            "attn_mask": mask, "key_padding_mask": pad, "need_weights": need, "average_attn_weights": average,
        }  # fmt: skip
        (expected, weights), (found, found_weights) = dense(*inputs, **settings), thinned(*inputs, **settings)
        assert torch.allclose(found, expected, atol=1e-5)
        assert (found_weights is None) == (weights is None) == (not need)
        if weights is not None:
            assert found_weights.shape == weights.shape
            assert torch.allclose(found_weights, weights, atol=1e-6)


@pytest.mark.parametrize("need_weights", [True, False])
def test_self_attention_reads_its_input_once_and_answers_the_same(need_weights):
    dense = attention(batch_first=True)
    x = torch.randn(N, L, 6)
    expected, found = (layer(x, x, x, need_weights=need_weights)[0] for layer in (dense, thin_twin(dense)))
    assert torch.allclose(found, expected, atol=1e-6)


def test_a_causal_hint_goes_with_its_mask():
    dense, x = attention(batch_first=True), torch.randn(N, L, 6)
    thinned, mask = thin_twin(dense), nn.Transformer.generate_square_subsequent_mask(L)
    for need in (True, False):
        settings = {"attn_mask": mask, "is_causal": True, "need_weights": need}
        assert torch.allclose(thinned(x, x, x, **settings)[0], dense(x, x, x, **settings)[0], atol=1e-6)
    message = "attention: is_causal says what attn_mask is, got no attn_mask; give it too"
    with pytest.raises(UsageError, match=f"^{re.escape(message)}$"):
        thinned(x, x, x, is_causal=True)


def test_attention_has_fewer_heads_than_its_input_is_wide():
    dense = attention(batch_first=True)
    thinned, x = thin_twin(dense), torch.randn(N, L, 6)
    second_head = [i for i in range(18) if i % 6 >= 3]
    thinned.in_proj_weight.data = dense.in_proj_weight.data[second_head]
    thinned.in_proj_bias.data = dense.in_proj_bias.data[second_head]
    thinned.out_proj.weight.data = dense.out_proj.weight.data[:, 3:]
    thinned.num_heads = 1
    with torch.no_grad():
        dense.out_proj.weight[:, :3] = 0  # the first head has no say
    assert torch.allclose(thinned(x, x, x)[0], dense(x, x, x)[0], atol=1e-6)


def test_dropout_of_attention_acts_in_training_alone():
    layer = nn.MultiheadAttention(6, 2, dropout=0.5, batch_first=True)
    layer.__class__ = ThinnedMultiheadAttention
    x = torch.randn(N, 8, 6)
    for need in (True, False):
        assert torch.equal(layer.eval()(x, x, x, need_weights=need)[0], layer(x, x, x, need_weights=need)[0])
        first, second = (layer.train()(x, x, x, need_weights=need)[0] for _ in range(2))
        assert not torch.equal(first, second)


def test_dropout_of_weights_is_of_the_layers_mode():
    """`F.dropout` drops by default, in evaluation too."""
    layer = nn.MultiheadAttention(6, 2, dropout=0.5, batch_first=True).eval()
    twin = thin_twin(layer)
    twin.dropout = 0.5
    x = torch.randn(N, L, 6)
    assert torch.allclose(twin(x, x, x)[1], layer(x, x, x)[1], atol=1e-6)
