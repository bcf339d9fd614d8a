"""What DoReFa, PACT, WRPN, binary and ternary quantizers have in common."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from distiller.config import file_config
from distiller.errors import QuantizationError
from distiller.models.create import create_model
from distiller.names import named_parameters
from distiller.quantization.quantizer import rebuild_quantized
from distiller.quantization.training.binary import BinaryQuantizer
from distiller.quantization.training.deploy import folded_copy
from distiller.quantization.training.dorefa import DorefaQuantizer
from distiller.quantization.training.pact import PACTQuantizer
from distiller.quantization.training.range_linear import QuantAwareTrainRangeLinearQuantizer
from distiller.quantization.training.ternary import TernaryQuantizer
from distiller.quantization.training.wrpn import WRPNQuantizer
from distiller.registry import QUANTIZERS
from tests.quantization.training.low_bit_networks import (
    BINARY_ENDS,
    ENDS,
    LowBitNet,
    low_bit_net,
    outputs,
    sgd,
    stripes,
    train,
)

CASES: dict[str, tuple[type, dict[str, Any]]] = {
    "DoReFa W3A4": (DorefaQuantizer, {"bits_weights": 3, "bits_activations": 4}),
    "DoReFa W1A1": (DorefaQuantizer, {"bits_weights": 1, "bits_activations": 1}),
    "PACT W3A4": (
        PACTQuantizer,
        {"bits_weights": 3, "bits_activations": 4, "act_clip_init_val": 2.0, "act_clip_decay": 0.001},
    ),
    "WRPN W4A4, bias of 8 bits": (WRPNQuantizer, {"bits_weights": 4, "bits_activations": 4, "bits_bias": 8}),
    "binary weights": (BinaryQuantizer, {}),
    "binary": (BinaryQuantizer, {"bits_activations": 1}),
    "binary with K": (
        BinaryQuantizer,
        {"bits_activations": 1, "activation_scale": True, "clip_gradients": True, "per_channel_wts": False},
    ),
    "TWN": (TernaryQuantizer, {}),
    "TTQ": (TernaryQuantizer, {"learned_scales": True}),
    "TTQ per channel": (TernaryQuantizer, {"learned_scales": True, "per_channel_wts": True}),
}


def overrides_of(settings: dict[str, Any]) -> dict[str, Any]:
    return BINARY_ENDS if settings.get("bits_activations") == 1 and "bits_weights" not in settings else ENDS


def prepared(case: str, model: LowBitNet | None = None, optimizer: Any = None) -> tuple[LowBitNet, Any]:
    kind, settings = CASES[case]
    model = low_bit_net() if model is None else model
    quantizer = kind(model, optimizer, overrides=overrides_of(settings), **settings)
    quantizer.prepare_model()
    return model, quantizer


@pytest.fixture(params=sorted(CASES))
def case(request) -> str:
    return request.param


def test_is_registered(case):
    kind, _ = CASES[case]
    assert QUANTIZERS.look_up(kind.__name__) is kind


def test_learns(case):
    torch.manual_seed(1)
    model = low_bit_net()
    optimizer = sgd(model)
    prepared(case, model, optimizer)
    assert train(model, optimizer, 50) < 0.3  # chance is 1.39
    assert (outputs(model).argmax(1) == stripes()[1]).float().mean() > 0.9


def test_parameters_keep_their_names_and_the_optimizer_its_objects(case):
    model = low_bit_net()
    optimizer = sgd(model)
    before = {name: id(parameter) for name, parameter in named_parameters(model)}
    prepared(case, model, optimizer)
    after = {name: id(parameter) for name, parameter in named_parameters(model)}
    assert before.items() <= after.items()
    in_optimizer = [id(parameter) for group in optimizer.param_groups for parameter in group["params"]]
    assert sorted(in_optimizer) == sorted(after.values())


def test_layers_that_are_overridden_are_left_alone(case):
    model, _ = prepared(case)
    assert type(model.first) is nn.Conv2d
    assert type(model.fc) is nn.Linear


def test_copies_and_rebuilt_models_compute_the_same(case):
    model, quantizer = prepared(case)
    train(model, sgd(model), 2)
    expected = outputs(model)
    assert torch.equal(outputs(copy.deepcopy(model)), expected)
    twin = LowBitNet()
    rebuild_quantized(twin, quantizer.quantizer_metadata())
    twin.load_state_dict(model.state_dict())
    assert torch.equal(outputs(twin), expected)


def test_a_resumed_training_is_bit_equal(case):
    model = low_bit_net()
    optimizer = sgd(model)
    prepared(case, model, optimizer)
    train(model, optimizer, 3)
    state, optimizer_state = copy.deepcopy(model.state_dict()), copy.deepcopy(optimizer.state_dict())
    train(model, optimizer, 3)

    twin = LowBitNet()
    twin_optimizer = sgd(twin)
    prepared(case, twin, twin_optimizer)
    twin.load_state_dict(state)
    twin_optimizer.load_state_dict(optimizer_state)
    train(twin, twin_optimizer, 3)
    assert all(torch.equal(a, b) for a, b in zip(model.parameters(), twin.parameters(), strict=True))
    assert torch.equal(outputs(twin), outputs(model))


def test_a_prepared_model_is_adopted(case):
    model, quantizer = prepared(case)
    expected = outputs(model)
    optimizer = sgd(model)
    adopting = type(quantizer)(model, optimizer, **quantizer.settings())
    adopting.prepare_model()
    assert torch.equal(outputs(model), expected)
    learned = {id(parameter) for parameter in adopting.learned_parameters().values()}
    assert learned == {id(p) for group in optimizer.param_groups[1:] for p in group["params"]}


def test_pruned_weights_are_zero_in_training_and_after(case):
    model = low_bit_net()
    optimizer = sgd(model)
    prepared(case, model, optimizer)
    originals = {name: p for name, p in named_parameters(model) if name in ("conv2.weight", "conv3.weight")}
    masks = {name: (torch.rand_like(p) > 0.5).float() for name, p in originals.items()}
    for _ in range(3):
        for name, parameter in originals.items():
            parameter.data.mul_(masks[name])
            quantized = model.get_submodule(name.removesuffix(".weight")).weight
            assert torch.equal(quantized[masks[name] == 0], torch.zeros(int((masks[name] == 0).sum())))
        train(model, optimizer, 1)


def test_exported_programs_compute_the_same(case):
    model, _ = prepared(case)
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
    assert all(p.grad is not None and p.grad.isfinite().all() for p in model.parameters())


def test_a_deployed_copy_computes_the_same_where_there_are_integers(case):
    model, _ = prepared(case)
    train(model, sgd(model), 2)
    if case in ("binary", "binary with K", "TTQ", "TTQ per channel"):
        with pytest.raises(QuantizationError, match="no integers"):
            folded_copy(model)
    else:
        deployed = folded_copy(model)
        assert sorted(deployed.weights) == ["conv2", "conv3"]
        assert torch.allclose(outputs(deployed.model), outputs(model), atol=1e-3)


COMPAT_SCHEDULES = {
    "alexnet_bn_dorefa": ("alexnet_bn", "imagenet", DorefaQuantizer),
    "preact_resnet20_cifar_pact": ("preact_resnet20_cifar", "cifar10", PACTQuantizer),
    "quant_aware_train_linear_quant": ("resnet18", "imagenet", QuantAwareTrainRangeLinearQuantizer),
}


@pytest.mark.parametrize("schedule", sorted(COMPAT_SCHEDULES))
def test_distillers_schedules_prepare_their_models(compat, schedule):
    arch, dataset, kind = COMPAT_SCHEDULES[schedule]
    with torch.device("meta"):  # alexnet_bn is large, and no value matters
        model = create_model(False, dataset, arch, parallel=False)
    path = compat / "schedules" / "quantization" / "quant_aware_train" / f"{schedule}.yaml"
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    file_config(model, optimizer, str(path))
    assert model.quantizer_metadata["class"] == kind.__name__
    roles = {getattr(module, "quantizes", None) for module in model.modules()}
    assert {"weight", "activation"} <= roles


def test_the_dorefa_schedule_leaves_the_ends_of_alexnet_alone(compat):
    with torch.device("meta"):
        model: Any = create_model(False, "imagenet", "alexnet_bn", parallel=False)
    path = compat / "schedules" / "quantization" / "quant_aware_train" / "alexnet_bn_dorefa.yaml"
    file_config(model, torch.optim.SGD(model.parameters(), lr=0.1), str(path))
    kinds = {name: type(module).__name__ for name, module in model.named_modules()}
    assert (kinds["features.0"], kinds["features.1"]) == ("Conv2d", "ReLU")
    assert (kinds["features.2"], kinds["features.5"]) == ("ParametrizedConv2d", "ClippedLinearQuantization")
    assert (kinds["classifier.5"], kinds["classifier.6"]) == ("ReLU", "Linear")
    assert model.features[5].num_bits == 8
    assert model.features[2].parametrizations.weight[0].num_bits == 4
