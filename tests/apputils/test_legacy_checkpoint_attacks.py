"""Malicious, damaged and foreign files: nothing in them runs, and each is refused with a reason."""

import functools
import io
import os
import pickle
import tarfile
import zipfile
from collections import OrderedDict
from pathlib import Path

import pytest
import torch
from torch import nn

from distiller.apputils.legacy_checkpoint import legacy_fields, load_plain
from distiller.atomic_file import write_whole
from distiller.errors import CheckpointError

COMPAT = Path(__file__).resolve().parents[2] / "../shared/compat/checkpoints"
needs_compat = pytest.mark.skipif(not COMPAT.is_dir(), reason=f"Distiller's checkpoints are not at {COMPAT}")
HEAD = [0x1950A86A20F9469CFC6C, 1001, {"protocol_version": 1001, "little_endian": True, "type_sizes": {}}]
REMEDY = "where it came from, save the weights alone: torch.save(model.state_dict(), file)"


class Reduced:
    """Pickles as a call of `function` with `args`."""

    def __init__(self, function, *args):
        self.call = (function, args)

    def __reduce__(self):
        return self.call


class RunsWhenItsStateIsSet:
    def __init__(self, canary):
        self.canary = canary

    def __setstate__(self, state):
        Path(state["canary"]).touch()


def save_zip(content, path):
    torch.save(content, path)


def save_before_1_6(content, path):
    torch.save(content, path, _use_new_zipfile_serialization=False)


def save_bare_pickle(protocol, content, path):
    path.write_bytes(pickle.dumps(content, protocol=protocol))


def write_pickles(path, *pickles):
    """A file of the format before PyTorch 1.6 with hand-made pickles after its head."""
    path.write_bytes(b"".join([*(pickle.dumps(part, protocol=2) for part in HEAD), *pickles]))
    return path


def refusal(path):
    with pytest.raises(CheckpointError) as caught:
        load_plain(path)
    return str(caught.value)


SAVERS = {
    "zip": save_zip,
    "before 1.6": save_before_1_6,
    **{f"pickle {protocol}": functools.partial(save_bare_pickle, protocol) for protocol in (0, 2, 4, 5)},
}
ATTACKS = {
    "system": (lambda canary: Reduced(os.system, f"touch {canary}"), f"'{os.name}.system'"),
    "eval": (lambda canary: Reduced(eval, f"open({str(canary)!r}, 'w')"), "'builtins.eval'"),
    "exec": (lambda canary: [1, Reduced(exec, f"open({str(canary)!r}, 'w')")], "'builtins.exec'"),
    "open": (lambda canary: {"state_dict": {"w": Reduced(open, str(canary), "w")}}, "'io.open'"),
    "nested": (lambda canary: Reduced(functools.partial(open, str(canary), "w")), "'functools.partial'"),
    "argument": (lambda canary: Reduced(OrderedDict, [("a", Reduced(os.mkdir, str(canary)))]), "mkdir'"),
    "torch.load": (lambda canary: Reduced(torch.load, f"{canary}.evil"), "'torch.serialization.load'"),
    "setstate": (lambda canary: RunsWhenItsStateIsSet(str(canary)), "RunsWhenItsStateIsSet'"),
    "module": (lambda canary: {"model": nn.Linear(1, 1)}, "'torch.nn.modules.linear.Linear'"),
}


@pytest.mark.parametrize("save", SAVERS.values(), ids=SAVERS)
@pytest.mark.parametrize(("attack", "wanted"), ATTACKS.values(), ids=ATTACKS)
def test_what_a_file_wants_to_run_is_refused_by_name_and_not_run(tmp_path, save, attack, wanted):
    canary, path = tmp_path / "canary", tmp_path / "evil.pth.tar"
    Path(f"{canary}.evil").write_bytes(pickle.dumps(Reduced(os.mkdir, str(canary))))
    save(attack(canary), path)
    text = refusal(path)
    assert text.startswith(f"{path}: refused, nothing in it was run: its pickle asks for '")
    assert wanted in text
    assert text.endswith(f", which is neither tensor nor plain data; {REMEDY}")
    assert not canary.exists()


@pytest.mark.parametrize("save", SAVERS.values(), ids=SAVERS)
def test_functions_of_this_library_are_not_called_either(tmp_path, save):
    canary, path = tmp_path / "canary", tmp_path / "evil.pth.tar"
    save({"a": Reduced(write_whole, str(canary), b"x")}, path)
    if save in (save_zip, save_before_1_6):
        held = load_plain(path)
        assert held == {"a": {"class": "distiller.atomic_file.write_whole", "args": (str(canary), b"x")}}
    else:
        refusal(path)
    assert not canary.exists()


def test_all_that_a_file_wants_is_counted(tmp_path):
    functions = [eval, exec, print, input, open]
    torch.save([Reduced(function, "1") for function in functions], tmp_path / "evil")
    assert "asks for 'builtins.eval', 'builtins.exec', 'builtins.print' and 2 more, " in refusal(
        tmp_path / "evil"
    )


def test_globals_behind_the_weights_are_found(tmp_path):
    evil = pickle.dumps(Reduced(os.mkdir, str(tmp_path / "canary")), protocol=2)
    path = write_pickles(tmp_path / "evil", pickle.dumps({"w": 1}, protocol=2), evil)
    assert f"asks for '{os.name}.mkdir'" in refusal(path)
    assert not (tmp_path / "canary").exists()


