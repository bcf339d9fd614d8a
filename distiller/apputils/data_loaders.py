"""From a data set to mini-batches, for training, validation, test and calibration.

The mini-batches of an epoch are a pure function of (seed, epoch); iterating neither reads nor moves
a global random state. So a run that was killed and resumed sees the same ones, bit for bit.
Knows nothing about file formats, models or training.
"""

from __future__ import annotations

import copy
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Self

import torch
from torch import Generator, Tensor
from torch.utils.data import DataLoader, Dataset

from distiller.apputils.augmentation import (
    BATCH_AUGMENTATIONS,
    evaluation_transform,
    fit_images,
    normalize,
    training_transform,
)
from distiller.apputils.dataset_function import float_item
from distiller.apputils.dataset_sources import ImageFiles, LabelledImages, Source
from distiller.apputils.datasets import decode_dataset
from distiller.apputils.device import usable_processors
from distiller.apputils.sampling import (
    draw_subset,
    isolated_random_state,
    seeded,
    split_indices,
    subset_size,
)
from distiller.dataset_facts import DatasetFacts
from distiller.errors import DatasetError, UsageError

Batch = tuple[Tensor, Tensor]
"""float32 images (batch, C, H, W), normalized; int64 labels (batch,)."""

_MAX_FITTED_BYTES = 2**31  # above, images are scaled batch by batch instead of once


