"""Codebooks of a model: trained, resumed, rebuilt, pruned; which parameters learn and which stay."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from distiller.errors import QuantizationError, UnknownNameError, UsageError
from distiller.names import named_parameters
from distiller.quantization.codebook.codebook_quantizer import (
    CodebookQuantizer,
    codebooks_of,
    quantize_with_codebook,
)
from distiller.quantization.quantizer import rebuild_quantized
from distiller.quantization.training.deploy import folded_copy
from distiller.registry import QUANTIZERS
from distiller.signatures import check_settings
from tests.quantization.training.low_bit_networks import (
    ENDS,
    LowBitNet,
    low_bit_net,
    outputs,
    sgd,
    stripes,
    train,
)

CASES: dict[str, dict[str, Any]] = {
    "learned centroids": {"bits_weights": 3},
    "learned centroids of each channel, zero kept": {
        "bits_weights": 2,
        "per_channel_wts": True,
        "keep_zero": True,
        "bits_bias": 8,
    },
    "means follow the weights": {"bits_weights": 3, "train_centroids": False, "reassign_every": 1},
    "learned centroids and weights": {"bits_weights": 3, "reassign_every": 2, "init": "quantile"},
    "linear levels": {"bits_weights": 4, "method": "linear", "reassign_every": 2},
    "one bit, of each channel": {
        "bits_weights": 1,
        "per_channel_wts": True,
        "train_centroids": False,
        "reassign_every": 1,
    },
    "constant": {"bits_weights": 4, "train_centroids": False, "init": "linear"},
}
FROZEN = [case for case, given in CASES.items() if not given.get("reassign_every")]


def prepared(case: str, model: LowBitNet | None = None, optimizer: Any = None) -> tuple[LowBitNet, Any]:
    model = low_bit_net() if model is None else model
    quantizer = CodebookQuantizer(model, optimizer, overrides=ENDS, **CASES[case])
    quantizer.prepare_model()
    return model, quantizer


@pytest.fixture(params=sorted(CASES))
def case(request) -> str:
    return request.param


def test_is_registered():
    assert QUANTIZERS.look_up("CodebookQuantizer") is CodebookQuantizer


def test_learns(case):
    model = low_bit_net()
    optimizer = sgd(model)
    prepared(case, model, optimizer)
    assert train(model, optimizer, 50) < 0.3  # chance is 1.39
    assert (outputs(model).argmax(1) == stripes()[1]).float().mean() > 0.9
    for original, codebook in codebooks_of(model).values():
        rows = original if codebook.channels else original[None]
        computed = codebook(original) if codebook.channels else codebook(original)[None]
        assert all(row.unique().numel() <= 2**codebook.num_bits for row in computed)
        assert len(rows) == len(codebook.centroids)


def test_parameters_keep_their_names_and_the_optimizer_its_objects(case):
    model = low_bit_net()
    optimizer = sgd(model)
    before = {name: id(parameter) for name, parameter in named_parameters(model)}
    prepared(case, model, optimizer)
    after = {name: id(parameter) for name, parameter in named_parameters(model)}
    assert before.items() <= after.items()
    in_optimizer = [id(parameter) for group in optimizer.param_groups for parameter in group["params"]]
    assert sorted(in_optimizer) == sorted(after.values())


def test_copies_and_rebuilt_models_compute_the_same(case):
    model = low_bit_net()
    optimizer = sgd(model)
    _, quantizer = prepared(case, model, optimizer)
    train(model, optimizer, 3)
    expected = outputs(model)
    assert torch.equal(outputs(copy.deepcopy(model)), expected)
    twin = LowBitNet()
    rebuild_quantized(twin, quantizer.quantizer_metadata())
    twin.load_state_dict(model.state_dict())
    assert torch.equal(outputs(twin), expected)


@pytest.mark.parametrize("steps", [3, 4])  # in the middle between two assignments, and at one
def test_a_resumed_training_is_bit_equal(case, steps):
    model = low_bit_net()
    optimizer = sgd(model)
    prepared(case, model, optimizer)
    train(model, optimizer, steps)
    state, optimizer_state = copy.deepcopy(model.state_dict()), copy.deepcopy(optimizer.state_dict())
    train(model, optimizer, 3)

    twin = LowBitNet()
    twin_optimizer = sgd(twin)
    prepared(case, twin, twin_optimizer)
    twin.load_state_dict(state)
    twin_optimizer.load_state_dict(optimizer_state)
    train(twin, twin_optimizer, 3)
    for key, value in model.state_dict().items():
        assert torch.equal(twin.state_dict()[key], value), key


def test_a_checkpoint_is_adopted_and_training_goes_on_bit_equal(case):
    model = low_bit_net()
    optimizer = sgd(model)
    _, quantizer = prepared(case, model, optimizer)
    train(model, optimizer, 3)
    twin = LowBitNet()
    rebuild_quantized(twin, quantizer.quantizer_metadata())
    twin.load_state_dict(copy.deepcopy(model.state_dict()))
    twin_optimizer = sgd(twin)
    expected = outputs(twin)
    adopting = CodebookQuantizer(twin, twin_optimizer, **quantizer.settings())
    adopting.prepare_model()
    assert torch.equal(outputs(twin), expected)
    learned = {id(parameter) for parameter in adopting.learned_parameters().values()}
    assert learned == {id(p) for group in twin_optimizer.param_groups[1:] for p in group["params"]}
    twin_optimizer.load_state_dict(copy.deepcopy(optimizer.state_dict()))
    assert train(twin, twin_optimizer, 4) == train(model, optimizer, 4)


def test_pruned_weights_are_zero_in_training_and_after(case):
    model = low_bit_net()
    optimizer = sgd(model)
    prepared(case, model, optimizer)
    originals = {name: p for name, p in named_parameters(model) if name in ("conv2.weight", "conv3.weight")}
    masks = {name: (torch.rand_like(p) > 0.5).float() for name, p in originals.items()}
    for _ in range(4):
        for name, parameter in originals.items():
            parameter.data.mul_(masks[name])
            layer: Any = model.get_submodule(name.removesuffix(".weight"))
            quantized = layer.weight
            assert torch.equal(quantized[masks[name] == 0], torch.zeros(int((masks[name] == 0).sum())))
        train(model, optimizer, 1)


def test_pruned_weights_do_not_draw_means_to_zero():
    """An optimizer's momentum moves them off zero until the mask is applied again; they count for no mean."""
    model = low_bit_net()
    mask = torch.rand_like(model.conv2.weight) > 0.8
    with torch.no_grad():
        model.conv2.weight.mul_(mask)
    optimizer = sgd(model)
    prepared("means follow the weights", model, optimizer)
    original, codebook = codebooks_of(model)["conv2"]
    for _ in range(5):
        train(model, optimizer, 1)
        original.data.mul_(mask)
    train(model, optimizer, 1)
    assert codebook.centroids.abs().min() > 0.01


