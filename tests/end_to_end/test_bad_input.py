"""Every kind of bad input: one message on standard error, exit status 2, no traceback, nothing written."""

from __future__ import annotations

import os
import pickle

import pytest
import torch
import yaml

from tests.end_to_end.conftest import TINY
from tests.end_to_end.program import load, refused
from tests.end_to_end.test_training import AGP


class Canary:
    def __init__(self, path):
        self.path = path

    def __reduce__(self):
        return os.system, (f"touch {self.path}",)


@pytest.mark.parametrize(
    "flags, dump",
    [
        ("-e -o out --exp-load-weights-from", None),
        ("--epochs 9 -o out --resume-from", None),
        ("--epochs 9 -o out --resume", pickle.dumps),
        ("--summary model --exp-load-weights-from", pickle.dumps),
    ],
    ids=["evaluate, of torch.save", "resume, of torch.save", "old resume, bare", "summary, bare"],
)
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
def test_a_damaged_checkpoint_is_refused(program, trained, cut, message):
    program.write("c.pth.tar", cut(trained.read_bytes()))
    err = refused(program, TINY + "--epochs 9 -o out --resume-from c.pth.tar")
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
    program.run(TINY + "--epochs 1 --etrs 0.1 -o out --compress agp.yaml").succeeded()
    file = program.latest("out") / "checkpoint.pth.tar"
    program.write("other.yaml", AGP.replace("agp", "gradual"))
    err = refused(program, TINY + f"--epochs 3 -o again --compress other.yaml --resume-from {file}")
    assert err.startswith(
        f"CheckpointError: {file}: the checkpoint was written under a schedule with policies"
    )
    assert (
        "['pruner agp', 'lr_scheduler decay'], this one has ['pruner gradual', 'lr_scheduler decay']" in err
    )


def test_resuming_under_an_edited_schedule(program):
    """Its edited numbers would be ignored where the checkpoint has a state of its own."""
    program.write("agp.yaml", AGP)
    program.run(TINY + "--epochs 1 --etrs 0.1 -o out --compress agp.yaml").succeeded()
    file = program.latest("out") / "checkpoint.pth.tar"
    program.write("agp.yaml", AGP.replace("gamma: 0.5", "gamma: 0.25"))
    err = refused(program, TINY + f"--epochs 3 -o again --compress agp.yaml --resume-from {file}")
    assert err == (
        f"CheckpointError: {file}: 'lr_scheduler decay': the checkpoint was written with gamma 0.5, the "
        "schedule has 0.25; resume with the same schedule, or start anew from its weights with "
        "--exp-load-weights-from or --reset-optimizer\n"
    )


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
        (lambda text: "a: [", "s.yaml:1: is not YAML: "),
        (lambda text: "", "s.yaml:1: is empty; activation statistics wanted"),
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


@pytest.mark.parametrize(
    "flags, message",
    [
        ("--qe-no-quant-layers fcc", "UnknownNameError: --qe-no-quant-layers: 'fcc' matches no layer of the model; "
         "did you mean 'fc'?"),
        ("--qe-clip-acts avg --qe-no-clip-layers fc conv9", "UnknownNameError: --qe-no-clip-layers: 'conv9' matches no layer of the model"),
        ("--qe-bits-wts 17", "QuantizationError: --qe-bits-wts: must be 2 to 16 bits"),
        ("--qe-bits-accum 65", "QuantizationError: --qe-bits-accum: must be 2 to 64 bits"),
        ("--qe-clip-acts n_std --qe-clip-n-stds -1", "QuantizationError: --qe-clip-n-stds: clip mode N_STD needs "),
    ],
)  # fmt: skip
def test_quantization_flags_that_do_not_fit(program, flags, message):
    assert refused(program, QUANTIZE + flags).startswith(message)


def test_a_scale_of_too_many_bits_writes_nothing(program):
    err = refused(program, QUANTIZE + "--qe-scale-approx-bits 99")
    assert err == "QuantizationError: --qe-scale-approx-bits: must be 1 to 31 bits, or null, got 99\n"


