"""A model made as thin as the one that a checkpoint is of, so that its weights fit.

The recipes are in the checkpoint; carrying one out is `thinning.removal`.
Knows nothing about files, weights or training.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import replace
from itertools import chain
from typing import Any

from torch import Tensor, nn
from torch.nn.modules.batchnorm import _NormBase
from torch.nn.modules.conv import _ConvNd, _ConvTransposeNd
from torch.optim import Optimizer

from distiller.apputils.checkpoint_format import Checkpoint
from distiller.errors import CheckpointError, DistillerError
from distiller.names import canonical_state_dict, named_modules, owner, unwrap
from distiller.tensor_cuts import Kept, cut, cut_shape, replace_data
from distiller.thinning import ThinningRecipe, apply_recipe
from distiller.thinning.layer_changes import NEW_SETTINGS, SETTINGS, layer_change

__all__ = [
    "cut_by",
    "is_other_arch",
    "models_named",
    "recipes_of",
    "restore_structure",
    "unchanged_on_error",
]


def recipes_of(model: nn.Module) -> tuple[ThinningRecipe, ...]:
    """How a model became as thin as it is, in order; () when it is not thinned."""
    plain = getattr(unwrap(model), "thinning_recipes", ())
    return tuple(ThinningRecipe.from_plain(recipe, "the model") for recipe in plain)


def restore_structure(model: nn.Module, checkpoint: Checkpoint, optimizer: Optimizer | None = None) -> None:
    """Thin a model as the checkpoint's was, all the way or not at all.

    What the model has gone through already is left out; one that is as thin already stays as it is.
    A checkpoint without recipes asks for nothing.

    Args:
        model: in floating point, as it was created or as it has been thinned since; changed in place.
        checkpoint: whose recipes they are.
        optimizer: of the model; what it keeps of the parameters becomes smaller with them.

    Raises:
        CheckpointError: the model is another one, or has been thinned otherwise.
    """
    if is_other_arch(model, checkpoint):
        raise CheckpointError(
            f"{checkpoint.path}: is of another model: {models_named(model, checkpoint)}; "
            f"create the model as '{checkpoint.arch}'"
        )
    here, theirs = recipes_of(model), checkpoint.thinning_recipes
    if not theirs or _plain(here) == _plain(theirs):
        return
    if _plain(theirs[: len(here)]) == _plain(here):
        due = theirs[len(here) :]
    elif _has_sizes_after(model, theirs):
        due = theirs
    else:
        raise CheckpointError(
            f"{checkpoint.path}: carries {_count(theirs)}, and the model has been thinned otherwise, by "
            f"{len(here)}; give a model that is not thinned yet"
        )
    if _has_sizes_after(model, due):  # only what modules are told of it may be missing
        due = tuple(replace(recipe, tensors={}) for recipe in due)
    with unchanged_on_error(model, optimizer):
        for index, recipe in enumerate(due, start=len(theirs) - len(due)):
            where = f"{checkpoint.path}: thinning_recipes[{index}]"
            try:
                recipe = _completed(model, recipe)
                _check_settings(model, recipe, where)
                apply_recipe(model, recipe, optimizer)
            except CheckpointError:
                raise
            except DistillerError as error:
                raise CheckpointError(
                    f"{where}: the model cannot be thinned as the checkpoint's was: {error}"
                ) from error
            _check_layers(model, recipe, where)
        unwrap(model).thinning_recipes = _plain(theirs)  # type: ignore[assignment]


@contextmanager
def unchanged_on_error(
    model: nn.Module, optimizer: Optimizer | None = None, values: bool = False
) -> Iterator[None]:
    """When the block fails, give modules their classes, settings and tensors back.

    Args:
        model: the model.
        optimizer: gets back what it kept of the parameters.
        values: whether tensors get back the values that the block has changed in place.
    """
    bare = unwrap(model)
    modules = [(module, module.__class__, dict(vars(module))) for module in bare.modules()]
    tensors = [
        (tensor, tensor.data, tensor.data.clone() if values else tensor.data)
        for tensor in chain(bare.parameters(), bare.buffers())
    ]
    state = {} if optimizer is None else {param: dict(kept) for param, kept in optimizer.state.items()}
    try:
        yield
    except BaseException:
        for module, kind, settings in modules:
            module.__class__ = kind
            vars(module).clear()
            vars(module).update(settings)
        for tensor, data, kept_values in tensors:
            if values:
                data.copy_(kept_values)
            if tensor.shape != data.shape:
                replace_data(tensor, data)
            else:
                tensor.data = data
        if optimizer is not None:
            for param, kept in state.items():
                optimizer.state[param] = kept
        raise


def is_other_arch(model: nn.Module, checkpoint: Checkpoint) -> bool:
    """Whether both have a name, and not the same."""
    arch = getattr(unwrap(model), "arch", None)
    return None not in (arch, checkpoint.arch) and arch != checkpoint.arch


def models_named(model: nn.Module, checkpoint: Checkpoint) -> str:
    """Which model the checkpoint is of, and which this one is, for a message."""
    stored = "an unknown model" if checkpoint.arch is None else f"'{checkpoint.arch}'"
    here = getattr(unwrap(model), "arch", None) or type(unwrap(model)).__name__
    return f"the checkpoint is of {stored}, the model is '{here}'"


def cut_by(recipes: Sequence[ThinningRecipe], state: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """What of the tensors of a model stays when it is thinned.

    Args:
        recipes: in order.
        state: tensors by canonical name, as they are before. One that is not as the recipes are of stays as
            it is.
    """
    result = dict(state)
    for recipe in recipes:
        for name, kept in recipe.tensors.items():
            if name in result and _can_be_cut(result[name], kept):
                result[name] = cut(result[name], kept)
    return result


def _can_be_cut(tensor: Any, kept: Kept) -> bool:
    return isinstance(tensor, Tensor) and all(
        dim < tensor.dim() and max(indices) < tensor.shape[dim] for dim, indices in kept.items()
    )


def _plain(recipes: Sequence[ThinningRecipe]) -> list[dict[str, Any]]:
    return [recipe.to_plain() for recipe in recipes]


def _count(recipes: Sequence[ThinningRecipe]) -> str:
    return f"{len(recipes)} thinning recipe{'s' if len(recipes) > 1 else ''}"


def _has_sizes_after(model: nn.Module, recipes: Sequence[ThinningRecipe]) -> bool:
    """Whether the tensors that the recipes name have the sizes that they end with."""
    sizes = {
        (name, dim): len(indices)
        for recipe in recipes
        for name, kept in recipe.tensors.items()
        for dim, indices in kept.items()
    }
    state = canonical_state_dict(model)
    return all(
        name in state and dim < state[name].dim() and state[name].shape[dim] == size
        for (name, dim), size in sizes.items()
    )


def _completed(model: nn.Module, recipe: ThinningRecipe) -> ThinningRecipe:
    """The recipe with the sizes of the layers that it says nothing about, as Distiller's."""
    state, modules = canonical_state_dict(model), dict(named_modules(model))
    settings = dict(recipe.modules)
    for name in dict.fromkeys(owner(tensor) for tensor in recipe.tensors):
        own = {
            tensor.removeprefix(f"{name}."): kept
            for tensor, kept in recipe.tensors.items()
            if owner(tensor) == name
            and tensor in state
            and tuple(state[tensor].shape) != cut_shape(state[tensor].shape, kept)
        }
        if own and name in modules and name not in settings:
            change = layer_change(modules[name], own)
            settings[name] = {} if change is None else change.attributes
    return replace(recipe, modules=settings)