def test_exported_programs_compute_the_same(case):
    model = low_bit_net()
    prepared(case, model)
    train(model, sgd(model), 1)
    images = stripes(4)[0]
    expected = outputs(model, images)
    with torch.no_grad():
        program = torch.export.export(model, (images,), strict=False).module()
        assert torch.allclose(program(images), expected, atol=1e-6)


def test_half_precision_trains(case):
    model, _ = prepared(case)
    model.to(torch.bfloat16)
    images, labels = stripes(16)
    loss = F.cross_entropy(model(images.bfloat16()), labels)
    loss.backward()
    assert loss.dtype == torch.bfloat16
    constant = {"conv2.weight", "conv3.weight"} if case in FROZEN else set()
    for name, parameter in named_parameters(model):
        assert (parameter.grad is None) == (name in constant)
        assert parameter.grad is None or parameter.grad.isfinite().all()


def test_channels_last_computes_the_same(case):
    model, _ = prepared(case)
    expected = outputs(model)
    assert torch.allclose(outputs(model.to(memory_format=torch.channels_last)), expected, atol=1e-5)
    assert model.conv2.weight.is_contiguous(memory_format=torch.channels_last)


@pytest.mark.parametrize("case", FROZEN)
def test_without_new_codes_weights_stay_as_they_were(case):
    model = low_bit_net()
    before = model.conv2.weight.detach().clone()
    optimizer = sgd(model)  # with momentum and weight decay
    prepared(case, model, optimizer)
    (original, codebook), _ = codebooks_of(model).values()
    codes, centroids = codebook.assignments.clone(), codebook.centroids.detach().clone()
    train(model, optimizer, 4)
    assert torch.equal(original, before)
    assert torch.equal(codebook.assignments, codes)
    assert torch.equal(codebook.centroids, centroids) == (case == "constant")