def test_weights_that_are_not_finite_write_nothing(program, trained):
    checkpoint = load(trained)
    checkpoint["state_dict"]["fc.bias"][:2] = float("nan")
    torch.save(checkpoint, program.folder / "nan.pth.tar")
    for flags in ("-e", "--epochs 9", "--qe-calibration 0.1", "-e --qe"):
        err = refused(program, TINY + f"{flags} -o out --resume-from nan.pth.tar")
        assert err == (
            "CheckpointError: nan.pth.tar: fc.bias holds 2 NaN; "
            "give a checkpoint from before the training diverged\n"
        )


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
        ("--dataset os:getcwd --arch lenet5", "DatasetError: os:getcwd: failed with TypeError: "),
        ("--dataset os:sep --arch lenet5", "UnknownNameError: data set function 'os.sep' is "),
        ("--dataset digits --arch lenet5 nowhere", "UsageError: digits needs no DATASET_DIR; nowhere is not read, leave it out\n"),
    ],
)  # fmt: skip
def test_data_that_are_not_there(program, flags, message):
    (program.folder / "empty").mkdir()
    assert refused(program, f"--epochs 1 -o out {flags}").startswith(message)


OWN = """
from torch import nn

five = lambda: nn.Sequential(nn.Flatten(), nn.Linear(64, 5))
large = lambda: nn.Sequential(nn.Flatten(), nn.Linear(784, 10))
pixelwise = lambda in_channels, num_classes: nn.Conv2d(in_channels, num_classes, 3)
recurrent = lambda num_classes: nn.Sequential(nn.Flatten(), nn.LSTM(64, num_classes))
number = lambda: 5
broken = lambda: 1 / 0
"""


@pytest.mark.parametrize(
    "name, message",
    [
        ("five", " must answer images of shape (1, 1, 8, 8) with logits of shape (1, 10), got (1, 5); "
         "build it with the parameters num_classes and in_channels\n"),
        ("large", ", given images of shape (1, 1, 8, 8): failed with RuntimeError: mat1 and mat2 shapes cannot be multiplied"),
        ("broken", ": failed with ZeroDivisionError: division by zero (own.py:9)\n"),
        ("pixelwise", " must answer images of shape (1, 1, 8, 8) with logits of shape (1, 10), got (1, 10, 6, 6); "),
        ("recurrent", " must answer images of shape (1, 1, 8, 8) with logits of shape (1, 10), got tuple; "),
        ("number", " must return a torch.nn.Module, got int\n"),
    ],
)  # fmt: skip
def test_a_network_of_the_users_own_that_does_not_fit_the_data(program, name, message):
    program.write("own.py", OWN)
    err = refused(program, f"--arch own:{name} --dataset digits --epochs 1 -o out")
    assert err.replace(f"{program.folder}/", "").startswith(f"UsageError: arch: 'own:{name}'{message}")


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
        ("--arch :x", "UsageError: arch: a function is given as package.module:function, got ':x'\n"),
        ("--arch lenet5 --pretrained", "UsageError: pretrained: no trained weights are offered for 'lenet5'; "),
        ("--arch lenet5 --gpus 9", "UsageError: --gpus: no GPU 9; this machine has "),
        ("--arch lenet5 --gpus one", "UsageError: --gpus: must be comma-separated numbers, got 'one'\n"),
        ("--arch lenet5 --device toaster", "UsageError: --device toaster: cannot be used here: "),
        ("--arch lenet5 --device meta", "UsageError: --device meta: cannot be used here: "),
        (f"--arch lenet5 --name {'a' * 300}", "UsageError: name: is part of file names and may have 128 bytes, got 300; "),
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
        ("--epochs 0", "argument --epochs: must be a whole number from 1, got '0'"),
        ("--frobnicate", "unrecognized arguments: --frobnicate"),
        ("-e -o ''", "argument -o/--out-dir: must not be empty"),
    ],
)
def test_a_wrong_flag_is_one_line(program, flags, message):
    err = refused(program, TINY + flags)
    assert err == f"compress_classifier.py: error: {message} (--help lists all flags)\n"


def test_a_flag_that_would_have_no_effect_is_one_line(program):
    err = refused(program, TINY + "-e --qe --qe-clip-acts n_std")
    assert err == "UsageError: --qe-clip-acts n_std: needs --qe-clip-n-stds N\n"


@pytest.mark.parametrize("job", ["--epochs 1", "--dry-run"])
@pytest.mark.parametrize(
    "content, reason",
    [
        (None, "ModuleNotFoundError: No module named 'mine'"),
        ("import nowhere", "ModuleNotFoundError: No module named 'nowhere'"),
        ("1 / 0", "ZeroDivisionError: division by zero"),
    ],
)
def test_a_plugin_that_cannot_be_imported(program, job, content, reason):
    program.write("s.yaml", "policies: []\n")
    if content is not None:
        program.write("mine.py", content)
    err = refused(program, TINY + f"{job} -o out --compress s.yaml --plugin mine")
    assert err == (
        f"UnknownNameError: --plugin mine: cannot be imported, {reason}; "
        "give a package that lies in the current folder or is installed\n"
    )


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
