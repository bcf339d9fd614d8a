from __future__ import annotations

from itertools import product

import pytest

from compress_classifier import make_parser
from distiller.apputils.usage import check_usage
from distiller.errors import UsageError


def check(argv: str) -> None:
    parser = make_parser()
    check_usage(parser.parse_args(argv.split()), parser.parse_args([]))


PRETRAINED = "--pretrained: not together with --resume-from or --exp-load-weights-from"
QUANTIZES = "only with --evaluate --quantize-eval"
TWO = "are two jobs; give each a command line of its own"
N_STDS = "--qe-clip-n-stds: only with --qe-clip-acts n_std"


@pytest.mark.parametrize(
    "argv, told",
    [
        ("--compress", "--compress: needs a FILE"),
        ("--dry-run", "--dry-run: needs a schedule, given with --compress"),
        ("--reset-optimizer", "--reset-optimizer: goes with --resume-from"),
        ("--reset-optimizer --exp-load-weights-from c", "--reset-optimizer: goes with --resume-from"),
        ("--pretrained --resume-from c", PRETRAINED),
        ("--pretrained --resume c", PRETRAINED),
        ("--pretrained --exp-load-weights-from c", PRETRAINED),
        ("--device cuda --cpu", "--device: not together with --cpu or --gpus"),
        ("--device cuda --gpus 0", "--device: not together with --cpu or --gpus"),
        ("--optimizer adam --momentum 0.5", "--momentum: of --optimizer sgd only"),
        ("--dataset digits -e /tmp", "digits needs no DATASET_DIR; /tmp is not read, leave it out"),
        ("--dataset synthetic data", "synthetic needs no DATASET_DIR; data is not read, leave it out"),
        ("--dataset digits --download", "--download: digits is there without, leave it out"),
        ("--plugin mine", "--plugin: goes with --compress"),
        ("--plugin mine --sense element", "--plugin: goes with --compress"),
        ("--compress s --plugin my.pruners", "--plugin: must be the name of a package, got 'my.pruners'; give --plugin my"),
        ("--compress s --plugin ../mine", "--plugin: must be the name of a package, got '../mine'"),
        ("--sense-resume logs/x", "--sense-resume: goes with --sense"),
        ("--sense-range 0 0.5 0.1", "--sense-range: goes with --sense"),
        ("-e --sense-range 0 0.5 0.1", "--sense-range: goes with --sense"),
        ("--sense filter --confusion", "--confusion: only when training or evaluating"),
        ("--qe-calibration 0.1 --confusion", "--confusion: only when training or evaluating"),
        ("--summary model --confusion", "--confusion: only when training or evaluating"),
        ("--greedy", "--greedy: needs --greedy-target-density D"),
        ("--greedy --greedy-target-density 0.5 --compress s", "--compress: not together with --greedy, which has no schedule"),
        ("--thinnify", "--thinnify: needs a checkpoint, given with --resume-from or --exp-load-weights-from"),
        ("--thinnify --resume-from c -e", f"--evaluate and --thinnify: {TWO}"),
        ("--greedy-target-density 0.5", "--greedy-target-density: goes with --greedy"),
        ("--greedy-ft-epochs 2", "--greedy-ft-epochs: goes with --greedy"),
        ("--greedy --greedy-target-density 0.5 -e", f"--greedy and --evaluate: {TWO}"),
        ("--greedy --greedy-target-density 0.5 --num-best-scores 3", "--num-best-scores: only when training"),
        ("-e --num-best-scores 3", "--num-best-scores: only when training"),
        ("--sense filter --num-best-scores 3", "--num-best-scores: only when training"),
        ("-e --masks-sparsity", "--masks-sparsity: only when training"),
        ("--summary model --param-hist", "--param-hist: only when training"),
        ("--export-onnx --param-hist", "--param-hist: only when training"),
        ("--compress s --dry-run --save-untrained-model", "--save-untrained-model: only when training"),
        ("--sense filter --act-stats test", "--activation-stats: only when training or evaluating"),
        ("--qe-calibration 0.1 --act-stats test", "--activation-stats: only when training or evaluating"),
        ("-e --act-stats test train", "--activation-stats train: only when training"),
        ("-e --qe --act-stats test", "--activation-stats: not with --quantize-eval, quantized layers have their ReLU inside"),
    ],
)  # fmt: skip
def test_a_flag_that_contradicts_another_or_has_no_effect_is_refused_by_name(argv, told):
    with pytest.raises(UsageError) as error:
        check(argv)
    assert str(error.value) == told


