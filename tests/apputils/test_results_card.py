import json
import math
from dataclasses import asdict, replace

import pytest
import torch
from torch import nn

from distiller.apputils.meters import EvalResult
from distiller.apputils.results_card import (
    SIMULATED_QUANTIZATION,
    SIMULATED_SPARSITY,
    Measurement,
    ResultsCard,
    build_card,
    measure,
    measurement_of,
    ratios,
    read_measurement,
    with_latencies_in_turns,
)
from distiller.errors import QuantizationError, UnknownNameError, UsageError
from distiller.export.latency import Latency


def latency(milliseconds: float, batch_size: int = 1, threads: int = 2) -> Latency:
    return Latency(milliseconds / 1e3, milliseconds / 1e3, milliseconds / 1e3, 10, batch_size, threads, "cpu")


DENSE = Measurement(
    top1_correct=9200,
    top5_correct=9990,
    n=10000,
    loss=0.25,
    parameters=100_000,
    nonzeros=100_000,
    weight_sparsity=0.0,
    total_sparsity=0.0,
    macs=1_000_000,
    bytes_checkpoint=402_000,
    bytes_dense=400_000,
    bytes_sparse=400_000,
    bytes_quantized=None,
    latency_single=latency(1.0),
    latency_batch=latency(20.0, batch_size=256),
)
PRUNED = replace(
    DENSE,
    top1_correct=9150,
    nonzeros=20_000,
    weight_sparsity=0.8123,
    total_sparsity=0.8,
    bytes_sparse=100_000,
    bytes_quantized=100_005,
    latency_single=latency(1.25),
)


@pytest.fixture
def model():
    torch.manual_seed(0)
    model = nn.Sequential(nn.Conv2d(1, 4, 3, bias=False), nn.BatchNorm2d(4), nn.Flatten(), nn.Linear(16, 10))
    with torch.no_grad():
        model[0].weight[:2] = 0  # 18 of 36
        for tensor in (model[1].bias, model[1].running_mean, model[1].num_batches_tracked):
            tensor.fill_(1)
    return model


def card_of(model, **settings) -> ResultsCard:
    simulated = settings.pop("simulated", ())
    return build_card(measure(model, EvalResult(0.5, 8, 10, 10), (1, 4, 4), 8, **settings), None, simulated)


# ------------------------------------------------------------------------ measuring


def test_counts_of_a_model_are_those_of_its_parameters(model):
    measured = card_of(model, macs=1234).measured
    assert measured.parameters == 36 + 4 + 4 + 160 + 10
    assert measured.nonzeros == measured.parameters - 18
    assert measured.weight_sparsity == pytest.approx(18 / 196)
    assert measured.total_sparsity == pytest.approx(18 / 214)
    assert measured.macs == 1234


def test_sizes_of_a_model_are_those_of_its_state_dict(model):
    measured = card_of(model).measured
    buffers = 4 + 4  # running mean and variance, float32
    assert measured.bytes_dense == 4 * (214 + buffers) + 8  # and the count of batches, int64
    assert measured.bytes_sparse == measured.bytes_dense - 4 * 36 + (5 + 4 * 18)  # conv as a bitmap
    assert measured.bytes_checkpoint > measured.bytes_dense
    assert measured.bytes_quantized is None


def test_quantized_size_takes_the_given_widths(model):
    measured = card_of(
        model, bits_by_param={"0.weight": 8, "3.weight": 4}, per_channel=("3.weight",)
    ).measured
    assert measured.bytes_quantized == measured.bytes_dense - 4 * 196 + (36 + 5) + (80 + 10 * 5)


def test_quantized_weights_that_are_buffers_count_as_parameters(model):
    before = measure(model, None, (1, 4, 4), 8)
    weight = model[3].weight.detach()
    del model[3].weight
    model[3].register_buffer("weight", weight)
    after = measure(model, None, (1, 4, 4), 8, bits_by_param={"3.weight": 8})
    assert (after.parameters, after.nonzeros) == (before.parameters, before.nonzeros)
    assert after.weight_sparsity == before.weight_sparsity


def test_wrapped_model_is_measured_under_canonical_names(model):
    wrapped = nn.DataParallel(model)
    measured = measure(wrapped, None, (1, 4, 4), 8, bits_by_param={"3.weight": 8})
    assert measured.parameters == 214


