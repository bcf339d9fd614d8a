"""The shipped schedules that thin: with the command line of their headers something really goes."""

import re
import shlex
from pathlib import Path

import pytest

SCHEDULES = Path(__file__).resolve().parents[2] / "schedules/thinning"


def command_of(schedule):
    """What the header says to run, without the name of the program."""
    comment = "".join(line.lstrip("# ") for line in schedule.read_text().splitlines(True) if line[0] == "#")
    return re.search(r"python compress_classifier.py ((?:.*\\\n)*.*)", comment)[1].replace("\\\n", " ")


@pytest.mark.parametrize("schedule", sorted(SCHEDULES.glob("*_digits_*.yaml")), ids=lambda path: path.stem)
def test_a_shipped_schedule_removes_what_its_header_says(program, schedule):
    words = shlex.split(command_of(schedule))
    words[words.index(f"schedules/thinning/{schedule.name}")] = str(schedule)
    if "CHECKPOINT" in words:
        dense = "--arch lenet5 --dataset digits -b 64 --epochs 3 --lr 0.02 --seed 0 -o dense"
        program.run(dense).succeeded()
        words[words.index("CHECKPOINT")] = str(program.latest("dense") / "checkpoint.pth.tar")
    words[words.index("--epochs") + 1] = "11"
    done = program.run(shlex.join([*words, "-o", "out"])).succeeded()
    shrunk = re.search(r"parameters ([\d,]+) -> ([\d,]+)", done.out)
    was, now = (int(shrunk[i].replace(",", "")) for i in (1, 2))
    assert was == 431_080
    assert now < 0.99 * was
