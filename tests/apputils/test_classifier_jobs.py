from __future__ import annotations

import copy
import csv
import dataclasses
import json
import logging
import platform
from argparse import Namespace

import pytest
import torch
import yaml

from distiller.apputils import classifier_jobs as jobs
from distiller.apputils import quantize_job
from distiller.apputils.image_classifier import ClassifierCompressor
from distiller.apputils.results_card import SIMULATED_QUANTIZATION, ResultsCard
from distiller.errors import QuantizationError, StatsError, UnknownNameError, UsageError
from tests.apputils.conftest import RunMaker
from tests.test_graph_picture import needs_dot

pytestmark = pytest.mark.usefixtures("untimed", "global_settings_restored")


def card_of(args: Namespace, open_run: RunMaker) -> ResultsCard:
    """Do a job that ends with a results card."""
    card = jobs.run_job(args, open_run)
    assert card is not None
    return card


@pytest.mark.parametrize(
    "command, job",
    [
        ("", jobs.train),
        ("--qe-bits-acts 4", jobs.train),
        ("-e", jobs.evaluate),
        ("-e --qe", jobs.quantize_and_evaluate),
        ("-e --qe --qe-calibration 0.1", jobs.quantize_and_evaluate),
        ("--greedy -e", jobs.prune_greedily),
        ("--greedy --qe-calibration 0.1 --sense filter", jobs.prune_greedily),
        ("--qe-calibration 0.1", jobs.collect_statistics),
        ("-e --qe-calibration 0.1", jobs.collect_statistics),
        ("--qe --qe-calibration 0.1", jobs.collect_statistics),
        ("--sense filter", jobs.sweep_sensitivity),
        ("--sense filter -e", jobs.sweep_sensitivity),
        ("--sense filter -e --qe", jobs.sweep_sensitivity),
        ("--sense filter --qe-calibration 0.1", jobs.collect_statistics),
    ],
)
def test_jobs_have_distillers_order_of_precedence(flags, command, job):
    assert jobs.choose_job(flags(command)) is job


def test_a_job_reads_the_flags_and_changes_none(flags, open_run):
    args = flags("-e --qe --qe-calibration 0.05")
    before = copy.deepcopy(vars(args))
    jobs.run_job(args, open_run)
    assert vars(args) == before


def test_a_card_is_returned_logged_and_saved(flags, open_run, caplog):
    with caplog.at_level(logging.INFO, logger="distiller"):
        card = card_of(flags("-e"), open_run)
    assert json.loads((open_run.folder / "results.json").read_text()) == card.to_json()
    assert card.to_text() in caplog.text
    assert open_run.names() == {"results.json"}
    assert card.measured.n == 71


def test_evaluation_leaves_the_model_as_it_is(flags, open_run):
    compressor = ClassifierCompressor(flags("-e"), open_run)
    before = copy.deepcopy(compressor.model.state_dict())
    jobs.evaluate(compressor)
    assert all(torch.equal(value, before[name]) for name, value in compressor.model.state_dict().items())


def test_summaries_come_in_the_order_asked_for(flags):
    compute, model = jobs.summaries(flags("--summary compute --summary model"))
    assert compute.endswith("Total MACs: 266,200")
    assert "(fc1): Linear(in_features=784, out_features=300" in model


@needs_dot
def test_pictures_go_beside_the_run_folders_and_the_summary_says_where(flags, tmp_path):
    first, compute, second = jobs.summaries(
        flags("--summary png_w_params --summary compute --summary png -o", tmp_path / "made")
    )
    named = [tmp_path / "made" / name for name in ("lenet_300_100_w_params.png", "lenet_300_100.png")]
    assert [first, second] == [f"Saved the picture of the graph to: {path}" for path in named]
    assert compute.endswith("Total MACs: 266,200")
    assert sorted((tmp_path / "made").iterdir()) == sorted(named)
    assert all(path.read_bytes().startswith(b"\x89PNG") for path in named)


AGP = """
pruners:
  agp: {class: AutomatedGradualPruner, initial_sparsity: 0.0, final_sparsity: 0.5, weights: [fc1.weight]}
policies:
  - {pruner: {instance_name: agp}, starting_epoch: 1, ending_epoch: 3, frequency: 1}
"""


