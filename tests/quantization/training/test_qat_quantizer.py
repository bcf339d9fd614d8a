"""What training quantizers share, by a quantizer with a learned factor in each place."""

from __future__ import annotations

import copy

import pytest
import torch
from torch import Tensor, nn
from torch.nn.utils import parametrize

from distiller.apputils.checkpoint import (
    load_state,
    read_checkpoint,
    restore_optimizer,
    restore_quantizer,
    save_checkpoint,
)
from distiller.errors import DistillerError, QuantizationError, UnknownNameError
from distiller.names import named_parameters
from distiller.quantization.quantizer import QBits, rebuild_quantized
from distiller.quantization.training.lsq import LSQQuantizer
from distiller.quantization.training.qat_quantizer import QatQuantizer
from distiller.quantization.training.range_linear import QuantAwareTrainRangeLinearQuantizer
from distiller.quantization.training.sim_bn_fold import SimulatedFoldedBatchNorm
from distiller.quantization.training.weight_quantizers import LinearWeightQuantizer
from tests.quantization.training.qat_networks import IMAGES, Net, equal_states, net, outputs, sgd, train


class Factor(nn.Module):
    def __init__(self, bits: int) -> None:
        super().__init__()
        self.bits = bits
        self.factor = nn.Parameter(torch.tensor(float(bits)))

    def forward(self, x: Tensor) -> Tensor:
        return x * self.factor

    def right_inverse(self, x: Tensor) -> Tensor:
        return x


class Factors(QatQuantizer):
    override_names = frozenset({"twice"})
    smallest_bits = QBits(1, 1, 2)

    def weight_quantizer(self, layer, name, bits, **overrides):
        return Factor(bits * (2 if overrides.get("twice") else 1))

    def activation_replacement(self, module, name, bits, **overrides):
        return Factor(bits) if isinstance(module, nn.ReLU) else None

    def input_quantizer(self, layer, name, bits, **overrides):
        return Factor(bits) if isinstance(layer, nn.Linear) else None

    def output_quantizer(self, layer, name, bits, **overrides):
        return Factor(bits) if name == "fc2" else None


def prepared(**settings) -> tuple[Net, Factors]:
    model = net()
    quantizer = Factors(model, **settings)
    quantizer.prepare_model()
    return model, quantizer


def test_each_place_gets_its_module_and_parameters_keep_their_names():
    before = set(dict(named_parameters(net())))
    model = net()
    identities = dict(named_parameters(model))
    quantizer = Factors(model, bits_activations=3, bits_weights=2, bits_bias=8)
    quantizer.prepare_model()
    after = dict(named_parameters(model))
    learned = quantizer.learned_parameters()
    assert set(after) - set(learned) == before
    assert all(after[name] is p for name, p in identities.items())
    assert isinstance(model.relu1, Factor)
    assert isinstance(model.fc.input_quantizer, Factor)
    assert isinstance(model.fc2.output_quantizer, Factor)
    assert isinstance(model.conv1.parametrizations.weight[0], Factor)
    assert isinstance(model.fc.parametrizations.bias[0], LinearWeightQuantizer)
    assert not hasattr(model.conv1.parametrizations, "bias")
    assert torch.equal(model.conv1.weight, identities["conv1.weight"] * 2)
    assert sorted(learned) == [
        "conv1.parametrizations.weight.0.factor",
        "fc.input_quantizer.factor",
        "fc.parametrizations.weight.0.factor",
        "fc2.input_quantizer.factor",
        "fc2.output_quantizer.factor",
        "fc2.parametrizations.weight.0.factor",
        "left.parametrizations.weight.0.factor",
        "relu1.factor",
        "relu2.factor",
        "right.parametrizations.weight.0.factor",
    ]
    assert quantizer.modules_processed[model.conv1] == ("conv1", None)


