import pytest
import torch
from torch import nn
from torch.nn.utils import parametrize

from distiller.apputils.checkpoint import (
    load_lean_checkpoint,
    load_state,
    read_checkpoint,
    save_checkpoint,
)
from distiller.apputils.checkpoint_format import FORMAT_VERSION
from distiller.errors import CheckpointError
from distiller.scheduler import CompressionScheduler


class Net(nn.Module):
    def __init__(self):
        super().__init__()
        self.conv = nn.Conv2d(1, 3, 3)
        self.bn = nn.BatchNorm2d(3)
        self.fc = nn.Linear(3, 2)


class Oddities(nn.Module):
    """Every kind of tensor a model may hold."""

    def __init__(self, seed):
        super().__init__()
        torch.manual_seed(seed)
        self.plain = nn.Parameter(torch.randn(3, 4))
        self.low = nn.Parameter(torch.randn(5).bfloat16())
        self.transposed = nn.Parameter(torch.randn(4, 3).t())
        self.conv = nn.Conv2d(3, 4, 3).to(memory_format=torch.channels_last)  # type: ignore[call-overload]
        self.tied = nn.Linear(4, 4)
        self.tied_too = nn.Linear(4, 4)
        self.tied_too.weight = self.tied.weight
        self.scalar = nn.Parameter(torch.tensor(float(seed)))
        self.register_buffer("counts", torch.randint(-9, 9, (3,)))
        self.register_buffer("flags", torch.rand(7) > 0.5)
        self.register_buffer("bytes", torch.randint(0, 255, (3,), dtype=torch.uint8))
        self.register_buffer("empty", torch.zeros(0, 3))
        strange = [float("nan"), float("inf"), -0.0, 1e-45] if seed == 1 else [0.0] * 4
        self.register_buffer("strange", torch.tensor(strange))


def bits(model):
    return {
        name: (value.dtype, tuple(value.shape), value.reshape(-1).view(torch.uint8).tolist())
        for name, value in model.state_dict().items()
    }


def message(call, *args, **kwargs):
    with pytest.raises(CheckpointError) as caught:
        call(*args, **kwargs)
    return str(caught.value)


@pytest.fixture(autouse=True)
def _seeded():
    torch.manual_seed(0)


# --- what comes back


def test_weights_of_every_kind_come_back_bit_equal(tmp_path):
    saved, fresh = Oddities(1), Oddities(2)
    assert bits(saved) != bits(fresh)
    strides = {name: value.stride() for name, value in fresh.state_dict().items()}
    load_state(fresh, read_checkpoint(save_checkpoint(0, "odd", saved, dir=tmp_path)))
    assert bits(fresh) == bits(saved)
    assert {name: value.stride() for name, value in fresh.state_dict().items()} == strides
    assert fresh.tied_too.weight is fresh.tied.weight


def test_tied_weights_are_stored_once(tmp_path):
    state = read_checkpoint(save_checkpoint(0, "odd", Oddities(1), dir=tmp_path)).state_dict
    assert state["tied.weight"].data_ptr() == state["tied_too.weight"].data_ptr()


def test_file_is_plain_data_to_pytorch_itself(tmp_path):
    model = Net()
    optimizer = torch.optim.Adam(model.parameters())
    path = save_checkpoint(4, "net", model, optimizer, CompressionScheduler(model), dir=tmp_path)
    held = torch.load(path, weights_only=True)
    assert (held["format_version"], held["epoch"], held["arch"]) == (FORMAT_VERSION, 4, "net")


