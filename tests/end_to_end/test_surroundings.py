"""The program among what a user's machine has: signals, pipes, odd names, folders, runs side by side."""

from __future__ import annotations

import json
import os
import pty
import re
import shlex
import signal
import termios
from pathlib import Path

import pytest

from tests.end_to_end.conftest import NETS, TINY
from tests.end_to_end.program import Done, differences, load


def interrupted(program, command: str, at: str, by=signal.SIGINT) -> Done:
    """Run, and interrupt as the keyboard does, or end as `kill` does, once `at` is printed."""
    running = program.start(command)
    running.wait_for(at)
    running.signal(by)
    done = running.wait()
    assert done.status == 128 + by
    assert "Traceback" not in done.out
    return done


@pytest.mark.parametrize("name, prefix", [("", ""), ("my run", "my run_")])
def test_an_interrupt_ends_a_training_with_one_line_and_a_checkpoint_that_resumes(program, name, prefix):
    done = interrupted(program, TINY + f"--epochs 1000 --etrs 0.1 -o out -n '{name}'", "Saved checkpoint to")
    left = program.latest("out") / f"{prefix}checkpoint.pth.tar"
    assert done.err == f"interrupted; go on with --resume-from {shlex.quote(str(left))}\n"
    assert not any(file.endswith(".part") for file in program.names(left.parent))
    again = TINY + f"--epochs {load(left)['epoch'] + 2} --etrs 0.1"
    program.run(again, *shlex.split(done.err.partition("go on with ")[2])).succeeded()


def test_a_terminated_training_tells_how_to_go_on_too(program):
    done = interrupted(
        program, TINY + "--epochs 1000 --etrs 0.1 -o out", "Saved checkpoint to", signal.SIGTERM
    )
    left = program.latest("out") / "checkpoint.pth.tar"
    assert done.err == f"interrupted; go on with --resume-from {left}\n"


def test_an_interrupt_before_the_first_checkpoint_names_none(program):
    done = interrupted(program, TINY + "-b 1 --epochs 1000 -o out", "Log file for this run")
    assert done.err == "interrupted\n"


def test_an_interrupted_sweep_tells_how_to_go_on(program):
    sweep = TINY + "--sense element --sense-range 0 1 0.01 -o out"
    first = interrupted(program, sweep, "blocks of images")
    folder = program.latest("out")
    assert first.err == f"interrupted; go on with --sense-resume {folder}\n"
    second = interrupted(program, f"{sweep} --sense-resume {folder}", "blocks of images")
    assert (second.err, program.latest("out")) == (first.err, folder)


SLOW = """
import time
from nets import Tiny

def net(**options):
    print("building", flush=True)
    time.sleep(60)
    return Tiny(**options)
"""


@pytest.mark.parametrize("job", ["--summary sparsity", "-e", "--epochs 1"])
def test_an_interrupted_job_that_left_nothing_does_not_tell_how_to_go_on(program, job):
    program.write("slow.py", SLOW)
    assert interrupted(program, f"--arch slow:net --dataset digits {job}", "building").err == "interrupted\n"


@pytest.mark.parametrize("flags", ["--summary compute", "--epochs 1000 --etrs 0.1 -o out"])
def test_a_reader_that_goes_away_ends_the_program_quietly(program, tmp_path, flags):
    pipe = tmp_path / "pipe"
    os.mkfifo(pipe)
    running = program.start(TINY + flags, stdout=str(pipe))
    with pipe.open():  # waits for the program to open it, too
        pass
    done = running.wait()
    assert (done.status, done.err) == (141, "")


@pytest.mark.parametrize(
    "flags", ["--summary sparsity", "--epochs 1 -o out", "-e -v -o out", "--summary model --cpu"]
)
def test_a_standard_output_that_cannot_be_written_is_one_line(program, flags):
    done = program.start(TINY + flags, stdout="/dev/full").wait()
    assert done.status == 2
    assert re.fullmatch(
        "standard output(, or a file)?: cannot be written, No space left on device; make room first\n",
        done.err,
    )


def test_a_log_file_that_cannot_be_written_ends_the_run_with_one_line(program):
    done = program.start(TINY + "--epochs 1 -o out", file_size=500, stdout="/dev/null").wait()
    log = program.latest("out") / f"{program.latest('out').name}.log"
    assert (done.status, done.err) == (2, f"{log}: cannot be written, File too large; make room first\n")


