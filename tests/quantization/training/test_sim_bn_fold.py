"""Without quantization a folded layer is layer and batch norm; with it, the formulas of arXiv 1806.08342."""

from __future__ import annotations

import copy

import pytest
import torch
from torch import nn
from torchvision.ops import FrozenBatchNorm2d

from distiller.errors import QuantizationError
from distiller.quantization import affine
from distiller.quantization.affine import LinearQuantMode as Mode
from distiller.quantization.training.folded_parameters import FoldedParameters
from distiller.quantization.training.sim_bn_fold import (
    SimulatedFoldedBatchNorm,
    check_freeze_bn_delay,
    is_passed_over,
    pass_over,
)
from distiller.quantization.training.weight_quantizers import LinearWeightQuantizer

PAIRS = {
    "conv1d": (lambda: (nn.Conv1d(3, 4, 3), nn.BatchNorm1d(4)), (5, 3, 9)),
    "conv2d": (
        lambda: (nn.Conv2d(3, 4, 3, stride=2, padding=1, bias=False), nn.BatchNorm2d(4)),
        (5, 3, 6, 6),
    ),
    "depthwise": (lambda: (nn.Conv2d(3, 6, 3, groups=3), nn.BatchNorm2d(6)), (5, 3, 6, 6)),
    "circular": (
        lambda: (nn.Conv2d(3, 4, 3, padding=1, padding_mode="circular"), nn.BatchNorm2d(4)),
        (5, 3, 6, 6),
    ),
    "conv3d": (lambda: (nn.Conv3d(2, 4, 2), nn.BatchNorm3d(4)), (3, 2, 4, 4, 4)),
    "transposed1d": (lambda: (nn.ConvTranspose1d(3, 4, 3), nn.BatchNorm1d(4)), (5, 3, 5)),
    "transposed2d": (
        lambda: (nn.ConvTranspose2d(4, 6, 3, stride=2, output_padding=1, groups=2), nn.BatchNorm2d(6)),
        (5, 4, 5, 5),
    ),
    "transposed3d": (lambda: (nn.ConvTranspose3d(2, 4, 2, bias=False), nn.BatchNorm3d(4)), (3, 2, 3, 3, 3)),
    "linear": (lambda: (nn.Linear(5, 4), nn.BatchNorm1d(4)), (9, 5)),
    "no affine": (lambda: (nn.Conv2d(3, 4, 1), nn.BatchNorm2d(4, affine=False)), (5, 3, 4, 4)),
    "cumulative": (lambda: (nn.Conv2d(3, 4, 1), nn.BatchNorm2d(4, momentum=None)), (5, 3, 4, 4)),
}


def pair(kind: str) -> tuple[nn.Module, nn.Module, torch.Size]:
    torch.manual_seed(2)
    make, shape = PAIRS[kind]
    layer, norm = (module.double() for module in make())
    for name, low, high in (
        ("weight", -1.0, 1.5),
        ("bias", -1, 1),
        ("running_mean", -1, 1),
        ("running_var", 0.5, 2),
    ):
        if getattr(norm, name) is not None:
            nn.init.uniform_(getattr(norm, name), low, high)
    return layer, norm, shape


def data(shape, seed: int = 0) -> torch.Tensor:
    return torch.randn(shape, dtype=torch.float64, generator=torch.Generator().manual_seed(seed))


@pytest.mark.parametrize("kind", PAIRS)
def test_without_quantization_training_is_that_of_layer_and_batch_norm(kind):
    layer, norm, shape = pair(kind)
    folded = SimulatedFoldedBatchNorm(*copy.deepcopy((layer, norm)))
    plain = nn.Sequential(layer, norm)
    for step in range(3):
        mine, theirs = data(shape, step).requires_grad_(), data(shape, step).requires_grad_()
        own, expected = folded(mine), plain(theirs)
        assert torch.allclose(own, expected, atol=1e-9)
        upstream = data(own.shape, 99)
        own.backward(upstream)
        expected.backward(upstream)
        assert torch.allclose(mine.grad, theirs.grad, atol=1e-9)
    assert torch.allclose(folded.full_precision_weight.grad, layer.weight.grad, atol=1e-9)
    if norm.affine:
        assert torch.allclose(folded.bn.weight.grad, norm.weight.grad, atol=1e-9)
        assert torch.allclose(folded.bn.bias.grad, norm.bias.grad, atol=1e-9)
    if layer.bias is not None:  # what is subtracted again gets no gradient
        assert folded.bias.grad is None
        assert layer.bias.grad.abs().max() < 1e-9
    for name, buffer in norm.named_buffers():
        assert torch.allclose(getattr(folded.bn, name), buffer, atol=1e-9), name


