"""Layers of a model replaced by factored ones, with what goes with their parameters: and the way back.

A model remembers in `factorization_recipes` what was done to it, which checkpoints store.
Knows nothing about how ranks are chosen, or about files.
"""

from __future__ import annotations

import copy
from collections.abc import Iterable, Mapping
from typing import Any

import torch
from torch import Tensor, nn
from torch.optim import Optimizer

from distiller.errors import DistillerError, UsageError, users_code
from distiller.evaluation_mode import buffers_kept, evaluating
from distiller.factorization.forms import Form, plain_rank, require_factorable, shape_of
from distiller.factorization.layers import LowRankPlusSparse, composed, factored, set_weights
from distiller.factorization.recipe import FactoredLayer, FactorizationRecipe
from distiller.masks import MaskRules, MaskStore
from distiller.names import named_modules, named_parameters, unwrap
from distiller.observation import unobserved

__all__ = ["apply_factorization", "factorizations_of", "refuse_shared", "with_layers_whole"]

SPARSE_RULES = MaskRules()
_SLOT = "sparse part"


def factorizations_of(model: nn.Module) -> tuple[FactorizationRecipe, ...]:
    """The factorizations that a model has gone through, in order."""
    plain = getattr(unwrap(model), "factorization_recipes", ())
    return tuple(
        FactorizationRecipe.from_plain(recipe, f"the model: factorization_recipes[{index}]")
        for index, recipe in enumerate(plain)
    )


def apply_factorization(
    model: nn.Module,
    recipe: FactorizationRecipe,
    optimizer: Optimizer | None = None,
    masks: MaskStore | None = None,
    *,
    has_weights: bool = True,
    moments: Mapping[str, Tensor] | None = None,
    nonzeros: Mapping[str, int] | None = None,
) -> None:
    """Replace layers of a model by their factors, in place.

    In the optimizer the factors take the place of the weight, in its group and with its settings; what it
    kept of the weight (momentum, moments) is dropped, and all else stays. A mask of the weight is multiplied
    into it, and ends. A bias stays the same parameter under its new name. The recipe is added to the model's
    `factorization_recipes`, with `after_thinnings` as it is now.

    Args:
        model: the model, or a wrapper around it.
        recipe: of a model of these shapes.
        optimizer: of the model.
        masks: of the model; the zeros of sparse parts become masks of them.
        has_weights: whether the factors get the weights that are nearest; else zeros, to be loaded.
        moments: by name of a layer, the second moments of its inputs.
        nonzeros: by name of a layer, elements of its sparse part; needed for those that have one.

    Raises:
        DistillerError: the recipe is of another model, or a layer cannot be factored; nothing is changed.
    """
    bare: Any = unwrap(model)
    modules = dict(named_modules(bare))
    refuse_shared(bare, [layer.name for layer in recipe.layers])
    known = {} if masks is None else {name: masks[name].mask for name in masks}
    replaced: dict[str, nn.Module] = {}
    for layer in recipe.layers:
        whole = _whole(modules, layer)
        module = factored(whole, layer.form, layer.rank, layer.is_sparse)
        if has_weights:
            weight: Any = whole.weight
            mask = known.get(f"{layer.name}.weight")
            dense = weight.detach() if mask is None else weight.detach() * mask
            set_weights(
                module,
                dense,
                layer.form,
                (moments or {}).get(layer.name),
                (nonzeros or {}).get(layer.name, 0) if layer.is_sparse else None,
            )
        replaced[layer.name] = module
    if optimizer is not None:
        _swap(optimizer, {modules[name].weight: _weights(module) for name, module in replaced.items()})
    before = dict(named_parameters(bare))
    for name, module in replaced.items():
        parent, _, attribute = name.rpartition(".")
        setattr(modules[parent], attribute, module)
    if masks is not None:
        masks.follow_replacement(before)
        for name, module in replaced.items():
            if isinstance(module, LowRankPlusSparse):
                weight = module.sparse.weight  # type: ignore[assignment]
                kept = (weight.detach() != 0).to(weight)
                masks.put(f"{name}.sparse.weight", kept, _SLOT, SPARSE_RULES)
    done = recipe.to_plain() | {"after_thinnings": len(getattr(bare, "thinning_recipes", ()))}
    bare.factorization_recipes = [*getattr(bare, "factorization_recipes", ()), done]