def test_32_bits_are_full_precision():
    # DEFECT of Distiller: its default, 32, quantized everything to 32-bit integers.
    for off in (None, 0, 32):
        model = net()
        expected = outputs(model)
        Factors(model, bits_activations=off, bits_weights=off, bits_bias=off).prepare_model()
        assert torch.equal(outputs(model), expected)
        assert not any(parametrize.is_parametrized(module) for module in model.modules())
    model, quantizer = prepared(bits_weights=4, bits_bias=24, overrides={"fc": {"bits_weights": 32}})
    assert quantizer.module_qbits_map["fc"] == QBits()
    assert quantizer.module_qbits_map["fc2"] == QBits(None, 4, None)


def test_overrides_reach_layers_and_their_bits():
    model, quantizer = prepared(
        bits_weights=4,
        bits_activations=4,
        overrides={
            "fc.*": {"bits_weights": 8, "twice": True},
            "fc": {"bits_weights": None},
            "relu1": {"bits_activations": None},
        },
    )
    assert not parametrize.is_parametrized(model.fc)
    assert model.fc2.parametrizations.weight[0].bits == 16
    assert isinstance(model.relu1, nn.ReLU)
    assert quantizer.settings()["overrides"]["fc.*"] == {"bits_weights": 8, "twice": True}


def test_wrong_settings_are_refused():
    def refusal(**settings):
        with pytest.raises((QuantizationError, UnknownNameError)) as error:
            Factors(net(), **settings)
        return str(error.value)

    assert refusal(bits_weights=17) == (
        "bits_weights: must be 1 to 16 bits, or 0, 32 or null for full precision, got 17"
    )
    assert refusal(overrides={"fc": {"bits_bias": True}}) == (
        "fc: bits_bias: must be 2 to 64 bits, or 0, 32 or null for full precision, got True"
    )
    assert refusal(overrides={"fc": {"twicee": 1}}) == (
        "overrides['fc']: unknown key 'twicee'; did you mean 'twice'?"
    )
    assert refusal(overrides={"fc": {"x": 1}}) == (
        "overrides['fc']: unknown key 'x'; Factors takes bits_activations, bits_weights, bits_bias, twice"
    )
    assert (
        refusal(overrides={"fc3": {}}) == "overrides: 'fc3' matches no layer of the model; did you mean 'fc'?"
    )
    assert refusal(overrides={"fc": {"wts": 3}}) == "overrides['fc']: key 'wts' is called 'bits_weights' now"
    assert refusal(overrides=[1]) == "overrides: must map layer names or patterns to settings, got list"
    with pytest.raises(
        ValueError, match="Factors: optimizer: must be a torch.optim.Optimizer or None, got str"
    ):
        Factors(net(), "sgd")


def test_learned_parameters_go_to_a_group_of_their_own():
    model = net()
    optimizer = sgd(model)
    before = list(optimizer.param_groups[0]["params"])
    quantizer = Factors(model, optimizer, bits_weights=2)
    quantizer.prepare_model()
    assert [id(p) for p in optimizer.param_groups[0]["params"]] == [id(p) for p in before]
    assert {id(p) for p in optimizer.param_groups[1]["params"]} == {
        id(p) for p in quantizer.learned_parameters().values()
    }
    assert optimizer.param_groups[1]["weight_decay"] == 0.01


def test_a_quantizer_prepares_once_and_nothing_that_is_prepared_otherwise():
    model, quantizer = prepared(bits_weights=4)
    with pytest.raises(QuantizationError, match="the model is prepared already; a quantizer does it once"):
        quantizer.prepare_model()
    with pytest.raises(QuantizationError) as error:
        Factors(model, bits_weights=3).prepare_model()
    assert str(error.value) == (
        "prepare_model: the model was prepared with bits_weights 4, got 3; "
        "use the settings of the checkpoint, or a model in floating point"
    )
    with pytest.raises(QuantizationError) as error:
        LSQQuantizer(model, bits_weights=4).prepare_model()
    assert str(error.value) == (
        "prepare_model: Factors has prepared the model; LSQQuantizer needs one in floating point"
    )


