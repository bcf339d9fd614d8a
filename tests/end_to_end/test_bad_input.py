"""Every kind of bad input: one message on standard error, exit status 2, no traceback, nothing written."""

from __future__ import annotations

import os
import pickle

import pytest
import torch
import yaml

from tests.end_to_end.conftest import TINY
from tests.end_to_end.program import load, refused
from tests.end_to_end.test_training import AGP, OWN_PRUNER, PLUGIN

TRAIN = TINY + "--epochs 1 --etrs 0.1 -o out "
LEVELS = "class: SparsityLevelParameterPruner, levels: {conv2.weight: 0.5}"


def schedule(component: str, policy: str = "starting_epoch: 0, ending_epoch: 2, frequency: 1") -> str:
    return f"pruners:\n  p: {{{component}}}\npolicies:\n  - {{pruner: {{instance_name: p}}, {policy}}}\n"


SCHEDULES = {
    "unknown class": (
        schedule("class: AutomatedGradualPrunner"),
        "  :2    pruners.p.class: unknown class 'AutomatedGradualPrunner'; did you mean 'AutomatedGradualPruner'?",
    ),
    "misspelt weight": (
        schedule("class: SparsityLevelParameterPruner, levels: {conv2.weigth: 0.5}"),
        "  :2    pruners.p.levels.conv2.weigth: no parameter 'conv2.weigth' in the model; "
        "did you mean 'conv2.weight'?",
    ),
    "pattern without a match": (
        schedule("class: SparsityLevelParameterPruner, levels: {'layer.*': 0.5}"),
        "  :2    pruners.p.levels.layer.*: ",
    ),
    "wrong type": (
        schedule("class: SparsityLevelParameterPruner, levels: {conv2.weight: much}"),
        "  :2    pruners.p.levels.conv2.weight: must be a number, got 'much'",
    ),
    "out of range": (
        schedule("class: SparsityLevelParameterPruner, levels: {conv2.weight: 50}"),
        "  :2    pruners.p",
    ),
    "missing key": (
        schedule("class: AutomatedGradualPruner, initial_sparsity: 0.1, weights: [conv2.weight]"),
        "  :2    pruners.p.final_sparsity: missing; AutomatedGradualPruner needs it",
    ),
    "missing class": (
        schedule("levels: {}"),
        "  :2    pruners.p: missing key 'class': the name of what it is",
    ),
    "unknown key": (schedule(LEVELS + ", level: {}"), "  :2    pruners.p.level: "),
    "duplicate key": (
        "pruners:\n  p:\n    class: X\n    class: Y\npolicies: []\n",
        "  :4    pruners.p: duplicate key 'class', first given in line 3; keep one",
    ),
    "overlapping pruners": (
        f"pruners:\n  p: {{{LEVELS}}}\n  q: {{{LEVELS}}}\npolicies:\n"
        "  - {pruner: {instance_name: p}, starting_epoch: 0, ending_epoch: 3, frequency: 1}\n"
        "  - {pruner: {instance_name: q}, epochs: [2]}\n",
        "  :6    policies[1]: 'pruner p' (epochs 0..2) and 'pruner q' (epochs 2..2) both prune 'conv2.weight'; "
        "let one end before the other begins",
    ),
    "epochs given twice": (
        schedule(LEVELS, "epochs: [1], starting_epoch: 0"),
        "  :4    policies[0]: both 'epochs'",
    ),
    "no policies": (
        "pruners: {}\n",
        "  :1    missing section 'policies': nothing says when anything happens",
    ),
    "unknown section": (
        "prunners: {}\npolicies: []\n",
        "  :1    prunners: unknown section; did you mean 'pruners'?",
    ),
    "unknown instance": (
        schedule(LEVELS).replace("instance_name: p", "instance_name: pp"),
        "  :4    policies[0].pruner.instance_name: no pruner 'pp' in 'pruners'",
    ),
    "empty": ("", "  :1    is empty; a schedule has at least a 'policies' list"),
    "binary": (bytes(range(256)), "  :1    is not text (byte 128 is not UTF-8); a YAML file is wanted"),
    "not YAML": ("pruners: [\n", "is not YAML: "),
    "class of a package that was not allowed": (OWN_PRUNER, "allow it with --plugin mine"),
}


@pytest.mark.parametrize("fault", SCHEDULES)
def test_a_wrong_schedule_does_not_start_to_train(program, fault):
    content, message = SCHEDULES[fault]
    program.write("mine/__init__.py", "raise SystemExit('this must not run')\n")
    program.write("mine/pruners.py", PLUGIN)
    program.write("s.yaml", content)
    err = refused(program, TRAIN + "--compress s.yaml")
    assert err.startswith("ScheduleError: s.yaml has 1 error\n  :")
    assert message in err


