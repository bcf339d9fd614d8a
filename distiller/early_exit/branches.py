"""Exits for any model by naming its layers: the branches are made to fit what the layers give.

    (N, C, H, W) -> average pooling to at most 4 x 4 -> flatten -> linear -> (N, classes)
    (N, F)       -> linear -> (N, classes)

What was attached is kept as plain data in `model.early_exits`, which checkpoints store.
Knows nothing about files.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from distiller.branch_points import attach_exits, exit_names, exits_of
from distiller.early_exit.places import exit_places
from distiller.errors import DistillerError, UsageError, require
from distiller.evaluation_mode import buffers_kept, evaluating
from distiller.graph import input_shape_of
from distiller.names import find_module, named_modules, unwrap
from distiller.observation import unobserved

_MOST_POSITIONS = 4
_BATCH = 2


def attach_exits_to(model: nn.Module, layers: Sequence[str], pools: Sequence[Any] | None = None) -> None:
    """Attach an exit behind each of some layers of a model, with a fresh branch that fits it.

    Where a layer has parameters and a layer without gives the same result last (the ReLU at the end of a
    block, say), the exit is attached to that one, so that all parameters keep their names.

    Args:
        model: with `input_shape`, (1, channels, height, width), and answering with logits; changed in place.
        layers: names of layers or blocks, in the order of execution.
        pools: for each layer (height, width) that its result is pooled to, None for one of two dimensions;
            default the largest up to 4 x 4 that divide its own.

    Raises:
        UnknownNameError: there is no such layer.
        UsageError: an exit cannot be there; names layers where it can. Or the order is another one.
        GraphTraceError: `torch.export` cannot trace the model.
        DistillerError: the model does not say its `input_shape`.
    """
    require(layers, (tuple, list), "attach_exits_to: layers", "a list of names of layers")
    for layer in layers:
        require(layer, str, "attach_exits_to: layers", "names of layers")
    bare = unwrap(model)
    if exits_of(bare):
        raise UsageError("early exit: the model has exits already; attach all of them at once")
    places, names = exit_places(bare), {module: name for name, module in named_modules(bare)}
    given = [names[find_module(bare, layer)] for layer in layers]
    for name in given:
        places.check(name)
    in_order = sorted(given, key=lambda name: places.position[name])
    if given != in_order:
        raise UsageError(
            f"early exit: name the layers in the order of execution: {' '.join(in_order)}, "
            f"got {' '.join(given)}"
        )
    results, classes = _dry_run(bare)
    exits: list[tuple[str, nn.Module]] = []
    plain: list[dict[str, Any]] = []
    for index, name in enumerate(given):
        result = results.get(name)
        if not isinstance(result, Tensor) or len(result) != _BATCH or result.dim() not in (2, 4):
            got = f"shape {tuple(result.shape)}" if isinstance(result, Tensor) else type(result).__name__
            raise UsageError(
                f"early exit: '{name}' must give a tensor (batch, channels, height, width) or (batch, "
                f"features) for an exit, got {got} for a batch of {_BATCH}"
            )
        pool = _pool_of(result) if pools is None else pools[index]
        _check_pool(name, result, pool)
        exits.append((_bearer(bare, name, results), _branch(result, pool, classes)))
        plain.append({"layer": name, "pool": None if pool is None else list(pool)})
    attach_exits(bare, exits)
    for point in exits_of(bare):
        point.is_checked = True
    bare.early_exits = plain  # type: ignore[assignment]


def attach_stored_exits(model: nn.Module, stored: Sequence[Mapping[str, Any]]) -> None:
    """Attach exits as `stored_exits` of another copy of the model says; raises as `attach_exits_to`."""
    attach_exits_to(model, [exit["layer"] for exit in stored], [exit["pool"] for exit in stored])


def stored_exits(model: nn.Module) -> list[dict[str, Any]]:
    """The exits that were attached by naming layers, as plain data; [] when the model's own code has them."""
    return [dict(exit) for exit in getattr(unwrap(model), "early_exits", ())]


