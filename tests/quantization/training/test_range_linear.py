from __future__ import annotations

import copy
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from distiller.config import file_config
from distiller.errors import DistillerError, QuantizationError
from distiller.models import create_model
from distiller.modules import Concat, EltwiseMult
from distiller.quantization import affine
from distiller.quantization.affine import LinearQuantMode as Mode
from distiller.quantization.quantizer import rebuild_quantized
from distiller.quantization.training.range_linear import (
    NCFQuantAwareTrainQuantizer,
    QuantAwareTrainRangeLinearQuantizer,
)
from distiller.quantization.training.range_tracking import FakeLinearQuantization
from distiller.quantization.training.weight_quantizers import LinearWeightQuantizer
from distiller.registry import QUANTIZERS
from tests.quantization.training.qat_networks import IMAGES, net, outputs, sgd, train

COMPAT = Path(__file__).resolve().parents[3] / "../shared/compat/schedules/quantization/quant_aware_train"


def prepared(model=None, **settings):
    model = net() if model is None else model
    quantizer = QuantAwareTrainRangeLinearQuantizer(model, **settings)
    quantizer.prepare_model()
    return model, quantizer


def test_a_trained_model_is_the_float_one_with_weights_and_tensors_on_grids():
    model, _ = prepared(bits_activations=5, bits_weights=4, mode="ASYMMETRIC_UNSIGNED", per_channel_wts=True)
    train(model, sgd(model))
    reference = net()
    reference.load_state_dict(
        {
            key.replace("parametrizations.weight.original", "weight"): value
            for key, value in model.state_dict().items()
        },
        strict=False,
    )
    for name in ("conv1", "left", "right", "fc", "fc2"):
        weight = getattr(reference, name).weight
        rows = weight.detach().flatten(1)
        scale, zero_point = affine.scale_and_zero_point(
            rows.amin(1), rows.amax(1), 4, Mode.ASYMMETRIC_UNSIGNED
        )
        weight.data = affine.fake_quantize(weight.data, scale, zero_point, 0, 15, axis=0)

    def on_grid(tracker: FakeLinearQuantization):
        scale, zero_point = affine.scale_and_zero_point(*tracker.tracked_range, 5, Mode.ASYMMETRIC_UNSIGNED)
        return lambda _m, _i, output: affine.fake_quantize(output, scale, zero_point, 0, 31)

    for name in ("relu1", "relu2"):
        getattr(reference, name).register_forward_hook(on_grid(getattr(model, name)))
    quantize_input = on_grid(model.input_quantizer)
    reference.register_forward_pre_hook(lambda _m, args: (quantize_input(None, None, args[0]),))
    assert torch.allclose(outputs(model), outputs(reference), atol=1e-6)


def test_relus_and_the_input_are_tracked():
    model, _ = prepared(bits_activations=8)
    seen = {}
    for name in ("conv1", "bn1"):
        getattr(model, name).register_forward_hook(
            lambda _m, i, o, name=name: seen.update({name: (i[0], o.clone())})
        )
    model.train()(IMAGES)
    assert model.input_quantizer.tracked_range.tolist() == pytest.approx(
        [IMAGES.min().item(), IMAGES.max().item()]
    )
    assert model.relu1.tracked_range.tolist() == pytest.approx([0, seen["bn1"][1].max().item()])
    assert len(torch.unique(seen["conv1"][0])) <= 256


def test_the_input_is_quantized_only_if_asked_and_at_its_own_width():
    assert not hasattr(prepared(bits_activations=8, quantize_inputs=False)[0], "input_quantizer")
    assert not hasattr(prepared(bits_weights=8)[0], "input_quantizer")
    assert prepared(bits_activations=8, num_bits_inputs=4)[0].input_quantizer.num_bits == 4


def test_a_second_model_of_the_class_is_not_touched():
    # DEFECT of Distiller: it patched the class's forward; a second instance recursed without end.
    first, _ = prepared(bits_activations=8)
    second, plain = net(), net()
    expected = outputs(plain)
    assert torch.equal(outputs(second), expected)
    prepared(second, bits_activations=8)
    first.train()(IMAGES)
    second.train()(IMAGES)
    assert torch.equal(outputs(net()), expected)
    assert torch.equal(first.input_quantizer.tracked_range, second.input_quantizer.tracked_range)