def test_a_dry_run_joins_epochs_in_which_the_same_happens(flags, tmp_path):
    file = tmp_path / "s.yaml"
    file.write_text(AGP)
    assert jobs.dry_run(flags("--epochs 6 --compress", file)) == (
        f"{file} on lenet_300_100: 1 policies, epochs 0..5\n"
        "  epoch 0:\n"
        "    nothing\n"
        "  epoch 1:\n"
        "    pruner agp: AutomatedGradualPruner: fc1.weight -> sparsity 0.0%\n"
        "  epoch 2:\n"
        "    pruner agp: AutomatedGradualPruner: fc1.weight -> sparsity 50.0%\n"
        "  epochs 3..5:\n"
        "    nothing"
    )


def test_a_dry_run_of_one_epoch_tells_what_never_begins(flags, tmp_path):
    file = tmp_path / "s.yaml"
    file.write_text(AGP)
    assert jobs.dry_run(flags("--epochs 1 --compress", file)).splitlines()[1:] == [
        "  note: pruner agp: does nothing, it acts in epochs 1..2 and trained are epochs 0..0",
        "  epoch 0:",
        "    nothing",
    ]


def test_a_dry_run_of_a_billion_epochs_ends(flags, tmp_path):
    file = tmp_path / "s.yaml"
    file.write_text(AGP)
    text = jobs.dry_run(flags("--epochs 1000000000 --compress", file))
    assert text.splitlines()[-2:] == ["  epochs 3..999999999:", "    nothing"]


def test_a_dry_run_lists_a_thousand_changes_at_most(flags, tmp_path):
    file = tmp_path / "s.yaml"
    file.write_text(AGP.replace("ending_epoch: 3, frequency: 1", "ending_epoch: 1000000000, frequency: 2"))
    lines = jobs.dry_run(flags("--epochs 1000000000 --compress", file)).splitlines()
    assert lines[-3:-1] == [
        "  epoch 999:",
        "    pruner agp: AutomatedGradualPruner: fc1.weight -> sparsity 0.0%",
    ]
    assert lines[-1] == "  and so on: only the first 1000 changes are listed"


def test_a_dry_run_refuses_a_quantized_checkpoint_as_other_jobs_do(flags, open_run, tmp_path):
    jobs.run_job(flags("-e --qe --qe-dynamic"), open_run)
    file = tmp_path / "s.yaml"
    file.write_text(AGP)
    args = flags(
        "--compress", file, "--exp-load-weights-from", open_run.folder / "quantized_checkpoint.pth.tar"
    )
    with pytest.raises(UsageError, match="^the checkpoint is of a quantized model, which can be evaluated"):
        jobs.dry_run(args)


def test_statistics_are_of_the_share_of_the_training_set_that_is_asked_for(flags, open_run, caplog):
    with caplog.at_level(logging.INFO, logger="distiller"):
        assert jobs.run_job(flags("--qe-calibration 0.01"), open_run) is None
    assert "Collecting activation statistics on 12 training images, in two passes" in caplog.messages
    assert open_run.names() == {"acts_quantization_stats.yaml"}
    stats = yaml.safe_load((open_run.folder / "acts_quantization_stats.yaml").read_text())
    assert stats["fc1"]["inputs"][0]["total_numel"] == 12 * 784


def test_a_quantization_keeps_the_statistics_it_collected(flags, open_run):
    jobs.run_job(flags("-e --qe --qe-calibration 0.01"), open_run)
    assert open_run.names() == {
        "acts_quantization_stats.yaml", "layer_quant_params.yaml", "quant_stats_after_prepare_model.yaml",
        "quantized_checkpoint.pth.tar", "results.json",
    }  # fmt: skip


@pytest.mark.parametrize("command", ["--qe-dynamic", "--qe-bits-acts 0"])
def test_without_use_for_statistics_none_are_collected(flags, open_run, monkeypatch, command):
    monkeypatch.setattr(quantize_job, "collected", lambda *args: pytest.fail("statistics were collected"))
    card = card_of(flags(f"-e --qe {command}"), open_run)
    assert "acts_quantization_stats.yaml" not in open_run.names()
    assert card.to_json()["ratios"]["bytes_quantized"] > 3.9


