"""Kills, failing disks and damaged files: the old checkpoint or the new one, whole, or one clear message."""

import errno
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from torch import nn

from distiller.apputils.checkpoint import read_checkpoint, save_checkpoint
from distiller.apputils.checkpoint_format import FORMAT_VERSION
from distiller.errors import CheckpointError

ROOT = Path(__file__).resolve().parents[2]


def net():
    return nn.Sequential(nn.Conv2d(1, 3, 3), nn.BatchNorm2d(3))


def message(call, *args, **kwargs):
    with pytest.raises(CheckpointError) as caught:
        call(*args, **kwargs)
    return str(caught.value)


@pytest.mark.skipif(os.name != "posix" or os.geteuid() == 0, reason="root may write everywhere")
def test_unwritable_folder_is_refused(tmp_path):
    tmp_path.chmod(0o500)
    assert "cannot be written: Permission denied" in message(save_checkpoint, 0, "net", net(), dir=tmp_path)


FAILING_STEPS = {
    "open": "distiller.atomic_file.Path.open",
    "write": "distiller.apputils.checkpoint.torch.save",
    "sync": "distiller.atomic_file.os.fsync",
    "rename": "distiller.atomic_file.Path.replace",
}


@pytest.mark.parametrize("is_best", [False, True])
@pytest.mark.parametrize("step", FAILING_STEPS.values(), ids=FAILING_STEPS)
def test_when_a_step_fails_the_old_files_stay_and_nothing_is_left_behind(
    tmp_path, monkeypatch, step, is_best
):
    save_checkpoint(0, "net", net(), is_best=True, dir=tmp_path)

    def fails(*args, **kwargs):
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    with monkeypatch.context() as patch:
        patch.setattr(step, fails)
        text = message(save_checkpoint, 1, "net", net(), is_best=is_best, dir=tmp_path)
    first = "best.pth.tar" if is_best else "checkpoint.pth.tar"
    assert text == (
        f"{tmp_path / first}: cannot be written: No space left on device; make room, or choose another folder"
    )
    assert sorted(path.name for path in tmp_path.iterdir()) == ["best.pth.tar", "checkpoint.pth.tar"]
    assert [read_checkpoint(path).epoch for path in tmp_path.iterdir()] == [0, 0]


def test_a_full_disk_is_told_in_the_systems_words(tmp_path):
    """torch itself reports only that a position in the file was not as expected."""
    script = (
        "import resource, sys; from torch import nn\n"
        "from distiller.apputils.checkpoint import save_checkpoint\n"
        "from distiller.errors import CheckpointError\n"
        "resource.setrlimit(resource.RLIMIT_FSIZE, (20_000, 20_000))\n"
        "try: save_checkpoint(0, 'net', nn.Linear(200, 200), dir=sys.argv[1])\n"
        "except CheckpointError as error: print(error)\n"
    )
    pytest.importorskip("resource")
    done = run_script(script, tmp_path)
    assert "cannot be written: File too large; make room, or choose another folder" in done
    assert list(tmp_path.iterdir()) == []


KILLED = """
import os, signal, sys, warnings
from pathlib import Path
import torch
from torch import nn
from distiller import atomic_file
from distiller.apputils import checkpoint

warnings.simplefilter("ignore", DeprecationWarning)  # of fork, with threads that torch started
folder = Path(sys.argv[1])

def model(epoch):
    made = nn.Linear(50, 50)
    for parameter in made.parameters():
        nn.init.constant_(parameter, epoch)
    return made

def die(*args, **kwargs):
    os.kill(os.getpid(), signal.SIGKILL)

def half_written(document, file):
    save(document, file)
    file.truncate(file.tell() // 2)
    file.flush()
    die()

syncs = iter(range(9))
def second_sync(descriptor):
    if next(syncs) == 1:
        die()

save, replace = torch.save, Path.replace
steps = {
    "before the write": (torch, "save", die),
    "half written": (torch, "save", half_written),
    "before the sync": (os, "fsync", die),
    "before the rename": (Path, "replace", die),
    "after the rename": (Path, "replace", lambda *paths: (replace(*paths), die())),
    "before the folder is synced": (os, "fsync", second_sync),
}
checkpoint.save_checkpoint(0, "net", model(0), dir=folder)
for name, patch in steps.items():
    child = os.fork()
    if child == 0:
        setattr(*patch)
        checkpoint.save_checkpoint(1, "net", model(1), dir=folder)
        os._exit(0)
    _, status = os.waitpid(child, 0)
    read = checkpoint.read_checkpoint(folder / "checkpoint.pth.tar")
    whole = all(bool((tensor == read.epoch).all()) for tensor in read.state_dict.values())
    print(name, os.WTERMSIG(status), read.epoch, whole, sep=", ")
checkpoint.save_checkpoint(2, "net", model(2), dir=folder)
print(sorted(path.name for path in folder.iterdir()))
"""