def test_latency_is_of_one_image_and_of_the_evaluations_batch(model):
    measured = card_of(model).measured
    assert measured.latency_single is not None
    assert measured.latency_batch is not None
    assert (measured.latency_single.batch_size, measured.latency_batch.batch_size) == (1, 8)


def test_measuring_changes_neither_weights_nor_mode(model):
    model.train()
    before = {name: value.clone() for name, value in model.state_dict().items()}
    card_of(model)
    assert model.training
    assert all(value.equal(before[name]) for name, value in model.state_dict().items())


def test_model_without_parameters_can_be_measured():
    measured = measure(nn.Flatten(), None, (1, 2, 2), 4)
    assert (measured.parameters, measured.nonzeros, measured.total_sparsity) == (0, 0, 0.0)


def test_wrong_name_or_width_is_refused(model):
    with pytest.raises(UnknownNameError, match=r"no tensor '3.weigth'; did you mean '3.weight'\?"):
        card_of(model, bits_by_param={"3.weigth": 8})
    with pytest.raises(QuantizationError, match=r"bits of '3.weight' must be 1 to 32, got 0"):
        card_of(model, bits_by_param={"3.weight": 0})


# ------------------------------------------------------------------ what is simulated


def test_card_says_by_itself_what_is_only_simulated(model):
    assert card_of(model).simulated == (SIMULATED_SPARSITY,)
    assert card_of(model, bits_by_param={"3.weight": 8}, simulated=["and this"]).simulated == (
        SIMULATED_QUANTIZATION,
        SIMULATED_SPARSITY,
        "and this",
    )


def test_dense_model_has_nothing_simulated(model):
    nn.init.ones_(model[0].weight)
    assert card_of(model).simulated == ()


# --------------------------------------------------------------------------- ratios


def test_ratios_are_reference_over_this_model():
    found = ratios(PRUNED, DENSE)
    assert found == {
        "parameters": 1.0,
        "nonzeros": 5.0,
        "macs": 1.0,
        "bytes_checkpoint": 1.0,
        "bytes_dense": 1.0,
        "bytes_sparse": 4.0,
        "bytes_quantized": pytest.approx(400_000 / 100_005),
        "latency_single": pytest.approx(0.8),
        "latency_batch": 1.0,
    }


def test_latencies_of_different_conditions_are_not_compared():
    found = ratios(PRUNED, replace(DENSE, latency_single=latency(1.0, threads=8), latency_batch=None))
    assert "latency_single" not in found
    assert "latency_batch" not in found


def test_nothing_left_has_no_ratio():
    assert "nonzeros" not in ratios(replace(PRUNED, nonzeros=0), DENSE)


# ----------------------------------------------------------------------------- text


def test_text_sets_each_figure_beside_the_uncompressed_one():
    text = ResultsCard(PRUNED, DENSE, ("everything",)).to_text()
    rows = [" ".join(line.split()) for line in text.splitlines()]
    assert rows[:1] + rows[2:20] == [
        "this model uncompressed uncompressed / this",
        "top-1 9,150/10,000 = 91.50 % 9,200/10,000 = 92.00 % -0.50 points",
        "top-1, 95 % interval 90.94 to 92.03 % 91.45 to 92.52 %",
        "top-5 9,990/10,000 = 99.90 % 9,990/10,000 = 99.90 % +0.00 points",
        "top-5, 95 % interval 99.82 to 99.95 % 99.82 to 99.95 %",
        "loss 0.2500 0.2500",
        "parameters 100,000 100,000 1.00x",
        "non-zero parameters 20,000 100,000 5.00x",
        "sparsity of the weights (2-D and up) 81.23 % 0.00 %",
        "sparsity of all parameters 80.00 % 0.00 %",
        "MACs for one image 1,000,000 1,000,000 1.00x",
        "bytes of the weights as a checkpoint 402,000 402,000 1.00x",
        "bytes stored dense * 400,000 400,000 1.00x",
        "bytes stored sparse * 100,000 400,000 4.00x",
        "bytes stored at the quantized width * 100,005 400,000 4.00x",
        "median latency, batch 1 (cpu, 2 threads) 1.250 ms 1.000 ms 0.80x",
        "median latency, batch 256 (cpu, 2 threads) 20.000 ms 20.000 ms 1.00x",
        "simulated: everything",
        rows[19],
    ]
    assert rows[19].startswith("* sizes marked * are computed")