@pytest.mark.parametrize(
    "command, error",
    [
        ("--qe-no-quant-layers fc7", UnknownNameError),
        ("--qe-dynamic --qe-scale-approx-bits 4", QuantizationError),
        ("--qe-scale-approx-bits 40", QuantizationError),
        ("--qe-stats-file nowhere.yaml", StatsError),
    ],
)
def test_a_quantization_that_cannot_be_opens_no_run(flags, open_run, command, error):
    with pytest.raises(error):
        jobs.run_job(flags(f"-e --qe {command}"), open_run)
    assert open_run.calls == 0


def test_a_misspelt_layer_is_told_before_statistics_are_collected(flags, open_run, monkeypatch):
    monkeypatch.setattr(quantize_job, "collected", lambda *args: pytest.fail("statistics were collected"))
    for command in ("--qe-no-clip-layers fc7", "--qe-no-quant-layers fc7"):
        with pytest.raises(UnknownNameError) as error:
            jobs.run_job(flags(f"-e --qe {command}"), open_run)
        flag = command.split()[0]
        assert str(error.value) == f"{flag}: 'fc7' matches no layer of the model; did you mean 'fc3'?"


def test_what_is_wrong_with_a_setting_of_quantization_is_told_of_its_flag(flags, open_run):
    with pytest.raises(QuantizationError) as error:
        jobs.run_job(flags("-e --qe --qe-dynamic --qe-bits-acts 1"), open_run)
    assert str(error.value) == "--qe-bits-acts: must be 2 to 16 bits, or 0 or null for none, got 1"


def test_sections_without_effect_in_a_configuration_of_quantization_are_warned_of(
    flags, open_run, tmp_path, caplog
):
    file = tmp_path / "q.yaml"
    file.write_text(AGP + "quantizers:\n  q: {class: PostTrainLinearQuantizer}\n")
    jobs.run_job(flags("-e --qe --qe-config-file", file), open_run)
    assert (
        f"--qe-config-file {file}: without effect: pruners, policies; of such a file only its quantizers are read"
        in caplog.messages
    )


def test_a_sweep_of_a_model_without_parameters_is_refused(flags, open_run, monkeypatch):
    monkeypatch.setattr(
        "distiller.apputils.image_classifier.create_model", lambda *_, **__: torch.nn.Flatten()
    )
    with pytest.raises(UsageError) as error:
        jobs.run_job(flags("--sense element"), open_run)
    assert str(error.value) == (
        "--sense element: 'lenet_300_100' has no parameters to prune; give a model that has some, "
        "or test this one with --evaluate"
    )


@pytest.mark.parametrize("command", ["", "--qe-calibration 0.1"])
def test_a_scale_of_too_many_bits_is_told_before_statistics_are_collected(
    flags, open_run, monkeypatch, command
):
    monkeypatch.setattr(quantize_job, "collected", lambda *args: pytest.fail("statistics were collected"))
    with pytest.raises(QuantizationError) as error:
        jobs.run_job(flags(f"-e --qe --qe-scale-approx-bits 40 {command}"), open_run)
    assert str(error.value) == "--qe-scale-approx-bits: must be 1 to 31 bits, or null, got 40"


def test_a_quantized_checkpoint_can_be_evaluated_and_nothing_else(flags, open_run):
    jobs.run_job(flags("-e --qe --qe-dynamic"), open_run)
    file = open_run.folder / "quantized_checkpoint.pth.tar"
    for command in ("", "-e --qe", "--sense element", "--qe-calibration 0.1"):
        with pytest.raises(UsageError, match="which can be evaluated"):
            jobs.run_job(flags(f"{command} --exp-load-weights-from", file), open_run)
    assert open_run.calls == 1
    card = card_of(flags("-e --exp-load-weights-from", file), open_run)
    assert card.reference is not None
    assert card.reference.source == str(file)


SPARSE = """
pruners:
  p: {class: SparsityLevelParameterPruner, levels: {fc1.weight: 0.5}}
policies:
  - {pruner: {instance_name: p}, epochs: [0]}
"""


@pytest.fixture
def sparse_schedule(tmp_path):
    file = tmp_path / "s.yaml"
    file.write_text(SPARSE)
    return file


