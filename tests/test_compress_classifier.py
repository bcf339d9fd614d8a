"""The command line. What the jobs do is in `tests/end_to_end/`."""

from __future__ import annotations

import os
import shlex
import subprocess
import sys
from pathlib import Path

import pytest

from compress_classifier import main, make_parser
from tests import flags_of_quantization

ROOT = Path(__file__).resolve().parents[1]

# The flags of Distiller's compress_classifier.py, all spellings, but those of AMC: (spellings, value, destination,
# parsed value, default).
SWITCH = None
LEVELS = "argument --sense-range: expected [AXIS] A B STEP, as in '0 0.95 0.05' or 'weight-bits 8 2 1', got "
ACCEPTED = [
    (["-a", "--arch"], "ResNet20_CIFAR", "arch", "resnet20_cifar", "resnet18"),
    (["-j", "--workers"], "2", "workers", 2, 4),
    (["--epochs"], "7", "epochs", 7, 90),
    (["-b", "--batch-size", "--batch"], "32", "batch_size", 32, 256),
    (["--lr", "--learning-rate"], "1e-3", "lr", 1e-3, 0.1),
    (["--momentum"], "0", "momentum", 0.0, 0.9),
    (["--weight-decay", "--wd"], "0", "weight_decay", 0.0, 1e-4),
    (["-p", "--print-freq"], "5", "print_freq", 5, 10),
    (["-v", "--verbose"], SWITCH, "verbose", True, False),
    (["--resume"], "c.pth.tar", "deprecated_resume", "c.pth.tar", None),
    (["--resume-from"], "c.pth.tar", "resumed_checkpoint_path", "c.pth.tar", None),
    (["--exp-load-weights-from"], "c.pth.tar", "load_model_path", "c.pth.tar", None),
    (["--pretrained"], SWITCH, "pretrained", True, False),
    (["--reset-optimizer"], SWITCH, "reset_optimizer", True, False),
    (["-e", "--evaluate"], SWITCH, "evaluate", True, False),
    (["--summary"], "Sparsity", "summary", ["sparsity"], None),
    (["--export-onnx"], "x.onnx", "export_onnx", "x.onnx", None),
    (["--compress"], "s.yaml", "compress", "s.yaml", None),
    (["--sense"], "Filter,Weight-Bits", "sensitivity", ("filter", "weight-bits"), None),
    (["--deterministic", "--det"], SWITCH, "deterministic", True, False),
    (["--seed"], "3", "seed", 3, None),
    (["--gpus", "--gpu"], "0,1", "gpus", "0,1", None),
    (["--cpu"], SWITCH, "cpu", True, False),
    (["-n", "--name"], "exp", "name", "exp", None),
    (["-o", "--out-dir"], "runs", "output_dir", "runs", "logs"),
    (["--validation-split", "--valid-size", "--vs"], "0", "validation_split", 0.0, 0.1),
    (["--effective-train-size", "--etrs"], "0.5", "effective_train_size", 0.5, 1.0),
    (["--effective-valid-size", "--evs"], "0.5", "effective_valid_size", 0.5, 1.0),
    (["--effective-test-size", "--etes"], "1", "effective_test_size", 1.0, 1.0),
    (["--confusion"], SWITCH, "display_confusion", True, False),
    (["--num-best-scores"], "3", "num_best_scores", 3, 1),
    (["--masks-sparsity"], SWITCH, "masks_sparsity", True, False),
    (["--param-hist"], SWITCH, "log_params_histograms", True, False),
    (["--activation-stats", "--act-stats"], "Train", "activation_stats", ["train"], []),
    (["--save-untrained-model"], SWITCH, "save_untrained_model", True, False),
    (["--greedy"], SWITCH, "greedy", True, False),
    (["--greedy-ft-epochs"], "0", "greedy_ft_epochs", 0, 1),
    (["--greedy-target-density"], "0.5", "greedy_target_density", 0.5, None),
    (["--greedy-pruning-step"], "0.2", "greedy_pruning_step", 0.2, 0.1),
    (["--greedy-finetuning-policy"], "Linear-Grow", "greedy_finetuning_policy", "linear-grow", "constant"),
    (["--thinnify"], SWITCH, "thinnify", True, False),
    (["--load-serialized"], SWITCH, "load_serialized", True, False),
    (["--channels-last"], SWITCH, "channels_last", True, False),
    (["--kd-teacher"], "ResNet18", "kd_teacher", "resnet18", None),
    (["--kd-pretrained"], SWITCH, "kd_pretrained", True, False),
    (["--kd-resume"], "a.pth.tar", "kd_resume", "a.pth.tar", None),
    (["--kd-temperature", "--kd-temp"], "4", "kd_temperature", 4.0, 1.0),
    (["--kd-distill-wt", "--kd-dw"], "0.7", "kd_distill_wt", 0.7, 0.5),
    (["--kd-student-wt", "--kd-sw"], "0.3", "kd_student_wt", 0.3, 0.5),
    (["--kd-teacher-wt", "--kd-tw"], "0.1", "kd_teacher_wt", 0.1, 0.0),
    (["--kd-start-epoch"], "3", "kd_start_epoch", 3, 0),
    (["--earlyexit_lossweights", "--earlyexit-lossweights"], "0.4", "earlyexit_lossweights", [0.4], None),
    (["--earlyexit_thresholds", "--earlyexit-thresholds"], "0.4", "earlyexit_thresholds", [0.4], None),
    *flags_of_quantization.ACCEPTED,
]
ADDED = [
    (["--dataset"], "digits", "dataset", "digits", None),
    (["--download"], SWITCH, "download", True, False),
    (["--device"], "cuda:1", "device", "cuda:1", None),
    (["--optimizer"], "adam", "optimizer", "adam", "sgd"),
    (["--dry-run"], SWITCH, "dry_run", True, False),
    (["--plugin"], "mine", "plugin", ["mine"], []),
    (["--sense-resume"], "logs/x", "sense_resume", "logs/x", None),
    (["--sense-params"], "fc*", "sense_params", ["fc*"], None),
    (["--sense-error"], "0.5", "sense_error", 0.5, None),
    (["--sense-jobs"], "2", "sense_jobs", 2, None),
    (["--sense-fast"], SWITCH, "sense_fast", True, False),
    (["--sense-block"], "8", "sense_block", 8, 4),
    (["--sense-valid"], SWITCH, "sense_valid", True, False),
    (["--pack"], "x.dsz", "pack", "x.dsz", None),
    (["--unpack"], "x.dsz", "unpack", "x.dsz", None),
    (["--plot-mixture"], "logs/x", "plot_mixture", "logs/x", None),
    (["--layerwise"], "prune,SVD+quant", "layerwise", ("prune", "svd+quant"), None),
    (["--layerwise-bits"], "4", "layerwise_bits", [4], []),
    (["--layerwise-layers"], "fc*", "layerwise_layers", ["fc*"], []),
    (["--layerwise-resume"], "logs/x", "layerwise_resume", "logs/x", None),
    (["--layerwise-plot"], "logs/x", "layerwise_plot", "logs/x", None),
    (["--recommend"], "logs/x", "recommend", "logs/x", None),
    (["--max-drop"], "1.5", "max_drop", 1.5, None),
    (["--target-sparsity"], "0.8", "target_sparsity", 0.8, None),
    (["--target-macs"], "0.5", "target_macs", 0.5, None),
    (["--recommend-axis"], "Filter", "recommend_axis", "filter", None),
    (["--recommend-pruner"], "Sensitivity", "recommend_pruner", "sensitivity", "agp"),
    (["--recommend-epochs"], "20", "recommend_epochs", 20, 10),
    (["--verify"], SWITCH, "verify", True, False),
    (["--kd-chain"], "VGG13,mine:Net", "kd_chain", ["vgg13", "mine:Net"], None),
    (["--kd-chain-resume"], "logs/x", "kd_chain_resume", "logs/x", None),
    (["--kd-loss"], "cross_entropy", "kd_loss", "cross_entropy", "kl"),
    (["--kd-no-t-squared"], SWITCH, "kd_no_t_squared", True, False),
    (["--kd-no-labels"], SWITCH, "kd_no_labels", True, False),
    (["--kd-half"], SWITCH, "kd_half", True, False),
    (["--kd-no-cache"], SWITCH, "kd_no_cache", True, False),
    (["--earlyexit-layers"], "layer1.2", "earlyexit_layers", ["layer1.2"], None),
    (["--earlyexit-criterion"], "Confidence", "earlyexit_criterion", "confidence", "entropy"),
    (["--earlyexit-max-drop"], "0.5", "earlyexit_max_drop", 0.5, None),
    (["--earlyexit-shares"], "0.5", "earlyexit_shares", [0.5], None),
    *flags_of_quantization.ADDED,
]
SPELLINGS = [
    (flag, value, dest, parsed) for flags, value, dest, parsed, _ in ACCEPTED + ADDED for flag in flags
]


