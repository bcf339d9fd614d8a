import copy
import itertools

import pytest
import torch
from torch import nn
from torch.nn import functional as F
from torch.nn.utils import parametrizations

from distiller.errors import UsageError
from distiller.functional_modules.attention import (
    DecomposedAttention,
    MaskedSoftmax,
    ScaledDotProductAttention,
)

N, L, S, E, HEADS = 3, 5, 6, 8, 2
K, V = 7, 6


def attention(**settings):
    return nn.MultiheadAttention(E, HEADS, **settings).eval()


def tensors(module, is_batched=True):
    given = [torch.randn(N, length, size) for length, size in ((L, E), (S, module.kdim), (S, module.vdim))]
    if not is_batched:
        return [x[0] for x in given]
    return given if module.batch_first else [x.transpose(0, 1) for x in given]


def assert_close(expected, got):
    assert expected.shape == got.shape
    assert (expected - got).abs().max() <= 1e-6 * expected.abs().max()


def assert_same(module, *args, **kwargs):
    """The attention and its decomposition give the same output and the same weights."""
    decomposed = DecomposedAttention(module)
    for expected, got in zip(module(*args, **kwargs), decomposed(*args, **kwargs), strict=True):
        if expected is None:
            assert got is None
        else:
            assert_close(expected, got)


@pytest.mark.parametrize(
    "batch_first, bias, kdim, is_batched, need_weights, average",
    list(
        itertools.product(
            (False, True), (False, True), (None, K), (False, True), (False, True), (False, True)
        )
    ),
)
def test_results_are_those_of_torch(batch_first, bias, kdim, is_batched, need_weights, average):
    module = attention(batch_first=batch_first, bias=bias, kdim=kdim, vdim=kdim and V)
    given = tensors(module, is_batched)
    assert_same(module, *given, need_weights=need_weights, average_attn_weights=average)


def masks(kind, is_batched=True):
    batch = N if is_batched else 1
    lacking_one = torch.zeros(L, S, dtype=torch.bool).index_fill(1, torch.tensor([2]), True)
    return {
        "none": None,
        "bool": lacking_one,
        "float": torch.randn(L, S),
        "infinite": torch.zeros(L, S).masked_fill(lacking_one, float("-inf")),
        "bool per head": torch.rand(batch * HEADS, L, S).argsort(-1) > 3,
        "float per head": torch.randn(batch * HEADS, L, S),
    }[kind]


def paddings(kind, is_batched=True):
    padding = torch.zeros(N, S, dtype=torch.bool)
    padding[0, 4:], padding[1, 5:] = True, True
    padding = {"none": None, "bool": padding, "float": torch.randn(N, S)}[kind]
    return padding if padding is None or is_batched else padding[0]


MASKS = [
    (mask, padding)
    for mask in ("none", "bool", "float", "infinite", "bool per head", "float per head")
    for padding in ("none", "bool", "float")
    if "none" in (mask, padding) or ("bool" in mask) == ("bool" in padding)
]


@pytest.mark.parametrize("mask, padding", MASKS)
@pytest.mark.parametrize("need_weights", [False, True])
@pytest.mark.parametrize("is_batched", [False, True])
def test_masks_are_those_of_torch(mask, padding, need_weights, is_batched):
    module = attention(batch_first=True)
    assert_same(
        module,
        *tensors(module, is_batched),
        attn_mask=masks(mask, is_batched),
        key_padding_mask=paddings(padding, is_batched),
        need_weights=need_weights,
    )


@pytest.mark.parametrize("need_weights", [False, True])
def test_a_causal_mask_is_that_of_torch(need_weights):
    module = attention(batch_first=True)
    x, mask = torch.randn(N, L, E), nn.Transformer.generate_square_subsequent_mask(L)
    assert_same(module, x, x, x, attn_mask=mask, is_causal=True, need_weights=need_weights)


def test_is_causal_without_a_mask_is_refused_as_in_torch():
    decomposed, x = DecomposedAttention(attention()), torch.randn(L, N, E)
    with pytest.raises(UsageError) as error:
        decomposed(x, x, x, is_causal=True)
    assert (
        str(error.value)
        == "DecomposedAttention: is_causal says of attn_mask what it is like, got no attn_mask"
    )


@pytest.mark.parametrize("need_weights", [False, True])
def test_dropout_drops_what_torch_drops(need_weights):
    module = attention(dropout=0.5, batch_first=True).train()
    decomposed, x = DecomposedAttention(module), torch.randn(N, L, E)
    torch.manual_seed(1)
    expected = module(x, x, x, need_weights=need_weights)[0]
    torch.manual_seed(1)
    got = decomposed(x, x, x, need_weights=need_weights)[0]
    assert decomposed.training
    assert_close(expected, got)