def test_a_pruned_model_that_is_quantized_is_compared_with_the_uncompressed_one_it_comes_from(
    flags, open_run, sparse_schedule
):
    dense = card_of(flags("--epochs 1"), open_run)
    weights = open_run.folder / "checkpoint.pth.tar"
    flag = "--exp-load-weights-from"
    pruned = card_of(flags("--epochs 1 --lr 0.5 --compress", sparse_schedule, flag, weights), open_run)
    weights = open_run.folder / "checkpoint.pth.tar"
    card = card_of(flags("-e --qe --qe-dynamic", flag, weights), open_run)
    assert card.reference is not None
    assert card.reference.top1_correct == dense.measured.top1_correct
    assert (card.reference.nonzeros, card.reference.source) == (266_610, str(weights))
    assert card.before is not None
    assert card.before == pruned.measured
    assert card.before.top1_correct != card.reference.top1_correct
    file = open_run.folder / "quantized_checkpoint.pth.tar"
    again = card_of(flags("-e", flag, file), open_run)
    assert again.reference == dataclasses.replace(card.reference, source=str(file))
    assert again.before == dataclasses.replace(card.before, source=str(file))
    assert again.simulated == card.simulated


def test_a_pruned_model_of_unknown_origin_is_not_called_uncompressed_when_it_is_quantized(
    flags, open_run, sparse_schedule
):
    pruned = card_of(flags("--epochs 1 --compress", sparse_schedule), open_run)
    weights = open_run.folder / "checkpoint.pth.tar"
    card = card_of(flags("-e --qe --qe-dynamic --resume-from", weights), open_run)
    assert card.reference is None
    assert card.before == pruned.measured
    assert "uncompressed" not in card.to_text()
    extras = torch.load(open_run.folder / "quantized_checkpoint.pth.tar", weights_only=True)["extras"]
    assert extras["reference"] is None
    assert extras["before_quantization"]["nonzeros"] == 266_610 - 784 * 150


def test_few_pruned_weights_are_known_by_their_masks(flags, open_run, sparse_schedule):
    sparse_schedule.write_text(SPARSE.replace("fc1.weight: 0.5", "fc3.weight: 0.5"))  # 500 of 266,200
    card_of(flags("--epochs 1 --compress", sparse_schedule), open_run)
    weights = open_run.folder / "checkpoint.pth.tar"
    card = card_of(flags("-e --qe --qe-dynamic --exp-load-weights-from", weights), open_run)
    assert (card.reference, card.before is not None) == (None, True)


def test_a_dense_model_that_is_quantized_is_the_uncompressed_one_and_nothing_is_called_sparse(
    flags, open_run
):
    dense = card_of(flags("--epochs 1"), open_run)
    weights = open_run.folder / "checkpoint.pth.tar"
    flag = "--exp-load-weights-from"
    card = card_of(flags("-e --qe --qe-dynamic --qe-bits-wts 4", flag, weights), open_run)
    assert card.measured.weight_sparsity > 0.01  # rounded to zero
    assert (card.reference, card.before) == (dense.measured, None)
    assert card.simulated == (SIMULATED_QUANTIZATION,)
    again = card_of(flags("-e", flag, open_run.folder / "quantized_checkpoint.pth.tar"), open_run)
    assert (again.before, again.simulated) == (None, (SIMULATED_QUANTIZATION,))


