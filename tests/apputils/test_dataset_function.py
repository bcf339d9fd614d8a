import importlib
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from torch.utils.data import TensorDataset

from distiller.apputils.dataset_function import decode_from_function, float_item
from distiller.apputils.dataset_sources import LabelledImages
from distiller.errors import DatasetError, UnknownNameError

MODULE = "a_users_own_data"


@pytest.fixture
def decode(tmp_path, monkeypatch):
    """Writes the body of a function `load` into a module of the user's and decodes what it returns."""
    monkeypatch.syspath_prepend(tmp_path)

    def run(body, folder=None):
        monkeypatch.delitem(sys.modules, MODULE, raising=False)
        source = "import numpy as np, torch\nfrom torch.utils.data import *\ndef load(data_dir):\n    "
        module = tmp_path / f"{MODULE}.py"
        module.write_text(source + body)
        importlib.invalidate_caches()
        return decode_from_function(f"{MODULE}:load", folder)

    monkeypatch.setattr(sys, "dont_write_bytecode", True)
    return run


PAIR = "(torch.zeros(4, 1, 6, 6, dtype=torch.uint8), torch.tensor([0, 1, 0, 1]))"


def test_pairs_of_tensors_or_arrays_become_labelled_images(decode):
    body = (
        "return (torch.arange(3 * 2 * 4 * 4, dtype=torch.uint8).view(3, 2, 4, 4), [0, 1, 2]), "
        "(np.ones((1, 2, 4, 4), np.uint8), np.array([6]))"
    )
    decoded = decode(body)
    assert isinstance(decoded.train, LabelledImages)
    assert decoded.train.labels.tolist() == [0, 1, 2]
    assert decoded.train.labels.dtype == torch.int64
    assert decoded.test.images.shape == (1, 2, 4, 4)
    facts = decoded.facts
    assert (facts.name, facts.num_classes, facts.channels, facts.size) == (f"{MODULE}:load", 7, 2, 4)
    by_channel = np.arange(96).reshape(3, 2, 16).transpose(1, 0, 2).reshape(2, -1) / 255
    assert facts.mean == pytest.approx(by_channel.mean(1))
    assert facts.std == pytest.approx(by_channel.std(1))


def test_constant_images_have_a_scale_of_one(decode):
    assert decode(f"return {PAIR}, {PAIR}").facts.std == (1.0,)


def test_float_images_are_left_as_they_are(decode):
    pair = "(np.full((2, 3, 4, 4), 7.5), [0, 1])"
    decoded = decode(f"return {pair}, {pair}")
    assert decoded.train.images.dtype == torch.float32
    assert (decoded.facts.mean, decoded.facts.std) == ((0.0,) * 3, (1.0,) * 3)


def test_function_is_called_with_the_data_folder(decode):
    folder = Path("some/folder")
    body = "assert str(data_dir) == 'some/folder'\n    return " + f"{PAIR}, {PAIR}"
    decode(body, folder)


def test_torch_data_sets_are_kept(decode):
    part = "TensorDataset(torch.zeros(5, 3, 8, 8), torch.tensor([0, 3, 1, 2, 0]))"
    decoded = decode(f"return {part}, {part}")
    assert isinstance(decoded.train, torch.utils.data.Dataset)
    assert decoded.facts.num_classes == 4
    assert decoded.facts.input_shape == (3, 8, 8)


@pytest.mark.parametrize("attribute", ["classes = list('abcdef')", "targets = torch.tensor([5, 1])"])
def test_classes_of_a_torch_data_set_are_read_without_its_items(decode, attribute):
    body = (
        "class Own(TensorDataset):\n"
        f"        {attribute}\n"
        "    own = Own(torch.zeros(2, 1, 4, 4), torch.tensor([0, 1]))\n"
        "    return own, own"
    )
    assert decode(body).facts.num_classes == 6