@pytest.mark.parametrize("is_frozen", [False, True])
@pytest.mark.parametrize("kind", PAIRS)
def test_without_quantization_evaluation_and_frozen_training_are_those_of_layer_and_batch_norm(
    kind, is_frozen
):
    layer, norm, shape = pair(kind)
    folded = SimulatedFoldedBatchNorm(*copy.deepcopy((layer, norm)))
    if is_frozen:
        folded.freeze()
    else:
        folded.eval()
    norm.eval()
    mine, theirs = data(shape).requires_grad_(), data(shape).requires_grad_()
    own, expected = folded(mine), norm(layer(theirs))
    assert torch.allclose(own, expected, atol=1e-9)
    upstream = data(own.shape, 99)
    own.backward(upstream)
    expected.backward(upstream)
    assert torch.allclose(mine.grad, theirs.grad, atol=1e-9)
    assert torch.allclose(folded.full_precision_weight.grad, layer.weight.grad, atol=1e-9)
    if layer.bias is not None:
        assert torch.allclose(folded.bias.grad, layer.bias.grad, atol=1e-9)
    for name, buffer in norm.named_buffers():
        assert torch.equal(getattr(folded.bn, name), buffer), name


def numpy_like_fold(layer, norm, x, quantize):
    """Section 3.2.2, figures 7 and 8, written down again."""
    y0 = nn.functional.conv2d(x, layer.weight)
    mu, sigma_b = y0.mean((0, 2, 3)), (y0.var((0, 2, 3), correction=0) + norm.eps).sqrt()
    n = y0.numel() / y0.shape[1]
    running = 0.9 * norm.running_var + 0.1 * y0.var((0, 2, 3), correction=0) * n / (n - 1)
    sigma = (running + norm.eps).sqrt()
    w = quantize(layer.weight * (norm.weight / sigma).reshape(-1, 1, 1, 1))
    c = sigma_b / sigma
    bias = norm.bias - norm.weight * mu / sigma_b
    return nn.functional.conv2d(x, w) / c.reshape(1, -1, 1, 1) + bias.reshape(1, -1, 1, 1), sigma


def test_what_is_quantized_in_training_is_the_weight_folded_with_the_running_statistics():
    torch.manual_seed(0)
    layer, norm = nn.Conv2d(3, 4, 1, bias=False).double(), nn.BatchNorm2d(4).double()
    nn.init.uniform_(norm.weight, 0.5, 2)
    quantizer = LinearWeightQuantizer(3, Mode.SYMMETRIC)
    expected, sigma = numpy_like_fold(layer, norm, data((6, 3, 5, 5)), quantizer)
    folded = SimulatedFoldedBatchNorm(layer, norm, None, quantizer)
    assert torch.allclose(folded(data((6, 3, 5, 5))), expected)
    by_hand = quantizer(layer.weight * (norm.weight / sigma).reshape(-1, 1, 1, 1))
    assert torch.allclose(folded.weight, by_hand)
    assert len(torch.unique(folded.weight)) <= 8


def test_evaluation_is_a_layer_with_the_quantized_folded_parameters():
    layer, norm, shape = pair("conv2d")
    q = LinearWeightQuantizer(4, Mode.ASYMMETRIC_UNSIGNED)
    b = LinearWeightQuantizer(5, Mode.SYMMETRIC)
    folded = SimulatedFoldedBatchNorm(layer, norm, None, q, bias_quantization_fn=b).eval()
    factor = norm.weight / (norm.running_var + norm.eps).sqrt()
    weight = q(layer.weight * factor.reshape(-1, 1, 1, 1))
    bias = b(norm.bias - factor * norm.running_mean)
    expected = nn.functional.conv2d(data(shape), weight, bias, stride=2, padding=1)
    assert torch.allclose(folded(data(shape)), expected)
    plain = folded.unfolded_layer(weight, bias)
    assert type(plain) is nn.Conv2d
    assert list(plain.state_dict()) == ["weight", "bias"]
    assert torch.allclose(plain(data(shape)), expected)
    assert torch.allclose(folded(data(shape)), expected)


