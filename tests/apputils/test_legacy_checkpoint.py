"""What files from elsewhere hold must arrive, as plain data."""

import struct
import sys
import types
from collections import OrderedDict, namedtuple
from enum import Enum
from pathlib import Path

import numpy as np
import pytest
import torch
from torch import nn

from distiller.apputils.legacy_checkpoint import legacy_fields, load_plain
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


def save_zip(content, path):
    torch.save(content, path)


def save_before_1_6(content, path):
    torch.save(content, path, _use_new_zipfile_serialization=False)


def refusal(path):
    with pytest.raises(CheckpointError) as caught:
        load_plain(path)
    return str(caught.value)


@pytest.fixture
def distillers(monkeypatch):
    """Distiller's classes, importable while a test writes a file."""
    thinning, ranges = (
        types.ModuleType(f"distiller.{name}") for name in ("thinning", "quantization.range_linear")
    )
    recipe = namedtuple("ThinningRecipe", ["modules", "parameters"], module=thinning.__name__)
    bits = namedtuple("QBits", ["acts", "wts", "bias"], module=ranges.__name__)
    quantizer = type("PostTrainLinearQuantizer", (), {"__module__": ranges.__name__})
    clip_mode = Enum("ClipMode", {"NONE": 0, "AVG": 1}, module=ranges.__name__)
    vars(thinning).update(ThinningRecipe=recipe)
    vars(ranges).update(QBits=bits, PostTrainLinearQuantizer=quantizer, ClipMode=clip_mode)
    with monkeypatch.context() as patch:
        for module in (thinning, ranges):
            patch.setitem(sys.modules, module.__name__, module)
        yield types.SimpleNamespace(Recipe=recipe, Quantizer=quantizer, ClipMode=clip_mode, QBits=bits)


@pytest.fixture
def distiller_file(tmp_path, distillers):
    """A checkpoint as Distiller writes it, in either of torch's formats."""

    def write(save=save_before_1_6, **changes):
        content = {
            "epoch": 7,
            "arch": "resnet20_cifar",
            "dataset": "cifar10",
            "is_parallel": True,
            "state_dict": OrderedDict([("module.conv.weight", torch.arange(6.0).view(1, 6))]),
            "optimizer_state_dict": torch.optim.SGD([nn.Parameter(torch.ones(1))], lr=0.1).state_dict(),
            "optimizer_type": torch.optim.SGD,
            "compression_sched": {
                "masks_dict": {"module.conv.weight": torch.ones(1, 6), "module.conv.bias": None}
            },
            "thinning_recipes": [
                distillers.Recipe(
                    modules={"module.bn": {"num_features": 1, "running_mean": (0, torch.tensor([2]))}},
                    parameters={"module.conv.weight": [(1, torch.tensor([1]), (1, 2, 3, 1), (1, 3))]},
                )
            ],
            "quantizer_metadata": {
                "type": distillers.Quantizer,
                "params": {
                    "bits": 8,
                    "clip_acts": distillers.ClipMode.AVG,
                    "q": distillers.QBits(8, 8, None),
                    "overrides": OrderedDict(a=OrderedDict(b=1)),
                },
                "dummy_input": torch.ones(1, 3),
            },
            "extras": {
                "best_top1": np.float64(91.78),
                "n": np.int64(-3),
                "f": np.float32(0.5),
                "ok": np.bool_(True),
            },
            **changes,
        }
        save(content, tmp_path / "distiller.pth.tar")
        return tmp_path / "distiller.pth.tar"

    return write


@pytest.mark.parametrize("save", [save_zip, save_before_1_6])
def test_distillers_checkpoint_becomes_plain_fields(distiller_file, save):
    path = distiller_file(save)
    fields = legacy_fields(load_plain(path), path)
    assert (fields["epoch"], fields["arch"], fields["dataset"]) == (7, "resnet20_cifar", "cifar10")
    assert list(fields["state_dict"]) == ["conv.weight"]
    assert fields["state_dict"]["conv.weight"].tolist() == [[0, 1, 2, 3, 4, 5]]
    assert list(fields["masks"]) == ["conv.weight"]
    assert fields["notes"] == (
        "the optimizer state of a Distiller checkpoint is left aside; use a fresh optimizer",
    )


def test_of_thinning_recipes_the_tensors_are_taken_under_canonical_names(distiller_file):
    path = distiller_file()
    (recipe,) = legacy_fields(load_plain(path), path)["thinning_recipes"]
    assert recipe.tensors == {"bn.running_mean": {0: (2,)}, "conv.weight": {1: (3, 4, 5)}}
    assert recipe.modules == {}


def test_quantizer_becomes_its_class_name_and_arguments(distiller_file):
    path = distiller_file()
    quantizer = legacy_fields(load_plain(path), path)["quantizer"]
    assert quantizer["class"] == "PostTrainLinearQuantizer"
    assert quantizer["params"] == {
        "bits": 8,
        "clip_acts": {"class": "distiller.quantization.range_linear.ClipMode", "args": (1,)},
        "q": {"class": "distiller.quantization.range_linear.QBits", "args": (8, 8, None)},
        "overrides": {"a": {"b": 1}},
    }
    assert quantizer["dummy_input"].tolist() == [[1, 1, 1]]


def test_numpy_numbers_are_decoded(distiller_file):
    path = distiller_file()
    extras = legacy_fields(load_plain(path), path)["extras"]
    assert extras == {"best_top1": 91.78, "n": -3, "f": 0.5, "ok": True}
    assert [type(value) for value in extras.values()] == [float, int, float, bool]


