import random
import sys

import numpy as np
import pytest
import torch
from PIL import Image
from torchvision.transforms import functional as per_image

from distiller.apputils import data_loaders
from distiller.apputils.augmentation import evaluation_transform
from distiller.apputils.data_loaders import ItemLoader, LoaderSettings, MemoryLoader, load_data
from distiller.apputils.dataset_sources import DecodedDataset, LabelledImages
from distiller.apputils.sampling import split_indices
from distiller.dataset_facts import DATASET_FACTS
from distiller.errors import DatasetError, UsageError

CIFAR10 = DATASET_FACTS["cifar10"]
SHAPE = (3, 32, 32)


def marked(count, shape=SHAPE, seed=0):
    """Noise images whose labels are their own indices."""
    generator = torch.Generator().manual_seed(seed)
    images = torch.randint(0, 256, (count, *shape), generator=generator, dtype=torch.uint8)
    return LabelledImages(images, torch.arange(count))


@pytest.fixture
def load(monkeypatch):
    """`load_data` on 50 training and 20 test images in memory, under the name of a data set."""

    def run(dataset="cifar10", shape=SHAPE, batch_size=8, **kwargs):
        def decode(name, data_dir, *, download, test_only):
            return DecodedDataset(
                DATASET_FACTS[name], None if test_only else marked(50, shape), marked(20, shape, 1)
            )

        monkeypatch.setattr(data_loaders, "decode_dataset", decode)
        return load_data(dataset, **{"input_shape": shape, "batch_size": batch_size} | kwargs)

    return run


@pytest.fixture
def image_folder(tmp_path):
    rng = np.random.default_rng(0)
    for part, count in (("train", 6), ("val", 3)):
        for name in ("cat", "dog"):
            (tmp_path / part / name).mkdir(parents=True)
            for i in range(count):
                pixels = rng.integers(0, 256, (40, 30 + i, 3), dtype=np.uint8)
                Image.fromarray(pixels).save(tmp_path / part / name / f"{i}.png")
    return tmp_path


def order(loader):
    return [int(label) for _, labels in loader for label in labels]


def same_batches(first, second):
    return all(
        torch.equal(a, b)
        for pair in zip(first, second, strict=True)
        for a, b in zip(*pair, strict=True)
    )  # fmt: skip


def epoch(loader, number):
    loader.set_epoch(number)
    return list(loader)


def random_states():
    return torch.get_rng_state().tolist(), np.random.get_state()[1].tolist(), random.getstate()  # noqa: NPY002


# what a loader gives


def test_batches_are_normalized_float_images_and_labels(load):
    bundle = load()
    images, labels = next(iter(bundle.test))
    assert images.shape == (8, *SHAPE)
    assert (images.dtype, labels.dtype) == (torch.float32, torch.int64)
    raw = per_image.convert_image_dtype(marked(20, seed=1).images[:8])
    torch.testing.assert_close(images, per_image.normalize(raw, list(CIFAR10.mean), list(CIFAR10.std)))


def test_last_batch_is_kept(load):
    bundle = load(batch_size=8)
    assert [len(labels) for _, labels in bundle.test] == [8, 8, 4]
    assert (len(bundle.test), bundle.test.num_samples, bundle.test.batch_size) == (3, 20, 8)
    assert len(load(batch_size=10).test) == 2


def test_tensors_are_all_batches_at_once(load):
    test = load().test
    images, labels = test.tensors()
    assert labels.tolist() == order(test) == list(range(20))
    assert torch.equal(images[8:16], list(test)[1][0])


@pytest.mark.parametrize("limit", [0, 2**31], ids=["scaled in the batch", "scaled at once"])
def test_images_come_in_the_shape_that_the_model_takes(load, monkeypatch, limit):
    monkeypatch.setattr(data_loaders, "_MAX_FITTED_BYTES", limit)
    images, _ = load("mnist", shape=(1, 8, 8), input_shape=(3, 12, 12)).test.tensors()
    assert images.shape == (20, 3, 12, 12)
    assert torch.equal(images[:, 0], images[:, 2])
    raw = per_image.resize(marked(20, (1, 8, 8), 1).images.float(), [12, 12]).round() / 255
    torch.testing.assert_close(images[:, :1], (raw - 0.1307) / 0.3081)