def test_gradients_pass_gradcheck():
    layer, norm = nn.Conv1d(2, 3, 2).double(), nn.BatchNorm1d(3).double()
    folded = SimulatedFoldedBatchNorm(layer, norm)
    x = data((3, 2, 4)).requires_grad_()
    states = copy.deepcopy(folded.state_dict())

    def run(x, weight, gamma):
        # the running variance cancels, and is put back all the same
        folded.load_state_dict(states)
        parameters = {"parametrizations.weight.original": weight, "bn.weight": gamma}
        return torch.func.functional_call(folded, parameters, (x,))

    weight, gamma = (p.detach().clone().requires_grad_() for p in (folded.full_precision_weight, norm.weight))
    assert torch.autograd.gradcheck(run, (x, weight, gamma))


def test_statistics_freeze_after_the_delay_and_the_state_says_so():
    layer, norm, shape = pair("conv2d")
    folded = SimulatedFoldedBatchNorm(layer, norm, freeze_bn_delay=2)
    folded(data(shape, 0))
    folded(data(shape, 1))
    assert (int(folded.batches_seen), folded.frozen) == (2, False)
    before = norm.running_mean.clone()
    folded(data(shape, 2))
    assert (int(folded.batches_seen), folded.frozen) == (2, True)
    assert torch.equal(norm.running_mean, before)
    folded.eval()
    expected = folded(data(shape, 3))
    folded.train()
    assert torch.equal(folded(data(shape, 3)), expected)


def test_a_saved_state_goes_on_where_it_was():
    def make(seen: int):
        layer, norm, shape = pair("conv2d")
        folded = SimulatedFoldedBatchNorm(layer, norm, 3, LinearWeightQuantizer(4, Mode.SYMMETRIC))
        for step in range(seen):
            folded(data(shape, step))
        return folded, shape

    for seen in (1, 4):
        trained, shape = make(seen)
        loaded, _ = make(0)
        loaded.load_state_dict(trained.state_dict())
        copied = copy.deepcopy(trained)
        for step in range(10, 14):
            expected = trained(data(shape, step))
            assert torch.equal(loaded(data(shape, step)), expected)
            assert torch.equal(copied(data(shape, step)), expected)
        assert loaded.frozen


def test_a_batch_norm_in_evaluation_mode_keeps_its_statistics_while_the_rest_trains():
    layer, norm, shape = pair("conv2d")
    folded = SimulatedFoldedBatchNorm(layer, norm)
    norm.eval()
    before = norm.running_mean.clone()
    folded(data(shape))
    assert torch.equal(norm.running_mean, before)


def test_frozen_batch_norms_are_frozen_at_once():
    layer, norm = nn.Conv2d(3, 4, 1), FrozenBatchNorm2d(4)
    nn.init.uniform_(norm.running_mean)
    x = torch.randn(2, 3, 4, 4)
    expected = norm(layer(x))
    folded = SimulatedFoldedBatchNorm(layer, norm)
    assert folded.frozen
    assert torch.allclose(folded(x), expected, atol=1e-6)
    assert SimulatedFoldedBatchNorm(nn.Conv2d(3, 4, 1), nn.BatchNorm2d(4), 0).frozen


def test_it_is_a_layer_of_its_kind_with_the_same_parameters():
    layer, norm = nn.Conv2d(3, 4, 3, padding=1), nn.BatchNorm2d(4)
    folded = SimulatedFoldedBatchNorm(layer, norm)
    assert isinstance(folded, SimulatedFoldedBatchNorm)
    assert isinstance(folded, nn.Conv2d)
    assert folded.padding == (1, 1)
    assert folded.full_precision_weight is layer.weight
    assert folded.bias is layer.bias
    assert folded.param_module is folded
    assert folded.bn is norm
    assert type(layer) is nn.Conv2d  # what was given is left alone
    layer(torch.randn(1, 3, 4, 4))


def test_a_batch_norm_that_is_not_owned_keeps_its_place():
    layer, norm = nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4)
    folded = SimulatedFoldedBatchNorm(layer, norm, owns_bn=False)
    pass_over(norm)
    model = nn.Sequential(folded, norm)
    assert "1.running_mean" in model.state_dict()
    assert not any("bn" in key for key in model.state_dict())
    assert isinstance(norm, nn.BatchNorm2d)
    assert is_passed_over(norm)
    x = torch.randn(2, 4, 3, 3)
    assert norm(x) is x
    copied = copy.deepcopy(model).double()
    assert copied[0].bn is copied[1]
    assert copied[0].folding.bn is copied[1]
    assert isinstance(copied[0].folding, FoldedParameters)
    assert copied(torch.randn(2, 3, 5, 5).double()).dtype is torch.float64


