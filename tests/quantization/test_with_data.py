"""The steps one after the other, on a small network that has learned the digits."""

import copy
import io

import pytest
import torch
from sklearn.datasets import load_digits
from torch import nn
from torch.nn import functional as F

from distiller.data_loggers.quant_stats import collect_quant_stats
from distiller.errors import QuantizationError
from distiller.quantization import PostTrainLinearQuantizer, rebuild_quantized
from distiller.quantization.data_steps import DataSteps
from distiller.quantization.rounding_state import read_rounding
from distiller.quantization.with_data import check_steps, quantize_with_data

IMAGES, LABELS = (torch.tensor(values) for values in load_digits(return_X_y=True))
IMAGES, LABELS = (IMAGES.float().reshape(-1, 1, 8, 8) / 16)[:512], LABELS[:512]
DUMMY = IMAGES[:1]
FEW_BITS = {"bits_activations": 8, "bits_parameters": 2, "mode": "ASYMMETRIC_UNSIGNED"}


def loss(model):
    with torch.no_grad():
        return float(F.cross_entropy(model(IMAGES), LABELS))


class Residual(nn.Module):
    """Adds by itself: a functional operation."""

    def __init__(self):
        super().__init__()
        self.conv1, self.bn1 = nn.Conv2d(1, 8, 3, padding=1), nn.BatchNorm2d(8)
        self.conv2, self.bn2 = nn.Conv2d(8, 8, 3, padding=1, groups=8), nn.BatchNorm2d(8)
        self.relu1, self.relu2 = nn.ReLU(), nn.ReLU()
        self.pool, self.fc = nn.MaxPool2d(2), nn.Linear(128, 10)

    def forward(self, x):
        x = self.relu1(self.bn1(self.conv1(x)))
        return self.fc(self.pool(self.relu2(x + self.bn2(self.conv2(x)))).flatten(1))


@pytest.fixture(scope="module")
def trained():
    torch.manual_seed(0)
    model = Residual()
    optimizer = torch.optim.Adam(model.parameters(), 0.01)
    for _ in range(40):
        optimizer.zero_grad()
        F.cross_entropy(model(IMAGES), LABELS).backward()
        optimizer.step()
    return model.eval()


def quantized(trained, plain=None, settings=FEW_BITS, **keywords):
    quantizer = PostTrainLinearQuantizer(copy.deepcopy(trained), **settings)
    batches = [IMAGES[:256], IMAGES[256:]]
    return quantize_with_data(quantizer, DataSteps.from_plain(plain), DUMMY, batches, loss, **keywords)


def test_without_steps_it_collects_statistics_of_functional_operations_too_and_quantizes(trained):
    result = quantized(trained)
    assert "add" in result.stats
    assert result.reports == {}
    assert result.quantizer.is_prepared
    assert loss(result.float_model) == pytest.approx(loss(trained), rel=1e-4)


@pytest.mark.parametrize(
    "plain",
    [
        {"adaround": {"iterations": 150, "samples": 512}},
        {"lapq": {"init_mode": "L2", "maxfev": 30}},
        {"clip_search": True},
        {
            "cross_layer_equalization": True,
            "adaround": {"iterations": 100, "samples": 512},
            "bias_correction": True,
        },
    ],
    ids=lambda plain: "+".join(plain),
)
def test_each_step_makes_few_bits_better_and_tells_what_it_did(trained, plain):
    lines = []
    result = quantized(trained, plain, progress=lines.append)
    assert tuple(result.reports) == DataSteps.from_plain(plain).names
    assert loss(result.quantizer.model) <= loss(quantized(trained).quantizer.model)
    assert lines


def test_scales_of_least_squared_error_are_chosen_for_each_weight(trained):
    rescaled = quantized(trained, {"mse_weight_scales": True}).reports["mse_weight_scales"]
    assert {layer.name for layer in rescaled} == {"conv1", "conv2", "fc"}
    assert all(layer.error_after < layer.error_before for layer in rescaled)


def test_mixed_precision_keeps_within_the_budget(trained):
    result = quantized(trained, {"mixed_precision": {"average_bits": 4.5, "weight_widths": [2, 4, 8]}})
    [point] = result.reports["mixed_precision"].points
    weights = {
        name: layer.weight.numel() for name, layer in trained.named_children() if name in point.weights
    }
    assert point.cost <= sum(weights.values()) * 4.5 / 8
    assert set(point.weights) == {"conv1", "conv2", "fc"}
    widths = {name: result.quantizer.module_qbits_map[name].wts for name in point.weights}
    assert widths == point.weights


def test_a_killed_run_goes_on_where_it_was(trained, tmp_path):
    plain = {"adaround": {"iterations": 60, "samples": 256}}

    class Killed(Exception):
        pass

    def stop(line):
        if "[2/" in line:
            raise Killed

    with pytest.raises(Killed):
        quantized(trained, plain, folder=tmp_path, progress=stop)
    lines = []
    resumed = quantized(trained, plain, folder=tmp_path, progress=lines.append)
    whole = quantized(trained, plain)
    for ours, theirs in zip(
        resumed.quantizer.model.state_dict().values(),
        whole.quantizer.model.state_dict().values(),
        strict=True,
    ):
        assert torch.equal(ours, theirs)
    assert not any("[1/" in line for line in lines)


