from __future__ import annotations

import pytest

from compress_classifier import make_parser
from distiller.apputils.distillation_usage import given_settings
from distiller.apputils.usage import check_usage
from distiller.errors import UsageError


def check(argv: str) -> None:
    parser = make_parser()
    check_usage(parser.parse_args(argv.split()))


TEACHER = "--kd-teacher lenet5 --kd-resume c "


@pytest.mark.parametrize(
    "argv, told",
    [
        ("--kd-resume c", "--kd-resume: goes with --kd-teacher"),
        ("--kd-temp 4", "--kd-temperature: goes with --kd-teacher"),
        ("--kd-temp 1", "--kd-temperature: goes with --kd-teacher"),  # its default: it was ignored once
        ("--kd-dw 0.5", "--kd-distill-wt: goes with --kd-teacher"),
        ("--kd-no-labels", "--kd-no-labels: goes with --kd-teacher"),
        ("--kd-start-epoch 3", "--kd-start-epoch: goes with --kd-teacher"),
        ("--kd-chain a,b", "--kd-chain: goes with --kd-teacher"),
        (
            "--kd-teacher lenet5",
            "--kd-teacher: needs the teacher's weights, give --kd-resume CHECKPOINT or --kd-pretrained",
        ),
        (TEACHER + "--kd-temp 1e-30", "--kd-temperature: must be a number from 0.01 to 1000, got 1e-30"),
        (TEACHER + "--kd-temp nan", "--kd-temperature: must be a number from 0.01 to 1000, got nan"),
        (TEACHER + "--kd-pretrained", "--kd-resume and --kd-pretrained: give one of them"),
        (TEACHER + "-e", "--kd-teacher: only when training"),
        (TEACHER + "--sense element", "--kd-teacher: only when training"),
        (
            TEACHER + "--kd-no-labels --kd-sw 0.3",
            "--kd-student-wt: is the weight of labels; leave it out with --kd-no-labels",
        ),
        (
            TEACHER + "--kd-dw 0",
            "--kd-distill-wt 0: nothing is learned from the teacher; give one above 0, or a --kd-teacher-wt",
        ),
        (
            TEACHER + "--kd-start-epoch 5 --epochs 5",
            "--kd-start-epoch 5: there is no such epoch, --epochs is 5",
        ),
        (
            TEACHER + "--kd-chain-resume logs/x",
            "--kd-chain-resume: goes with --kd-chain, give the flags of the interrupted chain",
        ),
        (
            TEACHER + "--kd-chain a --resume-from c",
            "--resume-from: not together with --kd-chain, whose networks begin untrained; go on with "
            "--kd-chain-resume RUN_FOLDER",
        ),
        (
            TEACHER + "--kd-chain a --exp-load-weights-from c",
            "--exp-load-weights-from: not together with --kd-chain, whose networks begin untrained",
        ),
        (TEACHER + "--kd-chain a --pretrained", "--pretrained: not together with --kd-chain"),
        (
            TEACHER + "--kd-chain a --dry-run --compress s",
            "--dry-run: not together with --kd-chain; leave the chain out",
        ),
    ],
)
def test_flags_that_contradict_each_other_or_have_no_use(argv, told):
    with pytest.raises(UsageError) as error:
        check(argv)
    assert str(error.value) == told


@pytest.mark.parametrize(
    "argv",
    [
        TEACHER,
        TEACHER + "--kd-dw 0 --kd-tw 1",
        TEACHER + "--kd-no-labels --kd-no-t-squared --kd-loss cross_entropy --kd-half --kd-no-cache",
        TEACHER + "--compress s --dry-run",
        TEACHER + "--resume-from c --kd-start-epoch 2",
        TEACHER + "--kd-chain a,b --kd-chain-resume logs/x",
        "--kd-teacher resnet18 --kd-pretrained",
    ],
)
def test_flags_that_go_together(argv):
    check(argv)


def test_the_settings_that_were_given():
    assert given_settings(make_parser().parse_args(TEACHER.split())) == []
    argv = TEACHER + "--kd-temp 4 --kd-sw 0.1 --kd-no-cache"
    assert given_settings(make_parser().parse_args(argv.split())) == [
        "--kd-no-cache",
        "--kd-temperature",
        "--kd-student-wt",
    ]


def test_a_setting_at_its_default_was_given_too():
    args = make_parser().parse_args([*TEACHER.split(), "--kd-temp", "1"])
    assert given_settings(args) == ["--kd-temperature"]
