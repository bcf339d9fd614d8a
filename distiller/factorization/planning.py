"""From what is asked of layers to the rank that each of them gets.

Knows nothing about replacing layers, schedules or checkpoints.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace
from functools import partial
from typing import Any, Literal

import torch
from torch import Tensor, nn

from distiller.dummy_input import forward_arguments, resolve_input_shape, shaped
from distiller.errors import DistillerError, UsageError
from distiller.factorization.forms import Form, LayerShape, Rank, candidate_ranks, checked_rank, shape_of
from distiller.factorization.ranks import (
    Cost,
    RankPoint,
    points_by_energy,
    rank_for_energy,
    rank_within,
    ranks_for_budget,
)
from distiller.factorization.settings import LayerSettings, layers_of
from distiller.graph import input_shape_of
from distiller.macs import LayerCost, count_macs
from distiller.masks import MaskStore
from distiller.names import named_modules, named_parameters, unwrap

__all__ = [
    "AboveBreakEven",
    "LayerPlan",
    "check_budgets",
    "check_share",
    "cost_of",
    "example_input",
    "layer_shapes",
    "masked_weight",
    "plan_layers",
    "plan_without_weights",
    "rank_text",
    "ranks_within",
    "total_macs_of",
    "total_parameters_of",
]

AboveBreakEven = Literal["keep", "refuse"]
"""Whether a layer that its rank would not make smaller stays whole, or is refused."""


@dataclass(frozen=True, slots=True)
class LayerPlan:
    """What is to become of one layer.

    Attributes:
        name: canonical.
        form: of its factors.
        shape: of the layer, and how often it is computed.
        rank: that it gets; None: it stays whole.
        nonzeros: elements of its sparse part; None: it has none.
        is_whitened: whether the error is least on inputs.
        reason: why it stays whole; empty if it does not.
    """

    name: str
    form: Form
    shape: LayerShape
    rank: Rank | None
    nonzeros: int | None = None
    is_whitened: bool = False
    reason: str = ""


def plan_layers(
    model: nn.Module,
    layers: Mapping[str, Mapping[str, Any]],
    dummy_input: Any,
    *,
    parameters: float | None = None,
    macs: float | None = None,
    above_break_even: AboveBreakEven = "keep",
    masks: MaskStore | None = None,
    has_weights: bool = True,
) -> list[LayerPlan]:
    """The rank that each layer is to get; changes nothing.

    Args:
        model: as in `factorize`.
        layers: likewise.
        dummy_input: the model's arguments, on its device.
        parameters: as in `factorize`.
        macs: likewise.
        above_break_even: likewise.
        masks: likewise.
        has_weights: False: weights are not looked at, and every rank counts as losing nothing.

    Raises:
        DistillerError: as `factorize`.
    """
    check_budgets(parameters, macs)
    settings = layers_of(model, layers)
    shapes = layer_shapes(model, list(settings), dummy_input)
    weights = {name: masked_weight(model, name, masks) if has_weights else None for name in settings}
    has_budget = parameters is not None or macs is not None
    plans: dict[str, LayerPlan] = {}
    open_: dict[str, list[RankPoint]] = {}
    for name, own in settings.items():
        form, shape = own.form, shapes[name]
        if not own.has_rank_of_its_own:
            if not has_budget:
                raise UsageError(
                    f"layers: '{name}' has no rank; give rank, energy, parameters or macs, or a budget of all"
                )
            if own.sparse is not None:
                raise UsageError(f"layers: '{name}': 'sparse' goes with a rank of its own, not with a budget")
            open_[name] = points_by_energy(shape, weights[name], form)
            continue
        nonzeros = None if own.sparse is None else round(own.sparse * shape.parameters)
        try:
            rank = _own_rank(own, shape, weights[name])
        except UsageError as error:
            raise UsageError(f"layers: '{name}': {error}") from error
        plans[name] = _within_break_even(
            LayerPlan(name, form, shape, rank, nonzeros, own.whitened), above_break_even
        )
    if open_:
        cost: Cost = "parameters" if parameters is not None else "macs"
        fraction = parameters if parameters is not None else macs
        assert fraction is not None
        total = total_macs_of(model, dummy_input) if cost == "macs" else total_parameters_of(model)
        fixed = sum(getattr(shapes[name], cost) - cost_of(plan, cost) for name, plan in plans.items())
        others = total - fixed - sum(getattr(shapes[name], cost) for name in open_)
        chosen = ranks_within(open_, cost, fraction, total, others)
        for name, point in chosen.items():
            reason = "" if point.rank is not None else "the budget is met without it"
            own = settings[name]
            plans[name] = LayerPlan(name, own.form, shapes[name], point.rank, None, own.whitened, reason)
    return [plans[name] for name in settings]


def check_budgets(parameters: float | None, macs: float | None) -> None:
    """Refuse budgets that cannot be.

    Args:
        parameters: as in `factorize`.
        macs: likewise.

    Raises:
        UsageError: both are given, or one is not more than 0 and less than 1.
    """
    if parameters is not None and macs is not None:
        raise UsageError("both 'parameters' and 'macs' given; give one")
    for argument, budget in (("parameters", parameters), ("macs", macs)):
        if budget is not None:
            check_share(budget, argument)


def check_share(value: float, argument: str = "") -> None:
    """Refuse what is no fraction of a model that a smaller one can have.

    Raises:
        UsageError: it is not more than 0 and less than 1.
    """
    if not 0 < value < 1:
        raise UsageError(f"{argument} must be more than 0 and less than 1, got {value}".lstrip())


def ranks_within(
    points: Mapping[str, list[RankPoint]], cost: Cost, fraction: float, total: int, others: int
) -> dict[str, RankPoint]:
    """`ranks_for_budget`, of a whole model.

    Args:
        points: by layer, what it may become.
        cost: what is counted.
        fraction: of the whole model that is to be left.
        total: what the model costs.
        others: what all else than these layers costs.

    Raises:
        UsageError: the fraction is too small.
    """
    budget = int(fraction * total)
    told = f"{cost} {fraction}: of {total:,}"
    what = "MACs" if cost == "macs" else cost
    if budget < 1:
        raise UsageError(f"{told} {what} that leaves none; give more than {1 / max(1, total):.2g}")
    if others >= budget:
        raise UsageError(
            f"{told}: the rest of the model has {others:,} {what} by itself, which leaves none of the "
            f"{budget:,} for these layers; give more than {others / total:.4f}, or name more layers"
        )
    try:
        return ranks_for_budget(points, cost, budget - others)
    except UsageError as error:
        raise UsageError(f"{told}: {error}") from error


def plan_without_weights(
    model: nn.Module,
    layers: Mapping[str, Mapping[str, Any]],
    dummy_input: Any,
    *,
    parameters: float | None = None,
    macs: float | None = None,
    above_break_even: AboveBreakEven = "keep",
) -> list[LayerPlan]:
    """`plan_layers` before the weights are trained: a rank that will follow from them is the break-even rank.

    Takes and raises what `plan_layers` does.
    """
    settings = layers_of(model, layers)
    unknown = {
        name for name, own in settings.items() if not own.has_rank_of_its_own or own.energy is not None
    }
    plans = plan_layers(
        model,
        layers,
        dummy_input,
        parameters=parameters,
        macs=macs,
        above_break_even=above_break_even,
        has_weights=False,
    )
    return [_at_break_even(plan) if plan.name in unknown else plan for plan in plans]


def example_input(model: nn.Module, dummy_input: Any = None) -> Any:
    """Arguments for a trial: those given, or zeros of the model's `input_shape`, where its weights are.

    Raises:
        UsageError: neither is there.
    """
    if dummy_input is None:
        shape = input_shape_of(model, "factorization")
        dtype = next((param.dtype for param in model.parameters()), None)
        dummy_input = shaped(resolve_input_shape(None, shape), partial(torch.zeros, dtype=dtype))
    return forward_arguments(unwrap(model), dummy_input)


def layer_shapes(model: nn.Module, names: list[str], dummy_input: Any) -> dict[str, LayerShape]:
    """The shapes of layers, as often as a forward pass of one sample computes each.

    Raises:
        UsageError: one of them is not run.
    """
    costs: dict[str, LayerCost] = {cost.name: cost for cost in count_macs(model, dummy_input)}
    modules = dict(named_modules(model))
    unused = [name for name in names if name not in costs]
    if unused:
        raise UsageError(
            f"factorization: '{unused[0]}' is not called in a forward pass (its weight may be read by other "
            "code); leave it out"
        )
    return {name: shape_of(modules[name], costs[name].input_shape, costs[name].macs) for name in names}


def masked_weight(model: nn.Module, name: str, masks: MaskStore | None) -> Tensor:
    """A copy of a layer's weight, with its mask multiplied in."""
    weight = dict(named_parameters(model))[f"{name}.weight"].detach()
    mask = None if masks is None else masks[f"{name}.weight"].mask
    return weight.clone() if mask is None else weight * mask