def test_an_equal_quantizer_takes_a_prepared_model_over():
    overrides = {"relu1": {"bits_activations": None}, "fc": {"bits_weights": 8}}
    model, _ = prepared(bits_weights=4, bits_activations=4, overrides=overrides)
    modules = dict(model.named_modules())
    optimizer = sgd(model)  # holds the learned parameters too: it was made after the model was prepared
    quantizer = Factors(model, optimizer, bits_weights=4, bits_activations=4, overrides=overrides)
    quantizer.prepare_model()
    assert dict(model.named_modules()) == modules
    assert [len(group["params"]) for group in optimizer.param_groups] == [
        13,
        len(quantizer.learned_parameters()),
    ]
    float_order = [name for name, _ in named_parameters(net())]
    names = {id(p): name for name, p in named_parameters(model)}
    assert [names[id(p)] for p in optimizer.param_groups[0]["params"]] == float_order
    with pytest.raises(QuantizationError, match="a quantizer does it once"):
        quantizer.prepare_model()


def test_modes_types_and_devices_are_those_of_the_layers():
    model = net().eval()
    Factors(model, bits_weights=4, bits_activations=4).prepare_model()
    assert not any(module.training for module in model.modules())


def test_wrapped_models_are_prepared_inside():
    model = nn.DataParallel(net())
    quantizer = Factors(model, bits_weights=4, overrides={"module.fc": {"bits_weights": 2}})
    quantizer.prepare_model()
    assert model.module.quantizer_metadata["class"] == "Factors"
    assert model.module.fc.parametrizations.weight[0].bits == 2
    assert all("module." not in name for name in quantizer.learned_parameters())


def test_a_module_at_two_names_is_replaced_at_both_with_distillers_warning():
    model = nn.Sequential(nn.Linear(2, 2), relu := nn.ReLU(), nn.Linear(2, 2), relu)
    with pytest.warns(UserWarning, match="Module '3' references to same module as '1'."):
        Factors(model, bits_activations=4).prepare_model()
    assert model[1] is model[3]
    assert isinstance(model[1], Factor)


def test_nothing_is_changed_when_one_layer_cannot_be_quantized():
    class Refuses(Factors):
        def weight_quantizer(self, layer, name, bits, **overrides):
            if name == "fc2":
                raise QuantizationError("fc2: no")
            return Factor(bits)

    model = net()
    with pytest.raises(QuantizationError):
        Refuses(model, bits_weights=4, bits_activations=4).prepare_model()
    assert not any(parametrize.is_parametrized(module) for module in model.modules())
    assert isinstance(model.relu1, nn.ReLU)


# --- the life of a model, with the quantizers of this package ---

KINDS = {
    "range": (QuantAwareTrainRangeLinearQuantizer, {"bits_activations": 8, "bits_weights": 4}),
    "range, folded": (
        QuantAwareTrainRangeLinearQuantizer,
        {
            "bits_activations": 4,
            "bits_weights": 4,
            "bits_bias": 8,
            "mode": "ASYMMETRIC_UNSIGNED",
            "per_channel_wts": True,
            "simulate_bn_folding": True,
            "freeze_bn_delay": 4,
        },
    ),
    "lsq": (
        LSQQuantizer,
        {"bits_activations": 4, "bits_weights": 4, "overrides": {"fc2": {"bits_weights": 8}}},
    ),
    "lsq, folded": (
        LSQQuantizer,
        {"bits_activations": 4, "bits_weights": 4, "per_channel_wts": True, "simulate_bn_folding": True},
    ),
}


def begin(kind: str):
    make, settings = KINDS[kind]
    model = net()
    optimizer = sgd(model)
    make(model, optimizer, **settings).prepare_model()
    return model, optimizer


@pytest.mark.parametrize("kind", KINDS)
def test_it_learns(kind):
    make, settings = KINDS[kind]
    model = net()
    optimizer = torch.optim.Adam(model.parameters(), lr=0.01)
    make(model, optimizer, **settings).prepare_model()
    losses = train(model, optimizer, 90)
    assert losses[0] > 1.6
    assert losses[-1] < 0.7