def test_inputs_of_integers_are_left_alone():
    class Tokens(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.embedding, self.fc = nn.Embedding(5, 3), nn.Linear(3, 2)

        def forward(self, tokens):
            return self.fc(self.embedding(tokens))

    model, _ = prepared(Tokens(), bits_activations=8, bits_weights=4, per_channel_wts=True)
    assert model.train()(torch.tensor([1, 2])).shape == (2, 2)
    assert len(torch.unique(model.embedding.weight[0])) <= 16


def test_relu6_is_one():
    model, _ = prepared(nn.Sequential(nn.Linear(2, 2), nn.ReLU6()), bits_activations=8, quantize_inputs=False)
    model.train()(torch.full((2, 2), 100.0))
    assert model[1].tracked_range[1] <= 6
    assert model.eval()(torch.full((1, 2), 1000.0)).max() <= 6


def test_settings_of_single_layers():
    model, _ = prepared(
        bits_activations=8,
        bits_weights=8,
        mode={"activations": "ASYMMETRIC_UNSIGNED", "weights": Mode.SYMMETRIC_RESTRICTED},
        overrides={
            "relu1": {"mode": "SYMMETRIC", "ema_decay": 0.5, "bits_activations": 4},
            "conv.*": {"per_channel_wts": True, "mode": {"activations": "SYMMETRIC", "weights": "SYMMETRIC"}},
        },
    )
    assert (model.relu1.mode, model.relu1.decay, model.relu1.num_bits) == (Mode.SYMMETRIC, 0.5, 4)
    assert (model.relu2.mode, model.relu2.decay, model.relu2.num_bits) == (Mode.ASYMMETRIC_UNSIGNED, 0.999, 8)
    assert model.conv1.parametrizations.weight[0].extra_repr() == "8 bits, SYMMETRIC, per channel"
    assert model.fc.parametrizations.weight[0].extra_repr() == "8 bits, SYMMETRIC_RESTRICTED"


def test_folding_quantizes_the_folded_weights_and_hands_on_in_the_batch_norms():
    model, _ = prepared(bits_weights=4, bits_bias=8, simulate_bn_folding=True, freeze_bn_delay=None)
    assert model.conv1.bn is model.bn1
    assert model.bn1(IMAGES[:, :1].expand(-1, 6, -1, -1)).shape[1] == 6
    assert (model.conv1.freeze_bn_delay, model.left.bias.requires_grad) == (None, True)
    train(model, sgd(model))
    assert len(torch.unique(model.eval().conv1.weight)) <= 16
    norm = model.bn1
    folded_bias = norm.bias - norm.weight * norm.running_mean / (norm.running_var + norm.eps).sqrt()
    expected = LinearWeightQuantizer(8, Mode.SYMMETRIC)(folded_bias)
    assert torch.allclose(model.conv1.folding.folded_bias(None), expected)
    assert not torch.allclose(folded_bias, expected, atol=1e-6)


def test_folding_in_floating_point_changes_nothing():
    model = net()
    train(model, sgd(model))
    expected = outputs(model)
    prepared(model, bits_weights=16, simulate_bn_folding=True, per_channel_wts=True)
    assert torch.allclose(outputs(model), expected, atol=1e-3)


def test_a_functional_batch_norm_order_does_not_matter_for_folding():
    class Reordered(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.norm, self.conv, self.input_shape = nn.BatchNorm2d(4), nn.Conv2d(3, 4, 1), (1, 3, 4, 4)

        def forward(self, x):
            return F.relu(self.norm(self.conv(x))).mean((2, 3))

    model, _ = prepared(Reordered(), bits_weights=8, simulate_bn_folding=True)
    assert model.conv.bn is model.norm


def test_wrong_settings_are_refused():
    def refusal(**settings):
        with pytest.raises(DistillerError) as error:
            QuantAwareTrainRangeLinearQuantizer(net(), **settings)
        return str(error.value)

    assert refusal(ema_decay=1) == "ema_decay: must be at least 0 and less than 1, got 1"
    assert refusal(num_bits_inputs=1) == (
        "num_bits_inputs: must be 2 to 16 bits, or 0, 32 or null for full precision, got 1"
    )
    assert refusal(per_channel_wts=1) == "per_channel_wts: must be true or false, got 1"
    assert refusal(mode="SYMETRIC").startswith("mode: ")
    assert refusal(overrides={"fc": {"ema_decay": 2}}) == (
        "overrides['fc'].ema_decay: must be at least 0 and less than 1, got 2"
    )
    assert refusal(overrides={"fc": {"mode": 3}}).startswith("overrides['fc'].mode: ")
    assert (
        refusal(freeze_bn_delay=2.5)
        == "freeze_bn_delay: must be a number of batches from 0, or null, got 2.5"
    )


def test_a_model_with_a_name_of_its_own_where_the_quantizer_goes_is_refused():
    model = net()
    model.input_quantizer = nn.Identity()
    with pytest.raises(QuantizationError, match="Net: has an attribute 'input_quantizer' of its own"):
        prepared(model, bits_activations=8)


class TinyNeuMF(nn.Module):
    """Neural collaborative filtering: products and a small net of joined embeddings."""

    def __init__(self) -> None:
        super().__init__()
        self.users, self.items = nn.Embedding(5, 4), nn.Embedding(6, 4)
        self.mult, self.concat, self.join = EltwiseMult(), Concat(dim=-1), Concat(dim=-1)
        self.fc, self.relu, self.final = nn.Linear(8, 4), nn.ReLU(), nn.Linear(8, 1)

    def forward(self, users, items):
        u, i = self.users(users), self.items(items)
        deep = self.relu(self.fc(self.concat(u, i)))
        return self.final(self.join(self.mult(u, i), deep))


def test_ncf_quantizes_products_concatenations_and_linear_outputs():
    model = TinyNeuMF()
    quantizer = NCFQuantAwareTrainQuantizer(
        model, bits_activations=4, bits_weights=8, overrides={"final": {"bits_activations": None}}
    )
    quantizer.prepare_model()
    pairs = torch.tensor([0, 1, 4]), torch.tensor([5, 0, 2])
    seen = {}
    for name in ("mult", "concat", "join", "fc", "relu", "final"):
        getattr(model, name).register_forward_hook(
            lambda _m, _i, output, name=name: seen.update({name: output})
        )
    model.train()(*pairs)
    assert {
        name: len(torch.unique(value)) <= 16 for name, value in seen.items() if name != "final"
    } == dict.fromkeys(("mult", "concat", "join", "fc", "relu"), True)
    assert not hasattr(model.final, "output_quantizer")
    assert not hasattr(model, "input_quantizer")
    assert isinstance(model.relu, FakeLinearQuantization)
    rebuilt = TinyNeuMF()
    rebuild_quantized(rebuilt, model.quantizer_metadata)
    rebuilt.load_state_dict(model.state_dict())
    assert torch.equal(rebuilt.eval()(*pairs), model.eval()(*pairs))
    assert torch.equal(copy.deepcopy(model)(*pairs), model(*pairs))


def test_both_are_registered():
    assert QUANTIZERS["QuantAwareTrainRangeLinearQuantizer"] is QuantAwareTrainRangeLinearQuantizer
    assert QUANTIZERS["NCFQuantAwareTrainQuantizer"] is NCFQuantAwareTrainQuantizer


@pytest.mark.skipif(not COMPAT.is_dir(), reason="needs the schedules of Distiller")
def test_distillers_schedule_prepares_resnet18():
    model = create_model(False, "imagenet", "resnet18", parallel=False)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    file_config(model, optimizer, COMPAT / "quant_aware_train_linear_quant.yaml")
    assert model.quantizer_metadata["class"] == "QuantAwareTrainRangeLinearQuantizer"
    assert model.conv1.parametrizations.weight[0].extra_repr() == "8 bits, ASYMMETRIC_UNSIGNED, per channel"
