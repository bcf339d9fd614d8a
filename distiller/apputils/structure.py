"""A model made as thin, and factored, as the one that a checkpoint is of, so that its weights fit.

The recipes are in the checkpoint, of both kinds in the order in which they came about; carrying one out is
`thinning.removal` and `factorization.replacement`.
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
from distiller.apputils.stored_exits import restore_exits
from distiller.branch_points import detach_exits, exits_of
from distiller.errors import CheckpointError, DistillerError
from distiller.factorization.recipe import FactorizationRecipe
from distiller.factorization.replacement import apply_factorization, factorizations_of
from distiller.names import canonical_state_dict, named_modules, owner, unwrap
from distiller.tensor_cuts import Kept, cut, cut_shape, replace_data
from distiller.thinning import ThinningRecipe, apply_recipe
from distiller.thinning.layer_changes import NEW_SETTINGS, SETTINGS, layer_change

__all__ = [
    "Recipe",
    "cut_by",
    "history_of",
    "is_other_arch",
    "models_named",
    "recipes_of",
    "restore_structure",
    "unchanged_on_error",
]


Recipe = ThinningRecipe | FactorizationRecipe
"""How a model became another, as plain data."""


def recipes_of(model: nn.Module) -> tuple[ThinningRecipe, ...]:
    """How a model became as thin as it is, in order; () when it is not thinned."""
    plain = getattr(unwrap(model), "thinning_recipes", ())
    return tuple(ThinningRecipe.from_plain(recipe, "the model") for recipe in plain)


def history_of(model: nn.Module) -> tuple[Recipe, ...]:
    """How a model was thinned and factored, in order; () when it was not."""
    return _history(recipes_of(model), factorizations_of(model))


def restore_structure(model: nn.Module, checkpoint: Checkpoint, optimizer: Optimizer | None = None) -> None:
    """Thin and factor a model as the checkpoint's was, all the way or not at all.

    What the model has gone through already is left out; one that is as thin already stays as it is.
    A checkpoint without recipes asks for nothing.

    Args:
        model: in floating point, as it was created or as it has been thinned or factored since; changed in
            place. Factors are zero until weights are loaded.
        checkpoint: whose recipes they are.
        optimizer: of the model; what it keeps of the parameters becomes smaller with them, and factors take
            the place of weights.

    Raises:
        CheckpointError: the model is another one, or has been thinned or factored otherwise.
    """
    if is_other_arch(model, checkpoint):
        raise CheckpointError(
            f"{checkpoint.path}: is of another model: {models_named(model, checkpoint)}; "
            f"create the model as '{checkpoint.arch}'"
        )
    with unchanged_on_error(model, optimizer):
        restore_exits(model, checkpoint)
        _restore_history(model, checkpoint, optimizer)


def _restore_history(model: nn.Module, checkpoint: Checkpoint, optimizer: Optimizer | None) -> None:
    """Thin and factor a model, exits and all, as the checkpoint's was."""
    here, theirs = history_of(model), _history(checkpoint.thinning_recipes, checkpoint.factorization_recipes)
    if not theirs or _plain(here) == _plain(theirs):
        return
    if _plain(theirs[: len(here)]) == _plain(here):
        due = theirs[len(here) :]
    elif _has_sizes_after(model, theirs):
        due = theirs
    elif checkpoint.factorization_recipes or factorizations_of(model):
        raise CheckpointError(
            f"{checkpoint.path}: the model has been thinned or factored otherwise than its own; give a model "
            "that is as it was created"
        )
    else:
        raise CheckpointError(
            f"{checkpoint.path}: carries {_count(theirs)}, and the model has been thinned otherwise, by "
            f"{len(here)}; give a model that is not thinned yet"
        )
    if _has_sizes_after(model, due):  # only what modules are told of it may be missing
        due = tuple(replace(recipe, tensors={}) for recipe in due if isinstance(recipe, ThinningRecipe))
    bare: Any = unwrap(model)
    with unchanged_on_error(model, optimizer):
        for recipe in due:
            done = len(getattr(bare, _LIST_OF[type(recipe)], ()))
            _carry_out(model, recipe, optimizer, f"{checkpoint.path}: {_LIST_OF[type(recipe)]}[{done}]")
        bare.thinning_recipes = [recipe.to_plain() for recipe in checkpoint.thinning_recipes]
        if checkpoint.factorization_recipes:
            bare.factorization_recipes = [recipe.to_plain() for recipe in checkpoint.factorization_recipes]


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
    had_exits = bool(exits_of(bare))
    modules = [(module, module.__class__, _settings_of(module)) for module in bare.modules()]
    tensors = [
        (tensor, tensor.data, tensor.data.clone() if values else tensor.data)
        for tensor in chain(bare.parameters(), bare.buffers())
    ]
    state = {} if optimizer is None else {param: dict(kept) for param, kept in optimizer.state.items()}
    groups = [] if optimizer is None else [list(group["params"]) for group in optimizer.param_groups]
    try:
        yield
    except BaseException:
        for module, kind, settings in modules:
            module.__class__ = kind
            vars(module).clear()
            vars(module).update(settings)
        if not had_exits:
            detach_exits(bare)  # their hooks
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
            for group, params in zip(optimizer.param_groups, groups, strict=True):
                group["params"] = params
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


_LIST_OF = {ThinningRecipe: "thinning_recipes", FactorizationRecipe: "factorization_recipes"}


def _history(
    thinnings: Sequence[ThinningRecipe], factorizations: Sequence[FactorizationRecipe]
) -> tuple[Recipe, ...]:
    """Both kinds of recipes in the order in which they came about."""
    steps: list[Recipe] = []
    for count in range(len(thinnings) + 1):
        steps += [recipe for recipe in factorizations if recipe.after_thinnings == count]
        steps += thinnings[count : count + 1]
    return tuple(steps)


def _carry_out(model: nn.Module, recipe: Recipe, optimizer: Optimizer | None, where: str) -> None:
    done = "factored" if isinstance(recipe, FactorizationRecipe) else "thinned"
    try:
        if isinstance(recipe, FactorizationRecipe):
            apply_factorization(model, recipe, optimizer, has_weights=False)
            return
        recipe = _completed(model, recipe)
        _check_settings(model, recipe, where)
        apply_recipe(model, recipe, optimizer)
    except CheckpointError:
        raise
    except DistillerError as error:
        raise CheckpointError(
            f"{where}: the model cannot be {done} as the checkpoint's was: {error}"
        ) from error
    _check_layers(model, recipe, where)


def _settings_of(module: nn.Module) -> dict[str, Any]:
    """What a module has for attributes; its tables of children and tensors copied."""
    tables = {key: dict(getattr(module, key)) for key in ("_modules", "_parameters", "_buffers")}
    return {**vars(module), **tables}


def _plain(recipes: Sequence[Recipe]) -> list[dict[str, Any]]:
    return [recipe.to_plain() for recipe in recipes]


def _count(recipes: Sequence[Recipe]) -> str:
    return f"{len(recipes)} thinning recipe{'s' if len(recipes) > 1 else ''}"


def _has_sizes_after(model: nn.Module, recipes: Sequence[Recipe]) -> bool:
    """Whether the tensors that the recipes name, all of which thin, have the sizes that they end with."""
    if any(isinstance(recipe, FactorizationRecipe) for recipe in recipes):
        return False
    sizes = {
        (name, dim): len(indices)
        for recipe in recipes
        if isinstance(recipe, ThinningRecipe)
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
