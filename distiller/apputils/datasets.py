"""Finding and decoding data sets: a name and a folder become labelled images.

Small sets are decoded once into uint8 tensors; image folders stay files that are read when asked
for. A set that is missing is downloaded only when the caller says so.
Knows nothing about splits, order, augmentation, normalization or models.
"""

from __future__ import annotations

from collections.abc import Sequence
from functools import lru_cache, partial
from http.client import HTTPException
from pathlib import Path

import numpy as np
import torch

from distiller.apputils.dataset_files import describe_places, find_folder, read_cifar_batch, read_idx
from distiller.apputils.dataset_function import decode_from_function
from distiller.apputils.dataset_sources import DecodedDataset, ImageFiles, LabelledImages, check_labels
from distiller.dataset_facts import DATASET_FACTS, DatasetFacts
from distiller.errors import DatasetError, UnknownNameError, did_you_mean
from distiller.registry import DATASETS


def dataset_info(name: str, data_dir: str | Path | None = None) -> DatasetFacts:
    """What a network has to know of a data set: classes, image shape, normalization.

    The facts of an image folder come from its folders, those of `package.module:function` from
    what the function returns (which `decode_dataset` then has from here); of the others no file is read.

    Args:
        name: a registered name, or `package.module:function`.
        data_dir: the user's data folder, `~` allowed.

    Raises:
        UnknownNameError: there is no such data set or function.
        DatasetError: the data must be read for it and cannot be.
    """
    if name in DATASET_FACTS:
        return DATASET_FACTS[name]
    if name == SYNTHETIC_FACTS.name:
        return SYNTHETIC_FACTS
    return decode_dataset(name, data_dir, test_only=True).facts


def decode_dataset(
    name: str, data_dir: str | Path | None = None, *, download: bool = False, test_only: bool = False
) -> DecodedDataset:
    """Find a data set and decode it, or list its files.

    Args:
        name: `digits`, `mnist`, `fashion-mnist`, `cifar10`, `cifar100`, `imagenet`, `image-folder`,
            `synthetic`, or `package.module:function`. The function is called with `data_dir` and
            returns (train, test), each a pair (images, labels) with images (N, C, H, W) of uint8
            or float, or a torch `Dataset` with items (float image (C, H, W), label), which is used
            as it stands, for training and evaluation alike.
        data_dir: the user's data folder, `~` allowed; None where the set needs none.
        download: whether missing data may be downloaded into `data_dir`.
        test_only: leave the training set out.

    Raises:
        UnknownNameError: there is no such data set or function.
        DatasetError: the data are missing or not what they should be.
    """
    folder = None if data_dir is None else Path(data_dir).expanduser()
    if ":" in name:
        return _decoded_once(name, folder)
    if name not in DATASETS:
        hint = did_you_mean(name, DATASETS) or "; a function is given as package.module:function"
        raise UnknownNameError(f"dataset: there is no '{name}', only {', '.join(DATASETS)}{hint}")
    if name in _EMBEDDED and folder is not None and not folder.exists():
        raise DatasetError(f"{name}: {folder}: no such folder; leave DATASET_DIR out, {name} needs none")
    try:
        return DATASETS[name](folder, download, test_only)
    except OSError as error:
        raise DatasetError(f"{name}: the data cannot be read: {error}") from error


def synthetic_images(
    shape: Sequence[int], num_classes: int, samples_per_class: int, part: int
) -> LabelledImages:
    """Random images that a network can learn: a fixed blocky pattern for each class, under noise.

    Args:
        shape: (C, H, W) of an image.
        num_classes: how many patterns.
        samples_per_class: images of each.
        part: parts with different numbers have the same patterns under different noise.

    Returns:
        uint8 images, the same ones at every call; labels run 0, 1, 2, ... over and over.
    """
    channels, height, width = shape
    coarse = torch.rand((num_classes, channels, 4, 4), generator=torch.Generator().manual_seed(0))
    patterns = torch.nn.functional.interpolate(coarse, (height, width), mode="nearest")
    labels = torch.arange(num_classes).repeat(samples_per_class)
    noise = torch.randn((len(labels), *shape), generator=torch.Generator().manual_seed(1 + part))
    images = (255 * patterns[labels] + 50 * noise).clamp_(0, 255).to(torch.uint8)
    return LabelledImages(images, labels)


SYNTHETIC_FACTS = DatasetFacts("synthetic", 10, 3, 32, (0.5,) * 3, (0.3,) * 3)
"""The data set `synthetic`: 640 training and 160 test images."""