@pytest.mark.parametrize(
    ("evil", "wanted"),
    [
        (b"(S'touch x'\nios\nsystem\n.", "'os.system'"),
        (b"\x80\x04\x8c\x02os\x94\x8c\x06system\x94h\x00h\x01\x93\x94.", "'os.system'"),
        (b"\x80\x02\x82\x07.", "'copyreg extension 7'"),
    ],
    ids=["INST", "STACK_GLOBAL from the memo", "EXT1"],
)
def test_globals_are_found_however_they_are_spelt(tmp_path, evil, wanted):
    assert wanted in refusal(write_pickles(tmp_path / "evil", evil))


@pytest.mark.parametrize(
    "evil",
    [
        b"\x80\x02cdistiller.a\nB\n}b.",  # state set on a stand-in's class itself
        b"\x80\x02ccollections\nOrderedDict\n}b.",
        b"\x80\x02cdistiller.a\nB\n)\x81K\x01K\x02s.",  # an item set on a stand-in
        b"\x80\x02X\x01\x00\x00\x00aQ.",  # a persistent id that is no storage
    ],
)
def test_what_weights_never_do_is_refused(tmp_path, evil):
    path = write_pickles(tmp_path / "evil", evil, pickle.dumps([], protocol=2))
    assert refusal(path) == (
        f"{path}: refused, nothing in it was run: its pickle does what weights and plain data never need"
    )


def test_data_that_contain_themselves_are_damaged(tmp_path):
    path = write_pickles(tmp_path / "x", b"\x80\x02]q\x00h\x00a.", pickle.dumps([], protocol=2))
    assert "is cut off or damaged" in refusal(path)


def test_torchscript_is_refused(tmp_path):
    with zipfile.ZipFile(tmp_path / "x.pt", "w") as archive:
        archive.writestr("x/data.pkl", pickle.dumps({}, protocol=2))
        archive.writestr("x/constants.pkl", pickle.dumps((), protocol=2))
    assert refusal(tmp_path / "x.pt") == (
        f"{tmp_path / 'x.pt'}: refused, nothing in it was run: is a TorchScript program; {REMEDY}"
    )


def test_missing_file_names_the_nearest(tmp_path):
    torch.save({}, tmp_path / "run_checkpoint.pth.tar")
    path = tmp_path / "run_chekpoint.pth.tar"
    assert refusal(path) == f"{path}: no such file; did you mean 'run_checkpoint.pth.tar'?"


def test_missing_file_without_one_alike(tmp_path):
    path = tmp_path / "nowhere" / "checkpoint.pth.tar"
    assert refusal(path) == f"{path}: no such file; check the path"


def test_folder_is_refused(tmp_path):
    assert refusal(tmp_path) == f"{tmp_path}: is a folder; name the checkpoint file in it"


def test_empty_file_is_refused(tmp_path):
    (tmp_path / "x").touch()
    assert refusal(tmp_path / "x") == f"{tmp_path / 'x'}: is empty; use another checkpoint"


@pytest.mark.parametrize(
    "content",
    [
        b"epochs: 3\n",
        b"config\nfoo\n",
        b"\x89PNG\r\n\x1a\n\x00\x00\x00\rIHDR",
        pickle.dumps({"a": 1}),
        b"\x80",
    ],
    ids=["yaml", "text that looks like opcodes", "png", "pickle of plain data", "one byte"],
)
def test_other_files_are_no_checkpoints(tmp_path, content):
    path = tmp_path / "x"
    path.write_bytes(content)
    assert refusal(path) == (
        f"{path}: is not a checkpoint: starts with {content[:15]!r}; give a file that torch.save wrote"
    )


def test_other_archives_are_no_checkpoints(tmp_path):
    with zipfile.ZipFile(tmp_path / "x.zip", "w") as archive:
        archive.writestr("a.txt", "hello")
    with tarfile.open(tmp_path / "x.tar", "w") as archive:
        archive.addfile(tarfile.TarInfo("a.txt"), io.BytesIO())
    assert refusal(tmp_path / "x.zip") == (
        f"{tmp_path / 'x.zip'}: is not a checkpoint: a zip archive without weights, holding ['a.txt']"
    )
    assert "is not a checkpoint: starts with b'a.txt" in refusal(tmp_path / "x.tar")


@pytest.mark.parametrize("save", [save_zip, save_before_1_6])
def test_files_cut_off_anywhere_are_refused(tmp_path, save):
    whole, cut = tmp_path / "whole", tmp_path / "cut"
    save({"state_dict": {"w": torch.arange(500.0), "b": torch.ones(3)}, "epoch": 3}, whole)
    content = whole.read_bytes()
    for size in {*range(1, len(content), 97), len(content) - 1}:
        cut.write_bytes(content[:size])
        refusal(cut)
    cut.write_bytes(content[:-100])
    assert refusal(cut) == (
        f"{cut}: is cut off or damaged: its {len(content) - 100} bytes do not read back; "
        "use another checkpoint"
    )


@pytest.mark.parametrize("save", [save_zip, save_before_1_6])
def test_files_with_a_flipped_byte_never_end_in_another_error(tmp_path, save):
    whole, flipped = tmp_path / "whole", tmp_path / "flipped"
    save({"state_dict": {"w": torch.arange(20.0)}, "epoch": 3, "arch": "x"}, whole)
    content = whole.read_bytes()
    for position in range(0, len(content), 3):
        flipped.write_bytes(content[:position] + bytes([content[position] ^ 0xFF]) + content[position + 1 :])
        try:
            legacy_fields(load_plain(flipped), flipped)
        except CheckpointError as error:
            assert str(error).startswith(str(flipped))  # noqa: PT017 - either outcome is right


def test_a_link_to_nothing_is_told_as_such(tmp_path):
    path = tmp_path / "latest.pth.tar"
    path.symlink_to("gone.pth.tar")
    assert refusal(path) == f"{path}: is a link to gone.pth.tar, which does not exist; check the path"
