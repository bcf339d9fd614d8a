"""The plain sweep: one full evaluation for every point, by whatever function evaluates.

    for each unit:
        for each level:
            the model becomes the variant of the level
            point <- test_func(model)
            the model is dense again

Each point is measured on a model compressed from the dense weights, and the model is dense again, bit for
bit, whenever a point is handed out. `sensitivity_sweep` gives the same points much faster where it is given
the images themselves.
Knows nothing about files, data or how the score comes about.
"""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Iterable
from typing import Protocol

from torch import nn

from distiller.evaluation_mode import buffers_kept, evaluating
from distiller.replay import applied
from distiller.sensitivity.axes import AxisContext, find_axis
from distiller.sensitivity.curves import Curves, Score, clean_level


class TestFunction(Protocol):
    """Evaluates the model that it is given, always on the same images in the same order."""

    __test__ = False  # not a class of tests, whatever pytest makes of its name

    def __call__(self, *, model: nn.Module) -> tuple[float, float, float]:
        """(top-1 in percent, top-5 in percent, mean loss)."""
        ...


def perform_sensitivity_analysis(
    model: nn.Module,
    net_params: Iterable[str],
    sparsities: Iterable[float],
    test_func: TestFunction,
    group: str,
    context: AxisContext | None = None,
) -> Curves:
    """How the model scores when one parameter at a time is compressed to each level.

    Args:
        model: the model; it comes back unchanged.
        net_params: names or patterns of parameters, with or without wrapper parts. Those that
            `group` does not apply to (biases, say) are passed over.
        sparsities: levels, in any order: fractions 0..1, bits for the axes of width. The dense one is
            evaluated once.
        test_func: called as `test_func(model=model)`; returns (top1, top5, loss).
        group: the axis: `element`, `filter`, `channel`, or another one of `AXES`.
        context: what some axes have to know besides.

    Returns:
        `{parameter: {level: (top1, top5, loss)}}`, in the order asked for.

    Raises:
        UnknownNameError: a name that matches nothing, or an unknown axis.
        UsageError: the axis applies to none of the parameters, or does not have a level.
        DistillerError: a parameter that holds NaN.
    """
    axis = find_axis(group)
    levels = tuple(dict.fromkeys(clean_level(level) for level in sparsities))
    units = axis.units(model, net_params, levels, context or AxisContext())
    dense = _evaluate(model, test_func) if axis.dense_level in levels else None
    curves: Curves = OrderedDict()
    for unit in units:
        curve = curves.setdefault(unit.parameter, OrderedDict())
        for level in levels:
            if level == axis.dense_level:
                assert dense is not None
                curve[level] = dense
                continue
            with applied(model, unit.make(level)):
                curve[level] = _evaluate(model, test_func)
    return curves


def _evaluate(model: nn.Module, test_func: TestFunction) -> Score:
    with evaluating(model), buffers_kept(model):
        top1, top5, loss = test_func(model=model)
    return Score(float(top1), float(top5), float(loss))