def parse(*argv: str):
    return make_parser().parse_args(argv)


def message(capsys, *argv: str) -> str:
    """What is told of a command line that is refused."""
    with pytest.raises(SystemExit) as end:
        parse(*argv)
    assert end.value.code == 2
    captured = capsys.readouterr()
    assert captured.out == ""
    start, finish = "compress_classifier.py: error: ", " (--help lists all flags)\n"
    assert captured.err.startswith(start)
    assert captured.err.endswith(finish)
    return captured.err[len(start) : -len(finish)]


@pytest.mark.parametrize("flag, value, dest, parsed", SPELLINGS)
def test_a_flag_is_known_under_each_of_its_spellings(flag, value, dest, parsed):
    args = parse(flag) if value is SWITCH else parse(flag, value)
    assert getattr(args, dest) == parsed


def test_defaults_are_those_of_distiller():
    args = vars(parse())
    assert args.pop("given") == frozenset()
    assert args.pop("data") is None
    assert args.pop("sense_range") is None
    assert args.pop("fractions") == [0.0, 0.9, 0.1]
    assert args == {dest: default for _, _, dest, _, default in ACCEPTED + ADDED}


@pytest.mark.parametrize(
    "argv, given",
    [
        ("", set()),
        ("--kd-temp 1 --kd-dw 0.5", {"kd_temperature", "kd_distill_wt"}),  # their defaults
        ("--fractions 0 0.9 0.1 -j 4", {"fractions", "workers"}),
        ("--plugin x --plugin y --summary model", {"plugin", "summary"}),
        ("--qe-no-clip-layers a --act-stats test", {"qe_no_clip_layers", "activation_stats"}),
        ("--compress", {"compress"}),
        ("--pack --export-onnx", {"pack", "export_onnx"}),
        ("data --evaluate", {"data", "evaluate"}),
        ("--resume c", {"deprecated_resume", "resumed_checkpoint_path", "reset_optimizer"}),
    ],
)
def test_a_flag_counts_as_given_at_whatever_value(argv, given):
    assert parse(*argv.split()).given == given


