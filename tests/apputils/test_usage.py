from __future__ import annotations

from itertools import product

import pytest

from compress_classifier import make_parser
from distiller.apputils.usage import check_usage
from distiller.errors import UsageError


def check(argv: str) -> None:
    parser = make_parser()
    check_usage(parser.parse_args(argv.split()))


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
        ("--optimizer adam --momentum 0.9", "--momentum: of --optimizer sgd only"),  # its default
        ("--qe-bits-acts 8", f"--qe-bits-acts: {QUANTIZES}"),
        ("-e --num-best-scores 1", "--num-best-scores: only when training"),
        ("--sense-range 0 0.95 0.05", "--sense-range: goes with --sense"),
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
        ("-e --earlyexit-lossweights 0.3", "--earlyexit-lossweights: only when training"),
        ("--earlyexit-lossweights 0.6 0.5", "--earlyexit-lossweights: must add up to less than 1, the rest is the weight of "
         "the final output, got 0.6 + 0.5 = 1.1"),
        ("--earlyexit-thresholds 1 --earlyexit-max-drop 1", "--earlyexit-thresholds and --earlyexit-max-drop: give one of them"),
        ("--sense element --earlyexit-thresholds 1", "--earlyexit-thresholds: only when training or evaluating"),
        ("--export-onnx --earlyexit-shares 0.5", "--earlyexit-shares: only when training or evaluating"),
        ("-e --qe --earlyexit-thresholds 1", "--earlyexit-thresholds: not with --quantize-eval, which quantizes no exits"),
        ("-e --earlyexit-criterion confidence", "--earlyexit-criterion: goes with --earlyexit-thresholds, --earlyexit-max-drop "
         "or --earlyexit-shares"),
        ("-e --earlyexit-criterion confidence --earlyexit-thresholds 0.5 2", "--earlyexit-thresholds: a confidence is a number "
         "from 0 to 1, got 2"),
        ("--earlyexit-shares 0.5 0.6", "--earlyexit-shares: are shares of all images, together at most 1, got 1.1"),
        ("--kd-teacher a --kd-resume b --kd-chain c --earlyexit-layers l",
         "--earlyexit-layers: not with --kd-chain, whose networks have other layers"),
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
STEPS = [
    "--qe-equalize",
    "--qe-mixed-precision 5",
    "--qe-mixed-precision-bytes 5",
    "--qe-mixed-precision-bitops 5",
    "--qe-clip-search",
    "--qe-mse-scales",
    "--qe-lapq",
    "--qe-adaround",
    "--qe-bias-correction",
]
OF_STEPS = [
    ("--qe-equalize-relu6", "--qe-equalize"),
    ("--qe-absorb-bias", "--qe-equalize"),
    ("--qe-adaround-iterations 5", "--qe-adaround"),
    ("--lapq-maxiter 5", "--qe-lapq"),
    ("--lapq-maxfev 5", "--qe-lapq"),
    ("--lapq-method COBYLA", "--qe-lapq"),
    ("--lapq-basinhopping", "--qe-lapq"),
    ("--lapq-basinhopping --lapq-bh-niter 5", "--qe-lapq"),
    ("--lapq-init-mode L2", "--qe-lapq"),
    ("--lapq-init-method Powell", "--qe-lapq"),
    ("--lapq-search-clipping", "--qe-lapq"),
]


@pytest.mark.parametrize(
    "flag, job",
    [
        *product(
            [*STEPS, "--qe-fpq 16", "--qe-search-size 0.1", "--lapq-maxfev 3", "--qe-resume x"], ["", "-e"]
        ),
        *product(SETTINGS, ["", "-e", "--sense element", "--summary model", "--qe-calibration 0.1"]),
        *product(SOURCES, ["", "-e", "--sense element", "--summary model"]),
    ],
)
def test_no_flag_of_quantization_is_ignored_by_another_job(flag, job):
    with pytest.raises(UsageError) as error:
        check(f"{flag} {job}")
    assert str(error.value) == f"{flag.split()[0]}: {QUANTIZES}"