def test_gradients_are_those_of_torch():
    module = attention(batch_first=True)
    other = DecomposedAttention(copy.deepcopy(module))
    x = torch.randn(N, L, E)
    module(x, x, x)[0].square().sum().backward()
    other(x, x, x)[0].square().sum().backward()
    packed = torch.cat([other.q_proj.weight.grad, other.k_proj.weight.grad, other.v_proj.weight.grad])
    torch.testing.assert_close(packed, module.in_proj_weight.grad, rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(other.out_proj.weight.grad, module.out_proj.weight.grad, rtol=1e-4, atol=1e-5)


def test_double_precision_stays():
    module = attention(batch_first=True).double()
    x = torch.randn(N, L, E, dtype=torch.float64)
    assert_same(module, x, x, x, attn_mask=torch.ones(L, L, dtype=torch.bool).triu(1))


def test_its_pieces_are_leaf_modules():
    decomposed = DecomposedAttention(attention())
    assert {name: type(module).__name__ for name, module in decomposed.named_children()} == {
        "q_proj": "Linear",
        "k_proj": "Linear",
        "v_proj": "Linear",
        "out_proj": "Linear",
        "scores": "BatchMatmul",
        "softmax": "MaskedSoftmax",
        "dropout": "Dropout",
        "context": "BatchMatmul",
    }


@pytest.mark.parametrize("kdim", [None, K])
def test_its_state_loads_from_either_kind_of_state(kdim):
    module = attention(kdim=kdim, vdim=kdim and V)
    decomposed = DecomposedAttention(attention(kdim=kdim, vdim=kdim and V))
    decomposed.load_state_dict(module.state_dict())
    given = tensors(module)
    expected = module(*given)[0]
    assert_close(expected, decomposed(*given)[0])
    other = nn.Sequential(DecomposedAttention(attention(kdim=kdim, vdim=kdim and V)))
    other.load_state_dict({f"0.{key}": value for key, value in decomposed.state_dict().items()})
    assert_close(expected, other[0](*given)[0])
    other.load_state_dict({f"0.{key}": value for key, value in module.state_dict().items()})
    assert_close(expected, other[0](*given)[0])


def test_from_attention_renames_what_is_of_the_attention():
    packed = torch.arange(6.0).reshape(6, 1)
    state = {"a.in_proj_weight": packed, "a.out_proj.weight": packed[:1], "b.in_proj_weight": packed}
    renamed = DecomposedAttention.from_attention(state, "a.")
    assert {key: value.flatten().tolist() for key, value in renamed.items()} == {
        "a.q_proj.weight": [0, 1],
        "a.k_proj.weight": [2, 3],
        "a.v_proj.weight": [4, 5],
        "a.out_proj.weight": [0],
        "b.in_proj_weight": [0, 1, 2, 3, 4, 5],
    }


def test_a_parameter_that_is_not_trained_stays_so():
    module = attention()
    module.in_proj_weight.requires_grad_(False)
    decomposed = DecomposedAttention(module)
    trained = {name for name, parameter in decomposed.named_parameters() if parameter.requires_grad}
    assert trained == {f"{name}.bias" for name in ("q_proj", "k_proj", "v_proj", "out_proj")} | {
        "out_proj.weight"
    }
    assert decomposed.out_proj.weight is module.out_proj.weight


class Odd(nn.MultiheadAttention):
    def forward(self, *args, **kwargs):
        return super().forward(*args, **kwargs)


REFUSED = {
    "attends to a learned key too (add_bias_kv)": lambda: attention(add_bias_kv=True),
    "attends to a key of zeros too (add_zero_attn)": lambda: attention(add_zero_attn=True),
    "has a forward of its own": lambda: Odd(E, HEADS),
    "has parametrized weights": lambda: parametrizations.weight_norm(attention(), "in_proj_weight"),
}


@pytest.mark.parametrize("reason", REFUSED)
def test_attention_of_another_kind_is_refused(reason):
    with pytest.raises(UsageError) as error:
        DecomposedAttention(REFUSED[reason]())
    assert str(error.value) == f"DecomposedAttention: the attention {reason}; leave it as it is"


@pytest.mark.parametrize("is_causal", [False, True])
def test_scaled_dot_product_attention_is_that_of_torch(is_causal):
    q, k, v = torch.randn(2, 2, 5, 4), torch.randn(2, 2, 6, 4), torch.randn(2, 2, 6, 3)
    expected = F.scaled_dot_product_attention(q, k, v, is_causal=is_causal, scale=0.3)
    assert_close(expected, ScaledDotProductAttention(0.3, is_causal)(q, k, v))


@pytest.mark.parametrize(
    "mask", [torch.rand(5, 6).argsort(-1) > 1, torch.randn(2, 2, 5, 6)], ids=["bool", "float"]
)
def test_masks_of_scaled_dot_product_attention_are_those_of_torch(mask):
    q, k, v = torch.randn(2, 2, 5, 4), torch.randn(2, 2, 6, 4), torch.randn(2, 2, 6, 3)
    expected = F.scaled_dot_product_attention(q, k, v, attn_mask=mask)
    assert_close(expected, ScaledDotProductAttention(0.5)(q, k, v, mask))


def test_no_mask_reaches_the_inputs_that_statistics_see():
    seen = []
    decomposed = DecomposedAttention(attention(batch_first=True))
    decomposed.softmax.register_forward_pre_hook(lambda module, args: seen.extend(args))
    x = torch.randn(N, L, E)
    decomposed(x, x, x, attn_mask=torch.full((L, L), float("-inf")).triu(1))
    assert [x.isfinite().all().item() for x in seen] == [True]


def test_masked_softmax_by_hand():
    scores, mask = torch.tensor([[0.0, 1.0, 5.0]]), torch.tensor([0.0, 0.0, float("-inf")])
    weights = MaskedSoftmax(2.0)(scores, mask=mask)
    torch.testing.assert_close(weights, torch.tensor([[1.0, torch.e**2, 0.0]]) / (1 + torch.e**2))
    assert repr(MaskedSoftmax(0.5)) == "MaskedSoftmax(dim=-1, scale=0.5)"
