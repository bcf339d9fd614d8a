"""Architectures: a registry of our own, torchvision's by name, and the user's.

To add one: write it in a file here, register a `ModelSpec`, import the file below. Models that are
no image classifiers (`RNNModel`) are not in the registry: they are built by their class.
"""

from distiller.models import (  # noqa: F401 - they register their models
    alexnet_bn,
    cifar,
    haiku_cifar,
    mnist,
    mobilenet,
    plain_cifar,
    preact_resnet,
    preact_resnet_cifar,
    resnet50_earlyexit,
    resnet_cifar,
    resnet_cifar_earlyexit,
    vgg_cifar,
)
from distiller.models.create import (
    all_model_names,
    create_model,
    find_spec,
    input_shape_for,
    register_user_model,
)
from distiller.models.spec import ModelSpec
from distiller.models.word_language_model import RNNModel

ALL_MODEL_NAMES: tuple[str, ...]

__all__ = [
    "ALL_MODEL_NAMES",
    "ModelSpec",
    "RNNModel",
    "all_model_names",
    "create_model",
    "find_spec",
    "input_shape_for",
    "register_user_model",
]


def __getattr__(name: str) -> tuple[str, ...]:
    """`ALL_MODEL_NAMES`, made when it is asked for: torchvision takes seconds to import."""
    if name == "ALL_MODEL_NAMES":
        return all_model_names()
    raise AttributeError(f"module 'distiller.models' has no attribute '{name}'")