@pytest.mark.parametrize("kind", KINDS)
def test_names_of_parameters_and_batch_norms_are_those_of_the_float_model(kind):
    make, settings = KINDS[kind]
    model = net()
    expected = dict(named_parameters(model))
    quantizer = make(model, **settings)
    quantizer.prepare_model()
    kept = {name: p for name, p in named_parameters(model) if name not in quantizer.learned_parameters()}
    assert set(kept) == set(expected)
    assert all(kept[name] is expected[name] for name in expected)
    assert {"bn1.running_mean", "bn2.running_var"} <= set(model.state_dict())
    assert isinstance(model.conv1, SimulatedFoldedBatchNorm) == ("folded" in kind)


@pytest.mark.parametrize("kind", KINDS)
def test_a_copy_and_a_rebuilt_model_are_equal_bit_for_bit(kind):
    model, optimizer = begin(kind)
    train(model, optimizer)
    expected = outputs(model)
    copied = copy.deepcopy(model)
    rebuilt = net()
    rebuild_quantized(rebuilt, model.quantizer_metadata)
    rebuilt.load_state_dict(model.state_dict())
    assert torch.equal(outputs(copied), expected)
    assert torch.equal(outputs(rebuilt), expected)
    train(model, optimizer)
    assert torch.equal(outputs(copied), expected)  # shares nothing with the model
    assert not torch.equal(outputs(model), expected)


@pytest.mark.parametrize("kind", KINDS)
def test_a_resumed_training_goes_on_bit_for_bit(kind, tmp_path):
    # DEFECT of Distiller: checkpoints of quantization-aware training could not be loaded again.
    make, settings = KINDS[kind]
    model, optimizer = begin(kind)
    train(model, optimizer)
    path = save_checkpoint(0, "net", model, optimizer, dir=tmp_path)
    expected = train(model, optimizer)

    checkpoint = read_checkpoint(path)
    resumed = net()
    with torch.no_grad():
        for parameter in resumed.parameters():
            parameter.zero_()
    restore_quantizer(resumed, checkpoint)
    load_state(resumed, checkpoint)
    fresh = sgd(resumed)
    make(resumed, fresh, **settings).prepare_model()
    restore_optimizer(resumed, checkpoint, fresh)
    assert train(resumed, fresh) == expected
    assert equal_states(resumed.state_dict(), model.state_dict())


@pytest.mark.parametrize("kind", KINDS)
def test_evaluation_exports(kind):
    model, optimizer = begin(kind)
    train(model, optimizer)
    expected = outputs(model)

    exported = torch.export.export(model, (IMAGES,))
    assert torch.equal(exported.module()(IMAGES), expected)


@pytest.mark.parametrize("kind", KINDS)
def test_masked_weights_are_exactly_zero(kind):
    model, optimizer = begin(kind)
    weight = dict(named_parameters(model))["right.weight"]
    mask = torch.rand(weight.shape, generator=torch.Generator().manual_seed(0)) < 0.5
    for _ in range(3):
        with torch.no_grad():
            weight.mul_(mask)
        assert torch.equal(model.right.weight[~mask], torch.zeros(int((~mask).sum())))
        train(model, optimizer, 1)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float64])
@pytest.mark.parametrize("kind", KINDS)
def test_other_types_and_channels_last_stay_what_they_are(kind, dtype):
    model, optimizer = begin(kind)
    train(model, optimizer, 1)
    model.to(dtype).to(memory_format=torch.channels_last)

    images = IMAGES.to(dtype).to(memory_format=torch.channels_last)
    assert outputs(model, images).dtype is dtype
    seen = []
    model.left.register_forward_hook(lambda _m, _i, output: seen.append(output))
    model.train()(images).sum().backward()
    assert seen[0].is_contiguous(memory_format=torch.channels_last)
    assert all(p.grad is None or p.grad.dtype is dtype for p in model.parameters())


def test_folding_needs_an_input_or_its_shape():
    model = net()
    del model.input_shape
    with pytest.raises(DistillerError) as error:
        LSQQuantizer(model, bits_activations=8).prepare_model()
    assert str(error.value) == (
        "'LSQQuantizer.prepare_model without dummy_input' needs the shape of the model's input: "
        "set model.input_shape, as (1, 3, 32, 32)"
    )
    LSQQuantizer(model, bits_weights=8).prepare_model()  # runs nothing
