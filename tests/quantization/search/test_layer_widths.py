from __future__ import annotations

import pytest
import torch
from torch import nn

from distiller.modules import EltwiseAdd, Matmul
from distiller.quantization.post_train import PostTrainLinearQuantizer
from distiller.quantization.search.copies import prepared_copy
from distiller.quantization.search.grids import quantized_layers
from distiller.quantization.search.layer_widths import (
    LayerPart,
    cost_of,
    overrides_for,
    parts_of,
    widths_by_layer,
)

WEIGHTS = [LayerPart(name, "weights") for name in ("conv1", "conv2", "fc")]
ACTIVATIONS = [LayerPart(name, "activations") for name in ("conv1", "conv2", "fc")]
NUMEL = {"conv1": 6 * 9, "conv2": 8 * 6 * 9, "fc": 10 * 32}
MACS = {"conv1": 36 * 54, "conv2": 16 * 432, "fc": 320}


def prepared_parts(quantizer, dummy, weight_widths=(2, 8), activation_widths=()):
    copied = prepared_copy(quantizer, dummy)
    layers = quantized_layers(copied.model, dummy)
    return copied.model, layers, parts_of(copied, layers, weight_widths, activation_widths)


def test_the_parts_are_weights_and_the_activations_that_have_a_grid(make_quantizer, dummy):
    _, _, parts = prepared_parts(make_quantizer(bits_activations=6), dummy)
    assert parts.free == dict.fromkeys(WEIGHTS, (2, 8))
    assert parts.pinned == dict.fromkeys(ACTIVATIONS, 6)
    _, _, parts = prepared_parts(make_quantizer(), dummy, (), (4, 8))
    assert parts.free == dict.fromkeys(ACTIVATIONS, (4, 8))
    assert parts.pinned == dict.fromkeys(WEIGHTS, 8)


def test_widths_that_overrides_give_are_not_free(make_quantizer, dummy):
    overrides = {"conv1": {"bits_weights": 8}, "fc": {"bits_weights": None}, "conv2": {"clip_acts": "AVG"}}
    _, _, parts = prepared_parts(make_quantizer(bits_parameters=4, overrides=overrides), dummy)
    assert parts.free == {WEIGHTS[1]: (2, 8)}
    assert parts.pinned[WEIGHTS[0]] == 8
    assert WEIGHTS[2] not in parts.pinned


def test_bytes_are_those_of_the_weights(make_quantizer, dummy):
    overrides = {"conv1": {"bits_weights": 5}, "fc": {"bits_weights": None}}
    model, layers, parts = prepared_parts(make_quantizer(overrides=overrides), dummy, (3, 8))
    cost = cost_of(model, layers, parts, "weight_bytes", dummy)
    fixed = 34 + 320 * 4  # 54 weights of 5 bits, and 320 in float32
    assert cost.of({WEIGHTS[1]: 3}) == fixed + 432 * 3 // 8
    assert cost.of({WEIGHTS[1]: 8}) == fixed + 432


def test_operations_are_macs_times_the_widths_of_what_is_multiplied(make_quantizer, dummy):
    """conv1 reads its own input's grid, conv2 the output of conv1, fc that of conv2 behind the pooling."""
    model, layers, parts = prepared_parts(make_quantizer(), dummy, (2, 4, 8), (3, 5, 7))
    cost = cost_of(model, layers, parts, "bit_operations", dummy)
    weights, acts = (4, 2, 8), (3, 5, 7)
    expected = MACS["conv1"] * 4 * 3 + MACS["conv2"] * 2 * 3 + MACS["fc"] * 8 * 5
    assert cost.of(dict(zip([*WEIGHTS, *ACTIVATIONS], [*weights, *acts], strict=True))) == expected


def test_operations_in_floating_point_count_as_32_bits(make_quantizer, dummy):
    overrides = {"fc": {"bits_weights": None, "bits_activations": None}}
    quantizer = make_quantizer(bits_activations=None, overrides=overrides)
    model, layers, parts = prepared_parts(quantizer, dummy)
    cost = cost_of(model, layers, parts, "bit_operations", dummy)
    expected = MACS["conv1"] * 2 * 32 + MACS["conv2"] * 8 * 32 + MACS["fc"] * 32 * 32
    assert cost.of({WEIGHTS[0]: 2, WEIGHTS[1]: 8}) == expected


class Attention(nn.Module):
    """An embedding of a sum with itself: weight by activations and activations by activations."""

    def __init__(self) -> None:
        super().__init__()
        self.table, self.key, self.add, self.score = (
            nn.Embedding(6, 4),
            nn.Linear(4, 4),
            EltwiseAdd(),
            Matmul(),
        )

    def forward(self, tokens):
        x = self.table(tokens)
        return self.score(self.key(x), self.add(x, x).transpose(1, 2))


def test_products_of_activations_have_the_widths_of_both(stats_of_tokens):
    tokens = torch.tensor([[0, 1, 5]])
    model = Attention().eval()
    quantizer = PostTrainLinearQuantizer(model, model_activation_stats=stats_of_tokens(model, tokens))
    prepared, layers, parts = prepared_parts(quantizer, tokens, (2, 4), (3, 5))
    cost = cost_of(prepared, layers, parts, "bit_operations", tokens)
    table, key = (LayerPart(name, "weights") for name in ("table", "key"))
    outputs = [LayerPart(name, "activations") for name in ("key", "add", "score")]
    assert set(parts.free) == {table, key, *outputs}
    widths = {table: 4, key: 2, **dict(zip(outputs, (3, 5, 5), strict=True))}
    # key: 3 tokens by 4 x 4, what it reads is on the table's grid; score: 3 x 4 by 4 x 3
    assert cost.of(widths) == 48 * 2 * 4 + 36 * 3 * 5


@pytest.fixture
def stats_of_tokens():
    from distiller.data_loggers.quant_stats import collect_quant_stats

    def collect(model, tokens):
        with torch.no_grad():
            return collect_quant_stats(model, lambda model: model(tokens))

    return collect


def test_widths_become_overrides_by_layer():
    widths = {WEIGHTS[0]: 4, ACTIVATIONS[0]: 8, WEIGHTS[2]: 2}
    assert overrides_for(widths) == {
        "conv1": {"bits_weights": 4, "bits_activations": 8},
        "fc": {"bits_weights": 2},
    }
    assert widths_by_layer(widths, "weights") == {"conv1": 4, "fc": 2}