@pytest.mark.parametrize(
    "argv, told",
    [
        ("--quantize-eval", "--quantize-eval: only with --evaluate"),
        ("--qe --sense element", "--quantize-eval: only with --evaluate"),
        ("-e --qe --qe-clip-acts n_std", "--qe-clip-acts n_std: needs --qe-clip-n-stds N"),
        ("-e --qe --qe-clip-n-stds 2", N_STDS),
        ("-e --qe --qe-clip-acts avg --qe-clip-n-stds 2", N_STDS),
        ("-e --qe --qeba 0 --qebw 0", "--qe-bits-acts 0 --qe-bits-wts 0: nothing would be quantized; give one of them bits"),
        ("-e --qe --qe-no-clip-layers fc", "--qe-no-clip-layers: without effect, nothing is clipped; goes with --qe-clip-acts"),
        ("-e --qe --qeba 0 --qe-clip-acts avg", "--qe-clip-acts: without effect, with --qe-bits-acts 0 activations are not "
         "quantized"),
        ("-e --qe --qeba 0 --qema asym_s", "--qe-mode-acts: without effect, with --qe-bits-acts 0 activations are not "
         "quantized"),
        ("-e --qe --qebw 0 --qe-per-channel", "--qe-per-channel: without effect, with --qe-bits-wts 0 weights are not "
         "quantized"),
        ("-e --qe --qebw 0 --qemw sym", "--qe-mode-wts: without effect, with --qe-bits-wts 0 weights are not quantized"),
        ("-e --qe-calibration 0.1", "--qe-calibration: with --evaluate only for --quantize-eval; "
         "leave --evaluate out to collect alone"),
    ],
)  # fmt: skip
def test_a_quantization_that_would_not_be_the_one_asked_for_is_refused(argv, told):
    with pytest.raises(UsageError) as error:
        check(argv)
    assert str(error.value) == told


SETTINGS = [
    "--qe-mode asym_u",
    "--qe-mode-acts sym",
    "--qe-mode-wts sym",
    "--qe-bits-acts 4",
    "--qe-bits-wts 4",
    "--qe-bits-accum 16",
    "--qe-clip-acts avg",
    "--qe-clip-n-stds 2",
    "--qe-no-clip-layers fc",
    "--qe-no-quant-layers fc",
    "--qe-per-channel",
    "--qe-scale-approx-bits 8",
    "--qe-save-fp-weights",
]
SOURCES = ["--qe-stats-file s", "--qe-dynamic", "--qe-config-file q"]


@pytest.mark.parametrize(
    "flag, job",
    [
        *product(SETTINGS, ["", "-e", "--sense element", "--summary model", "--qe-calibration 0.1"]),
        *product(SOURCES, ["", "-e", "--sense element", "--summary model"]),
    ],
)
def test_no_flag_of_quantization_is_ignored_by_another_job(flag, job):
    with pytest.raises(UsageError) as error:
        check(f"{flag} {job}")
    assert str(error.value) == f"{flag.split()[0]}: {QUANTIZES}"


@pytest.mark.parametrize(
    "argv, first, second",
    [
        ("-e --sense filter", "--sense", "--evaluate"),
        ("-e --qe --sense filter", "--sense", "--evaluate"),
        ("-e --summary model", "--summary", "--evaluate"),
        ("--sense filter --summary model", "--summary", "--sense"),
        ("--export-onnx -e", "--export-onnx", "--evaluate"),
        ("--export-onnx x.onnx --summary model", "--summary", "--export-onnx"),
        ("--sense filter --qe-calibration 0.1", "--sense", "--qe-calibration"),
        ("--compress s --dry-run -e", "--dry-run", "--evaluate"),
        ("--compress s --dry-run --summary model", "--summary", "--dry-run"),
    ],
)
def test_one_job_at_a_time(argv, first, second):
    with pytest.raises(UsageError) as error:
        check(argv)
    assert str(error.value) == f"{first} and {second}: {TWO}"


@pytest.mark.parametrize(
    "argv",
    [
        "",
        "--resume c",
        "--resume-from c --reset-optimizer",
        "-e --resume-from c",
        "-e --qe",
        "-e --qe --qe-calibration 0.1 --qe-bits-wts 4",
        "--qe-calibration 0.1",
        "-e --qe --qeca n_std --qe-clip-n-stds 2",
        "-e --qe --qeca avg --qe-no-clip-layers fc",
        "-e --qe --qe-config-file q --qeba 0 --qebw 0",
        "--gpus 0 --cpu",
        "--sense element --sense-resume logs/x --sense-range 0 0.5 0.1",
        "--compress s.yaml --dry-run",
        "--compress s.yaml --plugin mine --plugin yours",
        "--summary model --summary sparsity",
        "--confusion --num-best-scores 2",
        "-e --qe --confusion",
        "--masks-sparsity --param-hist --save-untrained-model --act-stats train valid test",
        "-e --act-stats test",
    ],
)
def test_flags_that_go_together(argv):
    check(argv)


def test_flags_beside_a_configuration_of_quantization_are_warned_of():
    parser = make_parser()
    command = "-e --qe --qe-config-file q --qe-bits-wts 2 --qe-no-clip-layers fc"
    assert check_usage(parser.parse_args(command.split()), parser.parse_args([])) == [
        "--qe-config-file: the file says it all, ignored are --qe-bits-wts, --qe-no-clip-layers"
    ]


@pytest.mark.parametrize("job", ["-e", "--sense element", "--qe-calibration 0.1", "--summary model"])
def test_flags_that_are_in_every_command_line_are_welcome_in_every_job(job):
    check(
        f"data {job} -j 2 -b 32 -p 5 -v --epochs 3 --lr 0.1 --wd 0 --optimizer adam --vs 0.2 --etrs 0.5 "
        "--evs 0.5 --etes 0.5 --seed 1 --det --cpu -n name -o out --download --compress s.yaml --resume-from c"
    )