def cost_of(plan: LayerPlan, cost: Cost) -> int:
    """What a layer costs as it is planned."""
    if plan.rank is None:
        return getattr(plan.shape, cost)
    if cost == "parameters":
        return plan.shape.factored_parameters(plan.form, plan.rank, plan.nonzeros or 0)
    return plan.shape.factored_macs(plan.form, plan.rank, plan.nonzeros or 0)


def total_parameters_of(model: nn.Module) -> int:
    """Elements of all parameters."""
    return sum(param.numel() for param in model.parameters())


def total_macs_of(model: nn.Module, dummy_input: Any) -> int:
    """Multiply-accumulates of a forward pass."""
    return sum(cost.macs for cost in count_macs(model, dummy_input))


def rank_text(rank: Rank | None) -> str:
    """A rank in a message."""
    return "none" if rank is None else str(rank[0]) if len(rank) == 1 else f"{rank[0]}, {rank[1]}"


def _own_rank(own: LayerSettings, shape: LayerShape, weight: Tensor | None) -> Rank:
    form = own.form
    if own.rank is not None:
        return checked_rank(shape, form, own.rank)
    if own.energy is not None:
        if weight is None:
            return candidate_ranks(shape, form)[0]
        return rank_for_energy(weight, form, own.energy)
    nonzeros = 0 if own.sparse is None else round(own.sparse * shape.parameters)
    if own.parameters is not None:
        return rank_within(shape, form, "parameters", own.parameters, nonzeros)
    assert own.macs is not None
    return rank_within(shape, form, "macs", own.macs, nonzeros)


def _at_break_even(plan: LayerPlan) -> LayerPlan:
    rank = plan.shape.break_even(plan.form) or candidate_ranks(plan.shape, plan.form)[0]
    return replace(plan, rank=rank, reason="")


def _within_break_even(plan: LayerPlan, above: AboveBreakEven) -> LayerPlan:
    assert plan.rank is not None
    if plan.shape.shrinks(plan.form, plan.rank, plan.nonzeros or 0):
        return plan
    limit = rank_text(plan.shape.break_even(plan.form, plan.nonzeros or 0))
    reason = f"rank {rank_text(plan.rank)} of form {plan.form} would not make it smaller"
    if above == "refuse":
        raise DistillerError(
            f"layers: '{plan.name}': {reason}; break-even rank {limit}: give a lower one, or "
            "above_break_even: keep"
        )
    return LayerPlan(plan.name, plan.form, plan.shape, None, None, plan.is_whitened, reason)
