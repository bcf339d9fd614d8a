import json
import math
from dataclasses import replace

import pytest

from distiller.apputils.results_card import (
    SIMULATED_QUANTIZATION,
    SIMULATED_SPARSITY,
    SIMULATED_SPARSITY_OF_THINNED,
    ResultsCard,
    build_card,
    ratios,
)
from distiller.errors import UsageError
from tests.apputils.figures import DENSE, PRUNED, latency

SPARSE = replace(PRUNED, bytes_quantized=None)  # PRUNED is quantized too
QUANTIZED = replace(DENSE, bytes_quantized=100_005, weight_sparsity=0.0118, nonzeros=98_800)

# ------------------------------------------------------------------ what is simulated


def test_card_says_by_itself_what_is_only_simulated():
    assert build_card(SPARSE, DENSE).simulated == (SIMULATED_SPARSITY,)
    assert build_card(PRUNED, DENSE, ["and this"], before=SPARSE).simulated == (
        SIMULATED_QUANTIZATION,
        SIMULATED_SPARSITY,
        "and this",
    )


def test_of_a_thinned_model_nothing_is_simulated_but_the_zeros_that_are_left():
    assert build_card(DENSE, is_thinned=True).simulated == ()
    assert build_card(SPARSE, DENSE, is_thinned=True).simulated == (SIMULATED_SPARSITY_OF_THINNED,)
    text = build_card(DENSE, is_thinned=True).to_text()
    assert "\nreal: filters or channels were physically removed: parameters, MACs, bytes and latency" in text
    assert "real:" not in build_card(DENSE).to_text()


def test_dense_model_has_nothing_simulated():
    assert build_card(DENSE).simulated == ()
    assert build_card(replace(DENSE, weight_sparsity=0.0099)).simulated == ()


def test_weights_that_quantization_rounds_to_zero_are_not_called_sparsity():
    assert build_card(QUANTIZED, DENSE).simulated == (SIMULATED_QUANTIZATION,)
    assert build_card(QUANTIZED, before=DENSE).simulated == (SIMULATED_QUANTIZATION,)


def test_a_quantized_model_is_sparse_when_the_float_model_was_whatever_the_reference_is():
    both = (SIMULATED_QUANTIZATION, SIMULATED_SPARSITY)
    assert build_card(PRUNED, DENSE, before=SPARSE).simulated == both
    assert build_card(PRUNED, before=SPARSE).simulated == both
    assert build_card(PRUNED).simulated == both  # of its float model nothing is known


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


def test_text_has_a_column_for_the_float_model_that_was_quantized_beside_the_uncompressed_one():
    text = build_card(PRUNED, DENSE, before=replace(SPARSE, top1_correct=9160)).to_text()
    rows = [" ".join(line.split()) for line in text.splitlines()]
    assert rows[0] == "this model before quantization uncompressed uncompressed / this"
    assert "top-1 9,150/10,000 = 91.50 % 9,160/10,000 = 91.60 % 9,200/10,000 = 92.00 % -0.50 points" in rows
    assert "bytes stored sparse * 100,000 100,000 400,000 4.00x" in rows
    assert "bytes stored at the quantized width * 100,005 400,000 400,000 4.00x" in rows
    assert "median latency, batch 1 (cpu, 2 threads) 1.250 ms 1.250 ms 1.000 ms 0.80x" in rows


def test_without_a_reference_the_ratios_are_to_the_model_before_quantization():
    text = build_card(PRUNED, before=replace(SPARSE, top1_correct=9160)).to_text()
    rows = [" ".join(line.split()) for line in text.splitlines()]
    assert rows[0] == "this model before quantization before quantization / this"
    assert "uncompressed" not in text
    assert "top-1 9,150/10,000 = 91.50 % 9,160/10,000 = 91.60 % -0.10 points" in rows
    assert "bytes stored sparse * 100,000 100,000 1.00x" in rows


def test_only_the_latency_of_another_run_is_left_out_of_three():
    reference = replace(DENSE, source="old.pth.tar")
    text = build_card(PRUNED, reference, before=SPARSE).to_text()
    rows = [" ".join(line.split()) for line in text.splitlines()]
    assert "median latency, batch 1 (cpu, 2 threads) 1.250 ms 1.250 ms -" in rows
    assert "uncompressed: from old.pth.tar; its latency was measured in another run" in text
    assert "before quantization: from" not in text


def test_text_leaves_out_what_was_not_measured():
    nothing = replace(DENSE, top1_correct=None, top5_correct=None, n=None, loss=None, macs=None)
    text = ResultsCard(nothing, DENSE).to_text()
    assert not any(word in text for word in ("top-1", "top-5", "loss", "MACs", "quantized width *", " - "))


def test_text_says_how_many_filters_and_channels_are_zero_where_there_are_any():
    dense = replace(DENSE, filters=60, zero_filters=0, channels=40, zero_channels=0)
    assert "all zero" not in build_card(dense, dense).to_text()
    pruned = replace(SPARSE, filters=60, zero_filters=30, channels=40, zero_channels=0)
    lines = build_card(pruned, dense).to_text().splitlines()
    (line,) = [line for line in lines if "all zero" in line]
    label = "convolutions' filters that are all zero"
    assert line.startswith(label)
    assert line.removeprefix(label).split() == ["30", "of", "60", "0", "of", "60"]
    alone = build_card(
        replace(pruned, zero_channels=7), DENSE
    ).to_text()  # DENSE: of before they were counted
    (line,) = [line for line in alone.splitlines() if "channels" in line]
    assert line.split()[-4:] == ["7", "of", "40", "-"]


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


def test_saved_card_has_the_figures_before_quantization(tmp_path):
    path = build_card(PRUNED, DENSE, before=SPARSE).save(tmp_path / "results.json")
    found = json.loads(path.read_text())
    assert found["before_quantization"]["bytes_sparse"] == found["measured"]["bytes_sparse"] == 100_000
    assert (found["ratios_before_quantization"]["nonzeros"], found["ratios"]["nonzeros"]) == (1.0, 5.0)
    plain = ResultsCard(PRUNED, DENSE).to_json()
    assert (plain["before_quantization"], plain["ratios_before_quantization"]) == (None, {})


def test_loss_that_is_not_finite_is_null(tmp_path):
    path = ResultsCard(replace(DENSE, loss=math.nan)).save(tmp_path / "results.json")
    assert json.loads(path.read_text(), parse_constant=pytest.fail)["measured"]["loss"] is None


def test_card_that_cannot_be_written_is_an_error_with_its_path(tmp_path):
    path = tmp_path / "gone" / "results.json"
    with pytest.raises(UsageError) as error:
        ResultsCard(DENSE).save(path)
    assert str(error.value) == f"{path}: cannot be written, No such file or directory; give a folder that can"
