"""Which layer gets which bits, and replacing layers."""

from __future__ import annotations

import warnings
from collections import OrderedDict

import pytest
import torch
from torch import nn

from distiller.errors import QuantizationError, UnknownNameError
from distiller.quantization.quantizer import QBits, Quantizer, leaf_modules, rebuild_quantized


class Marked(nn.Module):
    def __init__(self, layer: nn.Module, name: str, bits: QBits, **overrides) -> None:
        super().__init__()
        self.layer, self.name, self.bits, self.overrides = layer, name, bits, overrides


class MarkingQuantizer(Quantizer):
    """Replaces convolutions and linear layers by `Marked`."""

    def __init__(self, model: nn.Module, **kwargs) -> None:
        super().__init__(model, **kwargs)
        self.kwargs = kwargs
        self.replacement_factory = {nn.Conv2d: Marked, nn.Linear: Marked}

    def quantize_params(self) -> None:
        pass

    def settings(self) -> dict:
        return self.kwargs


class Net(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.conv1 = nn.Conv2d(3, 4, 3)
        self.relu = nn.ReLU()
        self.layer1 = nn.Sequential(nn.Conv2d(4, 4, 3), nn.ReLU(), nn.Conv2d(4, 4, 1))
        self.empty = nn.Sequential()
        self.fc = nn.Linear(4, 2)


@pytest.fixture
def net() -> Net:
    return Net()


def bits_of(net: nn.Module, overrides, **kwargs) -> dict[str, QBits]:
    quantizer = MarkingQuantizer(
        net, bits_activations=8, bits_weights=6, bits_bias=32, overrides=overrides, **kwargs
    )
    return quantizer.module_qbits_map


def test_weights_and_bias_have_bits_only_where_there_are_some(net) -> None:
    assert bits_of(net, None) == {
        "conv1": QBits(8, 6, 32),
        "relu": QBits(8, None, None),
        "layer1.0": QBits(8, 6, 32),
        "layer1.1": QBits(8, None, None),
        "layer1.2": QBits(8, 6, 32),
        "fc": QBits(8, 6, 32),
    }


def test_exact_name_wins_over_an_earlier_pattern(net) -> None:
    overrides = {"layer1.*": {"bits_weights": 4}, "layer1.0": {"bits_weights": 2}}
    bits = bits_of(net, overrides)
    assert (bits["layer1.0"].wts, bits["layer1.2"].wts) == (2, 4)


def test_first_matching_pattern_wins(net) -> None:
    bits = bits_of(net, {r"layer1\.[02]": {"bits_weights": 4}, "layer1.*": {"bits_weights": 3}})
    assert bits["layer1.2"].wts == 4


def test_patterns_match_whole_names(net) -> None:
    bits = bits_of(net, {"conv.": {"bits_weights": 4}})
    assert [name for name, b in bits.items() if b.wts == 4] == ["conv1"]


def test_groups_in_patterns_do_no_harm(net) -> None:
    """DEFECT in Distiller: parentheses shifted the index of the pattern that matched."""
    bits = bits_of(net, {r"(l)(a)yer1\.(0|1)": {"bits_weights": 4}, "(f)c": {"bits_weights": 3}})
    assert (bits["layer1.0"].wts, bits["fc"].wts) == (4, 3)


@pytest.mark.parametrize("key", ["module.conv1", r"module\.conv1", "module.conv[1]"])
def test_names_and_patterns_may_start_with_module(net, key) -> None:
    assert bits_of(net, {key: {"bits_weights": 4}})["conv1"].wts == 4


def test_a_parallel_model_has_the_names_of_the_model_inside(net) -> None:
    assert bits_of(nn.DataParallel(net), {"conv1": {"bits_weights": 4}})["conv1"].wts == 4


@pytest.mark.parametrize("off", [0, None])
def test_bits_can_be_switched_off_for_a_layer(net, off) -> None:
    assert bits_of(net, {"fc": {"bits_activations": off, "bits_weights": off}})["fc"] == QBits(None, None, 32)


def test_an_ordered_dict_is_as_good_as_a_dict(net) -> None:
    assert bits_of(net, OrderedDict(fc=OrderedDict(bits_weights=4)))["fc"].wts == 4


def test_other_keys_are_left_to_the_subclass(net) -> None:
    quantizer = MarkingQuantizer(net, overrides={"conv1": {"bits_weights": 4, "flavour": "sweet"}})
    assert quantizer.module_overrides_map["conv1"] == {"flavour": "sweet"}
    assert quantizer.module_overrides_map["fc"] == {}


@pytest.mark.parametrize(
    ("overrides", "kind", "text"),
    [
        (
            {"conv2": {}, "fx": {}},
            UnknownNameError,
            "overrides: 'conv2' matches no layer of the model; did you mean 'conv1'?\n"
            "overrides: 'fx' matches no layer of the model",
        ),
        (
            {"layer1": {}},
            UnknownNameError,
            "overrides: 'layer1' matches no layer, only what contains layers ('layer1'); "
            "write 'layer1\\..*' for all layers in it",
        ),
        (
            {"conv(": {}},
            QuantizationError,
            "overrides: 'conv(' is neither a layer's name nor a regular expression: "
            "missing ), unterminated subpattern at position 4",
        ),
        (
            {"conv1": {"wts": 4}},
            QuantizationError,
            "overrides['conv1']: key 'wts' is called 'bits_weights' now",
        ),
        (
            {"conv1": {"bits_weights": 33}},
            QuantizationError,
            "conv1: bits_weights: must be 2 to 16 bits, or 0 or null for none, got 33",
        ),
        (
            {"conv1": {"bits_bias": 1}},
            QuantizationError,
            "conv1: bits_bias: must be 2 to 64 bits, or 0 or null, got 1",
        ),
        (
            {"conv1": {}, "module.conv1": {}},
            QuantizationError,
            "overrides: 'conv1' and 'module.conv1' are the same layer; give one",
        ),
        ({"conv1": 4}, QuantizationError, "overrides['conv1']: must be a mapping of settings, got 4"),
        (["conv1"], QuantizationError, "overrides: must map layer names or patterns to settings, got list"),
    ],
)
def test_wrong_overrides_are_refused(net, overrides, kind, text) -> None:
    with pytest.raises(kind) as error:
        MarkingQuantizer(net, overrides=overrides)
    assert str(error.value) == text


def test_unmatched_overrides_are_told_apart_for_the_schedules_reader(net) -> None:
    with pytest.raises(UnknownNameError) as error:
        MarkingQuantizer(net, overrides={"conv2": {}, "conv1": {}, "fx": {}})
    assert list(error.value.faults) == ["conv2", "fx"]


def test_layers_are_replaced_with_their_settings(net) -> None:
    conv = net.conv1
    quantizer = MarkingQuantizer(net, bits_weights=4, overrides={"conv1": {"flavour": "sweet"}})
    quantizer.prepare_model()
    assert isinstance(net.conv1, Marked)
    assert (net.conv1.layer, net.conv1.name, net.conv1.bits) == (conv, "conv1", QBits(None, 4, None))
    assert net.conv1.overrides == {"flavour": "sweet"}
    assert isinstance(net.layer1[2], Marked)
    assert isinstance(net.relu, nn.ReLU)
    assert quantizer.modules_processed[conv] == ("conv1", net.conv1)


def test_subclasses_of_a_layer_are_replaced_like_it(net) -> None:
    class SpecialConv(nn.Conv2d):
        pass

    net.conv1 = SpecialConv(3, 4, 3)
    MarkingQuantizer(net).prepare_model()
    assert isinstance(net.conv1, Marked)


def test_layers_inside_a_parallel_part_are_replaced(net) -> None:
    net.layer1 = nn.DataParallel(net.layer1)
    MarkingQuantizer(net).prepare_model()
    assert isinstance(net.layer1.module[0], Marked)


def test_a_model_is_prepared_once(net) -> None:
    quantizer = MarkingQuantizer(net)
    quantizer.prepare_model()
    with pytest.raises(QuantizationError) as error:
        quantizer.prepare_model()
    assert str(error.value) == "prepare_model: the model is prepared already; a quantizer does it once"


def test_a_shared_layer_is_replaced_once_with_a_warning(net) -> None:
    net.layer1.append(net.layer1[0])
    with pytest.warns(UserWarning, match=r"^Module 'layer1\.3' references to same module as 'layer1\.0'\.$"):
        MarkingQuantizer(net).prepare_model()
    assert net.layer1[3] is net.layer1[0]


def test_blacklisted_layers_stay(net) -> None:
    quantizer = MarkingQuantizer(net)
    quantizer.replacement_blacklist = (nn.Linear,)
    quantizer.prepare_model()
    assert isinstance(net.fc, nn.Linear)


def test_default_replacement_is_for_all_other_layers(net) -> None:
    quantizer = MarkingQuantizer(net)
    quantizer.default_replacement_fn = lambda module, name, bits, **overrides: nn.Identity()
    quantizer.prepare_model()
    assert isinstance(net.relu, nn.Identity)


def test_attention_counts_as_one_layer() -> None:
    model = nn.Sequential(nn.MultiheadAttention(4, 2), nn.TransformerEncoderLayer(4, 2), nn.Linear(4, 4))
    assert list(leaf_modules(model)) == ["0", "1", "2"]


def test_metadata_describe_how_the_model_was_prepared(net) -> None:
    quantizer = MarkingQuantizer(net, bits_weights=4)
    with pytest.raises(QuantizationError, match="^quantizer_metadata: call prepare_model first$"):
        quantizer.quantizer_metadata()
    quantizer.prepare_model((torch.zeros(2, 3), (torch.zeros(4, dtype=torch.int64), torch.zeros(()))))
    expected = {
        "class": "MarkingQuantizer",
        "params": {"bits_weights": 4},
        "input_shape": ((2, 3), ((4,), ())),
        "input_dtype": (None, ("int64", None)),
    }
    assert quantizer.quantizer_metadata() == expected == net.quantizer_metadata


@pytest.mark.parametrize(
    ("changes", "text"),
    [
        ({"input_shape": 3}, "quantizer_metadata.input_shape: is malformed, got 3"),
        ({"input_shape": ("a",)}, "quantizer_metadata.input_shape: must be a tuple of sizes, got ('a',)"),
        ({"input_dtype": 3}, "quantizer_metadata.input_dtype: is malformed, got 3"),
        ({"input_dtype": "int65"}, "quantizer_metadata.input_dtype: must be a type of numbers, got 'int65'"),
        (
            {"input_shape": ((1,), (2,)), "input_dtype": ("int64",)},
            "quantizer_metadata.input_dtype: must fit ((1,), (2,)), got ('int64',)",
        ),
        ({"functional_modules": 1}, "quantizer_metadata.functional_modules: is malformed, got 1"),
    ],
)
def test_malformed_metadata_are_refused(net, changes, text) -> None:
    metadata = {"class": "PostTrainLinearQuantizer", "params": {}, "input_shape": (1, 3, 8, 8), **changes}
    with pytest.raises(QuantizationError) as error:
        rebuild_quantized(net, metadata)
    assert str(error.value) == text


def test_metadata_of_something_else_are_refused(net) -> None:
    with pytest.raises(QuantizationError) as error:
        rebuild_quantized(net, {"class": "PostTrainLinearQuantizer"})
    assert str(error.value) == "quantizer_metadata: has no 'params'; it is not of this library"


def test_no_warning_without_a_reason(net) -> None:
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        MarkingQuantizer(net).prepare_model()


def test_a_model_that_is_a_single_layer_is_refused() -> None:
    with pytest.raises(QuantizationError) as caught:
        MarkingQuantizer(nn.Linear(2, 2), bits_weights=4)
    assert str(caught.value) == (
        "the model is a single Linear without submodules; quantizers replace submodules: "
        "put it into an nn.Sequential"
    )
