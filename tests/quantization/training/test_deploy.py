"""The deployed copy computes what the trained model does, and its integers are what it says."""

from __future__ import annotations

from functools import cache

import pytest
import torch
from torch import nn

from distiller.errors import DistillerError
from distiller.quantization import affine
from distiller.quantization.training.deploy import (
    FoldedCopy,
    GridQuantizer,
    IntegerWeight,
    fold_into,
    folded_copy,
)
from distiller.quantization.training.fake_quant import Grid
from distiller.quantization.training.lsq import LSQQuantizer
from distiller.quantization.training.qat_quantizer import QatQuantizer
from distiller.quantization.training.range_linear import (
    NCFQuantAwareTrainQuantizer,
    QuantAwareTrainRangeLinearQuantizer,
)
from distiller.quantization.training.weight_quantizers import OutputChannels
from tests.quantization.training.qat_networks import IMAGES, equal_states, net, outputs, sgd, train

SETTINGS = {
    "range": (QuantAwareTrainRangeLinearQuantizer, {"mode": "SYMMETRIC_RESTRICTED"}),
    "range, asymmetric, per channel": (
        QuantAwareTrainRangeLinearQuantizer,
        {"mode": "ASYMMETRIC_UNSIGNED", "per_channel_wts": True},
    ),
    "range, asymmetric, signed": (QuantAwareTrainRangeLinearQuantizer, {"mode": "ASYMMETRIC_SIGNED"}),
    "range, folded": (
        QuantAwareTrainRangeLinearQuantizer,
        {"mode": "SYMMETRIC", "simulate_bn_folding": True, "bits_bias": 12},
    ),
    "outputs": (NCFQuantAwareTrainQuantizer, {"mode": "ASYMMETRIC_SIGNED"}),
    "lsq": (LSQQuantizer, {}),
    "lsq, folded": (LSQQuantizer, {"per_channel_wts": True, "simulate_bn_folding": True}),
}


def trained(kind: str, negative: bool = False) -> nn.Module:
    make, settings = SETTINGS[kind]
    model = net()
    if negative:
        with torch.no_grad():
            model.bn1.weight[1::2] *= -1
            model.bn2.weight[0] = 0
    make(model, bits_activations=8, bits_weights=5, **settings).prepare_model()
    train(model, sgd(model))
    return model


@cache
def deployed(kind: str) -> FoldedCopy:
    """To be looked at only."""
    return folded_copy(trained(kind))


@pytest.mark.parametrize("negative", [False, True])
@pytest.mark.parametrize("kind", SETTINGS)
def test_the_copy_computes_what_the_model_does(kind, negative):
    model = trained(kind, negative)
    before = {key: value.clone() for key, value in model.state_dict().items()}
    copied = folded_copy(model)
    expected = outputs(model)
    tolerance = 1e-5 if kind != "lsq" or not copied.kept_batch_norms else 1e-4
    assert torch.allclose(outputs(copied.model), expected, atol=tolerance)
    assert equal_states(model.state_dict(), before)
    assert torch.equal(outputs(model), expected)  # the model goes on working


@pytest.mark.parametrize("kind", SETTINGS)
def test_its_layers_are_plain_and_its_weights_are_integers_times_scales(kind):
    copied = deployed(kind)
    model = copied.model
    assert not hasattr(model, "quantizer_metadata")
    assert set(copied.weights) == {"conv1", "left", "right", "fc", "fc2"}
    for name, weight in copied.weights.items():
        layer = model.get_submodule(name)
        assert type(layer) in (nn.Conv2d, nn.Linear)
        assert list(layer._parameters) == ["weight", "bias"]
        assert torch.equal(layer.weight, weight.values)
        assert weight.integers.dtype is torch.int32
        assert weight.qmin <= weight.integers.min()
        assert weight.integers.max() <= weight.qmax
        assert weight.qmax - weight.qmin < 32
        scale = weight.scale if weight.scale.dim() else weight.scale.expand(layer.weight.shape[0])
        zero_point = weight.zero_point.expand(scale.shape)
        for channel, row in enumerate(layer.weight):
            by_hand = (weight.integers[channel] - zero_point[channel]) * scale[channel]
            assert torch.equal(row, by_hand)
    quantizers = [m for m in model.modules() if isinstance(m, GridQuantizer)]
    assert quantizers
    assert all(q.qmax - q.qmin <= 255 for q in quantizers)


@pytest.mark.parametrize("kind", SETTINGS)
def test_batch_norms_are_gone(kind):
    copied = deployed(kind)
    assert copied.kept_batch_norms == {}
    assert isinstance(copied.model.bn1, nn.Identity)
    assert isinstance(copied.model.bn2, nn.Identity)


def test_activation_quantizers_stand_where_they_stood():
    copied = deployed("range, asymmetric, per channel").model
    assert isinstance(copied.relu1, GridQuantizer)
    assert (copied.relu1.qmin, copied.relu1.qmax, int(copied.relu1.zero_point)) == (0, 255, 0)
    assert isinstance(copied.input_quantizer, GridQuantizer)
    copied = deployed("range").model
    assert (copied.relu1.qmin, copied.relu1.qmax) == (0, 127)  # the half of a signed grid that a ReLU leaves
    copied = deployed("lsq").model
    assert copied.left.input_quantizer is copied.right.input_quantizer
    assert (copied.left.input_quantizer.qmin, copied.left.input_quantizer.qmax) == (0, 255)
    assert (copied.conv1.input_quantizer.qmin, copied.conv1.input_quantizer.qmax) == (-128, 127)
    copied = deployed("outputs").model
    assert isinstance(copied.fc.output_quantizer, GridQuantizer)