def check_branch_points(model: nn.Module) -> None:
    """See to it that all that goes on goes through the branch points of a model.

    Raises:
        UsageError: the network has another way past one.
        GraphTraceError: `torch.export` cannot trace the model.
        DistillerError: the model does not say its `input_shape`.
    """
    bare = unwrap(model)
    points = [point for point in exits_of(bare) if not point.is_checked]
    if points:
        places, names = exit_places(bare), dict(zip(exits_of(bare), exit_names(bare), strict=True))
        for point in points:
            places.check(names[point])
            point.is_checked = True


class EarlyExitMgr:
    """Distiller's name for attaching exits.

    Attributes:
        exits: the layers that have one.
    """

    def __init__(self) -> None:
        self.exits: list[str] = []

    def attach_exits(self, model: nn.Module, exits_def: Sequence[tuple[str, nn.Module]]) -> None:
        """Put branches on layers of a model; takes and raises as `distiller.branch_points.attach_exits`."""
        attach_exits(model, exits_def)
        self.exits = list(exit_names(model))


def _dry_run(model: nn.Module) -> tuple[dict[str, Any], int]:
    """What each module gave for two images, by name, and the number of classes."""
    shape = input_shape_of(model, "early exit")
    if not all(isinstance(size, int) for size in shape):
        raise DistillerError(f"'early exit': a model of one input is needed, got the input_shape {shape}")
    like = next(model.parameters(), torch.empty(0))
    images = torch.zeros((_BATCH, *shape[1:]), dtype=like.dtype, device=like.device)
    results: dict[str, Any] = {}

    def see(name: str, module: nn.Module, inputs: Any, output: Any) -> None:
        results[name] = output

    with unobserved(model), evaluating(model), buffers_kept(model):
        handles = [
            module.register_forward_hook(partial(see, name)) for name, module in named_modules(model) if name
        ]
        try:
            answer = model(images)
        finally:
            for handle in handles:
                handle.remove()
    if not isinstance(answer, Tensor) or answer.dim() != 2:
        got = tuple(answer.shape) if isinstance(answer, Tensor) else type(answer).__name__
        raise UsageError(f"early exit: the model must answer with logits, (batch, classes), got {got}")
    return results, answer.shape[1]


def _bearer(model: nn.Module, name: str, results: Mapping[str, Any]) -> str:
    """The module that the exit is put on: one without parameters where one gives the same tensor."""
    modules = dict(named_modules(model))
    if not any(True for _ in modules[name].parameters()):
        return name
    prefix = f"{name}."
    inside = [
        other
        for other, module in modules.items()
        if other.startswith(prefix) and results.get(other) is results[name] and not list(module.parameters())
    ]
    return max(inside, key=lambda other: other.count("."), default=name)


def _pool_of(result: Tensor) -> list[int] | None:
    if result.dim() == 2:
        return None
    return [
        max(size for size in range(1, _MOST_POSITIONS + 1) if whole % size == 0) for whole in result.shape[2:]
    ]


def _check_pool(name: str, result: Tensor, pool: Any) -> None:
    wanted = 0 if result.dim() == 2 else 2
    is_fit = len(pool or ()) == wanted and all(
        isinstance(size, int) and 1 <= size <= whole
        for size, whole in zip(pool or (), result.shape[2:], strict=False)
    )
    if not is_fit:
        raise UsageError(f"early exit: '{name}' of shape {tuple(result.shape)} cannot be pooled to {pool}")


def _branch(result: Tensor, pool: Sequence[int] | None, classes: int) -> nn.Module:
    """A fresh branch for what a layer gives, of its type, where it is."""
    if pool is None:
        return nn.Sequential(nn.Linear(result.shape[1], classes)).to(result.device, result.dtype)
    features = result.shape[1] * pool[0] * pool[1]
    layers = (nn.AdaptiveAvgPool2d(tuple(pool)), nn.Flatten(), nn.Linear(features, classes))
    return nn.Sequential(*layers).to(result.device, result.dtype)