@pytest.mark.parametrize(
    ("returned", "complaint"),
    [
        ("None", "{path}: must return (train, test), got NoneType"),
        (f"[{PAIR}]", "{path}: must return (train, test), got list"),
        (
            f"{PAIR}, 5",
            "{path}, test: must be a torch Dataset with a length, or a pair (images, labels), got int",
        ),
        (
            "(torch.zeros(4, 6, 6), [0] * 4), 5",
            "{path}, train: images must be uint8 or float (N, C, H, W), got torch.float32 (4, 6, 6)",
        ),
        (
            "(torch.zeros(4, 1, 6, 6, dtype=torch.int32), [0] * 4), 5",
            "{path}, train: images must be uint8 or float (N, C, H, W), got torch.int32 (4, 1, 6, 6)",
        ),
        (
            "(torch.zeros(4, 1, 6, 6), [0.5] * 4), 5",
            "{path}, train: labels must be whole numbers (N,), got torch.float32 (4,)",
        ),
        ("(torch.zeros(4, 1, 6, 6), [0] * 3), 5", "{path}, train: 4 images but 3 labels"),
        (
            "[TensorDataset(torch.zeros(4, 1, 6, 6), torch.full((4,), -100))] * 2",
            "{path}, train: labels must not be negative, got -100",
        ),
        (
            f"{PAIR}, (torch.zeros(4, 3, 6, 6), [0] * 4)",
            "{path}: train and test images must have one shape, got (1, 6, 6) and (3, 6, 6)",
        ),
        (
            "(torch.zeros(1, 1, 5, 6), [0]), (torch.zeros(1, 1, 5, 6), [0])",
            "{path}: images must be square, got 5 x 6",
        ),
        (f"TensorDataset(torch.zeros(0, 1, 2, 2), torch.zeros(0)), {PAIR}", "{path}, train: holds no images"),
        (
            f"TensorDataset(torch.zeros(1, 1, 2, 2, dtype=torch.uint8), torch.zeros(1)), {PAIR}",
            "TensorDataset[0]: must be (float tensor (C, H, W), label), got torch.uint8 (1, 2, 2), "
            "torch.float32 (); give the data set a transform that ends in such a tensor",
        ),
    ],
)
def test_what_a_function_must_not_return_is_refused(decode, returned, complaint):
    with pytest.raises(DatasetError) as caught:
        decode(f"return {returned}")
    assert str(caught.value) == complaint.format(path=f"{MODULE}:load")


@pytest.mark.parametrize("path", [":load", "module:"])
def test_path_without_module_or_function_is_refused(path):
    with pytest.raises(DatasetError, match=r"a function is given as package\.module:function, got '"):
        decode_from_function(path, None)


@pytest.mark.parametrize("path", ["no_such_package.data:load", "distiller.errors:load"])
def test_function_that_is_not_there_is_refused(path):
    with pytest.raises(UnknownNameError, match="cannot be imported"):
        decode_from_function(path, None)


def test_item_that_is_no_pair_is_refused():
    with pytest.raises(DatasetError, match=r"TensorDataset\[0\]: must be .*, got torch.float32 \(1, 2, 2\);"):
        float_item(TensorDataset(torch.zeros(1, 1, 2, 2)), 0)


def test_labels_that_are_no_whole_numbers_are_refused():
    items = [(torch.zeros(1, 2, 2), label) for label in ("cat", None, 1.5, torch.tensor([1, 2]))]
    for index, _ in enumerate(items):
        with pytest.raises(
            DatasetError, match=r"^list\[\d\]: must be \(float tensor \(C, H, W\), label\), got"
        ):
            float_item(items, index)


USAGE = "; it is called with DATASET_DIR, or None, and returns (train, test)"


def test_function_that_fails_is_told_with_its_own_line(decode, tmp_path):
    with pytest.raises(DatasetError) as caught:
        decode("return open('nowhere')")
    assert str(caught.value) == (
        f"{MODULE}:load: failed with FileNotFoundError: [Errno 2] No such file or directory: 'nowhere' "
        f"({tmp_path / MODULE}.py:4){USAGE}"
    )


def test_function_of_another_kind_is_told_how_it_is_called():
    with pytest.raises(DatasetError) as caught:
        decode_from_function("os:getcwd", None)
    assert str(caught.value) == (
        f"os:getcwd: failed with TypeError: posix.getcwd() takes no arguments (1 given){USAGE}"
    )


def test_images_that_no_tensor_can_be_made_of_are_refused(decode):
    with pytest.raises(DatasetError, match=f"^{MODULE}:load: failed with .*it is called with DATASET_DIR"):
        decode("return (['a', 'b'], [0, 1]), 5")


def test_item_that_fails_is_told_with_its_line(decode, tmp_path):
    with pytest.raises(DatasetError) as caught:
        decode(
            "class Own(Dataset):\n"
            "        def __len__(self): return 3\n"
            "        def __getitem__(self, index): return {}[index]\n"
            "    return Own(), Own()"
        )
    assert str(caught.value) == f"Own[0]: failed with KeyError: 0 ({tmp_path / MODULE}.py:6)"


@pytest.mark.parametrize("value", [0, "enough"])
def test_function_that_ends_the_program_is_told_as_one_that_fails(decode, tmp_path, value):
    with pytest.raises(DatasetError) as caught:
        decode(f"import sys; sys.exit({value!r})")
    assert str(caught.value) == (
        f"{MODULE}:load: failed with SystemExit: {value} ({tmp_path / MODULE}.py:4); "
        "it is called with DATASET_DIR, or None, and returns (train, test)"
    )


def test_module_that_ends_the_program_is_told_too(decode, tmp_path):
    with pytest.raises(DatasetError) as caught:
        decode("pass\nraise SystemExit(3)")
    assert str(caught.value) == (
        f"{MODULE}:load: failed with SystemExit: 3 ({tmp_path / MODULE}.py:5); "
        "the module is imported for its function"
    )