@pytest.mark.parametrize("step", STEPS)
def test_a_step_contradicts_what_it_cannot_be_done_with(step):
    flag = step.split()[0]
    for other, told in (
        (
            "--qe-config-file q",
            "not with --qe-config-file; write the step into the file, under post_training_steps",
        ),
        ("--qe-dynamic", "not with --qe-dynamic, it is for ranges that are fixed beforehand"),
        ("--qe-fpq 16", "not with --qe-fpq, which makes no integers"),
    ):
        with pytest.raises(UsageError) as error:
            check(f"-e --qe {step} {other}")
        assert str(error.value) == f"{flag}: {told}"
    check(f"-e --qe {step} --qe-calibration 0.1")


@pytest.mark.parametrize("flag, step", OF_STEPS)
def test_a_setting_of_a_step_goes_with_the_step(flag, step):
    with pytest.raises(UsageError, match=f"^{flag.split()[0]}.*: goes with {step}$"):
        check(f"-e --qe {flag}")
    check(f"-e --qe {step} {flag}")


RESUMES = "--qe-mixed-precision, --qe-clip-search, --qe-lapq or --qe-adaround"
NEEDS = "needs a quantized model: --evaluate --quantize-eval, or"


@pytest.mark.parametrize(
    "argv, told",
    [
        ("-e --qe --qe-equalize --qe-stats-file s", "--qe-equalize: not with --qe-stats-file, it changes the ranges that the "
         "file tells of; leave the file out, or give --qe-calibration: statistics are collected afterwards"),
        ("-e --qe --qe-equalize --qesab 8",
         "--qe-scale-approx-bits: not with --qe-equalize, statistics come after it, and scales with them"),
        ("-e --qe --qe-lapq --qe-mse-scales",
         "--qe-mse-scales: not with --qe-lapq, whose scales of weights it would replace"),
        ("-e --qe --qe-lapq --lapq-bh-niter 5", "--lapq-basinhopping-niter: goes with --lapq-basinhopping"),
        ("-e --qe --qe-adaround --lapq-eval-size 0.1",
         "--qe-search-size: goes with --qe-mixed-precision, --qe-clip-search or --qe-lapq"),
        ("-e --qe --lapq-eval-memoize-dataloader",
         "--lapq-eval-memoize-dataloader: goes with --qe-mixed-precision, --qe-clip-search or --qe-lapq"),
        ("-e --qe --qe-bias-correction --qe-resume x", f"--qe-resume: goes with what can be resumed: {RESUMES}"),
        ("-e --qe --qe-adaround --qebw 0", "--qe-adaround: without effect, with --qe-bits-wts 0 weights are not quantized"),
        ("-e --qe --qe-clip-search --qeba 0",
         "--qe-clip-search: without effect, with --qe-bits-acts 0 activations are not quantized"),
        ("-e --qe --qe-one-pass --qeba 0",
         "--qe-one-pass: without effect, with --qe-bits-acts 0 no statistics are collected"),
        ("-e --qe --qe-one-pass --qe-dynamic",
         "--qe-one-pass: without effect, with --qe-dynamic no statistics are collected"),
        ("-e --qe --qe-one-pass --qe-stats-file s",
         "--qe-one-pass: without effect, with --qe-stats-file no statistics are collected"),
        ("--qe-one-pass", "--qe-one-pass: only where statistics are collected, with --qe-calibration or --quantize-eval"),
        ("-e --qe --qe-fpq 16 --qe-bits-wts 4", "--qe-bits-wts: not with --qe-fpq, which makes no integers"),
        ("-e --qe --qe-fpq 16 --export-int8", "--export-int8: not with --qe-fpq, which makes no integers"),
        ("-e --qe --qe-dynamic --export-int8", "--export-int8: not with --qe-dynamic, the ranges have to be fixed"),
        ("-e --qe --qe-dynamic --qept", "--qe-convert-pytorch: not with --qe-dynamic, the ranges have to be fixed"),
        ("-e --qe --qe-dynamic --qe-report", "--qe-report: not with --qe-dynamic, the ranges have to be fixed"),
        ("-e --qe --qeba 9 --export-int8", "--export-int8: takes at most 8 bits, got --qe-bits-acts 9"),
        ("-e --qe --qesab 9 --qept", "--qe-convert-pytorch: not with --qe-scale-approx-bits, scales are stored as they are"),
        ("-e --qe --qeba 4 --qept", "--qe-convert-pytorch: PyTorch computes with activations of 8 bits, got --qe-bits-acts 4; "
         "--export-int8 takes fewer"),
        ("--export-int8", f"--export-int8: {NEEDS} its checkpoint, given with --resume-from or --exp-load-weights-from"),
        ("-e --qept", f"--qe-convert-pytorch: {NEEDS} --evaluate and its checkpoint, given with --resume-from or "
         "--exp-load-weights-from"),
        ("--qe-report --resume-from c", f"--qe-report: {NEEDS} --evaluate and its checkpoint, given with --resume-from or "
         "--exp-load-weights-from"),
        ("-e --qe --qe-pytorch-backend qnnpack", "--qe-pytorch-backend: goes with --qe-convert-pytorch"),
    ],
)  # fmt: skip
def test_what_would_be_passed_over_in_a_quantization_is_refused(argv, told):
    with pytest.raises(UsageError) as error:
        check(argv)
    assert str(error.value) == told


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
        ("--act-hist 0.1 --qe-calibration 0.1", "--activation-histograms", "--qe-calibration"),
        ("--act-hist 0.1 -e", "--activation-histograms", "--evaluate"),
        ("--act-hist 0.1 --export-int8 --resume-from c", "--activation-histograms", "--export-int8"),
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
        "-e --qe --qe-stats-file s --qe-adaround",
        "-e --qe --qeba 0 --qe-adaround --export-int8",
        "-e --qe --qe-fpq bf16 --qe-no-quant-layers fc",
        "-e --qe --qe-clip-search --qe-no-clip-layers fc",
        "-e --qe --qe-cle --qe-adaround --qe-bias-correction --export-int8 --qept --qe-report",
        "-e --qe --qe-config-file q --qe-search-size 0.1 --qe-resume x --qe-one-pass --qe-report --export-int8",
        "-e --export-int8 --resume-from c",
        "--export-int8 --resume-from c",
        "-e --qept --qe-report --exp-load-weights-from c",
        "--qe-calibration 0.1 --qe-one-pass",
        "--act-hist 0.1",
        "--act-hist 0.1 --qe-stats-file s",
        "--gpus 0 --cpu",
        "--sense element --sense-resume logs/x --sense-range 0 0.5 0.1",
        "--compress s.yaml --dry-run",
        "--compress s.yaml --plugin mine --plugin yours",
        "--summary model --summary sparsity",
        "--confusion --num-best-scores 2",
        "-e --qe --confusion",
        "--masks-sparsity --param-hist --save-untrained-model --act-stats train valid test",
        "-e --act-stats test",
        "--earlyexit-layers a b --earlyexit-lossweights 0.3 0.3 --earlyexit-thresholds 1 never",
        "-e --earlyexit-criterion confidence --earlyexit-max-drop 0.5",
        "-e --earlyexit-thresholds 0",
    ],
)
def test_flags_that_go_together(argv):
    check(argv)


def test_flags_beside_a_configuration_of_quantization_are_warned_of():
    parser = make_parser()
    command = "-e --qe --qe-config-file q --qe-bits-wts 2 --qe-no-clip-layers fc"
    assert check_usage(parser.parse_args(command.split())) == [
        "--qe-config-file: the file says it all, ignored are --qe-bits-wts, --qe-no-clip-layers"
    ]


@pytest.mark.parametrize("job", ["-e", "--sense element", "--qe-calibration 0.1", "--summary model"])
def test_flags_that_are_in_every_command_line_are_welcome_in_every_job(job):
    check(
        f"data {job} -j 2 -b 32 -p 5 -v --epochs 3 --lr 0.1 --wd 0 --optimizer adam --vs 0.2 --etrs 0.5 "
        "--evs 0.5 --etes 0.5 --seed 1 --det --cpu -n name -o out --download --compress s.yaml --resume-from c"
    )
