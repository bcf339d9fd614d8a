"""Physical removal: from units of channel groups to a recipe, and a recipe carried out on a model.

Knows nothing about which units are chosen.
"""

from __future__ import annotations

from collections.abc import Collection, Iterable, Mapping
from types import NoneType
from typing import Any

from torch import Tensor, nn
from torch.optim import Optimizer

from distiller.channel_groups import ChannelGroups
from distiller.errors import DistillerError, UsageError
from distiller.interfaces import Policy
from distiller.masks import MaskStore
from distiller.names import canonical, named_buffers, named_modules, named_parameters, owner, unwrap
from distiller.tensor_cuts import Kept, TensorCuts, cut, cut_shape, replace_data
from distiller.thinning.layer_changes import layer_change, thinned_class
from distiller.thinning.recipe import ThinningRecipe

Removed = Mapping[str, Collection[int]]
"""By name of a channel group, the units that go."""


def thinning_recipe(model: nn.Module, groups: ChannelGroups, removed: Removed) -> ThinningRecipe:
    """What has to be done to `model` so that units of its channel groups are gone.

    Args:
        model: as it is before.
        groups: of the model.
        removed: by group, units; of a group at least one must stay.

    Raises:
        UnknownNameError: no such group.
        UsageError: no such unit, none would be left, or a group whose units cannot be removed.
        DistillerError: a layer cannot do without them; names it.
    """
    gone: dict[str, dict[int, set[int]]] = {}
    norms: set[str] = set()
    for group_name, units in removed.items():
        if not units:
            continue
        group = groups[group_name]
        if group.reason is not None:
            raise UsageError(f"channel group '{group_name}': no unit can be removed, {group.reason}")
        if not 0 <= min(units) <= max(units) < group.size:
            raise UsageError(
                f"channel group '{group_name}': units are 0..{group.size - 1}, got {sorted(units)}"
            )
        norms.update(group.normalized_by)
        for (name, dim), indices in group.indices(units).items():
            gone.setdefault(name, {}).setdefault(dim, set()).update(indices)
    tensors = _tensors(model)
    cuts: dict[str, dict[int, tuple[int, ...]]] = {}
    for name, dims in gone.items():
        for dim, indices in dims.items():
            kept = tuple(index for index in range(tensors[name].shape[dim]) if index not in indices)
            if not kept:
                raise UsageError(f"nothing would be left of {name} along dimension {dim}; remove less")
            cuts.setdefault(name, {})[dim] = kept
    return _with_modules(model, cuts, norms)


def _with_modules(model: nn.Module, cuts: TensorCuts, norms: Collection[str]) -> ThinningRecipe:
    attributes: dict[str, Mapping[str, Any]] = {}
    classes: dict[str, str] = {}
    concerned = {*norms}
    everywhere = _under_all_names(model, cuts)
    for name in everywhere:
        parent = owner(name)
        concerned.update((parent, owner(parent)))
    for name, module in named_modules(model):
        if name not in concerned:
            continue
        prefix = f"{name}." if name else ""
        own = {key.removeprefix(prefix): kept for key, kept in everywhere.items() if key.startswith(prefix)}
        try:
            change = layer_change(module, own, name in norms)
        except DistillerError as error:
            raise DistillerError(f"'{name}' {error}") from error
        if change is not None:
            attributes[name] = change.attributes
            if change.new_class is not None:
                classes[name] = change.new_class.__name__
    return ThinningRecipe(cuts, attributes, classes)


def apply_recipe(
    model: nn.Module,
    recipe: ThinningRecipe,
    optimizer: Optimizer | None = None,
    masks: MaskStore | None = None,
    policies: Iterable[Policy] = (),
) -> None:
    """Make a model smaller, in place, with all that goes with its parameters.

    The parameters stay the same objects, so that optimizers go on with them. What is already as small as
    the recipe says is left alone. The recipe is added to the model's `thinning_recipes`, which checkpoints
    store.

    Args:
        model: the model, or a wrapper around it.
        recipe: of a model of these shapes.
        optimizer: its state (momentum, moments) is cut with the parameters.
        masks: of the model; cut likewise, with dense copies kept aside.
        policies: told what became smaller.

    Raises:
        DistillerError: the recipe is of another model, or the optimizer keeps something of another shape
            for a parameter; nothing is changed.
    """
    tensors = _tensors(model)
    due = _due(tensors, recipe)
    modules = dict(named_modules(model))
    kinds = {name: thinned_class(kind) for name, kind in recipe.classes.items()}
    _check_modules(modules, recipe, kinds)
    state = _optimizer_cuts(optimizer, {id(tensors[name]): (name, kept) for name, kept in due.items()})
    for name, kept in due.items():
        replace_data(tensors[name], cut(tensors[name], kept))
    for entry, key, smaller in state:
        entry[key] = smaller
    for name, attributes in recipe.modules.items():
        for attribute, value in attributes.items():
            setattr(modules[name], attribute, tuple(value) if isinstance(value, list) else value)
    for name, kind in kinds.items():
        modules[name].__class__ = kind
    if masks is not None:
        masks.follow_thinning(due)
    for policy in policies:
        policy.follow_thinning(due)
    bare: Any = unwrap(model)
    bare.thinning_recipes = [*getattr(bare, "thinning_recipes", ()), recipe.to_plain()]