def test_names_and_paths_may_have_spaces_and_letters_of_any_alphabet(program):
    program.write("Zeitplan für ü.yaml", "policies: []\n")
    done = program.run(
        TINY + "--epochs 1 --etrs 0.05",
        *("-n", "größe ≥ 1", "-o", "meine Läufe", "--compress", "Zeitplan für ü.yaml"),
        env={"LC_ALL": "C", "PYTHONUTF8": "0", "PYTHONIOENCODING": "ascii"},
    )
    assert (done.status, done.err) == (0, "")
    folder = program.latest("meine Läufe")
    assert folder.name.startswith("größe ≥ 1___")
    checkpoint = folder / "größe ≥ 1_checkpoint.pth.tar"
    assert program.names(folder / "configs") == {"Zeitplan für ü.yaml"}
    assert "größe ≥ 1" in (folder / f"{folder.name}.log").read_text(encoding="utf-8")
    program.run(TINY + "-e -o again --exp-load-weights-from", checkpoint).succeeded()


def test_a_read_only_checkpoint_is_read(program, trained):
    copy = program.write("fixed/checkpoint.pth.tar", trained.read_bytes())
    copy.chmod(0o444)
    copy.parent.chmod(0o555)
    try:
        program.run(TINY + f"--epochs 3 --etrs 0.05 -o out --resume-from {copy}").succeeded()
    finally:
        copy.parent.chmod(0o755)
    assert program.names("fixed") == {"checkpoint.pth.tar"}
    assert copy.read_bytes() == trained.read_bytes()


def test_runs_at_the_same_moment_have_a_folder_each(program):
    both = [program.start(TINY + "--epochs 1 --etrs 0.05 --seed 1 -o out") for _ in range(3)]
    for running in both:
        running.wait().succeeded()
    folders = [path for path in (program.folder / "out").iterdir() if not path.is_symlink()]
    assert len(folders) == 3
    contents = [load(folder / "checkpoint.pth.tar")["state_dict"] for folder in folders]
    assert differences(contents[0], contents[1]) == differences(contents[0], contents[2]) == []
    assert program.latest("out") in folders


def write_images(folder: Path) -> None:
    from PIL import Image

    for part in ("train", "val"):
        for label, colour in enumerate(("red", "green", "blue")):
            (folder / part / colour).mkdir(parents=True)
            for number in range(4):
                image = Image.new("RGB", (40, 36), colour)
                image.putpixel((number, label), (255, 255, 255))
                image.save(folder / part / colour / f"{number}.png")


def test_a_folder_of_images_may_be_given_relative_to_the_current_folder(program):
    write_images(program.folder / "images")
    program.write(
        "nets.py", NETS.replace("nn.Flatten()", "nn.Sequential(nn.AdaptiveAvgPool2d(2), nn.Flatten())")
    )
    program.run(
        "../here/images --arch nets:Tiny --dataset image-folder -b 4 -j 2 --vs 0.25 --epochs 1 -o out"
    ).succeeded()
    card = json.loads((program.latest("out") / "results.json").read_text())
    assert card["measured"]["n"] == 12


def test_a_home_folder_is_expanded(program):
    program.write("home/agp.yaml", "policies: []\n")
    env = {"HOME": str(program.folder / "home")}
    program.run(TINY + "--epochs 1 --etrs 0.05 -o ~/runs --compress ~/agp.yaml", env=env).succeeded()
    assert "runs" in program.names("home")


def test_a_link_to_the_latest_run_that_is_none_is_left_alone(program):
    program.write("out/latest_log_dir", "mine\n")
    program.run(TINY + "-e --etes 0.1 -o out").succeeded()
    assert (program.folder / "out/latest_log_dir").read_text() == "mine\n"


def test_on_a_terminal_a_bar_takes_the_place_of_the_lines_and_the_log_file_has_them(program):
    main, side = pty.openpty()
    termios.tcsetwinsize(side, (24, 100))
    terminal = os.ttyname(side)
    running = program.start(TINY + "--epochs 1 --etrs 0.2 -p 1 -o out", stdout=terminal, stderr=terminal)
    shown = b""
    while b"--- results card" not in shown:
        shown += os.read(main, 65536)
    os.set_blocking(main, False)
    assert running.wait().status == 0
    os.close(main)
    os.close(side)
    assert b"Epoch: [" not in shown
    assert b"train 0:" in shown
    assert (program.folder / "out/latest_log_file").read_text().count("Epoch: [0][") == 9
    assert b"==> Top1: " in shown
