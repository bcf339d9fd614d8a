"""Operations in forwards: quantized as modules, or left and told of."""

from __future__ import annotations

import copy
import warnings
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torchvision.models.vision_transformer import VisionTransformer

from distiller.errors import UnknownNameError
from distiller.functional_modules import to_modules
from distiller.quantization.functional_operations import is_converted, without_statistics
from distiller.quantization.quantizer import rebuild_quantized
from tests.quantization.networks import ASYMMETRIC, quantized, signal_to_noise

X = torch.randn(4, 3, 8, 8, generator=torch.Generator().manual_seed(12))


class Net(nn.Module):
    """conv-relu-pool, a residual convolution, mean, fc."""

    def __init__(self) -> None:
        super().__init__()
        self.conv1, self.conv2 = nn.Conv2d(3, 6, 3, padding=1), nn.Conv2d(6, 6, 3, padding=1)
        self.fc = nn.Linear(6, 4)

    def forward(self, x: Tensor) -> Tensor:
        x = F.max_pool2d(F.relu(self.conv1(x)), 2)
        x = F.relu(self.conv2(x) + x)
        return F.log_softmax(self.fc(x.mean((2, 3))), dim=1)


@pytest.fixture
def net() -> nn.Module:
    return Net().eval()


@pytest.fixture
def converted(net) -> nn.Module:
    twin = copy.deepcopy(net)
    to_modules(twin, X[:1])
    return twin


def test_statistics_of_the_modules_make_modules_and_quantize_them(net, converted, stats_of) -> None:
    stats = stats_of(converted, X)
    model = quantized(net, stats, X[:1], mode=ASYMMETRIC)
    assert is_converted(model)
    assert not is_converted(net)
    assert type(model.add).__name__ == "RangeLinearQuantEltwiseAddWrapper"
    assert isinstance(model.relu, nn.Identity)
    assert model.conv2.input_grids[0] is model.conv1.output_quant
    assert model.add.input_grids == {0: model.conv2.output_quant, 1: model.conv1.output_quant}
    same = quantized(converted, stats, X[:1], mode=ASYMMETRIC)
    with torch.no_grad():
        assert torch.equal(same(X), model(X))
    assert signal_to_noise(net, model, X) > 25


def test_overrides_reach_operations_that_statistics_name(net, converted, stats_of) -> None:
    overrides = {"add": {"bits_activations": 4}, "conv.*|mean": {"clip_acts": "AVG"}}
    model = quantized(net, stats_of(converted, X), X[:1], mode=ASYMMETRIC, overrides=overrides)
    assert model.add.output_quant_settings.num_bits == 4
    assert model.mean.output_quant_settings.clip_mode.name == "AVG"
    with pytest.raises(UnknownNameError, match="^overrides: 'add' matches no layer of the model"):
        quantized(net, stats_of(net, X), X[:1], overrides={"add": {}})


def test_statistics_of_the_layers_alone_quantize_these_as_ever_and_tell_of_the_rest(net, stats_of) -> None:
    with pytest.warns(UserWarning, match="stay in floating point") as warned:
        model = quantized(net, stats_of(net, X), X[:1], mode=ASYMMETRIC)
    assert [str(warning.message) for warning in warned] == [
        "operations stay in floating point ('Add', 'ReduceMean'): make modules of them with "
        "distiller.functional_modules.to_modules(model, dummy_input), and collect statistics then"
    ]
    assert not is_converted(model)
    assert model.conv1.output_quant.zero_point.item() == 0  # narrowed to what the ReLU reads
    assert model.conv2.input_grids[0] is model.conv1.output_quant


def test_old_statistics_of_a_model_with_modules_quantize_the_layers_as_before(
    net, converted, stats_of
) -> None:
    stats = stats_of(net, X)
    with pytest.warns(UserWarning, match="stay in floating point"):
        before = quantized(net, stats, X[:1], mode=ASYMMETRIC)
    with pytest.warns(UserWarning, match="stay in floating point") as warned:
        model = quantized(converted, stats, X[:1], mode=ASYMMETRIC)
    assert [str(warning.message) for warning in warned] == [
        "operations stay in floating point ('add', 'mean'): collect the statistics of the model as it is now, "
        "with modules for them"
    ]
    with torch.no_grad():
        assert torch.equal(model(X), before(X))
    assert without_statistics(converted, stats) == {
        "relu",
        "max_pool2d",
        "add",
        "relu_1",
        "mean",
        "log_softmax",
    }


def test_dynamic_ranges_make_modules(net) -> None:
    with pytest.warns(UserWarning, match="^not quantized, since without statistics .*: 'add'$"):
        model = quantized(net, None, X[:1], mode=ASYMMETRIC)
    assert type(model.mean).__name__ == "RangeLinearFakeQuantWrapper"
    assert signal_to_noise(net, model, X) > 25


@pytest.mark.parametrize("settings", [{"bits_activations": None}, {"fpq_module": 16}])
def test_without_quantized_activations_nothing_is_converted_and_nothing_told(net, settings) -> None:
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        model = quantized(net, None, X[:1], **settings)
    assert not is_converted(model)


def test_operations_behind_the_last_layer_are_no_loss(stats_of) -> None:
    class Classifier(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.fc = nn.Linear(5, 3)

        def forward(self, x: Tensor) -> Tensor:
            return F.log_softmax(self.fc(x.flatten(1)[:, :5]) * 2, dim=1)

    plain = Classifier().eval()
    model = quantized(plain, stats_of(plain, X), X[:1])  # no warning
    assert not is_converted(model)


def vision_transformer() -> Any:
    model: Any = VisionTransformer(8, 4, 2, 2, 8, 16, num_classes=5)
    nn.init.normal_(model.heads.head.weight)
    return model.eval()


@pytest.mark.parametrize("is_dynamic", [False, True])
@pytest.mark.filterwarnings("ignore:not quantized")
def test_attention_is_quantized_piece_by_piece_and_reloads(stats_of, is_dynamic) -> None:
    plain = vision_transformer()
    twin = copy.deepcopy(plain)
    to_modules(twin, X[:1])
    stats = None if is_dynamic else stats_of(twin, X)
    model = quantized(plain, stats, X[:1], mode=ASYMMETRIC, per_channel_wts=True)
    wrappers = {type(wrapper).__name__ for _, wrapper in model.quantizer.modules_processed.values()}
    assert {"RangeLinearQuantParamLayerWrapper", "RangeLinearQuantMatmulWrapper"} <= wrappers
    assert signal_to_noise(plain, model, X) > 12
    other = vision_transformer()
    rebuild_quantized(other, model.quantizer_metadata)
    other.load_state_dict(model.state_dict())
    with torch.no_grad():
        assert torch.equal(other(X), model(X))


def test_weights_only_of_a_converted_model_reload_into_a_plain_one() -> None:
    plain = vision_transformer()
    to_modules(plain, X[:1])
    model = quantized(plain, None, X[:1], bits_activations=None, bits_parameters=4)
    assert model.quantizer_metadata["functional_modules"]
    other = vision_transformer()
    rebuild_quantized(other, model.quantizer_metadata)
    other.load_state_dict(model.state_dict())
    with torch.no_grad():
        assert torch.equal(other(X), model(X))


def test_attention_that_is_in_one_piece_stays_with_the_remedy(stats_of) -> None:
    plain = vision_transformer()
    with pytest.warns(
        UserWarning, match="not quantized, since they are quantized piece by piece, after to_modules"
    ):
        quantized(plain, None, X[:1], bits_activations=None)
