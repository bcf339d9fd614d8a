"""A data set of the user's own: a function at a dotted path that returns it.

Checks what the function returns, so that a mistake in it is told before training.
Knows nothing about the data sets that are registered by name.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.utils.data import Dataset, IterableDataset

from distiller.apputils.dataset_sources import DecodedDataset, LabelledImages, check_labels
from distiller.dataset_facts import DatasetFacts
from distiller.errors import DatasetError, users_code
from distiller.registry import load_dotted


def decode_from_function(path: str, folder: Path | None) -> DecodedDataset:
    """The data set that the function at `package.module:function` returns.

    Images of uint8 are normalized by the training images' own mean and standard deviation;
    floats are left as they are (mean 0, std 1).

    Args:
        path: as the user typed it, so its package may run.
        folder: the function's only argument.

    Raises:
        UnknownNameError: there is no such function.
        DatasetError: it does not return a pair (train, test), each a torch `Dataset` or a
            pair (images, labels), both of the same square shape; or it fails.
    """
    module, _, function_name = path.partition(":")
    if not (module and function_name):
        raise DatasetError(f"dataset: a function is given as package.module:function, got '{path}'")
    with users_code(path, "; the module is imported for its function", DatasetError):
        function = load_dotted(f"{module}.{function_name}", (module.partition(".")[0],), "data set function")
    with users_code(
        path, "; it is called with DATASET_DIR, or None, and returns (train, test)", DatasetError
    ):
        return _decoded(path, function(folder))


def float_item(dataset: Dataset, index: int) -> tuple[Tensor, int]:
    """One (image, label) of a user's data set.

    Raises:
        DatasetError: it is not a pair of a float tensor (C, H, W) and a whole number, or fails.
    """
    with users_code(f"{type(dataset).__name__}[{index}]", kind=DatasetError):
        item: Any = dataset[index]
    match item:
        case (Tensor() as image, label) if image.is_floating_point() and image.ndim == 3 and _is_whole(label):
            return image, int(label)
    got = (
        ", ".join(_described(value) for value in item)
        if isinstance(item, (tuple, list))
        else _described(item)
    )
    raise DatasetError(
        f"{type(dataset).__name__}[{index}]: must be (float tensor (C, H, W), label), got {got}; "
        "give the data set a transform that ends in such a tensor"
    )


def _decoded(path: str, returned: Any) -> DecodedDataset:
    if not (isinstance(returned, (tuple, list)) and len(returned) == 2):
        raise DatasetError(f"{path}: must return (train, test), got {type(returned).__name__}")
    train, test = _source(returned[0], f"{path}, train"), _source(returned[1], f"{path}, test")
    shapes = _image_shape(train), _image_shape(test)
    if shapes[0] != shapes[1]:
        raise DatasetError(
            f"{path}: train and test images must have one shape, got {shapes[0]} and {shapes[1]}"
        )
    channels, height, width = shapes[0]
    if height != width:
        raise DatasetError(f"{path}: images must be square, got {height} x {width}")
    mean, std = _statistics(train, channels)
    classes = max(_count_classes(train, f"{path}, train"), _count_classes(test, f"{path}, test"))
    facts = DatasetFacts(path, classes, channels, height, mean, std)
    return DecodedDataset(facts, train, test)


def _is_whole(label: Any) -> bool:
    try:
        return bool(int(label) == label)
    except (TypeError, ValueError, RuntimeError):
        return False


def _source(part: Any, where: str) -> LabelledImages | Dataset:
    if isinstance(part, Dataset) and not isinstance(part, IterableDataset):
        if len(part) == 0:  # pyright: ignore[reportArgumentType] - map-style, so it has a length
            raise DatasetError(f"{where}: holds no images")
        float_item(part, 0)
        return part
    if not (isinstance(part, (tuple, list)) and len(part) == 2):
        raise DatasetError(
            f"{where}: must be a torch Dataset with a length, or a pair (images, labels), "
            f"got {_described(part)}"
        )
    images, labels = torch.as_tensor(part[0]), torch.as_tensor(part[1])
    if images.ndim != 4 or not (images.dtype == torch.uint8 or images.is_floating_point()):
        raise DatasetError(f"{where}: images must be uint8 or float (N, C, H, W), got {_described(images)}")
    if labels.ndim != 1 or labels.is_floating_point():
        raise DatasetError(f"{where}: labels must be whole numbers (N,), got {_described(labels)}")
    images = images if images.dtype == torch.uint8 else images.float()
    return check_labels(LabelledImages(images, labels.to(torch.int64)), None, where)


def _image_shape(source: LabelledImages | Dataset) -> tuple[int, ...]:
    return tuple(
        source.images.shape[1:] if isinstance(source, LabelledImages) else float_item(source, 0)[0].shape
    )


def _count_classes(source: LabelledImages | Dataset, where: str) -> int:
    """From the labels in memory, a data set's `classes` or `targets`, or else all its items."""
    if isinstance(source, LabelledImages):
        return int(source.labels.max()) + 1
    classes = getattr(source, "classes", None)
    if classes is not None:
        return len(classes)
    targets = getattr(source, "targets", None)
    if targets is None:
        count = len(source)  # pyright: ignore[reportArgumentType] - map-style, so it has a length
        targets = [float_item(source, index)[1] for index in range(count)]
    smallest = int(min(targets))
    if smallest < 0:
        raise DatasetError(f"{where}: labels must not be negative, got {smallest}")
    return int(max(targets)) + 1


def _statistics(
    source: LabelledImages | Dataset, channels: int
) -> tuple[tuple[float, ...], tuple[float, ...]]:
    """Mean and standard deviation by channel of uint8 images scaled to 0..1, else 0 and 1."""
    if not isinstance(source, LabelledImages) or source.images.dtype != torch.uint8:
        return (0.0,) * channels, (1.0,) * channels
    levels = torch.arange(256, dtype=torch.float64) / 255
    means, stds = [], []
    for channel in source.images.unbind(1):
        counts = torch.bincount(channel.flatten(), minlength=256).double()
        share = counts / counts.sum()
        mean = float(share @ levels)
        variance = float(share @ (levels - mean) ** 2)
        means.append(mean)
        stds.append(variance**0.5 or 1.0)  # a constant channel has no scale of its own
    return tuple(means), tuple(stds)


def _described(value: Any) -> str:
    return f"{value.dtype} {tuple(value.shape)}" if isinstance(value, Tensor) else type(value).__name__