def test_weights_and_codes_move_with_new_codes():
    for case in set(CASES) - set(FROZEN):
        model = low_bit_net()
        optimizer = sgd(model)
        prepared(case, model, optimizer)
        (original, codebook), _ = codebooks_of(model).values()
        before, codes = original.detach().clone(), codebook.assignments.clone()
        train(model, optimizer, 4)
        assert not torch.equal(original, before)
        assert not torch.equal(codebook.assignments, codes)


def test_learned_centroids_are_a_group_of_their_own():
    model = low_bit_net()
    optimizer = sgd(model)
    quantizer = CodebookQuantizer(model, optimizer, 4, overrides=ENDS, centroid_lr_factor=0.2)
    quantizer.prepare_model()
    _, centroids = optimizer.param_groups
    assert [tuple(p.shape) for p in centroids["params"]] == [(1, 16), (1, 16)]
    assert (centroids["lr"], centroids["weight_decay"]) == (pytest.approx(0.01), 0)


def test_a_step_moves_a_centroid_by_the_sum_of_gradients():
    """Deep Compression, figure 3: gradients of a cluster are summed, and the centroid takes the step."""
    model = low_bit_net()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    CodebookQuantizer(model, optimizer, 2, overrides=ENDS, centroid_lr_factor=0.5).prepare_model()
    original, codebook = codebooks_of(model)["conv2"]
    before = codebook.centroids.detach().clone()
    plain = low_bit_net()
    plain.conv2.weight.data.copy_(codebook(original))
    plain.conv3.weight.data.copy_(codebooks_of(model)["conv3"][1](codebooks_of(model)["conv3"][0]))
    train(plain, torch.optim.SGD(plain.parameters(), lr=0), 1)
    train(model, optimizer, 1)
    grad = plain.conv2.weight.grad
    assert grad is not None
    for code in range(4):
        expected = before[0, code] - 0.05 * grad[codebook.assignments == code].sum()
        assert codebook.centroids[0, code].item() == pytest.approx(expected.item(), abs=1e-5)


def test_settings_by_layer():
    model = low_bit_net()
    overrides = {
        "conv2": {"bits_weights": 2, "method": "linear"},
        "conv3": {"per_channel_wts": True, "keep_zero": True, "init": "random", "train_centroids": False},
        "fc": {"bits_weights": None},
        "first": {"reassign_every": 7, "bits_weights": 8},
    }
    quantizer = CodebookQuantizer(model, None, 3, overrides=overrides)
    quantizer.prepare_model()
    codebooks = {name: codebook for name, (_, codebook) in codebooks_of(model).items()}
    assert sorted(codebooks) == ["conv2", "conv3", "first"]
    assert (codebooks["conv2"].codebook_size, codebooks["conv2"].is_learned) == (4, False)
    assert (codebooks["conv3"].centroids.shape, codebooks["conv3"].codebook_size) == ((8, 7), 8)
    assert (codebooks["first"].reassign_every, codebooks["first"].codebook_size) == (7, 72)
    assert sorted(quantizer.learned_parameters()) == ["first.parametrizations.weight.0.centroids"]


def test_one_call_quantizes_a_trained_model():
    model = low_bit_net()
    train(model, sgd(model), 30)
    weight = model.conv2.weight.detach().clone()
    expected = outputs(model).argmax(1)
    quantizer = quantize_with_codebook(model, bits_weights=4, keep_zero=True)
    assert model.conv2.weight.unique().numel() <= 16
    assert (model.conv2.weight - weight).abs().mean() < 0.1 * weight.abs().mean()
    assert (outputs(model).argmax(1) == expected).float().mean() > 0.9
    assert not quantizer.learned_parameters()
    assert quantizer.quantizer_metadata()["class"] == "CodebookQuantizer"