def test_levels_of_axes_are_kept_by_axis():
    assert parse("--sense-range", "0", "1", "0.5").sense_range == {"": (0.0, 1.0, 0.5)}
    argv = "--sense-range Weight-Bits 8 2 1 --sense-range rank 0 1 0.5 --sense-range RANK 0 0.5 0.1".split()
    assert parse(*argv).sense_range == {"weight-bits": (8.0, 2.0, 1.0), "rank": (0.0, 0.5, 0.1)}


def test_there_is_no_other_flag():
    known = {flag for flag, _, _, _ in SPELLINGS} | {"--sense-range", "--fractions", "-h", "--help"}
    assert {flag for action in make_parser()._actions for flag in action.option_strings} == known


def test_an_unknown_summary(capsys):
    assert message(capsys, "--summary", "size") == (
        "argument --summary: invalid choice: 'size' (choose from sparsity, compute, model, modules, low-rank, png, "
        "png_w_params)"
    )


def test_summaries_add_up():
    args = parse("--summary", "compute", "--summary", "PNG_w_params")
    assert args.summary == ["compute", "png_w_params"]


def test_layers_and_plugins_may_be_several():
    args = parse("--act-stats", "train", "Valid", "--qencl", "a", "b", "--qenql", "c", "d", "--plugin", "x", "--plugin",
                 "y", "data")  # fmt: skip
    assert args.activation_stats == ["train", "valid"]
    assert (args.qe_no_clip_layers, args.qe_no_quant_layers, args.plugin) == (
        ["a", "b"],
        ["c", "d"],
        ["x", "y"],
    )
    assert args.data == "data"


def test_the_defaults_of_one_parser_are_not_shared_with_the_next():
    parse("--plugin", "x")
    assert parse().plugin == []


def test_the_data_folder_may_stand_anywhere():
    assert parse("data", "--cpu").data == parse("--cpu", "data").data == "data"


def test_a_dotted_path_keeps_its_capitals():
    assert parse("-a", "mine.nets:LeNet").arch == "mine.nets:LeNet"


@pytest.mark.parametrize(
    "flag, dest",
    [
        ("--compress", "compress"),
        ("--resume-from", "resumed_checkpoint_path"),
        ("--exp-load-weights-from", "load_model_path"),
        ("--resume", "deprecated_resume"),
        ("--qe-stats-file", "qe_stats_file"),
        ("--qe-config-file", "qe_config_file"),
        ("--sense-resume", "sense_resume"),
        ("--qe-resume", "qe_resume"),
        ("--kd-resume", "kd_resume"),
        ("--kd-chain-resume", "kd_chain_resume"),
        ("-o", "output_dir"),
    ],
)
def test_paths_may_begin_in_the_home_folder(monkeypatch, tmp_path, flag, dest):
    monkeypatch.setenv("HOME", str(tmp_path))
    args = parse("~/data", flag, "~/file")
    assert (args.data, getattr(args, dest)) == (str(tmp_path / "data"), str(tmp_path / "file"))