def _synthetic(folder: Path | None, download: bool, test_only: bool) -> DecodedDataset:
    make = partial(synthetic_images, SYNTHETIC_FACTS.input_shape, SYNTHETIC_FACTS.num_classes)
    return DecodedDataset(SYNTHETIC_FACTS, None if test_only else make(64, part=0), make(16, part=1))


def _digits(folder: Path | None, download: bool, test_only: bool) -> DecodedDataset:
    from sklearn.datasets import load_digits  # half a second, which the other sets need not wait

    values, labels = map(np.asarray, load_digits(return_X_y=True))
    images = np.round(values * (255 / 16)).astype(np.uint8).reshape(-1, 1, 8, 8)
    position_in_class = np.array([np.count_nonzero(labels[:i] == label) for i, label in enumerate(labels)])
    is_test = position_in_class % 5 == 2  # every fifth image of each class, whatever the seed
    train = None if test_only else _labelled(images[~is_test], labels[~is_test])
    return DecodedDataset(DATASET_FACTS["digits"], train, _labelled(images[is_test], labels[is_test]))


def _mnist(name: str, folder: Path | None, download: bool, test_only: bool) -> DecodedDataset:
    parts = ["t10k"] if test_only else ["train", "t10k"]
    files = [f"{part}-{kind}-ubyte" for part in parts for kind in ("images-idx3", "labels-idx1")]
    found = _locate(name, folder, (f"{_TORCHVISION_CLASS[name]}/raw", "raw", "."), files, download)
    facts = DATASET_FACTS[name]

    def decode(part: str) -> LabelledImages:
        images = read_idx(found, f"{part}-images-idx3-ubyte", 3)
        labels = read_idx(found, f"{part}-labels-idx1-ubyte", 1)
        return check_labels(_labelled(images[:, None], labels), facts.num_classes, f"{found}, {part}")

    return DecodedDataset(facts, None if test_only else decode("train"), decode("t10k"))


def _cifar(name: str, folder: Path | None, download: bool, test_only: bool) -> DecodedDataset:
    below, train_files, test_files, label_key = {
        "cifar10": (
            "cifar-10-batches-py",
            [f"data_batch_{i}" for i in range(1, 6)],
            ["test_batch"],
            "labels",
        ),
        "cifar100": ("cifar-100-python", ["train"], ["test"], "fine_labels"),
    }[name]
    files = test_files if test_only else train_files + test_files
    found = _locate(name, folder, (below, "."), files, download)
    facts = DATASET_FACTS[name]

    def decode(files: list[str]) -> LabelledImages:
        batches = [read_cifar_batch(found / file, label_key) for file in files]
        images, labels = (np.concatenate(arrays) for arrays in zip(*batches, strict=True))
        return check_labels(_labelled(images, labels), facts.num_classes, f"{found}, {' '.join(files)}")

    return DecodedDataset(facts, None if test_only else decode(train_files), decode(test_files))


def _image_folder(name: str, folder: Path | None, download: bool, test_only: bool) -> DecodedDataset:
    where, train_folder, test_folder = _find_image_folders(name, folder, download, test_only)
    test = _scan(test_folder)
    train = None if test_only else _scan(train_folder)
    if train is not None and train.classes != test.classes:
        differing = sorted(set(train.classes) ^ set(test.classes))
        raise DatasetError(
            f"{where}: train/ and {test_folder.name}/ must have the same classes, "
            f"got {len(train.classes)} and {len(test.classes)}; "
            f"only in one of them: {', '.join(differing[:5])}"
        )
    imagenet = DATASET_FACTS["imagenet"]
    if name == "imagenet" and len(test.classes) != imagenet.num_classes:
        raise DatasetError(
            f"{where}: ImageNet has {imagenet.num_classes} classes, got {len(test.classes)}; "
            "a folder with other classes is read with --dataset image-folder"
        )
    facts = DatasetFacts(
        name, len(test.classes), imagenet.channels, imagenet.size, imagenet.mean, imagenet.std
    )
    return DecodedDataset(facts, train, test)


@lru_cache(maxsize=1)
def _decoded_once(function: str, folder: Path | None) -> DecodedDataset:
    """The user's function is called once, for the facts and the data: it may take long, or draw at random."""
    return decode_from_function(function, folder)