def test_statistics_of_before_are_refused_with_equalization(trained):
    stats = quantized(trained).stats
    with pytest.raises(
        QuantizationError, match="^cross_layer_equalization: changes the ranges that model_act"
    ):
        quantized(trained, {"cross_layer_equalization": True}, {**FEW_BITS, "model_activation_stats": stats})


@pytest.mark.parametrize(
    ("plain", "text"),
    [
        ({"adaround": {"iterations": 0}}, "^adaround: .*iterations must be a whole number"),
        ({"lapq": {"method": "Powel"}}, "^lapq: ptq_coordinate_search: method.*did you mean 'Powell'"),
        (
            {"mixed_precision": {"average_bits": 1}},
            "^mixed_precision: average_bits: must be a number from 2 to 16",
        ),
    ],
)
def test_wrong_settings_of_steps_name_the_step(trained, plain, text):
    with pytest.raises(QuantizationError, match=text):
        quantized(trained, plain)


def test_a_prepared_quantizer_is_refused(trained):
    quantizer = quantized(trained).quantizer
    with pytest.raises(QuantizationError, match="the model is prepared already"):
        quantize_with_data(quantizer, DataSteps(), DUMMY, [IMAGES], loss)


def test_statistics_are_collected_as_it_is_told_to(trained):
    collected = []

    def collect(model):
        collected.append(collect_quant_stats(model, lambda model: model(IMAGES), passes=1))
        return collected[0]

    result = quantized(trained, {"bias_correction": True}, collect=collect)
    assert len(collected) == 1
    assert result.stats is collected[0]


def test_steps_that_undo_each_other_are_refused(trained):
    with pytest.raises(
        QuantizationError, match="^mse_weight_scales: not with lapq, whose scales of weights it"
    ):
        quantized(trained, {"lapq": True, "mse_weight_scales": True})


def test_what_equalization_and_corrected_biases_made_is_rebuilt_from_the_description(trained):
    plain = {"cross_layer_equalization": {"absorb_bias": True}, "bias_correction": True}
    model = quantized(trained, plain).quantizer.model
    again = copy.deepcopy(trained)
    rebuild_quantized(again, model.quantizer_metadata)
    again.load_state_dict(model.state_dict())
    assert torch.equal(again.eval()(IMAGES), model(IMAGES))


@pytest.mark.parametrize(
    ("plain", "text"),
    [
        (
            {"mixed_precision": {"average_bits": None}},
            "average_bits: must be a number from 2 to 16, got None",
        ),
        ({"mixed_precision": {"weight_bytes": -1}}, "budgets: must be finite numbers > 0, got -1"),
        ({"mixed_precision": {"weight_bytes": 9, "metric": "los"}}, "metric: must be one of"),
        ({"clip_search": {"clip_modes": []}}, "clip_modes: must be a list of some of"),
        ({"cross_layer_equalization": {"absorb_bias": 1}}, "absorb_bias: must be true or false, got 1"),
    ],
)
def test_settings_are_checked_before_a_model_is_looked_at(plain, text):
    with pytest.raises(QuantizationError, match=text):
        check_steps(DataSteps.from_plain(plain))


ADAROUND = {"adaround": {"iterations": 20, "samples": 64}}


def refused(trained, plain, folder, settings=FEW_BITS):
    with pytest.raises(QuantizationError) as error:
        quantized(trained, plain, settings, folder=folder)
    return str(error.value).replace(str(folder), "FOLDER")


@pytest.fixture(scope="module")
def rounded(trained, tmp_path_factory):
    """A folder with the state of learned rounding."""
    folder = tmp_path_factory.mktemp("rounded")
    quantized(trained, ADAROUND, folder=folder)
    return folder


@pytest.mark.parametrize(
    ("iterations", "changes", "told"),
    [
        (21, {}, "'adaround.iterations' is 20 there, 21 here"),
        (20, {"bits_parameters": 3}, "'quantized_model' is "),
        (20, {"bits_accum": 31}, "'quantizer.bits_accum' is 32 there, 31 here"),
    ],
)
def test_learned_rounding_of_other_settings_is_refused(trained, rounded, iterations, changes, told):
    plain = {"adaround": {**ADAROUND["adaround"], "iterations": iterations}}
    text = refused(trained, plain, rounded, {**FEW_BITS, **changes})
    assert text.startswith("FOLDER/adaround.pt: is of another AdaRound, '")
    assert told.removesuffix(" is ") in text
    assert text.endswith("; give another folder, or remove this file to begin anew")


def test_learned_rounding_of_another_model_or_other_data_is_refused(trained, rounded):
    other = copy.deepcopy(trained)
    with torch.no_grad():
        other.fc.weight[0, 0] += 1
    assert "is of another AdaRound, 'model' is " in refused(other, ADAROUND, rounded)
    quantizer = PostTrainLinearQuantizer(copy.deepcopy(trained), **FEW_BITS)
    with pytest.raises(QuantizationError, match=r"is of another AdaRound, '(quantized_model|shapes)' is "):
        quantize_with_data(
            quantizer, DataSteps.from_plain(ADAROUND), DUMMY, [IMAGES[:64]], loss, folder=rounded
        )


