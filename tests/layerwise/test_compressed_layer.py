from __future__ import annotations

import math

import pytest
import torch

from distiller.errors import UsageError
from distiller.layerwise.compressed_layer import TECHNIQUES, WeightToCompress, read_pipeline
from distiller.layerwise.stored_bytes import gap_bytes, payload_bytes
from distiller.layerwise.techniques import prune_by_fraction, svd_by_kept_rank
from distiller.quantization.codebook import quantize_by_fraction


def weight(*shape: int) -> torch.Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(5))


@pytest.mark.parametrize("fraction", [0.0, 0.3, 0.9, 1.0])
def test_one_technique_is_the_pure_function(fraction):
    w = weight(30, 50)
    own = WeightToCompress(w)
    assert torch.equal(own.at_fraction(("prune",), fraction).weight, prune_by_fraction(w, fraction))
    assert torch.equal(own.at_fraction(("quant",), fraction).weight, quantize_by_fraction(w, fraction))
    assert torch.equal(own.at_fraction(("svd",), fraction).weight, svd_by_kept_rank(w, 1 - fraction))


@pytest.mark.parametrize("technique", TECHNIQUES)
def test_at_fraction_zero_the_weight_is_as_it_was_and_takes_as_much(technique):
    w = weight(12, 20)
    done = WeightToCompress(w).at_fraction((technique,), 0.0)
    assert torch.equal(done.weight, w)
    assert done.stored_bytes == 4 * 12 * 20


def test_the_weight_given_is_never_changed():
    w = weight(12, 20)
    before, own = w.clone(), WeightToCompress(w)
    for technique in TECHNIQUES:
        own.at_fraction((technique,), 0.7).weight.zero_()
    assert torch.equal(w, before)
    assert torch.equal(own.at_fraction(("prune",), 0.0).weight, before)


def test_ranks_below_break_even_are_stored_as_factors_and_others_dense():
    own = WeightToCompress(weight(40, 60))  # break even at 24
    below, above = own.at_fraction(("svd",), 0.5), own.at_fraction(("svd",), 0.3)
    assert below.stored_bytes == 4 * 20 * (40 + 60)
    assert below.factors is not None
    assert [tuple(factor.shape) for factor in below.factors] == [(40, 20), (20, 60)]
    assert (above.stored_bytes, above.factors) == (4 * 40 * 60, None)


def test_a_rank_of_exactly_break_even_saves_nothing_and_stays_dense():
    done = WeightToCompress(weight(40, 40)).at_fraction(("svd",), 0.5)
    assert (done.stored_bytes, done.factors) == (4 * 40 * 40, None)


@pytest.mark.parametrize("bits", [1, 2, 4, 8])
def test_bits_are_what_is_stored_for_each_weight_and_a_table(bits):
    own = WeightToCompress(weight(80, 100))
    linear, means = own.at_bits("quant", bits), own.at_bits("kmeans", bits)
    assert linear.stored_bytes == 80 * 100 * bits // 8 + 8
    assert means.stored_bytes == 80 * 100 * bits // 8 + 4 * 2**bits
    assert linear.code_bits / linear.coded == bits
    assert means.weight.unique().numel() <= 2**bits


def test_a_fraction_of_distinct_values_leaves_most_bits():
    """0 row 9 of the sources' contradictions: at 0.9 a large layer still has codes of many bits."""
    done = WeightToCompress(weight(300, 400)).at_fraction(("quant",), 0.9)
    assert done.code_bits / done.coded == pytest.approx(math.log2(0.1 * 300 * 400), abs=0.1)
    assert done.stored_bytes == 300 * 400 * 14 // 8 + 8


