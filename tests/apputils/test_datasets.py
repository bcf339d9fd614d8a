import gzip
import importlib
import pickle
import struct
from pathlib import Path
from urllib.error import URLError

import numpy as np
import pytest
import torch
import torchvision
from PIL import Image
from sklearn.datasets import load_digits

from distiller.apputils import datasets
from distiller.apputils.dataset_sources import ImageFiles
from distiller.apputils.datasets import dataset_info, decode_dataset, synthetic_images
from distiller.dataset_facts import DATASET_FACTS, DatasetFacts
from distiller.errors import DatasetError, UnknownNameError
from distiller.registry import DATASETS

FASHION_MNIST = Path("/usr/share/datasets/fashion-mnist")
RNG = np.random.default_rng(0)
MNIST_FILES = [
    f"{part}-{kind}-ubyte" for part in ("train", "t10k") for kind in ("images-idx3", "labels-idx1")
]


def write_idx(path, array):
    content = bytes([0, 0, 8, array.ndim]) + struct.pack(f">{array.ndim}I", *array.shape) + array.tobytes()
    path.write_bytes(gzip.compress(content) if path.suffix == ".gz" else content)


def write_mnist(folder, suffix="", train_labels=6, largest_label=9):
    """6 training images and 3 test images; returns them."""
    folder.mkdir(parents=True, exist_ok=True)
    images = {part: RNG.integers(0, 256, (n, 28, 28), np.uint8) for part, n in (("train", 6), ("t10k", 3))}
    for part, count in (("train", train_labels), ("t10k", 3)):
        write_idx(folder / f"{part}-images-idx3-ubyte{suffix}", images[part])
        labels = np.linspace(0, largest_label, count).astype(np.uint8)
        write_idx(folder / f"{part}-labels-idx1-ubyte{suffix}", labels)
    return images


def write_cifar(folder, name):
    """4 images in each file; returns their rows by file."""
    folder.mkdir(parents=True)
    files = (
        [*(f"data_batch_{i}" for i in range(1, 6)), "test_batch"] if name == "cifar10" else ["train", "test"]
    )
    key = "labels" if name == "cifar10" else "fine_labels"
    rows = {file: RNG.integers(0, 256, (4, 3072), np.uint8) for file in files}
    for number, (file, data) in enumerate(rows.items()):
        content = {"data": data, key: [number, 9, 0, 1], "coarse_labels": [0] * 4}
        (folder / file).write_bytes(pickle.dumps(content, protocol=2))
    return rows


def write_image_folder(folder, classes=("cat", "dog"), parts=("train", "val"), count=3):
    for part in parts:
        for shade, name in enumerate(classes):
            (folder / part / name).mkdir(parents=True)
            for i in range(count):
                Image.new("RGB", (40, 30), (shade * 100, i, 7)).save(folder / part / name / f"{i}.png")


def error_of(*args, **kwargs):
    with pytest.raises(DatasetError) as caught:
        decode_dataset(*args, **kwargs)
    return str(caught.value)


# digits, synthetic


def test_digits_are_all_there_once_and_the_test_fifth_is_stratified():
    decoded = decode_dataset("digits")
    values, labels = load_digits(return_X_y=True)
    images = torch.cat([decoded.train.images, decoded.test.images]).view(-1, 64)
    expected = np.round(values / 16 * 255).astype(np.uint8)
    assert sorted(map(bytes, images.numpy())) == sorted(map(bytes, expected))
    test_counts = torch.bincount(decoded.test.labels).numpy()
    assert np.abs(test_counts - np.bincount(labels) / 5).max() < 1
    assert len(decoded.test) == 359
    assert decoded.facts == DATASET_FACTS["digits"]


def test_digits_split_is_the_same_every_time():
    first, second = decode_dataset("digits"), decode_dataset("digits", test_only=True)
    assert torch.equal(first.test.images, second.test.images)
    assert second.train is None