def _check_settings(model: nn.Module, recipe: ThinningRecipe, where: str) -> None:
    """See to it that modules are told what they know: an attribute may cover a method."""
    modules = dict(named_modules(model))
    for name, settings in recipe.modules.items():
        for attribute, value in settings.items():
            if name not in modules:
                continue  # applying it tells
            known = vars(modules[name]).get(attribute, 1 if attribute in NEW_SETTINGS else None)
            known = known if attribute in SETTINGS else None
            if _kind(known) is None or _kind(known) != _kind(value):
                raise CheckpointError(
                    f"{where}: '{name}.{attribute}' must be {_kind(known) or 'left out'}, got {value!r}"
                )


def _kind(value: Any) -> str | None:
    if isinstance(value, bool):
        return "true or false"
    if isinstance(value, (int, float)):
        return "a number"
    is_numbers = isinstance(value, (tuple, list)) and all(type(item) in (int, float) for item in value)
    return "a list of numbers" if is_numbers else None


def _check_layers(model: nn.Module, recipe: ThinningRecipe, where: str) -> None:
    """See to it that layers have the sizes of their weights."""
    modules = dict(named_modules(model))
    for name in dict.fromkeys((*recipe.modules, *(owner(tensor) for tensor in recipe.tensors))):
        told, actual = _sizes(modules[name])
        if told != actual:
            raise CheckpointError(
                f"{where}: '{name}' would be told that its weight has the sizes {told}, it has {actual}"
            )


def _sizes(module: nn.Module) -> tuple[tuple[float, ...], tuple[float, ...]]:
    """The sizes of a layer's weight as its attributes say, and as they are."""
    if isinstance(module, _ConvNd):
        first, second = module.out_channels, module.in_channels
        if isinstance(module, _ConvTransposeNd):
            first, second = second, first
        per_group = second / module.groups if module.groups else -1
        return (first, per_group), tuple(module.weight.shape[:2])
    if isinstance(module, nn.Linear):
        return (module.out_features, module.in_features), tuple(module.weight.shape)
    if isinstance(module, _NormBase) and module.weight is not None:
        return (module.num_features,), tuple(module.weight.shape)
    return (), ()