@pytest.mark.skipif(not hasattr(os, "fork"), reason="needs fork")
def test_a_kill_at_any_moment_leaves_the_old_file_or_the_new_one_whole(tmp_path):
    assert run_script(KILLED, tmp_path).splitlines() == [
        "before the write, 9, 0, True",
        "half written, 9, 0, True",
        "before the sync, 9, 0, True",
        "before the rename, 9, 0, True",
        "after the rename, 9, 1, True",
        "before the folder is synced, 9, 1, True",
        "['checkpoint.pth.tar']",
    ]


def run_script(script, *args):
    done = subprocess.run(
        [sys.executable, "-c", script, *map(str, args)],
        cwd=ROOT, env={**os.environ, "OMP_NUM_THREADS": "1"}, capture_output=True, text=True, check=False,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    return done.stdout


# --- damaged and foreign files


def test_a_flipped_byte_is_noticed_or_harmless(tmp_path):
    """torch writes checksums and does not verify them: a flipped weight would load unnoticed."""
    path = save_checkpoint(0, "net", net(), dir=tmp_path)
    content, whole = path.read_bytes(), read_checkpoint(path)
    noticed = 0
    for position in range(0, len(content), 151):
        path.write_bytes(content[:position] + bytes([content[position] ^ 1]) + content[position + 1 :])
        try:
            read = read_checkpoint(path)
        except CheckpointError as error:
            assert str(error).startswith(str(path))  # noqa: PT017 - either outcome is right
            noticed += 1
        else:
            assert {n: t.tolist() for n, t in read.state_dict.items()} == {
                n: t.tolist() for n, t in whole.state_dict.items()
            }
    assert noticed > 10


def test_a_flipped_weight_is_named(tmp_path):
    model = nn.Linear(64, 64, bias=False)
    path = save_checkpoint(0, "net", model, dir=tmp_path)
    content = path.read_bytes()
    at = content.index(model.weight.detach().numpy().tobytes())
    path.write_bytes(content[: at + 5] + bytes([content[at + 5] ^ 1]) + content[at + 6 :])
    assert message(read_checkpoint, path) == (
        f"{path}: is damaged: the checksum of 'archive/data/0' is wrong; use another checkpoint"
    )


def rewritten(path, **changes):
    torch.save({**torch.load(path, weights_only=True), **changes}, path)
    return path


def test_another_format_version_is_refused(tmp_path):
    path = rewritten(save_checkpoint(0, "net", net(), dir=tmp_path), format_version=99)
    assert message(read_checkpoint, path) == (
        f"{path}: has format version 99, this library reads {FORMAT_VERSION}; "
        "use the library's version that wrote it"
    )


@pytest.mark.parametrize(
    ("key", "value"), [("state_dict", [1]), ("rng", None), ("epoch", "1"), ("extras", 3)]
)
def test_fields_of_the_wrong_kind_are_refused(tmp_path, key, value):
    path = rewritten(save_checkpoint(0, "net", net(), dir=tmp_path), **{key: value})
    assert message(read_checkpoint, path).startswith(f"{path}: '{key}' must be ")


def test_a_truncated_checkpoint_is_refused(tmp_path):
    path = save_checkpoint(0, "net", net(), dir=tmp_path)
    path.write_bytes(path.read_bytes()[:-1000])
    assert message(read_checkpoint, path).startswith(f"{path}: is cut off or damaged: its ")