def test_all_faults_of_a_schedule_are_told_at_once(program):
    program.write(
        "s.yaml", AGP.replace("conv2.weight", "conv2.weigth").replace("ExponentialLR", "ExponentialRL")
    )
    assert refused(program, TRAIN + "--compress s.yaml") == (
        "ScheduleError: s.yaml has 2 errors\n"
        "  :7    pruners.agp.weights[0]: no parameter 'conv2.weigth' in the model; did you mean 'conv2.weight'?\n"
        "  :9    lr_schedulers.decay.class: unknown class 'ExponentialRL'; did you mean 'ExponentialLR'?\n"
    )


@pytest.mark.parametrize(
    "name, reason", [("nowhere.yaml", "No such file or directory"), (".", "Is a directory")]
)
def test_a_schedule_that_cannot_be_read(program, name, reason):
    err = refused(program, TRAIN + f"--compress {name}")
    assert err == f"ScheduleError: {name} has 1 error\n  :1    cannot be read: {reason}\n"


def test_a_wrong_schedule_fails_in_a_dry_run_too(program):
    program.write("s.yaml", SCHEDULES["misspelt weight"][0])
    assert "did you mean 'conv2.weight'?" in refused(program, TINY + "--dry-run --compress s.yaml")


class Canary:
    def __init__(self, path):
        self.path = path

    def __reduce__(self):
        return os.system, (f"touch {self.path}",)


@pytest.mark.parametrize("flags", ["-e -o out --exp-load-weights-from", "--epochs 9 -o out --resume-from",
                                   "--epochs 9 -o out --resume", "--summary model --exp-load-weights-from"])  # fmt: skip
@pytest.mark.parametrize("dump", [pickle.dumps, None], ids=["a bare pickle", "a file of torch.save"])
def test_a_malicious_pickle_is_refused_and_not_run(program, tmp_path, flags, dump):
    content = {"epoch": 0, "state_dict": Canary(tmp_path / "canary")}
    file = program.write("evil.pth.tar", dump(content) if dump else b"")
    if not dump:
        torch.save(content, file)
    err = refused(program, TINY + flags, file)
    assert (
        f"{file}: refused, nothing in it was run: its pickle asks for '{os.system.__module__}.system'" in err
    )
    assert not (tmp_path / "canary").exists()