def test_abbreviations_are_not_guessed(capsys):
    assert message(capsys, "--eval") == "unrecognized arguments: --eval"


@pytest.mark.parametrize(
    "first, second",
    [
        (["--resume", "a"], ["--resume-from", "b"]),
        (["--resume-from", "a"], ["--exp-load-weights-from", "b"]),
        (["--exp-load-weights-from", "a"], ["--resume", "b"]),
        (["--qe-stats-file", "a"], ["--qe-dynamic"]),
        (["--qe-dynamic"], ["--qe-calibration", "0.1"]),
        (["--qe-calibration", "0.1"], ["--qe-config-file", "b"]),
        (["--qe-config-file", "a"], ["--qe-stats-file", "b"]),
        (["--qe-stats-file", "a"], ["--qe-calibration", "0.1"]),
        (["--qe-dynamic"], ["--qe-config-file", "b"]),
        (["--qe-mixed-precision", "4"], ["--qe-mixed-precision-bytes", "9"]),
        (["--qe-mixed-precision-bitops", "4"], ["--qe-mixed-precision-bytes", "9"]),
    ],
)
def test_flags_that_exclude_each_other(capsys, first, second):
    assert message(capsys, *first, *second) == f"argument {second[0]}: not allowed with argument {first[0]}"
    assert message(capsys, *second, *first) == f"argument {first[0]}: not allowed with argument {second[0]}"


WHOLE = "must be a whole number from {}, got '{}'"


@pytest.mark.parametrize(
    "flag, value, told",
    [
        ("--epochs", "0", WHOLE.format(1, "0")),
        ("--epochs", "1.5", WHOLE.format(1, "1.5")),
        ("--epochs", str(2**63 - 1), "must be at most 1,000,000,000, got '9223372036854775807'"),
        ("-b/--batch-size/--batch", "0", WHOLE.format(1, "0")),
        ("-j/--workers", "-1", WHOLE.format(0, "-1")),
        ("-p/--print-freq", "0", WHOLE.format(1, "0")),
        ("--seed", "-1", WHOLE.format(0, "-1")),
        ("--num-best-scores", "none", WHOLE.format(1, "none")),
        ("--seed", str(2**63), "must be below 2**63, got '9223372036854775808'"),
        ("-b/--batch-size/--batch", str(10**20), "must be below 2**63, got '100000000000000000000'"),
        ("--qe-bits-acts/--qeba", "-8", WHOLE.format(0, "-8")),
        ("--qe-bits-accum", "0", WHOLE.format(1, "0")),
        ("--validation-split/--valid-size/--vs", "1", "must be a number from 0 and below 1, got '1'"),
        ("--validation-split/--valid-size/--vs", "-0.1", "must be a number from 0 and below 1, got '-0.1'"),
        ("--effective-train-size/--etrs", "0", "must be a number above 0 and up to 1, got '0'"),
        ("--effective-valid-size/--evs", "1.1", "must be a number above 0 and up to 1, got '1.1'"),
        ("--effective-test-size/--etes", "nan", "must be a number above 0 and up to 1, got 'nan'"),
        ("--qe-calibration", "0", "must be a number above 0 and up to 1, got '0'"),
        ("--qe-calibration", "20%", "must be a number above 0 and up to 1, got '20%'"),
        ("--lr/--learning-rate", "0", "must be a number above 0 and up to 3.4e+38, got '0'"),
        ("--lr/--learning-rate", "inf", "must be a number above 0 and up to 3.4e+38, got 'inf'"),
        ("--lr/--learning-rate", "1e39", "must be a number above 0 and up to 3.4e+38, got '1e39'"),
        ("--momentum", "-0.9", "must be a number from 0 and up to 3.4e+38, got '-0.9'"),
        ("--momentum", "1e39", "must be a number from 0 and up to 3.4e+38, got '1e39'"),
        ("--weight-decay/--wd", "nan", "must be a number from 0 and up to 3.4e+38, got 'nan'"),
        ("--weight-decay/--wd", "1e308", "must be a number from 0 and up to 3.4e+38, got '1e308'"),
    ],
)
def test_numbers_out_of_their_range(capsys, flag, value, told):
    assert message(capsys, f"{flag.split('/')[-1]}={value}" if flag[1] == "-" else f"{flag[:2]}{value}") == (
        f"argument {flag}: {told}"
    )


