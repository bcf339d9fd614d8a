import dataclasses

import numpy as np
import pytest
from sklearn.datasets import load_digits

from distiller.dataset_facts import DATASET_FACTS, infer_dataset


def test_digits_are_normalised_by_their_own_mean_and_deviation():
    pixels = load_digits().images / 16
    facts = DATASET_FACTS["digits"]
    assert facts.mean == (pytest.approx(pixels.mean(), abs=5e-5),)
    assert facts.std == (pytest.approx(np.std(pixels), abs=1e-4),)
    assert (facts.num_classes, facts.input_shape) == (10, (1, *pixels.shape[1:]))


@pytest.mark.parametrize("name", DATASET_FACTS)
def test_facts_have_one_mean_and_deviation_per_channel(name):
    facts = DATASET_FACTS[name]
    assert facts.name == name
    assert len(facts.mean) == len(facts.std) == facts.channels


def test_facts_cannot_be_changed():
    with pytest.raises(TypeError):
        DATASET_FACTS["mine"] = DATASET_FACTS["mnist"]  # type: ignore[index]
    with pytest.raises(dataclasses.FrozenInstanceError):
        DATASET_FACTS["mnist"].size = 8  # type: ignore[misc]


@pytest.mark.parametrize(
    ("arch", "dataset"),
    [
        ("resnet20_cifar", "cifar10"),
        ("VGG16_BN_CIFAR", "cifar10"),
        ("simplenet_mnist", "mnist"),
        ("lenet_300_100", "mnist"),
        ("lenet5", "mnist"),
        ("googlenet", "imagenet"),
        ("resnet18", "imagenet"),
    ],
)
def test_data_set_is_inferred_from_the_name(arch, dataset):
    assert infer_dataset(arch) == dataset