def test_masked_weights_stay_zero():
    layer, norm = nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4)
    with torch.no_grad():
        layer.weight[:, 1] = 0
    for mode in Mode:
        quantizer = LinearWeightQuantizer(4, mode)
        folded = SimulatedFoldedBatchNorm(layer, norm, None, quantizer)
        assert torch.equal(folded.weight[:, 1], torch.zeros(4, 3, 3))


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_half_precision_and_channels_last_stay_what_they_are(dtype):
    layer, norm = nn.Conv2d(3, 4, 3, padding=1), nn.BatchNorm2d(4)
    folded = SimulatedFoldedBatchNorm(layer, norm, None, LinearWeightQuantizer(8, Mode.SYMMETRIC)).to(dtype)
    x = torch.randn(2, 3, 5, 5).to(dtype).to(memory_format=torch.channels_last)
    for _ in range(2):
        y = folded(x)
        assert y.dtype is dtype
        assert y.is_contiguous(memory_format=torch.channels_last)
        folded.eval()


def test_evaluation_exports():
    layer, norm, shape = pair("conv2d")
    folded = SimulatedFoldedBatchNorm(layer, norm, None, LinearWeightQuantizer(4, Mode.SYMMETRIC)).eval()
    exported = torch.export.export(nn.Sequential(folded), (data(shape),))
    assert torch.allclose(exported.module()(data(shape)), folded(data(shape)))


def test_wrong_pairs_are_refused():
    def refusal(*arguments):
        with pytest.raises(QuantizationError) as error:
            SimulatedFoldedBatchNorm(*arguments)
        return str(error.value)

    kind = "SimulatedFoldedBatchNorm: "
    assert refusal(nn.ReLU(), nn.BatchNorm1d(3)) == (
        f"{kind}a ReLU cannot take in a batch norm; it must be a convolution (1d to 3d, transposed too) or linear "
        "layer of torch.nn, with a plain weight"
    )
    assert (
        refusal(nn.Conv2d(3, 4, 1), nn.BatchNorm1d(4))
        == f"{kind}a Conv2d goes with BatchNorm2d, got BatchNorm1d"
    )
    assert refusal(nn.Linear(3, 4), nn.ReLU()) == f"{kind}a Linear goes with BatchNorm1d, got ReLU"
    assert refusal(nn.Conv2d(3, 4, 1), nn.BatchNorm2d(4, track_running_stats=False)) == (
        f"{kind}the batch norm has no running statistics; make it with track_running_stats=True"
    )
    assert refusal(nn.Conv2d(3, 4, 1), nn.BatchNorm2d(3)) == (
        f"{kind}the layer has 4 outputs, the batch norm is over 3 channels; they must be as many"
    )
    assert refusal(nn.Conv2d(3, 4, 1), nn.BatchNorm2d(4), -1) == (
        "freeze_bn_delay: must be a number of batches from 0, or null, got -1"
    )
    assert check_freeze_bn_delay(None) is None
    with pytest.raises(QuantizationError, match="a InstanceNorm2d cannot be folded"):
        pass_over(nn.InstanceNorm2d(3))


def test_a_batch_of_one_value_per_channel_has_no_variance():
    folded = SimulatedFoldedBatchNorm(nn.Linear(2, 3), nn.BatchNorm1d(3))
    with pytest.raises(QuantizationError) as error:
        folded(torch.randn(1, 2))
    assert str(error.value) == (
        "simulated batch-norm folding: a training batch needs more than one value per channel, "
        "got (1, 3) from the layer"
    )


def test_the_quantized_weight_is_on_a_grid():
    layer, norm = nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4)
    quantizer = LinearWeightQuantizer(4, Mode.SYMMETRIC)
    folded = SimulatedFoldedBatchNorm(layer, norm, None, quantizer)
    grid = quantizer.weight_grid(folded.folding.folded_weight(layer.weight))
    on_grid = affine.fake_quantize(folded.weight, grid.scale, grid.zero_point, grid.qmin, grid.qmax)
    assert torch.allclose(on_grid, folded.weight, atol=1e-6)
