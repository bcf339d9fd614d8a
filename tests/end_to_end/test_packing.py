"""`--pack` and `--unpack`, from a schedule to a file and back, with the same figures."""

from __future__ import annotations

import json
import os
import re
import shlex
from pathlib import Path

import pytest

import compress_classifier
from distiller.apputils.packing_usage import packs_only
from distiller.apputils.usage import check_usage
from distiller.errors import UsageError
from tests.end_to_end.conftest import TINY
from tests.end_to_end.program import refused

GUIDE = (Path(__file__).resolve().parents[2] / "docs/packed_files.md").read_text(encoding="utf-8")
SCHEDULE = """
quantizers:
  book: {class: CodebookQuantizer, bits_weights: 4, keep_zero: true}
pruners:
  p: {class: SparsityLevelParameterPruner, levels: {conv2.weight: 0.7, fc.weight: 0.8}}
policies:
  - quantizer: {instance_name: book}
    epochs: [1]
  - pruner: {instance_name: p}
    epochs: [0]
"""
TIMES = ("latency_single", "latency_batch", "packed", "source")


def card(folder: Path) -> dict:
    """A results card without what is measured by the clock."""

    def untimed(value):
        if not isinstance(value, dict):
            return value
        return {key: untimed(item) for key, item in value.items() if key not in TIMES}

    return untimed(json.loads((folder / "results.json").read_text()))


def test_what_training_ended_with_is_packed_and_tests_as_it_did(program):
    program.write("schedule.yaml", SCHEDULE)
    program.run(TINY + "--epochs 2 --lr 0.05 --seed 1 --compress schedule.yaml --pack -o out").succeeded()
    trained = program.latest("out")
    packed = json.loads((trained / "results.json").read_text())["packed"]
    size = os.stat(trained / "model.dsz").st_size  # noqa: PTH116
    assert packed["file"] == "model.dsz"
    assert packed["bytes"] == size
    assert packed["compression_rate"] == packed["original_bytes"] / size
    done = program.run(TINY + "-e -o again --exp-load-weights-from", trained / "model.dsz").succeeded()
    assert card(program.latest("again")) == card(trained)
    assert "packed file" not in done.out
    program.run("-o unpacked --unpack", trained / "model.dsz").succeeded()
    checkpoint = program.latest("unpacked") / "model_checkpoint.pth.tar"
    program.run(TINY + "-e -o third --exp-load-weights-from", checkpoint).succeeded()
    assert card(program.latest("third")) == card(trained)


def test_a_checkpoint_is_packed_as_it_is_and_the_log_has_the_rate(program, trained):
    done = program.run(TINY + "--pack small.dsz -o out --exp-load-weights-from", trained).succeeded()
    file = program.latest("out") / "small.dsz"
    size = file.stat().st_size
    (rate,) = re.findall(rf"compression rate ([\d,]+) / {size:,} = ([\d.]+)x", done.out)
    assert f"{int(rate[0].replace(',', '')) / size:.2f}" == rate[1]
    assert program.names(program.latest("out")) == {"LOG", "small.dsz"}
    program.run(TINY + "--epochs 1 -o on --reset-optimizer --resume-from", file).succeeded()


def test_the_rate_of_a_network_with_exits_compares_with_one_that_has_them(program):
    exits = "--earlyexit-layers relu1 --earlyexit-lossweights 0.3 "
    program.run(TINY + exits + "--epochs 1 --lr 0.05 --seed 1 --pack -o out").succeeded()
    trained = json.loads((program.latest("out") / "results.json").read_text())
    assert trained["packed"]["original_bytes"] == trained["measured"]["bytes_dense"]


def test_a_quantized_model_is_packed_after_its_test(program, trained, stats):
    flags = f"-e --qe --qe-stats-file {stats} --pack -o out --exp-load-weights-from"
    program.run(TINY + flags, trained).succeeded()
    quantized = program.latest("out")
    program.run(TINY + "-e -o again --exp-load-weights-from", quantized / "model.dsz").succeeded()
    ours, theirs = card(program.latest("again")), card(quantized)
    assert ours["measured"] == theirs["measured"]


def test_what_is_refused(program, trained):
    damaged = bytearray(b"\x89DSZ\r\n\x1a\n" + bytes(40))
    path = program.write("damaged.dsz", bytes(damaged))
    told = "CheckpointError: {}: header has version 0, this library reads 1; use the library's version"
    assert refused(program, "--unpack", path).startswith(told.format(path))
    assert refused(program, TINY + "-e --exp-load-weights-from", path).startswith(told.format(path))
    assert refused(program, "--unpack", trained).startswith(
        f"CheckpointError: {trained}: is not a packed file: "
    )
    assert refused(program, TINY + "--pack no/x.dsz --exp-load-weights-from", trained) == (
        "UsageError: --pack no/x.dsz: there is no folder no; give the name of a file in a folder that is there\n"
    )


@pytest.mark.parametrize("more, is_trained", [("", False), ("--epochs 6", True), ("--lr 0.1", True)])
def test_with_a_flag_of_training_a_checkpoint_is_trained_before_it_is_packed(more, is_trained):
    args = compress_classifier.make_parser().parse_args(shlex.split(f"--pack x --resume-from c {more}"))
    check_usage(args)
    assert packs_only(args) is not is_trained


def test_a_file_of_another_architecture_is_not_unpacked_as_asked(program, trained):
    program.run(TINY + "--pack own.dsz -o out --exp-load-weights-from", trained).succeeded()
    path = program.latest("out") / "own.dsz"
    assert refused(program, "--arch resnet18 --unpack", path) == (
        f"UsageError: --arch resnet18: {path} is of 'nets:Tiny'; leave the flag out\n"
    )


@pytest.mark.parametrize(
    "argv, told",
    [
        ("--pack x --sense filter", "--pack: only when training or evaluating, or with a checkpoint, given with --resume-from "
         "or --exp-load-weights-from, alone"),
        ("--pack x --resume-from c --thinnify", "--thinnify and --pack: are two jobs; give each a command line of its own"),
        ("--pack x --resume-from c --unpack y", "--pack and --unpack: are two jobs; give each a command line of its own"),
        ("--unpack y --resume-from c", "--unpack: not together with --resume-from or --exp-load-weights-from, which take a "
         "packed file as it is"),
        ("--unpack y --compress s", "--compress: not together with --unpack, which trains nothing"),
        ("--unpack y --epochs 3", "--unpack: trains nothing; leave the flags of training out"),
        ("--pack x --resume-from c --param-hist", "--param-hist: only when training"),
    ],
)  # fmt: skip
def test_flags_that_contradict_each_other(argv, told):
    parser = compress_classifier.make_parser()
    with pytest.raises(UsageError) as error:
        check_usage(parser.parse_args(shlex.split(argv)))
    assert str(error.value) == told


COMMANDS = re.findall(r"^python compress_classifier.py ((?:[^\n]*\\\n)*[^\n]*)", GUIDE, re.MULTILINE)


@pytest.mark.parametrize("command", [command.replace("\\\n", " ") for command in COMMANDS])
def test_the_guides_command_lines_are_in_order(command):
    parser = compress_classifier.make_parser()
    args = parser.parse_args(shlex.split(command))
    check_usage(args)
    assert args.pack