def test_everything_that_was_saved_is_read(tmp_path):
    model = Net()
    model.dataset, model.input_shape = "digits", (1, 1, 8, 8)  # type: ignore[assignment]
    optimizer = torch.optim.SGD(model.parameters(), lr=0.25, momentum=0.9)
    extras = {"current_top1": 91.5, "history": [1, (2, "x")], "none": None}
    read = read_checkpoint(save_checkpoint(7, "net", model, optimizer, extras=extras, dir=tmp_path))
    assert (read.epoch, read.arch, read.dataset, read.input_shape) == (7, "net", "digits", (1, 1, 8, 8))
    assert read.optimizer is not None
    assert read.optimizer["class"] == "SGD"
    assert read.optimizer["state_dict"]["param_groups"][0]["lr"] == 0.25
    assert read.extras == extras
    assert (read.scheduler, read.masks, read.quantizer, read.thinning_recipes, read.notes) == (
        None, {}, None, (), ()
    )  # fmt: skip


def test_names_are_canonical_whatever_wraps_the_model(tmp_path):
    model = Net()
    parametrize.register_parametrization(model.fc, "weight", nn.Identity())
    read = read_checkpoint(save_checkpoint(0, "net", nn.DataParallel(model), dir=tmp_path))
    assert set(read.state_dict) == set(Net().state_dict())
    plain, wrapped = Net(), nn.DataParallel(Net())
    load_state(plain, read)
    load_state(wrapped, read)
    assert bits(plain) == bits(wrapped.module)
    assert torch.equal(plain.fc.weight, model.fc.weight)


def test_a_lean_file_saved_under_data_parallel_loads(tmp_path):
    """DEFECT of Distiller: `module.` was stripped only when loading masks had failed before."""
    wrapped, fresh = nn.DataParallel(Net()), Net()
    torch.save({"state_dict": wrapped.state_dict()}, tmp_path / "lean.pth.tar")
    assert load_lean_checkpoint(fresh, tmp_path / "lean.pth.tar") is fresh
    assert bits(fresh) == bits(wrapped.module)


def test_precision_may_differ_between_file_and_model(tmp_path):
    saved, half = Net(), Net().bfloat16()
    load_state(half, read_checkpoint(save_checkpoint(0, "net", saved, dir=tmp_path)))
    assert torch.equal(half.fc.weight, saved.fc.weight.bfloat16())


def test_num_batches_tracked_may_be_missing_as_in_files_before_pytorch_0_4_1(tmp_path):
    state = {name: value for name, value in Net().state_dict().items() if "num_batches" not in name}
    torch.save(state, tmp_path / "old.pt")
    model = Net()
    load_state(model, read_checkpoint(tmp_path / "old.pt"))
    assert torch.equal(model.fc.weight, state["fc.weight"])


# --- what is written, and how


def test_file_names_follow_distillers(tmp_path):
    assert save_checkpoint(0, "net", Net(), dir=tmp_path) == tmp_path / "checkpoint.pth.tar"
    assert save_checkpoint(0, "net", Net(), name="run", is_best=True, dir=str(tmp_path)) == (
        tmp_path / "run_checkpoint.pth.tar"
    )
    assert sorted(path.name for path in tmp_path.iterdir()) == [
        "checkpoint.pth.tar",
        "run_best.pth.tar",
        "run_checkpoint.pth.tar",
    ]


def test_best_file_is_replaced_only_by_a_better_one(tmp_path):
    save_checkpoint(0, "net", Net(), is_best=True, dir=tmp_path)
    save_checkpoint(1, "net", Net(), dir=tmp_path)
    assert read_checkpoint(tmp_path / "best.pth.tar").epoch == 0
    assert read_checkpoint(tmp_path / "checkpoint.pth.tar").epoch == 1


def test_missing_folder_is_refused(tmp_path):
    folder = tmp_path / "nowhere"
    assert message(save_checkpoint, 0, "net", Net(), dir=folder) == (
        f"{folder / 'checkpoint.pth.tar'}: cannot be written: '{folder}' is not a folder; create it first"
    )


def test_data_that_are_not_plain_leave_the_old_file(tmp_path):
    path = save_checkpoint(0, "net", Net(), dir=tmp_path)
    assert "'extras.x' is a builtins.object" in message(
        save_checkpoint, 1, "net", Net(), extras={"x": object()}, dir=tmp_path
    )
    assert read_checkpoint(path).epoch == 0