def test_synthetic_images_are_the_same_every_time_and_can_be_learned():
    train, test = synthetic_images((2, 9, 7), 5, 20, part=0), synthetic_images((2, 9, 7), 5, 4, part=1)
    assert torch.equal(train.images, synthetic_images((2, 9, 7), 5, 20, part=0).images)
    assert test.images.shape == (20, 2, 9, 7)
    assert not torch.equal(train.images[:20], test.images)
    centres = torch.stack([train.images[train.labels == k].float().mean(0) for k in range(5)]).flatten(1)
    nearest = torch.cdist(test.images.float().flatten(1), centres).argmin(1)
    assert (nearest == test.labels).float().mean() > 0.95


def test_synthetic_facts_are_those_of_its_images():
    decoded = decode_dataset("synthetic")
    assert decoded.facts == dataset_info("synthetic")
    assert tuple(decoded.train.images.shape[1:]) == decoded.facts.input_shape
    assert (len(decoded.train), len(decoded.test)) == (640, 160)
    scaled = decoded.train.images / 255
    torch.testing.assert_close(scaled.mean((0, 2, 3)), torch.tensor(decoded.facts.mean), atol=0.1, rtol=0)
    torch.testing.assert_close(scaled.std((0, 2, 3)), torch.tensor(decoded.facts.std), atol=0.1, rtol=0)


# the MNIST family


@pytest.mark.parametrize("suffix", ["", ".gz"])
@pytest.mark.parametrize(
    ("name", "below"),
    [
        ("mnist", "MNIST/raw"),
        ("mnist", "raw"),
        ("mnist", "."),
        ("fashion-mnist", "FashionMNIST/raw"),
        ("fashion-mnist", "."),
    ],
)
def test_mnist_family_is_read_in_every_layout(tmp_path, name, below, suffix):
    written = write_mnist(tmp_path / below, suffix)
    decoded = decode_dataset(name, tmp_path)
    np.testing.assert_array_equal(decoded.train.images[:, 0].numpy(), written["train"])
    np.testing.assert_array_equal(decoded.test.images[:, 0].numpy(), written["t10k"])
    assert decoded.train.labels.tolist() == [0, 1, 3, 5, 7, 9]
    assert decoded.train.images.dtype == torch.uint8
    assert decoded.facts == DATASET_FACTS[name]


def test_mnist_is_not_taken_for_fashion_mnist(tmp_path):
    write_mnist(tmp_path / "MNIST" / "raw")
    with pytest.raises(DatasetError):
        decode_dataset("fashion-mnist", tmp_path)


def test_test_set_alone_needs_no_training_files(tmp_path):
    write_mnist(tmp_path)
    for path in tmp_path.glob("train*"):
        path.unlink()
    assert decode_dataset("mnist", tmp_path, test_only=True).train is None
    assert f"{tmp_path}: lacks train-images-idx3-ubyte, train-labels-idx1-ubyte" in error_of(
        "mnist", tmp_path
    )


def test_folder_may_start_at_the_users_home(tmp_path, monkeypatch):
    monkeypatch.setenv("HOME", str(tmp_path))
    write_mnist(tmp_path / "data")
    assert len(decode_dataset("mnist", "~/data").test) == 3


def test_missing_data_says_where_it_looked_and_how_to_get_them(tmp_path, monkeypatch):
    folder = tmp_path / "empty"
    folder.mkdir()
    monkeypatch.setattr(datasets, "_SYSTEM_FOLDERS", {"fashion-mnist": tmp_path / "system"})
    files = ", ".join(MNIST_FILES)
    remedy = "give the DATASET_DIR that holds them, or add --download to get them into it"
    package = ", or install the Debian package dataset-fashion-mnist and leave DATASET_DIR out"
    assert error_of("mnist", folder) == (
        f"mnist: the data are not there, looked in\n"
        f"  {folder}/MNIST/raw: no such folder\n"
        f"  {folder}/raw: no such folder\n"
        f"  {folder}: lacks {files}\n{remedy}"
    )
    assert error_of("mnist") == f"mnist: the data are not there, no DATASET_DIR was given\n{remedy}"
    assert error_of("fashion-mnist") == (
        "fashion-mnist: the data are not there, looked in\n"
        f"  {tmp_path}/system: no such folder\n{remedy}{package}"
    )


