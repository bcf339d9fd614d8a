"""Ranks by measured sensitivity: one evaluation for each layer and candidate rank.

    points = measured_points(model, layers, evaluate, ranks_each=4)
    chosen = ranks_for_budget(points, "macs", budget)

Knows nothing about what is evaluated.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

from torch import nn

from distiller.errors import UsageError
from distiller.factorization.forms import LayerShape, Rank, candidate_ranks, plain_rank
from distiller.factorization.planning import check_budgets, example_input, layer_shapes, ranks_within
from distiller.factorization.ranks import Cost, RankPoint
from distiller.factorization.recipe import FactoredLayer, FactorizationRecipe
from distiller.factorization.replacement import apply_factorization, copied
from distiller.factorization.settings import LayerSettings, layers_of
from distiller.macs import count_macs

__all__ = ["measured_points", "ranks_by_sensitivity"]


def measured_points(
    model: nn.Module,
    layers: Mapping[str, Mapping[str, Any]],
    evaluate: Callable[[nn.Module], float],
    dummy_input: Any = None,
    ranks_each: int = 4,
) -> dict[str, list[RankPoint]]:
    """What the model loses when one of its layers has a lower rank, the others being whole.

    Candidates are spread evenly over the ranks at which a layer is smaller than whole. A loss below that of
    the whole model counts as none.

    Args:
        model: the model, or a wrapper around it; stays as it is.
        layers: settings by name or pattern; of these the form alone is looked at.
        evaluate: of a model, a loss: lower is better.
        dummy_input: as in `factorize`.
        ranks_each: candidates of each layer, at least 1.

    Returns:
        By layer, its points, the whole layer last.

    Raises:
        DistillerError: as `factorize`.
    """
    if ranks_each < 1:
        raise UsageError(f"sensitivity: ranks_each: must be 1 or more, got {ranks_each}")
    inputs = example_input(model, dummy_input)
    settings = layers_of(model, layers)
    shapes = layer_shapes(model, list(settings), inputs)
    whole = evaluate(model)
    points: dict[str, list[RankPoint]] = {}
    for name, own in settings.items():
        shape = shapes[name]
        points[name] = [
            RankPoint(
                rank,
                shape.factored_parameters(own.form, rank),
                shape.factored_macs(own.form, rank),
                max(0.0, evaluate(_factored(model, name, own, shape, rank)) - whole),
            )
            for rank in _spread(shape, own, ranks_each)
        ]
        points[name].append(RankPoint(None, shape.parameters, shape.macs, 0.0))
    return points


def ranks_by_sensitivity(
    model: nn.Module,
    layers: Mapping[str, Mapping[str, Any]],
    evaluate: Callable[[nn.Module], float],
    *,
    parameters: float | None = None,
    macs: float | None = None,
    dummy_input: Any = None,
    ranks_each: int = 4,
) -> dict[str, dict[str, Any]]:
    """Settings for `factorize` with which the whole model keeps to a budget, and loses least as measured.

    Args:
        model: the model, or a wrapper around it; stays as it is.
        layers: settings by name or pattern; of these the form alone is looked at.
        evaluate: of a model, a loss: lower is better.
        parameters: the fraction of the whole model's parameters that it is to have.
        macs: the same of its MACs; one of both is wanted.
        dummy_input: as in `factorize`.
        ranks_each: candidates of each layer, at least 1.

    Returns:
        Form and rank by name of a layer; those that stay whole are left out.

    Raises:
        DistillerError: as `factorize`, or the budget cannot be met.
    """
    if (parameters is None) == (macs is None):
        raise UsageError("sensitivity: a budget is wanted: give one of 'parameters' and 'macs'")
    check_budgets(parameters, macs)
    inputs = example_input(model, dummy_input)
    points = measured_points(model, layers, evaluate, inputs, ranks_each)
    cost: Cost = "parameters" if parameters is not None else "macs"
    total = (
        sum(param.numel() for param in model.parameters())
        if cost == "parameters"
        else sum(layer.macs for layer in count_macs(model, inputs))
    )
    fraction = parameters if parameters is not None else macs
    assert fraction is not None
    others = total - sum(getattr(own[-1], cost) for own in points.values())
    chosen = ranks_within(points, cost, fraction, total, others)
    forms = {name: own.form for name, own in layers_of(model, layers).items()}
    return {
        name: {"form": forms[name], "rank": plain_rank(point.rank)}
        for name, point in chosen.items()
        if point.rank is not None
    }


def _spread(shape: LayerShape, own: LayerSettings, count: int) -> list[Rank]:
    fitting = [rank for rank in candidate_ranks(shape, own.form) if shape.shrinks(own.form, rank)]
    chosen = {round((index + 1) * len(fitting) / count) - 1 for index in range(count)} if fitting else set()
    return [fitting[max(0, index)] for index in sorted(chosen)]


def _factored(model: nn.Module, name: str, own: LayerSettings, shape: LayerShape, rank: Rank) -> nn.Module:
    trial = copied(model, "sensitivity")
    layer = FactoredLayer(name, own.form, rank, shape.weight)
    apply_factorization(trial, FactorizationRecipe((layer,)))
    return trial
