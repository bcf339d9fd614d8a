"""Architectures: a registry of our own, torchvision's by name, and the user's.

To add one: write it in a file here, register a `ModelSpec`, import the file below.
"""

from distiller.models import cifar, mnist, resnet_cifar, vgg_cifar  # noqa: F401 - they register their models
from distiller.models.create import (
    all_model_names,
    create_model,
    find_spec,
    input_shape_for,
    register_user_model,
)
from distiller.models.spec import ModelSpec

ALL_MODEL_NAMES: tuple[str, ...]

__all__ = [
    "ALL_MODEL_NAMES",
    "ModelSpec",
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