def test_text_without_a_reference_has_one_column_of_figures():
    lines = ResultsCard(DENSE).to_text().splitlines()
    assert lines[0].split() == ["this", "model"]
    assert [" ".join(line.split()) for line in lines[7:9]] == [
        "parameters 100,000",
        "non-zero parameters 100,000",
    ]


def test_text_leaves_out_what_was_not_measured():
    nothing = replace(DENSE, top1_correct=None, top5_correct=None, n=None, loss=None, macs=None)
    text = ResultsCard(nothing, DENSE).to_text()
    assert not any(word in text for word in ("top-1", "top-5", "loss", "MACs", "quantized width *", " - "))


def test_text_shows_no_reference_latency_of_other_conditions():
    reference = replace(DENSE, latency_single=latency(7.0, threads=8))
    rows = [" ".join(line.split()) for line in ResultsCard(PRUNED, reference).to_text().splitlines()]
    assert "median latency, batch 1 (cpu, 2 threads) 1.250 ms -" in rows


def test_text_warns_of_a_reference_latency_of_another_run():
    warning = "uncompressed: from logs/results.json; its latency was measured in another run"
    assert warning not in ResultsCard(PRUNED, DENSE).to_text()
    assert warning in ResultsCard(PRUNED, replace(DENSE, source="logs/results.json")).to_text()


# ----------------------------------------------------------------------------- json


def test_saved_card_is_plain_json_with_every_figure(tmp_path):
    path = ResultsCard(PRUNED, DENSE, ("everything",)).save(tmp_path / "results.json")
    found = json.loads(path.read_text())
    assert found["measured"]["top1_correct"] == 9150
    assert found["measured"]["top1_percent"] == 91.5
    assert found["measured"]["top1_interval_95_percent"] == pytest.approx([90.937, 92.031], abs=1e-3)
    assert found["measured"]["latency_batch"]["batch_size"] == 256
    assert found["reference"]["bytes_dense"] == 400_000
    assert found["ratios"]["bytes_sparse"] == 4.0
    assert found["simulated"] == ["everything"]
    assert [entry.name for entry in tmp_path.iterdir()] == ["results.json"]


def test_loss_that_is_not_finite_is_null(tmp_path):
    path = ResultsCard(replace(DENSE, loss=math.nan)).save(tmp_path / "results.json")
    assert json.loads(path.read_text(), parse_constant=pytest.fail)["measured"]["loss"] is None


def test_saved_card_serves_as_reference_of_another_run(tmp_path):
    path = ResultsCard(PRUNED, DENSE).save(tmp_path / "results.json")
    assert read_measurement(path) == replace(PRUNED, source=str(path))


def test_figures_survive_a_checkpoint_as_plain_data():
    assert measurement_of(json.loads(json.dumps(asdict(PRUNED)))) == PRUNED


def test_figures_of_another_kind_are_refused():
    with pytest.raises(UsageError) as error:
        measurement_of({"n": 1})
    assert str(error.value) == "figures: no results card; give one of this program"


def test_card_that_cannot_be_written_is_an_error_with_its_path(tmp_path):
    path = tmp_path / "gone" / "results.json"
    with pytest.raises(UsageError) as error:
        ResultsCard(DENSE).save(path)
    assert str(error.value) == f"{path}: cannot be written, No such file or directory; give a folder that can"


def test_missing_reference_is_an_error_with_its_path(tmp_path):
    with pytest.raises(UsageError) as error:
        read_measurement(tmp_path / "results.json")
    assert str(error.value) == (
        f"{tmp_path}/results.json: cannot be read, No such file or directory; give a results.json of a run"
    )


@pytest.mark.parametrize(
    "content", [b"", b"\xff\x00", b"[]", b"{}", b'{"measured": {"n": 1}}', b'{"measured": 3}']
)
def test_reference_that_is_no_card_is_refused(tmp_path, content):
    path = tmp_path / "results.json"
    path.write_bytes(content)
    with pytest.raises(UsageError) as error:
        read_measurement(path)
    assert str(error.value) == f"{path}: no results card; give one of this program"


def test_latencies_of_a_model_and_its_reference_are_measured_side_by_side(model):
    stale = replace(measure(model, None, (1, 4, 4), 8), latency_single=latency(99_000.0), source="old.json")
    ours, theirs = with_latencies_in_turns(stale, stale, (model, model), (1, 4, 4), 8)
    for found in (ours, theirs):
        assert found.latency_single is not None
        assert found.latency_single.median_s < 99