@pytest.mark.parametrize(
    "quant, fraction",
    [("quant", 0.3), ("quant", 0.5), ("quant", 0.7), ("quant", 0.9), ("kmeans", 0.7), ("kmeans", 0.9)],
)
def test_sizes_of_a_pipeline_multiply_as_predicted(quant, fraction):
    w, steps = weight(120, 200), ("svd", "prune", quant)
    done = WeightToCompress(w).at_fraction(steps, fraction)
    predicted = payload_bytes(w.shape, steps, fraction)
    parts = [w] if done.factors is None else list(done.factors)
    left = [part.numel() - round(fraction * part.numel()) for part in parts]
    tables = sum(8 if quant == "quant" else 4 * (n - round(fraction * n)) for n in left)
    if done.factors is None:
        positions = min(-(-w.numel() // 8), gap_bytes(done.weight != 0))
        assert int((done.weight == 0).sum()) == round(fraction * w.numel())
    else:
        positions = sum(min(-(-p.numel() // 8), gap_bytes(p != 0)) for p in parts)
        for part in parts:
            assert int((part == 0).sum()) == round(fraction * part.numel())
    assert done.stored_bytes == predicted + positions + tables


def test_the_prediction_is_the_product_of_the_shares():
    shape, fraction = (120, 200), 0.5
    rank_share = 60 * (120 + 200) / (120 * 200)
    whole = 4 * 120 * 200
    assert payload_bytes(shape, ("svd", "prune"), fraction) == pytest.approx(
        whole * rank_share * 0.5, rel=1e-3
    )
    bits = math.ceil(math.log2(0.5 * 0.5 * 60 * 200))  # of the larger factor
    product = whole * rank_share * 0.5 * bits / 32
    assert payload_bytes(shape, ("svd", "prune", "quant"), fraction) == pytest.approx(product, rel=0.05)


def test_what_is_pruned_stays_zero_when_the_others_come_to_share_values():
    w = weight(40, 40)
    pruned = prune_by_fraction(w, 0.6)
    for quant in ("quant", "kmeans"):
        done = WeightToCompress(w).at_fraction(("prune", quant), 0.6).weight
        assert torch.equal(done == 0, pruned == 0)
        assert done.unique().numel() <= 1 + 640 - round(0.6 * 640)


def test_the_product_of_the_stored_factors_is_what_the_network_computes_with():
    done = WeightToCompress(weight(40, 5, 3, 3)).at_fraction(("svd", "prune"), 0.8)
    assert done.factors is not None
    left, right = done.factors
    assert torch.equal(done.weight, (left @ right).view(40, 5, 3, 3))


@pytest.mark.parametrize("steps", [("svd",), ("prune",), ("svd", "prune", "quant"), ("prune", "kmeans")])
def test_with_everything_gone_there_is_nothing_to_store(steps):
    done = WeightToCompress(weight(10, 12)).at_fraction(steps, 1.0)
    assert done.stored_bytes == 0
    assert not done.weight.any()


@pytest.mark.parametrize(
    "text, steps",
    [
        ("prune", ("prune",)),
        ("SVD + prune+quant", ("svd", "prune", "quant")),
        ("svd+kmeans", ("svd", "kmeans")),
    ],
)
def test_pipelines_are_written_with_plus_signs(text, steps):
    assert read_pipeline(text) == steps


def test_an_unknown_technique_is_named_with_the_nearest():
    with pytest.raises(UsageError) as error:
        read_pipeline("svd+pruned")
    assert str(error.value) == (
        "layerwise: unknown technique 'pruned', not one of prune, quant, kmeans, svd; did you mean 'prune'?"
    )


@pytest.mark.parametrize(
    "text", ["prune+svd", "quant+prune", "svd+svd", "quant+kmeans", "prune+quant+kmeans"]
)
def test_an_order_in_which_sizes_would_not_multiply_is_refused(text):
    with pytest.raises(UsageError) as error:
        read_pipeline(text)
    assert str(error.value) == (
        f"layerwise: '{text}' cannot be combined so; the order is svd, then prune, then one of quant and kmeans, "
        "each once, as in 'svd+prune+quant'"
    )
