"""Models by name: our own, the user's, torchvision's, or a dotted path; built for the data in use.

torchvision takes seconds to import, so it waits until a name is not one of ours.

Knows nothing about reading data or training.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable, Sequence
from functools import partial

from torch import nn

from distiller.dataset_facts import DATASET_FACTS, infer_dataset
from distiller.errors import UnknownNameError, UsageError, did_you_mean, require, users_code
from distiller.models.spec import ModelSpec, register_model
from distiller.registry import MODELS, load_dotted


def create_model(
    pretrained: bool,
    dataset: str | None,
    arch: str,
    parallel: bool = True,
    device_ids: Sequence[int] | None = None,
    *,
    num_classes: int | None = None,
    input_shape: Sequence[int] | None = None,
) -> nn.Module:
    """Build a model for a data set, on the CPU.

    Args:
        pretrained: with the trained weights that torchvision offers.
        dataset: its name; None for the one the architecture was designed for.
        arch: a name in `all_model_names()`, upper or lower case, or `package.module:function`:
            a function or class that returns the model, and is given `num_classes` and
            `in_channels` if it has parameters of these names. That package is imported, so its
            code runs: pass a path that the user typed, never one read from a file.
        parallel: whether `device_ids` of more than one GPU mean DataParallel; default True.
        device_ids: GPUs to spread batches over; the caller moves the model to the first.
        num_classes: number of outputs; default that of the data set.
        input_shape: (1, channels, height, width) of a batch of one square image of the data set;
            default what is known of it. The model is built for `input_shape_for` these images.

    Returns:
        The model, with attributes `arch`, `dataset`, `num_classes`, `input_shape` (1, channels,
        height, width) and `is_parallel`.

    Raises:
        UnknownNameError: no such architecture.
        UsageError: no trained weights are offered, or they do not suit; nothing is known of the
            data set and `num_classes` is not given; `input_shape` is no such shape.
    """
    spec = find_spec(arch)
    dataset = dataset or spec.dataset
    num_classes = num_classes or _known_classes(dataset)
    channels, height, width = spec.input_shape(*_channels_and_size(spec, dataset, input_shape))
    if not pretrained:
        model = spec(num_classes, channels, height)
    elif spec.build_pretrained is not None:
        model = spec.build_pretrained(num_classes)
    else:
        raise UsageError(
            f"pretrained: no trained weights are offered for '{spec.arch}'; "
            "leave it out, or load a checkpoint of your own"
        )
    is_parallel = parallel and device_ids is not None and len(device_ids) > 1
    wrapped = nn.DataParallel(model, device_ids=list(device_ids or ())) if is_parallel else model
    for module in (model, wrapped):
        module.arch = spec.arch  # type: ignore[assignment]
        module.dataset = dataset  # type: ignore[assignment]
        module.num_classes = num_classes  # type: ignore[assignment]
        module.input_shape = (1, channels, height, width)  # type: ignore[assignment]
        module.is_parallel = is_parallel  # type: ignore[assignment]
    return wrapped


def all_model_names() -> tuple[str, ...]:
    """The names that `arch` can have besides a dotted path, sorted."""
    from distiller.models.imagenet import torchvision_names

    return tuple(sorted({*MODELS, *torchvision_names()}))


def input_shape_for(arch: str, channels: int, size: int) -> tuple[int, int, int]:
    """The (channels, height, width) that images must be brought to for an architecture.

    Their own shape where the architecture takes it; where it does not, they are scaled to the
    architecture's native size, and grey images become RGB for torchvision's models.

    Args:
        arch: as in `create_model`.
        channels: of the images of the data set, 1 or 3.
        size: height and width of the images of the data set, in pixels.

    Raises:
        UnknownNameError: no such architecture.
    """
    return find_spec(arch).input_shape(channels, size)


def register_user_model(arch: str, dataset: str, model: Callable[..., nn.Module]) -> None:
    """Make a model of one's own known to `create_model`.

    Args:
        arch: its name; lower and upper case are alike.
        dataset: the data set it is for, a name in `DATASET_FACTS`. It is taken to accept images
            of any size.
        model: a function or class that returns it; given `num_classes` and `in_channels` if it
            has parameters of these names.

    Raises:
        UsageError: the name is taken.
        UnknownNameError: no such data set.
    """
    if dataset not in DATASET_FACTS:
        raise UnknownNameError(
            f"register_user_model: unknown data set '{dataset}'{did_you_mean(dataset, DATASET_FACTS)}"
        )
    from distiller.models.imagenet import torchvision_names

    if arch.lower() in torchvision_names():
        raise UsageError(
            f"register_user_model: torchvision has a model '{arch.lower()}'; choose another name"
        )
    register_model(_user_spec(arch.lower(), dataset, model))


def find_spec(arch: str) -> ModelSpec:
    """What is known of an architecture.

    Args:
        arch: as in `create_model`.

    Raises:
        UnknownNameError: no such architecture; names the one most like it.
    """
    require(arch, str, "arch", "the name of an architecture")
    name = arch.lower()
    if name in MODELS:
        spec = MODELS[name]
        assert isinstance(spec, ModelSpec)
        return spec
    from distiller.models.imagenet import torchvision_names, torchvision_spec

    if name in torchvision_names():
        return torchvision_spec(name)
    if ":" in arch:
        package = arch.partition(":")[0].partition(".")[0]
        with users_code(f"arch: '{arch}'", "; its module is imported"):
            function = load_dotted(arch.replace(":", "."), (package,), "architecture")
        return _user_spec(arch, infer_dataset(arch), function)
    hint = "; a function of your own is written package.module:function" if "." in arch else ""
    raise UnknownNameError(
        f"arch: unknown architecture '{arch}'{did_you_mean(name, all_model_names()) or hint}"
    )


def _user_spec(arch: str, dataset: str, function: Callable[..., nn.Module]) -> ModelSpec:
    build = partial(_call_user_function, arch, function)
    return ModelSpec(arch, build, dataset, DATASET_FACTS[dataset].input_shape, smallest_size=1)


def _call_user_function(
    arch: str, function: Callable[..., nn.Module], num_classes: int, in_channels: int
) -> nn.Module:
    known = {"num_classes": num_classes, "in_channels": in_channels}
    accepted = inspect.signature(function).parameters
    required = [
        name
        for name, parameter in accepted.items()
        if parameter.default is parameter.empty
        and parameter.kind not in (parameter.VAR_POSITIONAL, parameter.VAR_KEYWORD)
        and name not in known
    ]
    if required:
        raise UsageError(
            f"arch: '{arch}' is called with num_classes and in_channels only, but requires '{required[0]}'; "
            "give it a default"
        )
    with users_code(f"arch: '{arch}'"):
        model = function(**{name: value for name, value in known.items() if name in accepted})
    if not isinstance(model, nn.Module):
        raise UsageError(f"arch: '{arch}' must return a torch.nn.Module, got {type(model).__name__}")
    return model


def _known_classes(dataset: str) -> int:
    if dataset not in DATASET_FACTS:
        raise UsageError(f"create_model: how many classes '{dataset}' has is not known; give num_classes")
    return DATASET_FACTS[dataset].num_classes


def _channels_and_size(spec: ModelSpec, dataset: str, input_shape: Sequence[int] | None) -> tuple[int, int]:
    """Of the data set's images; of those the architecture is made for when nothing is known."""
    if input_shape is None:
        facts = DATASET_FACTS.get(dataset)
        return (facts.channels, facts.size) if facts else spec.native_shape[:2]
    if len(input_shape) != 4 or input_shape[2] != input_shape[3]:
        raise UsageError(
            "create_model: input_shape must be (1, channels, size, size) of one square image, "
            f"got {tuple(input_shape)}"
        )
    return input_shape[1], input_shape[2]