def _saved(content):
    buffer = io.BytesIO()
    torch.save(content, buffer)
    return buffer.getvalue()


@pytest.mark.parametrize(
    ("content", "told"),
    [
        (b"nonsense", "is damaged, or no state of AdaRound"),
        (b"", "is damaged, or no state of AdaRound"),
        (_saved({"a": torch.ones(99)})[:-60], "is damaged, or no state of AdaRound"),
        (_saved([1]), "is no state of AdaRound"),
        (_saved({"settings": {}, "layers": {}}), "is no state of AdaRound"),
        (_saved({"identity": {}, "settings": {}, "layers": {"fc": 3}}), "is no state of AdaRound"),
    ],
    ids=["text", "empty", "truncated", "list", "without identity", "wrong layer"],
)
def test_a_file_that_is_no_state_of_learned_rounding_is_told_with_the_remedy(tmp_path, content, told):
    file = tmp_path / "adaround.pt"
    file.write_bytes(content)
    with pytest.raises(QuantizationError) as error:
        read_rounding(file)
    assert str(error.value) == f"{file}: {told}; give another folder, or remove this file to begin anew"


def test_a_damaged_state_is_told_of_where_it_lies(trained, tmp_path):
    (tmp_path / "adaround.pt").write_bytes(b"nonsense")
    assert refused(trained, ADAROUND, tmp_path).startswith("FOLDER/adaround.pt: is damaged")


def test_the_folder_of_states_is_made_with_its_parents(trained, tmp_path):
    quantized(trained, ADAROUND, folder=tmp_path / "a" / "b")
    assert (tmp_path / "a" / "b" / "adaround.pt").is_file()


def test_a_folder_that_cannot_be_made_is_told_before_anything_runs(trained, tmp_path):
    (tmp_path / "file").write_text("")

    def collect(model):
        raise AssertionError("too late")

    with pytest.raises(QuantizationError) as error:
        quantized(trained, ADAROUND, folder=tmp_path / "file" / "states", collect=collect)
    assert str(error.value) == (
        f"folder: '{tmp_path}/file/states' cannot be made, Not a directory; give a folder that can be written"
    )


@pytest.mark.parametrize(
    ("plain", "told"),
    [
        (
            {"average_bits": 2.5, "weight_widths": [4, 8]},
            "average_bits: 2.5 cannot be reached, the smallest widths are 4 on average",
        ),
        ({"weight_bytes": 100}, "weight_bytes: 100 cannot be reached, the smallest widths cost 356 bytes"),
        ({"bit_operations": 9}, "bit_operations: 9 cannot be reached, the smallest widths cost "),
    ],
)
def test_a_budget_that_cannot_be_reached_is_told_in_its_unit_before_statistics(trained, plain, told):
    def collect(model):
        raise AssertionError("too late")

    with pytest.raises(QuantizationError) as error:
        quantized(trained, {"mixed_precision": plain}, collect=collect)
    assert str(error.value).startswith(f"mixed_precision: {told}")


def test_an_average_is_that_of_the_weights_that_are_quantized(trained):
    """Those that overrides leave in floating point cost what they cost, and take nothing from the others."""
    settings = {**FEW_BITS, "overrides": {"fc": {"bits_weights": None, "bits_activations": None}}}
    lines = []
    result = quantized(trained, {"mixed_precision": {"average_bits": 3}}, settings, progress=lines.append)
    [point] = result.reports["mixed_precision"].points
    assert set(point.weights) == {"conv1", "conv2"}
    assert sum(point.weights.values()) <= 6
    assert any(line.startswith("mixed precision [1/12]: in floating point, loss ") for line in lines)
    assert any(": conv1 alone, weights of 2 bits, change of the loss " in line for line in lines)
    widths = next(line for line in lines if line.startswith("widths of weights: "))
    assert all(name in widths for name in point.weights)
    assert any("bytes of weights of " in line for line in lines)


def test_four_bits_on_average_are_more_than_four_everywhere(trained):
    """By default there are widths below: with 4, 6 and 8 an average of 4 would leave no choice."""
    result = quantized(trained, {"mixed_precision": {"average_bits": 4}})
    assert set(next(iter(result.reports["mixed_precision"].weight_sensitivities.values()))) == {2, 3, 4, 6, 8}


def test_chosen_clip_modes_and_what_equalization_did_are_told(trained):
    lines = []
    quantized(trained, {"clip_search": True}, progress=lines.append)
    [modes] = [line for line in lines if line.startswith("clip modes: ")]
    assert all(name in modes for name in ("conv1", "conv2", "fc"))
    lines = []
    plain = {"cross_layer_equalization": {"replace_relu6": True, "absorb_bias": True}}
    quantized(trained, plain, progress=lines.append)
    assert "replaced 0 ReLU6s by ReLUs" in lines
    assert any(line.startswith("absorbed high biases of 0 layers") for line in lines)