# split and sizes


def test_split_gives_every_training_image_to_one_side(load):
    bundle = load(validation_split=0.3, seed=4)
    train, valid = order(bundle.train), order(bundle.valid)
    assert len(valid) == 15
    assert sorted(train + valid) == list(range(50))
    assert valid == split_indices(50, 0.3, 4)[1].tolist()
    assert not bundle.valid_is_test


def test_without_split_the_test_set_validates_and_is_marked(load):
    bundle = load(validation_split=0)
    assert bundle.valid is bundle.test
    assert bundle.valid_is_test
    assert bundle.train.num_samples == 50


def test_validation_images_are_not_augmented_as_distiller_did(load):
    """Distiller's defect: its validation loader used the training transforms (D 1.5)."""
    images, labels = load("cifar10", validation_split=0.3).valid.tensors()
    raw = per_image.convert_image_dtype(marked(50).images[labels])
    torch.testing.assert_close(images, per_image.normalize(raw, list(CIFAR10.mean), list(CIFAR10.std)))


def test_effective_sizes_are_portions_after_the_split(load):
    bundle = load(
        validation_split=0.2, effective_train_size=0.5, effective_valid_size=0.3, effective_test_size=0.25
    )
    assert [loader.num_samples for loader in (bundle.train, bundle.valid, bundle.test)] == [20, 3, 5]
    assert [len(order(loader)) for loader in (bundle.train, bundle.valid, bundle.test)] == [20, 3, 5]


def test_training_subset_is_drawn_anew_in_each_epoch_and_the_others_are_not(load):
    bundle = load(effective_train_size=0.5, effective_valid_size=0.4, effective_test_size=0.5)
    subsets = {name: [] for name in ("train", "valid", "test")}
    for number in (0, 1):
        for name, seen in subsets.items():
            loader = getattr(bundle, name)
            loader.set_epoch(number)
            seen.append(order(loader))
    assert set(subsets["train"][0]) != set(subsets["train"][1])
    for name in ("valid", "test"):
        assert subsets[name][0] == subsets[name][1] == sorted(subsets[name][0])


def test_fixed_subset_changes_its_order_only(load):
    train = load(effective_train_size=0.5, fixed_subset=True).train
    first = order(train)
    train.set_epoch(1)
    second = order(train)
    assert first != second
    assert sorted(first) == sorted(second)
    assert len(first) == train.num_samples == 22


@pytest.mark.parametrize(
    ("argument", "complaint"),
    [
        ({"effective_train_size": 0.0}, "effective_train_size: must lie in (0, 1], got 0.0"),
        ({"effective_valid_size": 1.5}, "effective_valid_size: must lie in (0, 1], got 1.5"),
        ({"effective_test_size": float("nan")}, "effective_test_size: must lie in (0, 1], got nan"),
        ({"validation_split": 1.0}, "validation_split: must lie in [0, 1), got 1.0"),
        ({"validation_split": -0.1}, "validation_split: must lie in [0, 1), got -0.1"),
        ({"batch_size": 0}, "batch_size: must be at least 1, got 0"),
        ({"workers": -1}, "workers: must be at least 0, got -1"),
    ],
)
def test_sizes_out_of_range_are_refused(load, argument, complaint):
    with pytest.raises(UsageError) as caught:
        load(**argument)
    assert str(caught.value) == complaint


# order and augmentation


def test_an_epoch_is_a_function_of_seed_and_epoch(load):
    """So a run that was killed and resumed sees the same batches as one that was not."""
    whole_run, resumed = load(seed=3).train, load(seed=3).train
    for number in range(3):
        batches = epoch(whole_run, number)
    assert same_batches(batches, epoch(resumed, 2))
    assert order(whole_run) != [int(label) for _, labels in epoch(resumed, 1) for label in labels]
    assert order(load(seed=4).train) != order(load(seed=3).train)