def with_layers_whole(model: nn.Module, names: Iterable[str], where: str) -> nn.Module:
    """A copy of a model in which factored layers are single ones again, with the products of their factors.

    Args:
        model: the model, or a wrapper around it; stays as it is.
        names: of factored layers.
        where: what the copy is for, named in errors.

    Raises:
        UsageError: the model cannot be copied.
    """
    bare: Any = unwrap(copied(model, where))
    layers = [layer for recipe in factorizations_of(bare) for layer in recipe.layers]
    forms: dict[str, Form] = {layer.name: layer.form for layer in layers}
    modules, gone = dict(named_modules(bare)), set(names)
    for name in gone & forms.keys():
        parent, _, attribute = name.rpartition(".")
        setattr(modules[parent], attribute, composed(modules[name], forms[name]))
    left = []
    for plain in getattr(bare, "factorization_recipes", ()):
        others = {name: entry for name, entry in plain["layers"].items() if name not in gone}
        kept = [name for name in plain["kept"] if name not in gone]
        left += [{**plain, "layers": others, "kept": kept}] if others or kept else []
    bare.factorization_recipes = left
    return bare


def copied(model: nn.Module, where: str) -> nn.Module:
    """A copy of a model that nobody watches.

    Raises:
        UsageError: it cannot be copied.
    """
    with unobserved(model), users_code(f"{where}: the model cannot be copied"):
        return copy.deepcopy(model)


def require_runs(model: nn.Module, dummy_input: Any, names: Iterable[str], where: str) -> None:
    """See to it that a factored model computes: its code may read a layer's weight or size itself.

    Args:
        model: the factored model.
        dummy_input: a tensor, or a tuple of the model's arguments, on its device.
        names: what was factored.
        where: named in the error.

    Raises:
        UsageError: it does not.
    """
    arguments = dummy_input if isinstance(dummy_input, (tuple, list)) else (dummy_input,)
    remedy = f"; its code may read one of them itself, leave that out: {', '.join(names)}"
    with (
        unobserved(model),
        evaluating(model),
        buffers_kept(model),
        users_code(f"{where}: the model does not run factored", remedy),
        torch.no_grad(),
    ):
        model(*arguments)


def refuse_shared(model: nn.Module, names: Iterable[str]) -> None:
    """Refuse layers or weights that are in a model under several names, and the model itself.

    Raises:
        DistillerError: naming the first.
    """
    bare = unwrap(model)
    by_module: dict[int, list[str]] = {}
    by_param: dict[int, list[str]] = {}
    for name, module in bare.named_modules(remove_duplicate=False):
        by_module.setdefault(id(module), []).append(name)
    for name, param in bare.named_parameters(remove_duplicate=False):
        by_param.setdefault(id(param), []).append(name)
    modules = dict(named_modules(bare))
    for name in names:
        module = modules.get(name)
        if module is None:
            continue
        own: Any = module
        several = by_module[id(module)]
        if len(several) == 1 and isinstance(getattr(own, "weight", None), Tensor):
            several = by_param.get(id(own.weight), several)
        if name == "":
            raise DistillerError("factorization: the model is a single layer; put it into a Sequential")
        if len(several) > 1:
            raise DistillerError(
                f"factorization: '{name}' cannot be factored: it is in the model as {' and '.join(several)}"
            )


def _whole(modules: Mapping[str, nn.Module], layer: FactoredLayer) -> nn.Module:
    """The layer that a recipe is of, found to be as the recipe says."""
    module = modules.get(layer.name)
    if module is None:
        raise DistillerError(
            f"factorization: the model has no layer '{layer.name}'; the recipe is of another model"
        )
    require_factorable(layer.name, module, layer.form)
    shape = shape_of(module)
    if shape.weight != layer.shape:
        raise DistillerError(
            f"factorization: '{layer.name}' has a weight of shape {shape.weight}, the recipe is of "
            f"{layer.shape}; the recipe is of another model"
        )
    most = shape.most(layer.form)
    if len(layer.rank) != len(most) or any(
        not 1 <= r <= top for r, top in zip(layer.rank, most, strict=True)
    ):
        raise UsageError(
            f"factorization: '{layer.name}': rank must be 1 to {plain_rank(most)}, got "
            f"{plain_rank(layer.rank)}"
        )
    return module


def _weights(module: nn.Module) -> list[nn.Parameter]:
    return [param for name, param in named_parameters(module) if not name.endswith("bias")]


def _swap(optimizer: Optimizer, factors: Mapping[Any, list[nn.Parameter]]) -> None:
    """Let the factors take the place of weights in an optimizer's groups; what it kept of these goes."""
    by_id = {id(weight): parts for weight, parts in factors.items()}
    for group in optimizer.param_groups:
        group["params"] = [new for param in group["params"] for new in by_id.get(id(param), [param])]
    for weight in factors:
        optimizer.state.pop(weight, None)