def test_a_sweep_measures_every_level_of_every_weight_and_leaves_the_model_dense(flags, open_run, caplog):
    compressor = ClassifierCompressor(flags("--sense element --sense-range 0.5 0.9 0.4"), open_run)
    before = copy.deepcopy(compressor.model.state_dict())
    with caplog.at_level(logging.INFO, logger="distiller"):
        jobs.sweep_sensitivity(compressor)
    assert all(torch.equal(value, before[name]) for name, value in compressor.model.state_dict().items())
    rows = list(csv.DictReader((open_run.folder / "sensitivity.csv").read_text().splitlines()))
    assert [(row["parameter"], float(row["sparsity"])) for row in rows] == [
        (f"fc{layer}.weight", level) for layer in (1, 2, 3) for level in (0.0, 0.5, 0.9)
    ]
    blocks = -(-int(rows[0]["n"]) // compressor.args.batch_size)
    assert sum("blocks of images, " in message for message in caplog.messages) == blocks
    assert open_run.names() == {"sensitivity.csv", "sensitivity.json", "sensitivity.png", "sensitivity.svg"}


@pytest.mark.parametrize(
    "command, message",
    [
        ("--sense channel", "axis 'channel' takes convolution weights"),
        ("--sense element --sense-range 0.9 0.1 0.1", "start and stop must satisfy"),
        ("--sense element --sense-resume nowhere", "--sense-resume nowhere: no sweep to go on with"),
    ],
)
def test_a_sweep_that_cannot_be_opens_no_run(flags, open_run, command, message):
    with pytest.raises(UsageError, match=message):
        jobs.run_job(flags(command), open_run)
    assert open_run.calls == 0


def test_a_resumed_sweep_goes_on_in_its_folder_and_opens_no_other(flags, open_run):
    command = "--sense element --sense-range 0.5 0.9 0.4"
    jobs.run_job(flags(command), open_run)
    file = open_run.folder / "sensitivity.csv"
    whole = file.read_bytes()
    file.write_bytes(b"".join(whole.splitlines(keepends=True)[:4]))
    jobs.run_job(flags(f"{command} --sense-resume", open_run.folder), open_run)
    assert file.read_bytes() == whole
    assert open_run.calls == 1


def test_a_schedule_that_has_no_effect_is_told(flags, open_run, caplog):
    jobs.run_job(flags("-e --compress s.yaml"), open_run)
    assert "--compress s.yaml: without effect, this job does not train" in caplog.messages


@pytest.mark.parametrize(
    "command, file, flag",
    [
        ("", "checkpoint.pth.tar", "--resume-from"),
        ("-n lenet", "lenet_checkpoint.pth.tar", "--resume-from"),
        ("-n lenet", "checkpoint.pth.tar", None),
        ("--sense element", "sensitivity.json", "--sense-resume"),
        ("--sense element", "checkpoint.pth.tar", None),
        ("-e", "checkpoint.pth.tar", None),
        ("-e --qe", "quantized_checkpoint.pth.tar", None),
        ("--qe-calibration 0.1", "acts_quantization_stats.yaml", None),
    ],
)
def test_what_goes_on_with_an_interrupted_job_is_named_once_it_is_there(flags, tmp_path, command, file, flag):
    folder = tmp_path / "my run"
    folder.mkdir()
    assert jobs.how_to_go_on(flags(command), None) is None
    assert jobs.how_to_go_on(flags(command), folder) is None
    (folder / file).touch()
    target = folder / file if flag == "--resume-from" else folder
    assert jobs.how_to_go_on(flags(command), folder) == (flag and f"{flag} '{target}'")


def test_a_resumed_sweep_that_is_interrupted_goes_on_in_its_folder(flags, tmp_path):
    (tmp_path / "sensitivity.json").touch()
    args = flags("--sense element --sense-resume", tmp_path)
    assert jobs.how_to_go_on(args, None) == f"--sense-resume {tmp_path}"


def test_a_training_that_goes_on_clears_the_folder_of_what_a_kill_left(flags, open_run):
    jobs.run_job(flags("--epochs 1"), open_run)
    before = open_run.folder
    stale = before / f"checkpoint.pth.tar.{platform.node().partition('.')[0]}.99999999.part"
    stale.touch()
    with pytest.raises(UsageError, match="nothing to do"):
        jobs.run_job(flags("--epochs 1 --resume-from", before / "checkpoint.pth.tar"), open_run)
    assert stale.exists()
    jobs.run_job(flags("--epochs 2 --resume-from", before / "checkpoint.pth.tar"), open_run)
    assert not stale.exists()


def test_a_plugin_that_cannot_be_imported_is_told_whether_or_not_the_schedule_asks_for_it(flags, open_run):
    args = flags("--compress s.yaml --plugin no_such_package")
    for job in (lambda: jobs.dry_run(args), lambda: jobs.run_job(args, open_run)):
        with pytest.raises(UnknownNameError) as error:
            job()
        assert str(error.value) == (
            "--plugin no_such_package: cannot be imported, ModuleNotFoundError: No module named 'no_such_package'; "
            "give a package that lies in the current folder or is installed"
        )
    assert open_run.calls == 0