def test_system_folder_is_read_only_when_no_other_is_given(tmp_path, monkeypatch):
    write_mnist(tmp_path / "system", ".gz")
    monkeypatch.setattr(datasets, "_SYSTEM_FOLDERS", {"fashion-mnist": tmp_path / "system"})
    assert len(decode_dataset("fashion-mnist").test) == 3
    with pytest.raises(DatasetError):
        decode_dataset("fashion-mnist", tmp_path / "elsewhere")


def test_labels_that_do_not_match_the_images_are_refused(tmp_path):
    write_mnist(tmp_path, train_labels=5)
    assert error_of("mnist", tmp_path) == f"{tmp_path}, train: 6 images but 5 labels"


def test_labels_that_cannot_be_are_refused(tmp_path):
    write_mnist(tmp_path, largest_label=10)
    assert error_of("mnist", tmp_path) == f"{tmp_path}, train: labels must lie in 0..9, got 10"


def test_truncated_file_is_refused(tmp_path):
    write_mnist(tmp_path)
    path = tmp_path / "t10k-images-idx3-ubyte"
    path.write_bytes(path.read_bytes()[:100])
    assert error_of("mnist", tmp_path) == (
        f"{path}: its header promises 2352 bytes of data, got 84; delete it and get it again"
    )


@pytest.mark.skipif(not FASHION_MNIST.is_dir(), reason="the package dataset-fashion-mnist is not installed")
def test_real_fashion_mnist_has_the_statistics_that_normalize_it():
    decoded = decode_dataset("fashion-mnist")
    assert decoded.train.images.shape == (60_000, 1, 28, 28)
    assert decoded.test.images.shape == (10_000, 1, 28, 28)
    assert torch.bincount(decoded.train.labels).tolist() == [6000] * 10
    assert torch.bincount(decoded.test.labels).tolist() == [1000] * 10
    levels = torch.bincount(decoded.train.images.flatten(), minlength=256).double()
    values = torch.arange(256) / 255
    mean = float(levels @ values.double() / levels.sum())
    std = float((levels @ (values.double() - mean) ** 2 / levels.sum()).sqrt())
    assert (mean, std) == pytest.approx((*decoded.facts.mean, *decoded.facts.std), abs=5e-5)


# CIFAR


@pytest.mark.parametrize(
    ("name", "below", "labels"),
    [
        ("cifar10", "cifar-10-batches-py", [0, 9, 0, 1, 1, 9, 0, 1]),
        ("cifar10", ".", [0, 9, 0, 1, 1, 9, 0, 1]),
        ("cifar100", "cifar-100-python", [0, 9, 0, 1]),
        ("cifar100", ".", [0, 9, 0, 1]),
    ],
)
def test_cifar_is_read_in_every_layout(tmp_path, name, below, labels):
    rows = list(write_cifar(tmp_path / "data" / below, name).values())
    decoded = decode_dataset(name, tmp_path / "data")
    expected = np.concatenate(rows[:-1]).reshape(-1, 3, 32, 32)
    np.testing.assert_array_equal(decoded.train.images.numpy(), expected)
    np.testing.assert_array_equal(decoded.test.images.numpy(), rows[-1].reshape(-1, 3, 32, 32))
    assert decoded.train.labels.tolist()[: len(labels)] == labels
    assert decoded.facts == DATASET_FACTS[name]
    assert decode_dataset(name, tmp_path / "data", test_only=True).train is None


def test_image_folders_called_train_and_test_are_not_taken_for_cifar100(tmp_path):
    write_image_folder(tmp_path, parts=("train", "test"))
    assert f"{tmp_path}: lacks train, test" in error_of("cifar100", tmp_path)


# download