@pytest.mark.parametrize(
    "argv, told",
    [
        ("--sense element --sense-range 0 1", f"{LEVELS}'0 1'"),
        ("--sense element --sense-range 0 1 x", f"{LEVELS}'0 1 x'"),
        ("--sense element --sense-range rank 0 1 x", f"{LEVELS}'rank 0 1 x'"),
        ("--sense rank --sense-range rank 0 1 2 3", f"{LEVELS}'rank 0 1 2 3'"),
        ("one two", "unrecognized arguments: two"),
        ("--act-stats", "argument --activation-stats/--act-stats: expected at least one argument"),
    ],
)
def test_values_that_are_not_as_many_or_not_of_the_kind_wanted(capsys, argv, told):
    assert message(capsys, *argv.split()) == told


def test_an_unknown_phase(capsys):
    told = message(capsys, "--act-stats", "valid", "all")
    assert told.startswith("argument --activation-stats/--act-stats: invalid choice: 'all'")


@pytest.mark.parametrize(
    "flag, name",
    [
        ("--out-dir", "-o/--out-dir"),
        ("--compress", "--compress"),
        ("--resume-from", "--resume-from"),
        ("--dataset", "--dataset"),
    ],
)
def test_an_empty_path_is_not_the_current_folder(capsys, flag, name):
    assert message(capsys, flag, "") == f"argument {name}: must not be empty"


def test_an_empty_data_folder_is_not_the_current_folder(capsys):
    assert message(capsys, "") == "argument DATASET_DIR: must not be empty"


def test_the_deprecated_resume_resets_the_optimizer():
    args = parse("--resume", "c")
    assert (args.resumed_checkpoint_path, args.reset_optimizer) == ("c", True)


def test_main_refuses_before_anything_is_imported(capsys):
    with pytest.raises(SystemExit) as end:
        main(["--kd-teacher"])
    assert end.value.code == 2


def test_help_imports_no_torch_and_hides_what_is_not_available():
    code = (
        "import sys, compress_classifier\n"
        "compress_classifier.make_parser()\n"
        "assert 'torch' not in sys.modules and 'distiller' not in sys.modules\n"
        "compress_classifier.main(['--help'])\n"
    )
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, check=False)
    assert (done.returncode, done.stderr) == (0, "")
    assert done.stdout.startswith("usage: compress_classifier.py [-h]")
    for flags, *_ in ACCEPTED + ADDED:
        for flag in flags:
            assert flag == "--resume" or flag in done.stdout


@pytest.mark.parametrize("closed", [">&-", "2>&-"])
def test_a_closed_output_is_one_line(closed):
    command = f"{shlex.quote(sys.executable)} compress_classifier.py --dataset digits {closed}"
    done = subprocess.run(["sh", "-c", command], cwd=ROOT, capture_output=True, text=True, check=False)
    assert (done.returncode, done.stdout + done.stderr) == (
        2,
        f"compress_classifier.py: standard output and error are needed; instead of closing one, send it to {os.devnull}\n",
    )


def test_a_current_folder_that_was_deleted_is_one_line(tmp_path):
    (tmp_path / "gone").mkdir()
    program = f"{shlex.quote(sys.executable)} {ROOT / 'compress_classifier.py'} --dataset digits"
    command = f"cd {tmp_path}/gone && rmdir ../gone && {program}"
    done = subprocess.run(["sh", "-c", command], capture_output=True, text=True, check=False)
    assert (done.returncode, done.stdout + done.stderr) == (
        2,
        "compress_classifier.py: the current folder cannot be used, No such file or directory; if it was deleted, "
        "change to another one\n",
    )


def test_a_python_without_torch_is_told_what_to_do():
    command = [sys.executable, "-E", "-S", "compress_classifier.py", "--dataset", "digits"]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=False)
    assert (done.returncode, done.stdout) == (2, "")
    assert done.stderr == (
        f"compress_classifier.py: {sys.executable} lacks a package: No module named 'torch'; "
        "install requirements.txt for it, or run .venv/bin/python, which `make setup` makes\n"
    )


def test_a_fault_of_ours_is_not_taken_for_a_missing_package(monkeypatch):
    def broken(*_):
        raise ImportError("cannot import name 'x' from 'distiller.y'", name="distiller.y")

    monkeypatch.setattr("compress_classifier.run_or_explain", broken)
    with pytest.raises(ImportError):
        main(["--dataset", "digits"])