def test_training_order_is_shuffled(load):
    seen = order(load(validation_split=0).train)
    assert seen != list(range(50))
    assert sorted(seen) == list(range(50))


def test_iterating_neither_moves_nor_reads_the_global_random_state(load):
    train = load().train
    before = random_states()
    first = list(train)
    assert random_states() == before
    torch.manual_seed(99)
    assert same_batches(first, list(train))


@pytest.mark.parametrize(
    ("dataset", "moved"), [("cifar10", "crop and flip"), ("fashion-mnist", "flip"), ("mnist", "nothing")]
)
def test_training_images_are_augmented_as_their_data_set_asks(load, dataset, moved):
    shape = DATASET_FACTS[dataset].input_shape
    facts = DATASET_FACTS[dataset]
    images, labels = load(dataset, shape=shape, validation_split=0).train.tensors()
    raw = per_image.convert_image_dtype(marked(50, shape).images[labels])
    plain = per_image.normalize(raw, list(facts.mean), list(facts.std))
    same = [torch.allclose(a, b, atol=1e-5) for a, b in zip(images, plain, strict=True)]
    mirrored = [torch.allclose(a, b.flip(2), atol=1e-5) for a, b in zip(images, plain, strict=True)]
    if moved == "nothing":
        assert all(same)
    elif moved == "flip":
        assert all(a != b for a, b in zip(same, mirrored, strict=True))
        assert 10 < sum(mirrored) < 40
    else:
        assert sum(same) + sum(mirrored) < 10


def test_augmentation_differs_between_epochs(load):
    train = load("cifar10", validation_split=0).train
    (first, labels), (second, other_labels) = (
        (torch.cat([i for i, _ in batches]), torch.cat([k for _, k in batches]))
        for batches in (epoch(train, 0), epoch(train, 1))
    )
    assert not torch.equal(first[labels.argsort()], second[other_labels.argsort()])


# calibration


def test_calibration_takes_training_images_without_augmentation(load):
    bundle = load("cifar10", validation_split=0.2, seed=2)
    images, labels = bundle.calibration(0.5).tensors()
    assert set(labels.tolist()) < set(order(bundle.train))
    assert len(labels) == 20
    raw = per_image.convert_image_dtype(marked(50).images[labels])
    torch.testing.assert_close(images, per_image.normalize(raw, list(CIFAR10.mean), list(CIFAR10.std)))


def test_calibration_is_fixed_by_the_seed(load):
    assert order(load(seed=1).calibration(0.3)) == order(load(seed=1).calibration(0.3))
    assert order(load(seed=1).calibration(0.3)) != order(load(seed=2).calibration(0.3))


def test_calibration_without_training_data_is_refused(load):
    bundle = load(test_only=True)
    assert bundle.train is None
    assert bundle.valid is None
    with pytest.raises(DatasetError) as caught:
        bundle.calibration(0.1)
    assert str(caught.value) == "calibration: takes training data, but only the test set was loaded"
    with pytest.raises(UsageError, match=r"calibration portion: must lie in \(0, 1\], got 0"):
        load().calibration(0)


# images that are read one by one


def folder_data(folder, **kwargs):
    defaults = {"input_shape": (3, 28, 28), "batch_size": 4, "workers": 0, "validation_split": 0.25}
    return load_data("image-folder", folder, **defaults | kwargs)


def test_image_folder_is_evaluated_with_the_evaluation_transform(image_folder):
    bundle = folder_data(image_folder, input_shape=(3, 24, 24))
    images, labels = bundle.test.tensors()
    assert isinstance(bundle.test, ItemLoader)
    assert labels.tolist() == [0, 0, 0, 1, 1, 1]
    imagenet = DATASET_FACTS["imagenet"]
    image = evaluation_transform((3, 24, 24))(Image.open(image_folder / "val" / "dog" / "1.png"))
    expected = per_image.normalize(image / 255, list(imagenet.mean), list(imagenet.std))
    torch.testing.assert_close(images[4], expected)


def test_image_folder_is_read_in_grey_for_a_grey_model(image_folder):
    images, _ = folder_data(image_folder, input_shape=(1, 16, 16)).test.tensors()
    assert images.shape == (6, 1, 16, 16)