@pytest.mark.parametrize("value", [np.str_("x"), np.datetime64("2020-01-01"), np.complex64(1j)])
def test_numpy_objects_that_are_no_numbers_are_refused(distiller_file, value):
    path = distiller_file(extras={"x": value})
    assert refusal(path).startswith(f"{path}: refused: holds a numpy object of type ")


def test_numpy_numbers_of_the_other_byte_order_are_decoded(tmp_path):
    scalar = np.float64(0).__reduce__()[0]
    big, little = np.dtype("f8").newbyteorder(">"), np.dtype("f8").newbyteorder("<")
    held = [Reduced(scalar, big, struct.pack(">d", 1.5)), Reduced(scalar, little, struct.pack("<d", 2.5))]
    torch.save(held, tmp_path / "x")
    assert load_plain(tmp_path / "x") == [1.5, 2.5]


def test_optimizer_class_is_only_a_name(distiller_file):
    assert load_plain(distiller_file())["optimizer_type"] == "torch.optim.sgd.SGD"


def test_parameters_in_a_state_dict_become_tensors(tmp_path):
    torch.save({"w": nn.Parameter(torch.ones(2))}, tmp_path / "x")
    held = load_plain(tmp_path / "x")["w"]
    assert (type(held), held.requires_grad) == (torch.Tensor, False)


def test_a_bare_state_dict_is_a_checkpoint(tmp_path):
    torch.save(nn.DataParallel(nn.Linear(2, 1)).state_dict(), tmp_path / "x")
    assert list(legacy_fields(load_plain(tmp_path / "x"), tmp_path / "x")) == ["state_dict"]
    assert list(legacy_fields(load_plain(tmp_path / "x"), tmp_path / "x")["state_dict"]) == ["weight", "bias"]


NOT = "is not a checkpoint:"


@pytest.mark.parametrize(
    ("content", "text"),
    [
        (
            [1],
            f"{NOT} holds a list, not a dict of weights; save one with torch.save(model.state_dict(), file)",
        ),
        (
            {"a": 1, "b": 2},
            f"{NOT} has no 'state_dict', got 'a', 'b'; give a checkpoint, or a file of weights only",
        ),
        ({}, f"{NOT} has no 'state_dict', got nothing; give a checkpoint, or a file of weights only"),
        ({"state_dict": [1]}, f"{NOT} 'state_dict' must be dict, got list"),
        ({"state_dict": {}, "epoch": "7"}, f"{NOT} 'epoch' must be int, got str"),
        ({"state_dict": {}, "thinning_recipes": 1}, f"{NOT} 'thinning_recipes' must be list, got int"),
        (
            {"state_dict": {}, "compression_sched": {"masks_dict": {"w": 1}}},
            f"{NOT} 'w' must be Tensor, got int",
        ),
        (
            {"state_dict": {}, "thinning_recipes": [{"class": "distiller.thinning.ThinningRecipe"}]},
            "one of its 'thinning_recipes' is not a ThinningRecipe of two dicts",
        ),
        (
            {"state_dict": {}, "thinning_recipes": [1]},
            "one of its 'thinning_recipes' is not a ThinningRecipe of two dicts",
        ),
        (
            {"state_dict": {"a": 1, "module.a": 2}},
            "two names in its 'state_dict' differ only in wrapper parts such as 'module.'",
        ),
    ],
)
def test_other_contents_are_refused(content, text):
    with pytest.raises(CheckpointError) as caught:
        legacy_fields(content, Path("x.pt"))
    assert str(caught.value) == f"x.pt: {text}"


@needs_compat
def test_distillers_dense_resnet20_is_read():
    path = COMPAT / "checkpoint_trained_dense.pth.tar"
    fields = legacy_fields(load_plain(path), path)
    assert (fields["epoch"], fields["arch"], fields["dataset"]) == (179, "resnet20_cifar", None)
    assert fields["extras"] == {"best_top1": 92.54}
    assert len(fields["state_dict"]) == 107
    assert fields["state_dict"]["layer1.0.conv1.weight"].shape == (16, 16, 3, 3)
    assert {str(tensor.device) for tensor in fields["state_dict"].values()} == {"cpu"}
    assert (fields["masks"], fields["thinning_recipes"], fields["quantizer"]) == ({}, (), None)
    assert fields["notes"]


@needs_compat
def test_distillers_thinned_resnet20_is_read_with_masks_and_recipe():
    path = COMPAT / "checkpoint_trained_channel_regularized_resnet20.pth.tar"
    fields = legacy_fields(load_plain(path), path)
    assert len(fields["masks"]) == 7
    assert fields["masks"]["layer1.1.conv2.weight"].shape == (16, 8, 3, 3)
    (recipe,) = fields["thinning_recipes"]
    assert recipe.tensors["layer1.1.conv2.weight"] == {1: (0, 6, 9, 11, 12, 13, 14, 15)}
    assert recipe.tensors["layer1.1.bn1.running_mean"] == {0: (0, 6, 9, 11, 12, 13, 14, 15)}
    assert recipe.modules == {}  # Distiller told layer1.1.conv2 that it has 8 outputs; it has 16
    assert fields["state_dict"]["layer1.1.conv2.weight"].shape == (16, 8, 3, 3)


@needs_compat
def test_a_file_of_weights_only_is_read():
    path = COMPAT / "mnist_lenet.pt"
    fields = legacy_fields(load_plain(path), path)
    assert sum(tensor.numel() for tensor in fields["state_dict"].values()) == 266_610