class Loader(ABC):
    """Mini-batches of one part of a data set.

    A training loader visits another random order in each epoch, with augmentation; any other
    visits the same samples in the same order without. Set the epoch before iterating over one.

    Attributes:
        batch_size: samples in a mini-batch; the last one may have fewer.
        num_samples: samples visited in an epoch.
    """

    def __init__(self, settings: LoaderSettings, pool: Tensor) -> None:
        self.batch_size = settings.batch_size
        self.num_samples = subset_size(len(pool), settings.portion)
        self.epoch = 0
        self._settings = settings
        self._pool = pool

    def __len__(self) -> int:
        return -(-self.num_samples // self.batch_size)

    @abstractmethod
    def __iter__(self) -> Iterator[Batch]: ...

    def set_epoch(self, epoch: int) -> None:
        """Choose the order and augmentation of epoch `epoch`, from 0; without effect on evaluation."""
        self.epoch = epoch

    def indices(self) -> Tensor:
        """The samples of the present epoch, as indices into the data set, in order."""
        if not self._settings.training:
            return self._pool
        return draw_subset(self._pool, self._settings.portion, self._generator("order"))

    def of_samples(self, samples: Tensor) -> Self:
        """The same for these samples, indices into the data set, in this order; not for training."""
        assert not self._settings.training
        other = copy.copy(self)
        other.num_samples, other._pool = len(samples), samples
        return other

    def tensors(self) -> Batch:
        """All mini-batches of the present epoch as one; takes 4 * num_samples * C * H * W bytes."""
        images, labels = zip(*self, strict=True)
        return torch.cat(images), torch.cat(labels)

    def _generator(self, purpose: str) -> Generator:
        return seeded(self._settings.seed, purpose, self.epoch if self._settings.training else 0)


@dataclass(frozen=True)
class LoaderSettings:
    """How a loader makes its mini-batches.

    Attributes:
        facts: for normalization.
        input_shape: (C, H, W) that the model takes.
        batch_size: at least 1.
        workers: processes that read image files or a user's data set; batches do not depend on it.
        seed: of order and augmentation.
        training: shuffle and augment.
        portion: of the samples, drawn anew in each epoch of training.
        augment: of whole batches in memory.
    """

    facts: DatasetFacts
    input_shape: tuple[int, ...]
    batch_size: int
    workers: int
    seed: int
    training: bool = False
    portion: float = 1.0
    augment: Callable[[Tensor, Generator], Tensor] | None = None


class MemoryLoader(Loader):
    """Batches by index from images in memory."""

    def __init__(self, source: LabelledImages, settings: LoaderSettings, pool: Tensor) -> None:
        super().__init__(settings, pool)
        self._source = source

    def __iter__(self) -> Iterator[Batch]:
        settings, facts = self._settings, self._settings.facts
        generator = self._generator("augmentation")
        for chosen in self.indices().split(self.batch_size):
            images = fit_images(self._source.images[chosen], settings.input_shape)
            if settings.training and settings.augment is not None:
                images = settings.augment(images, generator)
            yield normalize(images, facts.mean, facts.std), self._source.labels[chosen]


class ItemLoader(Loader):
    """Batches of items that are read one by one, by worker processes: image files, a user's data set."""

    def __init__(self, source: ImageFiles | Dataset, settings: LoaderSettings, pool: Tensor) -> None:
        super().__init__(settings, pool)
        if isinstance(source, ImageFiles):
            make = training_transform if settings.training else evaluation_transform
            mode = "L" if settings.input_shape[0] == 1 else "RGB"
            self._items = _SeededItems(partial(_file_item, source, make(settings.input_shape), mode))
        else:
            self._items = _SeededItems(partial(_user_item, source, settings.input_shape))

    def __iter__(self) -> Iterator[Batch]:
        indices = self.indices().tolist()
        generator = self._generator("augmentation")
        seeds = torch.randint(2**62, (len(indices),), generator=generator).tolist()
        keys = list(zip(indices, seeds, strict=True))
        batches = [keys[i : i + self.batch_size] for i in range(0, len(keys), self.batch_size)]
        loader = DataLoader(
            self._items,
            batch_sampler=batches,  # pyright: ignore[reportArgumentType] - any iterable of lists will do
            num_workers=min(self._settings.workers, usable_processors(), len(batches)),
            collate_fn=_collate,
            generator=generator,
            pin_memory=torch.cuda.is_available(),
        )
        facts = self._settings.facts
        for batch in loader:
            if isinstance(batch, DatasetError):
                raise batch
            images, labels = batch
            yield normalize(images, facts.mean, facts.std), labels


@dataclass(frozen=True)
class DataBundle:
    """The loaders of one run.

    Attributes:
        facts: of the data set.
        train: None when only the test set was loaded.
        valid: likewise; the test loader itself when there was no split.
        test: the test set.
        valid_is_test: whether validation uses the test set, so that results on it are no longer unseen.
    """

    facts: DatasetFacts
    train: Loader | None
    valid: Loader | None
    test: Loader
    valid_is_test: bool
    _calibration: Callable[[float], Loader] | None

    def calibration(self, portion: float) -> Loader:
        """A fixed portion of the training split, drawn from the seed, as in evaluation: no augmentation.

        Args:
            portion: of the training split, (0, 1].

        Raises:
            UsageError: `portion` is outside.
            DatasetError: only the test set was loaded.
        """
        _require_portion("calibration portion", portion)
        if self._calibration is None:
            raise DatasetError("calibration: takes training data, but only the test set was loaded")
        return self._calibration(portion)


def load_data(
    dataset: str,
    data_dir: str | Path | None = None,
    *,
    input_shape: Sequence[int],
    batch_size: int,
    workers: int = 4,
    validation_split: float = 0.1,
    effective_train_size: float = 1.0,
    effective_valid_size: float = 1.0,
    effective_test_size: float = 1.0,
    fixed_subset: bool = False,
    seed: int = 0,
    download: bool = False,
    test_only: bool = False,
) -> DataBundle:
    """Find a data set, decode it and make its loaders.

    Args:
        dataset: a name as `decode_dataset` takes it.
        data_dir: the user's data folder; None where the set needs none.
        input_shape: (C, H, W) that the model takes; images are scaled to it.
        batch_size: at least 1.
        workers: processes that read image files; sets in memory need none.
        validation_split: share of the training set that becomes the validation set, [0, 1);
            0: the test loader is the validation loader.
        effective_train_size: portion of the training split visited in an epoch, (0, 1].
        effective_valid_size: portion of the validation split, (0, 1], the same in every epoch.
        effective_test_size: portion of the test set, (0, 1], the same in every epoch.
        fixed_subset: whether the training portion too is the same in every epoch.
        seed: of split, subsets, order and augmentation.
        download: whether missing data may be downloaded into `data_dir`.
        test_only: leave the training and validation sets out.

    Raises:
        UsageError: a size is out of its range.
        UnknownNameError: there is no such data set.
        DatasetError: the data are missing, damaged or too few for the split.
    """
    _require_sizes(batch_size, workers, validation_split)
    for flag, portion in (
        ("effective_train_size", effective_train_size),
        ("effective_valid_size", effective_valid_size),
        ("effective_test_size", effective_test_size),
    ):
        _require_portion(flag, portion)
    decoded = decode_dataset(dataset, data_dir, download=download, test_only=test_only)
    settings = LoaderSettings(decoded.facts, tuple(input_shape), batch_size, workers, seed)
    test_source = _fitted(decoded.test, settings.input_shape)
    test = _fixed_loader(test_source, settings, _all(test_source), "test", effective_test_size)
    if test_only or decoded.train is None:
        return DataBundle(decoded.facts, None, None, test, validation_split == 0, None)

    source = _fitted(decoded.train, settings.input_shape)
    train_pool, valid_pool = split_indices(_length(source), validation_split, seed)
    valid = test
    if validation_split > 0:
        valid = _fixed_loader(source, settings, valid_pool, "valid", effective_valid_size)
    pool, portion = train_pool, effective_train_size
    if fixed_subset:
        pool, portion = draw_subset(pool, portion, seeded(seed, "fixed training subset")), 1.0
    augment = BATCH_AUGMENTATIONS.get(dataset)
    train = _loader(source, replace(settings, training=True, portion=portion, augment=augment), pool)
    calibration = partial(_fixed_loader, source, settings, train_pool, "calibration")
    return DataBundle(decoded.facts, train, valid, test, validation_split == 0, calibration)


class _SeededItems(Dataset):
    """Items by (index, seed): what is random in an item depends on these, not on the worker."""

    def __init__(self, fetch: Callable[[int], tuple[Tensor, int]]) -> None:
        self._fetch = fetch

    def __getitem__(self, key: tuple[int, int]) -> tuple[Tensor, int] | DatasetError:
        index, seed = key
        with isolated_random_state(seed):
            try:
                return self._fetch(index)
            except DatasetError as error:
                return error  # as a value: raised in a worker, its message would come with a traceback


def _file_item(
    files: ImageFiles, transform: Callable[..., Tensor], mode: str, index: int
) -> tuple[Tensor, int]:
    return transform(files.load(index, mode)), int(files.labels[index])


def _user_item(dataset: Dataset, input_shape: tuple[int, ...], index: int) -> tuple[Tensor, int]:
    image, label = float_item(dataset, index)
    return fit_images(image[None], input_shape)[0], label


def _collate(items: list[tuple[Tensor, int] | DatasetError]) -> Batch | DatasetError:
    images, labels = [], []
    for item in items:
        if isinstance(item, DatasetError):
            return item
        images.append(item[0])
        labels.append(item[1])
    return torch.stack(images), torch.tensor(labels)


def _loader(source: Source, settings: LoaderSettings, pool: Tensor) -> Loader:
    if isinstance(source, LabelledImages):
        return MemoryLoader(source, settings, pool)
    return ItemLoader(source, settings, pool)


def _fixed_loader(
    source: Source, settings: LoaderSettings, pool: Tensor, purpose: str, portion: float
) -> Loader:
    """A loader for evaluation on a portion of the pool drawn from the seed, in the data set's order."""
    chosen = draw_subset(pool, portion, seeded(settings.seed, purpose))
    return _loader(source, settings, chosen.sort().values)


def _fitted(source: Source, input_shape: tuple[int, ...]) -> Source:
    if not isinstance(source, LabelledImages):
        return source
    bytes_needed = len(source) * torch.Size(input_shape).numel() * source.images.element_size()
    if bytes_needed > _MAX_FITTED_BYTES:
        return source
    return LabelledImages(fit_images(source.images, input_shape), source.labels)


def _length(source: Source) -> int:
    return len(source)  # pyright: ignore[reportArgumentType] - a user's data set is map-style


def _all(source: Source) -> Tensor:
    return torch.arange(_length(source))


def _require_portion(flag: str, portion: float) -> None:
    if not 0 < portion <= 1:
        raise UsageError(f"{flag}: must lie in (0, 1], got {portion}")


def _require_sizes(batch_size: int, workers: int, validation_split: float) -> None:
    if batch_size < 1:
        raise UsageError(f"batch_size: must be at least 1, got {batch_size}")
    if workers < 0:
        raise UsageError(f"workers: must be at least 0, got {workers}")
    if not 0 <= validation_split < 1:
        raise UsageError(f"validation_split: must lie in [0, 1), got {validation_split}")
