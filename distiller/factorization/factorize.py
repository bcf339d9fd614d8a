"""A model factored from Python: settings to ranks, ranks to a recipe, and a report of what became of it.

    report = factorize(model, {"*": {}}, macs=0.5)
    report = factorize(model, {"fc1": {"rank": 40}, "conv2": {"form": "tucker2", "energy": 0.9}})

Knows nothing about schedules or checkpoints.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from types import NoneType
from typing import Any, get_args

from torch import Tensor, nn
from torch.optim import Optimizer

from distiller.errors import UsageError, require
from distiller.factorization.forms import Form, Rank
from distiller.factorization.layers import composed
from distiller.factorization.planning import (
    AboveBreakEven,
    LayerPlan,
    cost_of,
    example_input,
    masked_weight,
    plan_layers,
    rank_text,
    total_macs_of,
    total_parameters_of,
)
from distiller.factorization.recipe import FactoredLayer, FactorizationRecipe
from distiller.factorization.replacement import apply_factorization, copied, require_runs
from distiller.masks import MaskStore
from distiller.names import named_modules

__all__ = ["FactorizationReport", "LayerReport", "factorize", "recipe_of"]


@dataclass(frozen=True, slots=True)
class LayerReport:
    """What became of one layer.

    Attributes:
        name: canonical.
        form: of its factors.
        rank: None: it stayed whole.
        break_even: the highest rank at which it has fewer parameters and MACs than whole; None: none.
        parameters: elements of its weights (non-zero ones of a sparse part) before and after.
        macs: for one sample, before and after.
        energy: 1 - ||W - W'||^2 / ||W||^2, W' being what the factors (and the sparse part) multiply to.
        reason: why it stayed whole; empty if it did not.
    """

    name: str
    form: Form
    rank: Rank | None
    break_even: Rank | None
    parameters: tuple[int, int]
    macs: tuple[int, int]
    energy: float
    reason: str = ""

    def __str__(self) -> str:
        rank, limit = rank_text(self.rank), rank_text(self.break_even)
        if self.rank is None:
            return f"{self.name}: stays whole, {self.reason} (break-even rank {limit})"
        costs = ", ".join(
            f"{what} {was:,} -> {now:,}"
            for what, (was, now) in (("parameters", self.parameters), ("MACs", self.macs))
        )
        return (
            f"{self.name}: {self.form} of rank {rank} (break-even {limit}), {costs}, energy {self.energy:.4f}"
        )


@dataclass(frozen=True, slots=True)
class FactorizationReport:
    """What a factorization did.

    Attributes:
        layers: each that was asked for.
        parameters: of the whole model, before and after; zeros of sparse parts do not count.
        macs: of the whole model for one sample, before and after.
        recipe: what was done.
    """

    layers: tuple[LayerReport, ...]
    parameters: tuple[int, int]
    macs: tuple[int, int]
    recipe: FactorizationRecipe


def factorize(
    model: nn.Module,
    layers: Mapping[str, Mapping[str, Any]],
    dummy_input: Any = None,
    *,
    parameters: float | None = None,
    macs: float | None = None,
    above_break_even: AboveBreakEven = "keep",
    moments: Mapping[str, Tensor] | None = None,
    optimizer: Optimizer | None = None,
    masks: MaskStore | None = None,
) -> FactorizationReport:
    """Replace layers of a model by products of smaller ones, in place.

    Args:
        model: the model, or a wrapper around it.
        layers: settings by name or pattern of a layer (`settings.LayerSettings`).
        dummy_input: a batch of one; a tensor, or a tuple of the model's arguments. None: of the model's
            `input_shape`.
        parameters: a budget for the layers without a rank of their own: the fraction of the WHOLE model's
            parameters that the model is to have.
        macs: the same of its MACs; not together with `parameters`.
        above_break_even: whether a layer that its rank would not make smaller stays whole, or is refused.
        moments: by name of a layer, second moments of its inputs (`InputMoments`); of those with `whitened`.
        optimizer: of the model; goes on with the factors in the place of the weights.
        masks: of the model; end where their weight does.

    Raises:
        DistillerError: a name, rank or budget that cannot be, a layer that cannot be factored, a model that
            does not run factored, or an optimizer of another model. Nothing is changed.
    """
    require(layers, Mapping, "factorize: layers", "a mapping of settings by layer, as {'fc1': {'rank': 40}}")
    for argument, value in (("parameters", parameters), ("macs", macs)):
        require(value, (int, float, NoneType), f"factorize: {argument}", "a fraction or None")
    if above_break_even not in get_args(AboveBreakEven):
        raise UsageError(
            f"factorize: above_break_even: must be {' or '.join(get_args(AboveBreakEven))}, got "
            f"{above_break_even!r}"
        )
    _refuse_foreign(optimizer, model)
    inputs = example_input(model, dummy_input)
    plans = plan_layers(
        model,
        layers,
        inputs,
        parameters=parameters,
        macs=macs,
        above_break_even=above_break_even,
        masks=masks,
    )
    lacking = [
        p.name for p in plans if p.is_whitened and p.rank is not None and p.name not in (moments or {})
    ]
    if lacking:
        raise UsageError(
            f"factorization: '{lacking[0]}' is to be whitened, and there are no moments of its inputs; "
            "collect them with InputMoments"
        )
    recipe = recipe_of(plans)
    weights = {p.name: masked_weight(model, p.name, masks) for p in plans}
    trial = copied(model, "factorization")
    apply_factorization(trial, recipe, has_weights=False)
    require_runs(trial, inputs, [layer.name for layer in recipe.layers], "factorization")
    before = total_parameters_of(model), total_macs_of(model, inputs)
    apply_factorization(
        model,
        recipe,
        optimizer,
        masks,
        moments={p.name: (moments or {})[p.name] for p in plans if p.is_whitened and p.rank is not None},
        nonzeros={p.name: p.nonzeros for p in plans if p.nonzeros is not None},
    )
    modules = dict(named_modules(model))
    reports = tuple(_report(plan, weights[plan.name], modules[plan.name]) for plan in plans)
    zeros = sum(
        p.shape.parameters - p.nonzeros for p in plans if p.nonzeros is not None and p.rank is not None
    )
    after = total_parameters_of(model) - zeros, total_macs_of(model, inputs)
    return FactorizationReport(reports, (before[0], after[0]), (before[1], after[1]), recipe)


def recipe_of(plans: list[LayerPlan]) -> FactorizationRecipe:
    """What has to be done for plans to come true."""
    done = tuple(
        FactoredLayer(plan.name, plan.form, plan.rank, plan.shape.weight, plan.nonzeros is not None)
        for plan in plans
        if plan.rank is not None
    )
    return FactorizationRecipe(done, tuple(plan.name for plan in plans if plan.rank is None))


def _refuse_foreign(optimizer: Optimizer | None, model: nn.Module) -> None:
    """See to it that an optimizer has parameters of the model: others may be frozen, and not in it."""
    if optimizer is None:
        return
    ours = {id(param) for param in model.parameters()}
    if not any(id(param) in ours for group in optimizer.param_groups for param in group["params"]):
        raise UsageError(
            "factorize: optimizer: has none of the model's parameters, and is of another model or of a copy; "
            "give the one that trains this model, or none"
        )


def _report(plan: LayerPlan, weight: Tensor, module: nn.Module) -> LayerReport:
    shape, extra = plan.shape, plan.nonzeros or 0
    costs = (cost_of(plan, "parameters"), cost_of(plan, "macs"))
    energy = 1.0
    if plan.rank is not None:
        product: Any = composed(module, plan.form)
        error = (weight - product.weight.detach()).double().square().sum()
        energy = 1 - float(error / weight.double().square().sum().clamp(min=1e-300))
    return LayerReport(
        plan.name, plan.form, plan.rank, shape.break_even(plan.form, extra), (shape.parameters, costs[0]),
        (shape.macs, costs[1]), energy, plan.reason,
    )  # fmt: skip