class Downloader:
    """Stands in for a class of torchvision."""

    def __init__(self, error=None):
        self.error, self.calls = error, []

    def __call__(self, root, download):
        self.calls.append((root, download))
        if self.error:
            raise self.error
        write_mnist(Path(root) / "MNIST" / "raw")


def test_data_are_downloaded_only_when_asked_for_and_only_when_missing(tmp_path, monkeypatch):
    downloader = Downloader()
    monkeypatch.setattr(torchvision.datasets, "MNIST", downloader)
    with pytest.raises(DatasetError):
        decode_dataset("mnist", tmp_path)
    assert downloader.calls == []
    for _ in range(2):
        assert len(decode_dataset("mnist", tmp_path, download=True).train) == 6
    assert downloader.calls == [(str(tmp_path), True)]


@pytest.mark.parametrize("error", [URLError("no route to host"), RuntimeError("no mirror answers")])
def test_failed_download_is_told(tmp_path, monkeypatch, error):
    monkeypatch.setattr(torchvision.datasets, "MNIST", Downloader(error))
    assert (
        error_of("mnist", tmp_path, download=True) == f"mnist: the download into {tmp_path} failed: {error}"
    )


def test_nothing_is_downloaded_into_a_folder_of_the_system_or_into_none(monkeypatch):
    downloader = Downloader()
    monkeypatch.setattr(torchvision.datasets, "MNIST", downloader)
    assert error_of("mnist", "/usr/share/datasets", download=True) == (
        "mnist: --download does not write into /usr/share/datasets, a folder of the system; give your own"
    )
    assert error_of("mnist", download=True) == (
        "mnist: --download needs a DATASET_DIR to put the data into, got none"
    )
    assert downloader.calls == []


# image folders


@pytest.mark.parametrize("test_part", ["val", "test"])
def test_image_folder_lists_files_by_class(tmp_path, test_part):
    write_image_folder(tmp_path, parts=("train", test_part))
    decoded = decode_dataset("image-folder", tmp_path)
    assert isinstance(decoded.train, ImageFiles)
    assert decoded.train.labels.tolist() == [0, 0, 0, 1, 1, 1]
    assert decoded.test.paths[3] == str(tmp_path / test_part / "dog" / "0.png")
    imagenet = DATASET_FACTS["imagenet"]
    expected = DatasetFacts("image-folder", 2, 3, 224, imagenet.mean, imagenet.std)
    assert decoded.facts == dataset_info("image-folder", tmp_path) == expected


def test_test_images_alone_need_no_training_folder(tmp_path):
    write_image_folder(tmp_path, parts=("val",))
    assert len(decode_dataset("image-folder", tmp_path, test_only=True).test) == 6


REMEDY = "give as DATASET_DIR a folder with train/ and val/ (or test/), in each one folder per class"


def test_folder_without_image_folders_is_refused(tmp_path):
    (tmp_path / "empty").mkdir()
    assert error_of("imagenet") == f"imagenet: no DATASET_DIR was given; {REMEDY}"
    assert error_of("imagenet", tmp_path / "absent", download=True) == (
        f"imagenet: {tmp_path}/absent: no such folder; {REMEDY}; --download cannot get them"
    )
    assert error_of("image-folder", tmp_path / "empty") == (
        f"image-folder: {tmp_path}/empty: lacks image folders, it holds nothing; {REMEDY}"
    )
    write_image_folder(tmp_path, parts=("train",))
    assert error_of("image-folder", tmp_path) == (
        f"image-folder: {tmp_path}: lacks image folders, it holds empty, train; {REMEDY}"
    )


def test_folder_that_may_not_be_read_is_refused(tmp_path, monkeypatch):
    def refuse(path):
        raise PermissionError(13, "Permission denied", str(path))

    monkeypatch.setattr(Path, "is_dir", refuse)
    assert error_of("image-folder", tmp_path) == (
        f"image-folder: the data cannot be read: [Errno 13] Permission denied: '{tmp_path}'"
    )