@pytest.mark.parametrize(
    "cut, message",
    [
        (lambda data: data[: len(data) // 2], "is cut off or damaged"),
        (lambda data: data[:-1], "is cut off or damaged"),
        (lambda data: b"", "is empty; use another checkpoint"),
        (lambda data: b"hello, world", "is not a checkpoint: starts with b'hello, world'"),
        (lambda data: data[:3000] + bytes([data[3000] ^ 255]) + data[3001:], "is cut off or damaged"),
    ],
    ids=["half", "all but a byte", "nothing", "text", "a byte flipped"],
)
@pytest.mark.parametrize("flags", ["-e -o out --exp-load-weights-from", "--epochs 9 -o out --resume-from"])
def test_a_damaged_checkpoint_is_refused(program, trained, flags, cut, message):
    program.write("c.pth.tar", cut(trained.read_bytes()))
    err = refused(program, TINY + flags, "c.pth.tar")
    assert err.startswith(f"CheckpointError: c.pth.tar: {message}")


def test_a_checkpoint_that_is_not_there(program):
    err = refused(program, TINY + "-e -o out --resume-from nowhere.pth.tar")
    assert err == "CheckpointError: nowhere.pth.tar: no such file; check the path\n"


@pytest.mark.parametrize(
    "flags", ["-e --exp-load-weights-from", "--epochs 9 --resume-from", "-e --qe --resume-from"]
)
def test_a_checkpoint_of_another_model(program, trained, flags):
    err = refused(program, f"--arch lenet_300_100 --dataset digits -o out {flags} {trained}")
    assert (
        f"{trained}: is of another model: the checkpoint is of 'nets:Tiny', the model is 'lenet_300_100'"
        in err
    )
    assert "create the model as 'nets:Tiny'" in err


def test_epochs_that_a_checkpoint_has_finished_already(program, trained):
    for epochs in (1, 2):
        assert refused(program, TINY + f"--epochs {epochs} -o out --resume-from {trained}") == (
            f"UsageError: --epochs {epochs}: nothing to do, the checkpoint has finished epoch 1; "
            "give an ending epoch above 2, or --reset-optimizer to begin at 0\n"
        )


def test_resuming_with_another_optimizer(program, trained):
    err = refused(program, TINY + f"--epochs 3 --optimizer adam -o out --resume-from {trained}")
    assert err == f"CheckpointError: {trained}: its optimizer is SGD, got Adam; use SGD\n"


def test_resuming_under_another_schedule(program):
    program.write("agp.yaml", AGP)
    program.run(TRAIN + "--compress agp.yaml").succeeded()
    file = program.latest("out") / "checkpoint.pth.tar"
    program.write("other.yaml", schedule(LEVELS))
    err = refused(program, TINY + f"--epochs 3 -o again --compress other.yaml --resume-from {file}")
    assert err.startswith("CheckpointError: the checkpoint was written under a schedule with policies")
    assert "['pruner agp', 'lr_scheduler decay'], this one has ['pruner p']" in err


def test_a_quantized_checkpoint_is_only_evaluated(program, trained):
    program.run(TINY + f"-e --qe --qe-dynamic -o out --resume-from {trained}").succeeded()
    file = program.latest("out") / "quantized_checkpoint.pth.tar"
    for flags in ("--epochs 5", "-e --qe", "--sense element", "--qe-calibration 0.1"):
        assert refused(program, TINY + f"{flags} -o again --resume-from {file}") == (
            "UsageError: the checkpoint is of a quantized model, which can be evaluated (--evaluate) and nothing else\n"
        )


QUANTIZE = TINY + "-e --qe -o out "


@pytest.mark.parametrize(
    "change, message",
    [
        (lambda text: text.replace("conv2", "convolution"), "s.yaml: 1 of 10 layers are not in the model "
         "('convolution'); the statistics are of another model"),
        (lambda text: text.replace("avg_max", "average"), "s.yaml: conv1.inputs[0].avg_max: is missing"),
        (lambda text: "- 1\n", "s.yaml: layers by name wanted, got [1]"),
        (lambda text: "a: [", "s.yaml:1: is no YAML"),
        (lambda text: "", "s.yaml: is empty; activation statistics wanted"),
        (lambda text: bytes(range(256)), "s.yaml: is no text file"),
        (lambda text: yaml.safe_dump({"conv1": yaml.safe_load(text)["conv1"]}), "s.yaml: "),
    ],
    ids=["another model", "a key less", "a list", "no YAML", "empty", "binary", "a layer only"],
)  # fmt: skip
def test_statistics_that_do_not_fit(program, trained, stats, change, message):
    program.write("s.yaml", change(stats.read_text()))
    err = refused(program, QUANTIZE + f"--qe-stats-file s.yaml --resume-from {trained}")
    assert err.startswith(f"StatsError: {message}")


def test_statistics_that_are_not_there(program):
    err = refused(program, QUANTIZE + "--qe-stats-file nowhere.yaml")
    assert err == "StatsError: nowhere.yaml: cannot be read, No such file or directory\n"


@pytest.mark.parametrize("source", ["--qe-dynamic", "--qe-calibration 0.1"])
@pytest.mark.parametrize(
    "flags, message",
    [
        ("--qe-no-quant-layers fcc", "UnknownNameError: overrides: 'fcc' matches no layer of the model; "
         "did you mean 'fc'?"),
        ("--qe-no-clip-layers fc conv9", "UnknownNameError: overrides: 'conv9' matches no layer of the model"),
        ("--qe-bits-wts 17", "QuantizationError: bits_weights: must be 2 to 16 bits"),
        ("--qe-bits-accum 64", "QuantizationError: bits_accum: must be 2 to 32 bits"),
        ("--qe-clip-acts n_std --qe-clip-n-stds -1", "QuantizationError: clip_n_stds: clip mode N_STD needs "),
    ],
)  # fmt: skip
def test_quantization_flags_that_do_not_fit(program, flags, message, source):
    assert refused(program, QUANTIZE + f"{source} {flags}").startswith(message)


def test_a_scale_of_too_many_bits_writes_nothing_although_statistics_were_collected(program):
    err = refused(program, QUANTIZE + "--qe-scale-approx-bits 99")
    assert err == "QuantizationError: scale_approx_mult_bits: must be 1 to 31 bits, or null, got 99\n"


def test_activations_that_are_not_finite_write_nothing(program, trained):
    checkpoint = load(trained)
    checkpoint["state_dict"]["conv1.weight"].fill_(float("nan"))
    torch.save(checkpoint, program.folder / "nan.pth.tar")
    for flags in ("--qe-calibration 0.1", "-e --qe"):
        err = refused(program, TINY + f"{flags} -o out --resume-from nan.pth.tar")
        assert err.startswith("StatsError: ")
        assert "NaN or infinite values in the first pass; is the model trained?" in err


@pytest.mark.parametrize(
    "content, message",
    [
        ("quantizers:\n  q:\n    class: PostTrainLinearQuantizer\n    overrides:\n      conv9: {bits_weights: 4}\n",
         "  :5    quantizers.q.overrides.conv9: overrides: 'conv9' matches no layer of the model"),
        ("pruners: {}\npolicies: []\n", "  :1    has no component of class 'PostTrainLinearQuantizer'"),
        ("quantizers:\n  q: {class: PostTrainLinearQuantizer, bits: 8}\n", "  :2    quantizers.q.bits: "),
        ("", "  :1    is empty"),
    ],
)  # fmt: skip
def test_a_configuration_of_quantization_that_does_not_fit(program, content, message):
    program.write("q.yaml", content)
    err = refused(program, QUANTIZE + "--qe-config-file q.yaml")
    assert err.startswith("ScheduleError: q.yaml has 1 error\n" + message)


@pytest.mark.parametrize(
    "flags, message",
    [
        ("--dataset cifar10 --arch resnet20_cifar empty", "DatasetError: cifar10: the data are not there, looked in\n"
         "  empty/cifar-10-batches-py: no such folder\n  empty: lacks data_batch_1, "),
        ("--dataset mnist --arch lenet5 nowhere", "DatasetError: mnist: the data are not there, looked in\n"
         "  nowhere/MNIST/raw: no such folder\n"),
        ("--arch lenet5", "DatasetError: mnist: the data are not there, no DATASET_DIR was given\n"
         "give the DATASET_DIR that holds them, or add --download to get them into it"),
        ("--dataset image-folder --arch squeezenet1_1 empty", "DatasetError: image-folder: empty: lacks image folders, "
         "it holds nothing; give as DATASET_DIR a folder with train/ and val/"),
        ("--arch squeezenet1_1", "DatasetError: imagenet: no DATASET_DIR was given; "),
        ("--dataset digitz --arch lenet5", "UnknownNameError: dataset: there is no 'digitz', only digits, "),
        ("--dataset mine:f --arch lenet5", "UnknownNameError: data set function 'mine.f' cannot be imported: "),
    ],
)  # fmt: skip
def test_data_that_are_not_there(program, flags, message):
    (program.folder / "empty").mkdir()
    assert refused(program, f"--epochs 1 -o out {flags}").startswith(message)


@pytest.mark.parametrize("job", ["-e", "-e --qe --qe-dynamic", "--qe-calibration 0.1", "--sense element"])
def test_every_job_looks_for_its_data_before_it_writes(program, job):
    message = "DatasetError: mnist: the data are not there, no DATASET_DIR was given\n"
    assert refused(program, f"{job} -o out --arch lenet5").startswith(message)


@pytest.mark.parametrize(
    "flags, message",
    [
        ("--arch lenet55", "UnknownNameError: arch: unknown architecture 'lenet55'; did you mean 'lenet5'?\n"),
        ("--arch nets:Tinny", "UnknownNameError: architecture 'nets.Tinny' cannot be imported: "),
        ("--arch nowhere.nets:Tiny", "UnknownNameError: architecture 'nowhere.nets.Tiny' cannot be imported: "),
        ("--arch lenet5 --pretrained", "UsageError: pretrained: no trained weights are offered for 'lenet5'; "),
        ("--arch lenet5 --gpus 9", "UsageError: --gpus: no GPU 9; this machine has "),
        ("--arch lenet5 --gpus one", "UsageError: --gpus: must be comma-separated numbers, got 'one'\n"),
        ("--arch lenet5 --device toaster", "UsageError: --device toaster: cannot be used here: "),
        ("--arch lenet5 --name a/b", "UsageError: name: cannot be part of a folder's name, got 'a/b'; "),
        ("--arch lenet5 --vs 0.0001", "DatasetError: validation_split: 0.0001 of 1438 images leaves none to validate on; "),
        ("--arch lenet5 --sense element --sense-range 0 2 0.5", "UsageError: sensitivity range: start and stop must satisfy "),
        ("--arch lenet5 --sense element --sense-range 0 1 0", "UsageError: sensitivity range: step must lie between "),
        ("--arch lenet_300_100 --sense channel", "UsageError: sensitivity: axis 'channel' takes convolution weights "),
        ("--arch lenet5 --sense element --sense-resume .", "UsageError: --sense-resume .: no sweep to go on with, "
         "there is no sensitivity.json; give the run folder of a sweep, or leave the flag out\n"),
    ],
)  # fmt: skip
def test_names_and_numbers_that_do_not_fit(program, flags, message):
    assert refused(program, f"--dataset digits --epochs 1 --etrs 0.05 -o out {flags}").startswith(message)


@pytest.mark.parametrize(
    "job, folder, reason",
    [
        ("--epochs 1", "file", "File exists"),
        ("--epochs 1", "file/below", "Not a directory"),
        ("-e", "file/below", "Not a directory"),
        ("-e --qe", "file/below", "Not a directory"),
        ("--qe-calibration 0.1", "file/below", "Not a directory"),
        ("--sense element", "file/below", "Not a directory"),
    ],
)
def test_an_output_folder_that_cannot_be_written(program, job, folder, reason):
    program.write("file", "of the user's\n")
    err = refused(program, TINY + f"{job} --etrs 0.05 -o {folder}")
    assert err == (
        f"UsageError: out-dir: '{program.folder / folder}' cannot be written, {reason}; "
        "give a folder that can with --out-dir\n"
    )


@pytest.mark.parametrize(
    "flags, message",
    [
        ("--qe-clip-acts n_std -e --qe", "--qe-clip-acts n_std: needs --qe-clip-n-stds N"),
        ("--greedy", "--greedy: greedy pruning is not available in this version"),
        ("--epochs 0", "argument --epochs: must be a whole number from 1, got '0'"),
        ("--frobnicate", "unrecognized arguments: --frobnicate"),
    ],
)
def test_a_wrong_flag_is_one_line(program, flags, message):
    err = refused(program, TINY + flags)
    assert err == f"compress_classifier.py: error: {message} (--help lists all flags)\n"


def test_another_sweep_in_the_folder_to_resume(program, trained):
    sweep = TINY + "--sense filter --etes 0.1 --sense-range 0 0.8 0.4 "
    program.run(sweep + f"-o out --resume-from {trained}").succeeded()
    folder = program.latest("out")
    for flags in (
        f"--sense-range 0 0.8 0.2 --resume-from {trained}",
        "",
        f"--etes 0.2 --resume-from {trained}",
    ):
        err = refused(program, sweep + f"--sense-resume {folder} {flags}")
        assert err.startswith("SensitivityError: ")
        assert "the folder holds another sweep" in err


EXPLODING = """
lr_schedulers:
  lr: {class: MultiStepMultiGammaLR, milestones: [1], gammas: [1.0e+30]}
policies:
  - {lr_scheduler: {instance_name: lr}, starting_epoch: 0, ending_epoch: 5, frequency: 1}
"""


@pytest.mark.parametrize("print_freq", [1, 1000])
def test_training_stops_at_a_loss_that_is_not_finite_and_the_last_good_checkpoint_stays(program, print_freq):
    program.write("s.yaml", EXPLODING)
    done = program.run(TINY + f"--epochs 4 --lr 0.02 --etrs 0.1 -p {print_freq} -o out --compress s.yaml")
    assert done.status == 2
    assert done.err.startswith("DivergenceError: epoch 1, mini-batch ")
    assert done.err.endswith(
        ": the training loss is nan; training stops here and the last checkpoint stays as it is. Try a lower --lr\n"
    )
    log = (program.folder / "out/latest_log_file").read_text()
    assert f"stopped by {done.err.strip()}" in log
    folder = program.latest("out")
    assert program.names(folder) == {
        "LOG",
        "EVENTS",
        "configs",
        "checkpoint.pth.tar",
        "best.pth.tar",
        "epochs.csv",
    }
    assert load(folder / "checkpoint.pth.tar")["epoch"] == 0
    program.run(TINY + f"-e --resume-from {folder / 'checkpoint.pth.tar'}").succeeded()


def test_an_epoch_of_one_step_that_spoils_the_weights_writes_no_checkpoint(program):
    program.write("s.yaml", EXPLODING)
    done = program.run(TINY + "--epochs 4 --lr 0.02 --etrs 0.01 -o out --compress s.yaml")
    assert done.status == 2
    assert done.err.startswith("DivergenceError: epoch 1: the validation loss is ")
    state = load(program.latest("out") / "checkpoint.pth.tar")["state_dict"]
    assert all(bool(torch.isfinite(value).all()) for value in state.values())


def test_a_training_that_diverges_at_once_leaves_the_checkpoint_that_it_began_with(program, trained):
    before = trained.read_bytes()
    done = program.run(TINY + f"--epochs 3 --lr 1e30 -p 1 -o out --resume-from {trained} --reset-optimizer")
    assert done.status == 2
    assert "the training loss is nan" in done.err
    assert trained.read_bytes() == before
    assert "checkpoint.pth.tar" not in program.names(program.latest("out"))