def _tensors(model: nn.Module) -> dict[str, Tensor]:
    """Parameters and buffers by canonical name."""
    return {**dict(named_parameters(model)), **dict(named_buffers(model))}


def _under_all_names(model: nn.Module, cuts: TensorCuts) -> TensorCuts:
    """The cuts, those of a parameter that several modules share under each of its names."""
    bare = unwrap(model)
    shared: dict[int, list[str]] = {}
    for raw, param in bare.named_parameters(remove_duplicate=False):
        shared.setdefault(id(param), []).append(canonical(raw, bare))
    names = {name: together for together in shared.values() for name in together}
    return {other: dims for name, dims in cuts.items() for other in names.get(name, [name])}


def _due(tensors: Mapping[str, Tensor], recipe: ThinningRecipe) -> dict[str, Kept]:
    """What of the recipe is still to be done."""
    due: dict[str, Kept] = {}
    for name, kept in recipe.tensors.items():
        tensor = tensors.get(name)
        if tensor is None:
            raise DistillerError(f"thinning: the model has no '{name}'; the recipe is of another model")
        if max(kept, default=0) < tensor.dim() and tuple(tensor.shape) == cut_shape(tensor.shape, kept):
            continue
        for dim, indices in kept.items():
            if dim >= tensor.dim() or max(indices) >= tensor.shape[dim]:
                raise DistillerError(
                    f"thinning: '{name}' of shape {tuple(tensor.shape)} has no index {max(indices)} along "
                    f"dimension {dim}; the recipe is of another model"
                )
        due[name] = kept
    return due


def _check_modules(
    modules: Mapping[str, nn.Module], recipe: ThinningRecipe, kinds: Mapping[str, type[nn.Module]]
) -> None:
    """Refuse what the modules of a model cannot be told."""
    for name in (*recipe.modules, *kinds):
        if name not in modules:
            raise DistillerError(
                f"thinning: the model has no module '{name}'; the recipe is of another model"
            )
    for name, attributes in recipe.modules.items():
        for attribute in attributes:
            present = getattr(modules[name], attribute, None)
            if not isinstance(present, (int, float, tuple, list, NoneType)):
                raise DistillerError(
                    f"thinning: '{name}.{attribute}' is a {type(present).__name__}, no number that a recipe "
                    "could set; the recipe is of another model"
                )
    for name, kind in kinds.items():
        taken_over, got = kind.__bases__[-1], type(modules[name]).__name__
        if not isinstance(modules[name], taken_over):
            raise DistillerError(
                f"thinning: '{name}' is a {got}, and {kind.__name__} takes over from "
                f"{taken_over.__name__}; the recipe is of another model"
            )


def _optimizer_cuts(
    optimizer: Optimizer | None, due: Mapping[int, tuple[str, Kept]]
) -> list[tuple[dict[str, Any], str, Tensor]]:
    """Entries of the optimizer's state, and what they become."""
    found: list[tuple[dict[str, Any], str, Tensor]] = []
    for param, entry in (optimizer.state if optimizer is not None else {}).items():
        if id(param) not in due:
            continue
        name, kept = due[id(param)]
        for key, value in entry.items():
            if not isinstance(value, Tensor) or value.numel() == 1 != param.numel():
                continue
            if value.shape != param.shape:
                raise DistillerError(
                    f"thinning: {type(optimizer).__name__} keeps '{key}' of shape {tuple(value.shape)} for "
                    f"'{name}' of shape {tuple(param.shape)}, which cannot be cut with it; use SGD, Adam or "
                    "AdamW, or thin the checkpoint after training (--thinnify)"
                )
            found.append((entry, key, cut(value, kept)))
    return found