def test_metadata_is_plain_and_fits_the_constructor(case):
    _, quantizer = prepared(case)
    assert check_settings(CodebookQuantizer, quantizer.settings()) == []


def test_a_model_of_other_settings_is_not_adopted():
    model, quantizer = prepared("learned centroids")
    other = CodebookQuantizer(model, None, **{**quantizer.settings(), "keep_zero": True})
    with pytest.raises(QuantizationError, match="was prepared with keep_zero False, got True"):
        other.prepare_model()


def test_integers_of_a_codebook_are_refused_in_words():
    model, _ = prepared("learned centroids")
    with pytest.raises(QuantizationError, match="weight of 'conv2', by CodebookWeights, has no integers"):
        folded_copy(model)


def test_transposed_convolutions_linear_layers_and_embeddings_have_codebooks_too():
    torch.manual_seed(0)
    model = nn.ModuleDict(
        {
            "up": nn.ConvTranspose2d(4, 6, 3, groups=2),
            "rows": nn.Embedding(20, 8, padding_idx=0),
            "fc": nn.Linear(9, 5),
            "deep": nn.Conv3d(2, 3, 2),
        }
    )
    CodebookQuantizer(model, None, 1, per_channel_wts=True).prepare_model()
    up: Any = model["up"]
    for group in range(2):
        for channel in range(3):
            assert up.weight[2 * group : 2 * group + 2, channel].unique().numel() == 2
    for name, rows in (("rows", 20), ("fc", 5), ("deep", 3)):
        layer: Any = model[name]
        assert layer.parametrizations.weight[0].centroids.shape == (rows, 2)
    rows: Any = model["rows"]
    assert not rows.weight[0].any()


@pytest.mark.parametrize(
    "given, text",
    [
        (
            {"bits_weights": 9},
            "bits_weights: must be 1 to 8 bits, or 0, 32 or null for full precision with CodebookQuantizer, got 9",
        ),
        (
            {"overrides": {"fc": {"bits_weights": 12}}},
            "fc: bits_weights: must be 1 to 8 bits, or 0, 32 or null for full precision with CodebookQuantizer, "
            "got 12",
        ),
        (
            {"overrides": {"relu1": {"bits_activations": 4}}},
            "relu1: bits_activations: must be 0, 32 or null for full precision with CodebookQuantizer, got 4",
        ),
        (
            {"method": "kmean"},
            "CodebookQuantizer: method: must be kmeans, linear, linear_interior, got 'kmean'; "
            "did you mean 'kmeans'?",
        ),
        (
            {"overrides": {"fc": {"init": "density"}}},
            "CodebookQuantizer: overrides['fc'].init: must be exact, linear, quantile, random, got 'density'",
        ),
        (
            {"reassign_every": -1},
            "CodebookQuantizer: reassign_every: must be a number of steps from 0, got -1",
        ),
        ({"centroid_lr_factor": float("inf")}, "centroid_lr_factor: must be a number from 0, got inf"),
    ],
)
def test_settings_that_mean_nothing_are_refused(given, text):
    with pytest.raises(QuantizationError) as refused:
        CodebookQuantizer(low_bit_net(), **given)
    assert str(refused.value) == text


def test_flags_that_are_none_are_refused():
    for key, value, wanted in (
        ("keep_zero", 1, "true or false"),
        ("per_channel_wts", None, "true or false"),
        ("train_centroids", "yes", "true, false or null"),
    ):
        given: Any = {key: value}
        with pytest.raises(UsageError, match=rf"CodebookQuantizer: {key}: must be {wanted}"):
            CodebookQuantizer(low_bit_net(), **given)
        with pytest.raises(UsageError, match=rf"overrides\['fc'\]\.{key}: must be {wanted}"):
            CodebookQuantizer(low_bit_net(), overrides={"fc": given})


def test_overrides_of_no_layer_are_refused():
    with pytest.raises(UnknownNameError, match="conv9"):
        quantize_with_codebook(low_bit_net(), overrides={"conv9": {"bits_weights": 2}})