_EMBEDDED = ("digits", "synthetic")
_TORCHVISION_CLASS = {
    "mnist": "MNIST",
    "fashion-mnist": "FashionMNIST",
    "cifar10": "CIFAR10",
    "cifar100": "CIFAR100",
}
# Where a package of the system puts a data set, and how to get it.
_SYSTEM_FOLDERS = {"fashion-mnist": Path("/usr/share/datasets/fashion-mnist")}
_SYSTEM_PACKAGES = {
    "fashion-mnist": "install the Debian package dataset-fashion-mnist and leave DATASET_DIR out"
}
_NO_DOWNLOADS_BELOW = ("/bin", "/boot", "/dev", "/etc", "/lib", "/proc", "/run", "/sbin", "/sys", "/usr")

for _name, _decode in {
    "digits": _digits,
    "mnist": partial(_mnist, "mnist"),
    "fashion-mnist": partial(_mnist, "fashion-mnist"),
    "cifar10": partial(_cifar, "cifar10"),
    "cifar100": partial(_cifar, "cifar100"),
    "imagenet": partial(_image_folder, "imagenet"),
    "image-folder": partial(_image_folder, "image-folder"),
    "synthetic": _synthetic,
}.items():
    DATASETS.register(_decode, _name)


def _find_image_folders(
    name: str, folder: Path | None, download: bool, test_only: bool
) -> tuple[str, Path, Path]:
    """(what errors name, folder of training images, folder of test images)."""
    remedy = "give as DATASET_DIR a folder with train/ and val/ (or test/), in each one folder per class"
    if download:
        remedy += "; --download cannot get them"
    if folder is None:
        raise DatasetError(f"{name}: no DATASET_DIR was given; {remedy}")
    where = f"{name}: {folder}"
    if not folder.is_dir():
        raise DatasetError(f"{where}: no such folder; {remedy}")
    test_folder = folder / "val" if (folder / "val").is_dir() else folder / "test"
    wanted = [test_folder] if test_only else [folder / "train", test_folder]
    if not all(place.is_dir() for place in wanted):
        names = sorted(path.name for path in folder.iterdir())
        got = ", ".join(names[:5] + ["..."] * (len(names) > 5)) or "nothing"
        raise DatasetError(f"{where}: lacks image folders, it holds {got}; {remedy}")
    return where, folder / "train", test_folder


def _labelled(images: np.ndarray, labels: np.ndarray) -> LabelledImages:
    return LabelledImages(torch.tensor(images), torch.tensor(labels, dtype=torch.int64))


def _locate(
    name: str, folder: Path | None, below: Sequence[str], files: Sequence[str], download: bool
) -> Path:
    """The folder with all `files`: below the user's folder, or the system's when none is given."""
    if folder is not None:
        places = [folder / inner for inner in below]
    else:
        places = [_SYSTEM_FOLDERS[name]] if name in _SYSTEM_FOLDERS else []
    found = find_folder(places, files)
    if found is None and download:
        _download(name, folder)
        found = find_folder(places, files)
    if found is None:
        looked = f"looked in\n{describe_places(places, files)}" if places else "no DATASET_DIR was given"
        package = f", or {_SYSTEM_PACKAGES[name]}" if name in _SYSTEM_PACKAGES else ""
        raise DatasetError(
            f"{name}: the data are not there, {looked}\n"
            f"give the DATASET_DIR that holds them, or add --download to get them into it{package}"
        )
    return found


def _download(name: str, folder: Path | None) -> None:
    if folder is None:
        raise DatasetError(f"{name}: --download needs a DATASET_DIR to put the data into, got none")
    resolved = folder.resolve()
    if any(resolved.is_relative_to(place) for place in _NO_DOWNLOADS_BELOW):
        raise DatasetError(
            f"{name}: --download does not write into {folder}, a folder of the system; give your own"
        )
    import torchvision.datasets  # seconds of import, which sets that are read by ourselves need not wait

    try:
        getattr(torchvision.datasets, _TORCHVISION_CLASS[name])(str(folder), download=True)
    except (OSError, RuntimeError, HTTPException) as error:
        raise DatasetError(f"{name}: the download into {folder} failed: {error}") from error


def _scan(folder: Path) -> ImageFiles:
    import torchvision.datasets  # as above

    try:
        scanned = torchvision.datasets.ImageFolder(str(folder))
    except OSError as error:
        raise DatasetError(f"{folder}: must hold one folder of images per class: {error}") from error
    paths, labels = zip(*scanned.samples, strict=True)
    return ImageFiles(paths, torch.tensor(labels), tuple(scanned.classes))
