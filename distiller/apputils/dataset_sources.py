"""What a data set is once it is found: labelled images in memory, image files, or a torch data set.

Knows nothing about where data come from, nor about loaders.
"""

from __future__ import annotations

from dataclasses import dataclass

from PIL import Image
from torch import Tensor
from torch.utils.data import Dataset

from distiller.dataset_facts import DatasetFacts
from distiller.errors import DatasetError


@dataclass(frozen=True, slots=True)
class LabelledImages:
    """A part of a data set in memory.

    Attributes:
        images: (N, C, H, W); uint8, or float values that a network takes as they are.
        labels: (N,) int64, from 0.
    """

    images: Tensor
    labels: Tensor

    def __len__(self) -> int:
        return len(self.labels)


@dataclass(frozen=True, slots=True)
class ImageFiles:
    """A part of a data set as image files.

    Attributes:
        paths: one for each image.
        labels: (N,) int64, indices into `classes`.
        classes: the names of the folders, sorted.
    """

    paths: tuple[str, ...]
    labels: Tensor
    classes: tuple[str, ...]

    def __len__(self) -> int:
        return len(self.paths)

    def load(self, index: int, mode: str) -> Image.Image:
        """One image in PIL's `mode` (RGB, L).

        Raises:
            DatasetError: the file is damaged or gone.
        """
        try:
            with Image.open(self.paths[index]) as image:
                return image.convert(mode)
        except (OSError, SyntaxError, ValueError) as error:  # what PIL raises on damaged files
            raise DatasetError(f"{self.paths[index]}: cannot be read as an image: {error}") from error


Source = LabelledImages | ImageFiles | Dataset
"""A part of a data set. A `Dataset` has items (float image (C, H, W), label), used as they are."""


@dataclass(frozen=True, slots=True)
class DecodedDataset:
    """A data set found; `train` is None when only the test set was asked for."""

    facts: DatasetFacts
    train: Source | None
    test: Source


def check_labels(part: LabelledImages, num_classes: int | None, where: str) -> LabelledImages:
    """`part` itself, when it has images, a label for each, and only labels that there can be.

    Args:
        part: the images and labels.
        num_classes: labels must lie below; None when not known.
        where: what an error names.

    Raises:
        DatasetError: it has not.
    """
    if len(part.images) != len(part.labels):
        raise DatasetError(f"{where}: {len(part.images)} images but {len(part.labels)} labels")
    if len(part) == 0:
        raise DatasetError(f"{where}: holds no images")
    smallest, largest = int(part.labels.min()), int(part.labels.max())
    if smallest < 0 or (num_classes is not None and largest >= num_classes):
        wanted = "not be negative" if num_classes is None else f"lie in 0..{num_classes - 1}"
        raise DatasetError(f"{where}: labels must {wanted}, got {smallest if smallest < 0 else largest}")
    return part