def test_a_batch_norm_behind_a_quantized_output_stays():
    class Quantized(QuantAwareTrainRangeLinearQuantizer):
        def output_quantizer(self, layer, name, bits, **overrides):
            return self._activation_quantizer(name, bits, overrides) if name == "conv1" else None

    model = net()
    Quantized(model, bits_activations=8, bits_weights=8, mode="SYMMETRIC_RESTRICTED").prepare_model()
    train(model, sgd(model))
    copied = folded_copy(model)
    assert isinstance(copied.model.bn1, nn.BatchNorm2d)
    assert isinstance(copied.model.bn2, nn.Identity)
    assert torch.allclose(outputs(copied.model), outputs(model), atol=1e-5)


def test_integers_that_cannot_change_their_sign_keep_the_batch_norm_and_are_told():
    model = net()
    LSQQuantizer(model, bits_weights=2).prepare_model()
    train(model, sgd(model), 1)
    with torch.no_grad():
        model.bn1.weight.fill_(-1)
        model.conv1.parametrizations.weight[0].step_size.mul_(
            0.4
        )  # so that weights reach the ends of the grid
    copied = folded_copy(model)
    assert copied.kept_batch_norms == {
        "bn1": "its negative factors turn -2, which 'conv1' uses, into 2, which is not on the grid; "
        "train with simulate_bn_folding, or on a grid that is its own mirror image (SYMMETRIC_RESTRICTED)"
    }
    assert isinstance(copied.model.bn1, nn.BatchNorm2d)
    assert torch.allclose(outputs(copied.model), outputs(model), atol=1e-5)


def weight_of(integers, scale, zero_point=0, qmin=-8, qmax=7):
    zero_points = torch.as_tensor(zero_point, dtype=torch.int32)
    return IntegerWeight(
        torch.tensor(integers, dtype=torch.int32),
        torch.tensor(scale),
        zero_points,
        qmin,
        qmax,
        OutputChannels(),
    )


def test_negative_factors_turn_the_integers_around():
    folded = fold_into(weight_of([[1, -7], [3, 4]], 0.5), torch.tensor([-2.0, 3.0]))
    assert folded.integers.tolist() == [[-1, 7], [3, 4]]
    assert folded.scale.tolist() == [1.0, 1.5]
    assert folded.zero_point.tolist() == [0, 0]
    assert fold_into(weight_of([[1, -8], [3, 4]], 0.5), torch.tensor([-2.0, 3.0])) is None


def test_asymmetric_integers_are_mirrored_with_their_zero_point():
    weight = weight_of([[0, 15], [3, 4]], [0.5, 0.25], [4, 0], 0, 15)
    folded = fold_into(weight, torch.tensor([-2.0, -1.0]))
    assert folded.integers.tolist() == [[15, 0], [12, 11]]
    assert folded.zero_point.tolist() == [11, 15]
    assert torch.equal(folded.values, weight.values * torch.tensor([[-2.0], [-1.0]]))


def test_a_factor_of_zero_leaves_zeros():
    folded = fold_into(weight_of([[1, 2]], 0.5, 3), torch.tensor([0.0]))
    assert folded.values.tolist() == [[0, 0]]
    assert folded.scale.tolist() == [1.0]


def test_a_grid_quantizer_is_affine():
    grid = Grid(torch.tensor(0.1), torch.tensor(3, dtype=torch.int32), 0, 15)
    x = torch.randn(50)
    assert torch.equal(GridQuantizer(grid)(x), affine.fake_quantize(x, grid.scale, grid.zero_point, 0, 15))
    assert GridQuantizer(grid).extra_repr() == "[0, 15], scale=0.1, zp=3"


def test_what_cannot_be_deployed_is_refused():
    def refusal(model, *arguments):
        with pytest.raises(DistillerError) as error:
            folded_copy(model, *arguments)
        return str(error.value)

    assert refusal(net()) == "folded_copy: the model is not prepared by a training quantizer"
    model = net()
    QuantAwareTrainRangeLinearQuantizer(model, bits_activations=8).prepare_model()
    assert refusal(model).startswith("relu1: has seen no training batch") or "input" in refusal(model)
    model = trained("range")
    del model.input_shape
    assert refusal(model) == (
        "'folded_copy without dummy_input' needs the shape of the model's input: "
        "set model.input_shape, as (1, 3, 32, 32)"
    )
    assert folded_copy(model, IMAGES).kept_batch_norms == {}

    class Odd(nn.Module):
        def forward(self, x):
            return x

        def right_inverse(self, x):
            return x

    class OddGrid(Odd):
        def weight_grid(self, weight):
            return Grid(torch.tensor(0.1), torch.tensor(0, dtype=torch.int32), -8, 7)

    def prepared(weights, acts):
        class Quantizer(QatQuantizer):
            def weight_quantizer(self, layer, name, bits, **overrides):
                return weights()

            def activation_replacement(self, module, name, bits, **overrides):
                return acts() if isinstance(module, nn.ReLU) else None

        model = net()
        Quantizer(
            model, bits_weights=4 if weights else None, bits_activations=4 if acts else None
        ).prepare_model()
        return model

    assert refusal(prepared(Odd, None)) == (
        "folded_copy: the weight of 'conv1', by Odd, has no integers: its values are not equally far apart, and "
        "integer kernels know one scale for all of them; train it on linear levels "
        "(QuantAwareTrainRangeLinearQuantizer, LSQQuantizer), or keep the checkpoint"
    )
    assert (
        refusal(prepared(OddGrid, None))
        == "folded_copy: the weight of 'conv1' is not on the grid that OddGrid says"
    )
    assert refusal(prepared(None, Odd)) == "folded_copy: the activations of 'relu1', by Odd, have no integers"