def test_validation_part_of_an_image_folder_is_not_augmented(image_folder):
    bundle = folder_data(image_folder)
    assert (bundle.train.num_samples, bundle.valid.num_samples) == (9, 3)
    assert same_batches(epoch(bundle.valid, 0), epoch(bundle.valid, 1))
    assert not same_batches(epoch(bundle.train, 0), epoch(bundle.train, 1))


# From Python 3.12 on a fork is reported when PyTorch's threads run; its workers are forked nevertheless.
@pytest.mark.filterwarnings("ignore:.*multi-threaded.*fork:DeprecationWarning")
def test_image_batches_do_not_depend_on_the_number_of_workers(image_folder, monkeypatch):
    monkeypatch.setattr(data_loaders, "usable_processors", lambda: 2)
    monkeypatch.setattr("os.sched_getaffinity", lambda _: {0, 1}, raising=False)
    before = random_states()
    runs = [epoch(folder_data(image_folder, seed=5, workers=workers).train, 2) for workers in (0, 1, 2)]
    assert random_states() == before
    assert same_batches(runs[0], runs[1])
    assert same_batches(runs[0], runs[2])
    assert not same_batches(runs[0], epoch(folder_data(image_folder, seed=6).train, 2))


@pytest.mark.filterwarnings("ignore:.*multi-threaded.*fork:DeprecationWarning")
@pytest.mark.parametrize("workers", [0, 1])
def test_damaged_image_is_told_in_one_line(image_folder, workers):
    path = image_folder / "val" / "dog" / "2.png"
    path.write_bytes(b"no image")
    with pytest.raises(DatasetError) as caught:
        list(folder_data(image_folder, workers=workers).test)
    assert str(caught.value) == (f"{path}: cannot be read as an image: cannot identify image file '{path}'")


def test_users_data_set_is_scaled_and_otherwise_left_as_it_is(tmp_path, monkeypatch):
    monkeypatch.syspath_prepend(tmp_path)
    monkeypatch.setattr(sys, "dont_write_bytecode", True)
    (tmp_path / "loader_test_data.py").write_text(
        "import torch, numpy, random\n"
        "class Own(torch.utils.data.Dataset):\n"
        "    classes = 'ab'\n"
        "    def __len__(self): return 10\n"
        "    def __getitem__(self, index):\n"
        "        noise = torch.rand(1).item() + numpy.random.rand() + random.random()\n"
        "        return torch.full((1, 6, 6), float(index) + noise / 10), index % 2\n"
        "def load(folder): return Own(), Own()\n"
    )
    bundle = load_data(
        "loader_test_data:load", input_shape=(3, 4, 4), batch_size=4, workers=0, validation_split=0
    )
    before = random_states()
    images, labels = bundle.test.tensors()
    assert bundle.facts.num_classes == 2
    assert images.shape == (10, 3, 4, 4)
    assert images[:, 0, 0, 0].int().tolist() == list(range(10))
    assert labels.tolist() == [0, 1] * 5
    assert torch.equal(images, bundle.test.tensors()[0])
    assert same_batches(epoch(bundle.train, 1), epoch(bundle.train, 1))
    assert random_states() == before


def test_real_digits_go_through_from_end_to_end():
    bundle = load_data("digits", input_shape=(1, 28, 28), batch_size=100)
    assert isinstance(bundle.train, MemoryLoader)
    assert [loader.num_samples for loader in (bundle.train, bundle.valid, bundle.test)] == [1295, 143, 359]
    images, labels = bundle.train.tensors()
    assert images.shape == (1295, 1, 28, 28)
    assert abs(images.mean().item()) < 0.02
    assert set(labels.tolist()) == set(range(10))


def test_settings_alone_make_a_loader():
    settings = LoaderSettings(CIFAR10, SHAPE, batch_size=3, workers=0, seed=0)
    assert order(MemoryLoader(marked(9), settings, torch.tensor([8, 1, 5, 0]))) == [8, 1, 5, 0]