def test_folder_without_classes_or_with_an_empty_class_is_refused(tmp_path):
    for part in ("train", "val"):
        (tmp_path / part).mkdir()
    assert error_of("image-folder", tmp_path).startswith(
        f"{tmp_path}/val: must hold one folder of images per class: "
    )
    (tmp_path / "val" / "cat").mkdir()
    assert error_of("image-folder", tmp_path).startswith(
        f"{tmp_path}/val: must hold one folder of images per class: "
    )


def test_different_classes_in_training_and_test_are_refused(tmp_path):
    write_image_folder(tmp_path, parts=("train",))
    write_image_folder(tmp_path, classes=("cat", "cow", "dog"), parts=("val",))
    assert error_of("image-folder", tmp_path) == (
        f"image-folder: {tmp_path}: train/ and val/ must have the same classes, got 2 and 3; "
        "only in one of them: cow"
    )


def test_imagenet_of_other_classes_is_refused(tmp_path):
    write_image_folder(tmp_path)
    assert error_of("imagenet", tmp_path) == (
        f"imagenet: {tmp_path}: ImageNet has 1000 classes, got 2; "
        "a folder with other classes is read with --dataset image-folder"
    )


# names


def test_facts_of_known_data_sets_need_no_files():
    for name, facts in DATASET_FACTS.items():
        assert dataset_info(name) == facts


def test_every_known_data_set_is_registered():
    assert set(DATASETS) == {*DATASET_FACTS, "image-folder", "synthetic"}


def test_function_at_a_dotted_path_is_a_data_set(tmp_path, monkeypatch):
    monkeypatch.syspath_prepend(tmp_path)
    monkeypatch.setattr("sys.dont_write_bytecode", True)
    (tmp_path / "data_by_a_function.py").write_text(
        "import torch\ndef load(folder):\n"
        "    part = torch.zeros(2, 1, 4, 4), torch.tensor([0, 1])\n    return part, part\n"
    )
    facts = dataset_info("data_by_a_function:load", tmp_path)
    assert (facts.num_classes, facts.input_shape) == (2, (1, 4, 4))


def test_function_is_called_once_for_facts_and_data(tmp_path, monkeypatch):
    monkeypatch.syspath_prepend(tmp_path)
    monkeypatch.setattr("sys.dont_write_bytecode", True)
    (tmp_path / "data_that_counts.py").write_text(
        "import torch\ncalls = []\ndef load(folder):\n    calls.append(folder)\n"
        "    part = torch.rand(2, 1, 4, 4), torch.tensor([0, 1])\n    return part, part\n"
    )
    facts = dataset_info("data_that_counts:load", tmp_path)
    decoded = decode_dataset("data_that_counts:load", tmp_path)
    assert decoded.facts is facts
    assert importlib.import_module("data_that_counts").calls == [tmp_path]
    decode_dataset("data_that_counts:load", tmp_path / "other")
    assert importlib.import_module("data_that_counts").calls == [tmp_path, tmp_path / "other"]


@pytest.mark.parametrize("name", ["digits", "synthetic"])
def test_folder_that_is_not_there_is_refused_though_none_is_needed(name, tmp_path):
    with pytest.raises(DatasetError) as caught:
        decode_dataset(name, tmp_path / "none")
    assert str(caught.value) == (
        f"{name}: {tmp_path / 'none'}: no such folder; leave DATASET_DIR out, {name} needs none"
    )
    assert decode_dataset(name, tmp_path, test_only=True).facts.name == name


def test_unknown_name_is_told_with_the_nearest():
    names = "digits, mnist, fashion-mnist, cifar10, cifar100, imagenet, image-folder, synthetic"
    with pytest.raises(UnknownNameError) as caught:
        dataset_info("fashon-mnist")
    assert str(caught.value) == (
        f"dataset: there is no 'fashon-mnist', only {names}; did you mean 'fashion-mnist'?"
    )
    with pytest.raises(UnknownNameError, match=r"; a function is given as package\.module:function$"):
        dataset_info("xyz")
