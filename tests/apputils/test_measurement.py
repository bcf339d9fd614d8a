import json
from dataclasses import asdict, replace

import pytest
import torch
from torch import nn

from distiller.apputils.measurement import (
    Measurement,
    measure,
    measurement_of,
    read_measurement,
    with_latencies,
)
from distiller.apputils.meters import EvalResult
from distiller.apputils.results_card import ResultsCard
from distiller.errors import QuantizationError, UnknownNameError, UsageError
from tests.apputils.figures import DENSE, PRUNED


@pytest.fixture
def model():
    torch.manual_seed(0)
    model = nn.Sequential(nn.Conv2d(1, 4, 3, bias=False), nn.BatchNorm2d(4), nn.Flatten(), nn.Linear(16, 10))
    with torch.no_grad():
        model[0].weight[:2] = 0  # 18 of 36
        for tensor in (model[1].bias, model[1].running_mean, model[1].num_batches_tracked):
            tensor.fill_(1)
    return model


def measured_of(model, **settings) -> Measurement:
    return measure(model, EvalResult(0.5, 8, 10, 10), **settings)


# ------------------------------------------------------------------------ measuring


def test_counts_of_a_model_are_those_of_its_parameters(model):
    measured = measured_of(model, macs=1234)
    assert measured.parameters == 36 + 4 + 4 + 160 + 10
    assert measured.nonzeros == measured.parameters - 18
    assert measured.weight_sparsity == pytest.approx(18 / 196)
    assert measured.total_sparsity == pytest.approx(18 / 214)
    assert measured.macs == 1234


def test_structures_that_are_all_zero_are_those_of_convolutions():
    model = nn.Sequential(
        nn.Conv2d(3, 4, 3), nn.Conv2d(4, 4, 3, groups=4), nn.Conv1d(4, 5, 1), nn.Linear(5, 6)
    )
    with torch.no_grad():
        for param in model.parameters():
            param.fill_(1)
        model[0].weight[:2] = 0
        model[0].weight[:, 1] = 0
        model[0].weight[2, 0] = 0
        model[1].weight[3] = 0  # depthwise: a filter, and not its only channel
        model[2].weight[:, 1:] = 0
        model[3].weight[0] = 0
    measured = measured_of(model)
    assert (measured.filters, measured.zero_filters) == (4 + 4 + 5, 2 + 1)
    assert (measured.channels, measured.zero_channels) == (3 + 4, 1 + 3)


def test_figures_of_before_structures_were_counted_are_read():
    new = ("filters", "channels")
    plain = {key: value for key, value in asdict(PRUNED).items() if not key.endswith(new)}
    assert measurement_of(plain) == PRUNED


def test_sizes_of_a_model_are_those_of_its_state_dict(model):
    measured = measured_of(model)
    buffers = 4 + 4  # running mean and variance, float32
    assert measured.bytes_dense == 4 * (214 + buffers) + 8  # and the count of batches, int64
    assert measured.bytes_sparse == measured.bytes_dense - 4 * 36 + (5 + 4 * 18)  # conv as a bitmap
    assert measured.bytes_checkpoint > measured.bytes_dense
    assert measured.bytes_quantized is None


def test_quantized_size_takes_the_given_widths(model):
    measured = measured_of(model, bits_by_param={"0.weight": 8, "3.weight": 4}, per_channel=("3.weight",))
    assert measured.bytes_quantized == measured.bytes_dense - 4 * 196 + (36 + 5) + (80 + 10 * 5)


def test_quantized_weights_that_are_buffers_count_as_parameters(model):
    before = measure(model)
    weight = model[3].weight.detach()
    del model[3].weight
    model[3].register_buffer("weight", weight)
    after = measure(model, bits_by_param={"3.weight": 8})
    assert (after.parameters, after.nonzeros) == (before.parameters, before.nonzeros)
    assert after.weight_sparsity == before.weight_sparsity


def test_wrapped_model_is_measured_under_canonical_names(model):
    wrapped = nn.DataParallel(model)
    measured = measure(wrapped, bits_by_param={"3.weight": 8})
    assert measured.parameters == 214


def test_measuring_changes_neither_weights_nor_mode(model):
    model.train()
    before = {name: value.clone() for name, value in model.state_dict().items()}
    measured_of(model)
    assert model.training
    assert all(value.equal(before[name]) for name, value in model.state_dict().items())


def test_model_without_parameters_can_be_measured():
    measured = measure(nn.Flatten())
    assert (measured.parameters, measured.nonzeros, measured.total_sparsity) == (0, 0, 0.0)


def test_wrong_name_or_width_is_refused(model):
    with pytest.raises(UnknownNameError, match=r"no tensor '3.weigth'; did you mean '3.weight'\?"):
        measured_of(model, bits_by_param={"3.weigth": 8})
    with pytest.raises(QuantizationError, match=r"bits of '3.weight' must be 1 to 32, got 0"):
        measured_of(model, bits_by_param={"3.weight": 0})


def test_weights_are_pruned_from_a_hundredth_of_zeros_on():
    assert [replace(DENSE, weight_sparsity=share).has_pruned_weights for share in (0.0, 0.0099, 0.01)] == [
        False, False, True,
    ]  # fmt: skip


# ---------------------------------------------------------------------- latencies


def test_latency_is_of_one_image_and_of_a_mini_batch(model):
    [measured] = with_latencies([measured_of(model)], [model], (1, 4, 4), 8)
    assert measured.latency_single is not None
    assert measured.latency_batch is not None
    assert (measured.latency_single.batch_size, measured.latency_batch.batch_size) == (1, 8)
    assert replace(measured, latency_single=None, latency_batch=None) == measured_of(model)


def test_latencies_of_models_that_are_compared_are_measured_in_turns(model):
    turns = []
    other = nn.Sequential(model)
    model.register_forward_hook(lambda *_: turns.append("inner"))
    other.register_forward_hook(lambda *_: turns.append("outer"))
    figures = with_latencies([measured_of(model), measured_of(other)], [other, model], (1, 4, 4), 8)
    assert len(figures) == 2
    assert turns[:9] == ["inner", "outer", "inner"] * 3


# ----------------------------------------------------------------------- kept figures


def test_figures_survive_a_checkpoint_as_plain_data():
    assert measurement_of(json.loads(json.dumps(asdict(PRUNED)))) == PRUNED


def test_figures_of_another_kind_are_refused():
    with pytest.raises(UsageError) as error:
        measurement_of({"n": 1})
    assert str(error.value) == "figures: no results card; give one of this program"


def test_missing_reference_is_an_error_with_its_path(tmp_path):
    with pytest.raises(UsageError) as error:
        read_measurement(tmp_path / "results.json")
    assert str(error.value) == (
        f"{tmp_path}/results.json: cannot be read, No such file or directory; give a results.json of a run"
    )


@pytest.mark.parametrize(
    "content",
    [b"", b"\xff\x00", b"[]", b"{}", b'{"measured": {"n": 1}}', b'{"measured": 3}', b"[" * 100_000],
)
def test_reference_that_is_no_card_is_refused(tmp_path, content):
    path = tmp_path / "results.json"
    path.write_bytes(content)
    with pytest.raises(UsageError) as error:
        read_measurement(path)
    assert str(error.value) == f"{path}: no results card; give one of this program"


def test_saved_card_serves_as_reference_of_another_run(tmp_path):
    path = ResultsCard(PRUNED, DENSE).save(tmp_path / "results.json")
    assert read_measurement(path) == replace(PRUNED, source=str(path))
