"""The plain sweep: one full evaluation for every parameter and level.

    for each parameter:
        for each level:
            parameter <- axis.compress(dense parameter, level)
            point <- test_func(model)
            parameter <- dense parameter

Each point is measured on a model compressed from the dense weights, and the model is
dense again, bit for bit, whenever a point is handed out.
Knows nothing about files, data or how the score comes about.
"""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Protocol

import torch
from torch import nn

from distiller.errors import DistillerError, UsageError
from distiller.evaluation_mode import buffers_kept, evaluating
from distiller.names import named_parameters, resolve_all
from distiller.sensitivity.axes import Axis, find_axis
from distiller.sensitivity.curves import Curves, Score, SensitivityPoint, clean_level


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
) -> Curves:
    """How the model scores when one parameter at a time is pruned to each sparsity.

    Args:
        model: the model; it comes back unchanged.
        net_params: names or patterns of parameters, with or without wrapper parts. Those that
            `group` does not apply to (biases, say) are passed over.
        sparsities: fractions 0..1, in any order.
        test_func: called as `test_func(model=model)`; returns (top1, top5, loss).
        group: `element`, `filter` or `channel`.

    Returns:
        `{parameter: {sparsity: (top1, top5, loss)}}`, in the order asked for.

    Raises:
        UnknownNameError: a name that matches nothing, or an unknown group.
        UsageError: `group` applies to none of the parameters, or a sparsity outside of 0..1.
        DistillerError: a parameter that holds NaN.
    """
    axis = find_axis(group)
    levels = tuple(dict.fromkeys(clean_level(sparsity) for sparsity in sparsities))
    for level in levels:
        if not 0 <= level <= 1:
            raise UsageError(f"sensitivity: a sparsity must lie in 0..1, got {level:g}")
    names = applicable_parameters(model, axis, net_params)
    curves: Curves = OrderedDict((name, OrderedDict()) for name in names)
    for point in sensitivity_points(model, names, levels, test_func, axis, {}):
        curves[point.parameter][point.level] = point.score
    return curves


def applicable_parameters(model: nn.Module, axis: Axis, names: Iterable[str]) -> tuple[str, ...]:
    """The canonical names, among those asked for, of the parameters that `axis` is meant for.

    Raises:
        UnknownNameError: a name that matches nothing.
        UsageError: the axis applies to none of them.
    """
    parameters = dict(named_parameters(model))
    requested = resolve_all(names, parameters)
    found = tuple(name for name in requested if axis.applies_to(name, parameters[name]))
    if not found:
        raise UsageError(
            f"sensitivity: axis '{axis.name}' takes {axis.takes}, "
            f"got {len(requested)} parameters without one; choose another axis or other parameters"
        )
    return found


def sensitivity_points(
    model: nn.Module,
    names: Sequence[str],
    levels: Sequence[float],
    test_func: TestFunction,
    axis: Axis,
    finished: Mapping[tuple[str, float], Score],
) -> Iterator[SensitivityPoint]:
    """Measure and hand out, one by one, every point that is not `finished`.

    The dense point (level 0) is measured once and handed out for every parameter.

    Args:
        model: the model; evaluation mode while a point is measured, dense at every point handed out.
        names: canonical names of parameters that `axis` applies to.
        levels: the levels, free of float noise (`clean_level`).
        test_func: called as `test_func(model=model)`; returns (top1, top5, loss).
        axis: what a level does to a parameter.
        finished: scores by (parameter, level) that are there already.
    """
    parameters = dict(named_parameters(model))
    dense = next((score for (_, level), score in finished.items() if level == 0), None)
    for name in names:
        for level in levels:
            if (name, level) in finished:
                continue
            if level == 0:
                if dense is None:
                    dense = _evaluate(model, test_func)
                score = dense
            else:
                with _compressed(name, parameters[name], axis, level):
                    score = _evaluate(model, test_func)
            yield SensitivityPoint(name, level, score)


@contextmanager
def _compressed(name: str, parameter: nn.Parameter, axis: Axis, level: float) -> Iterator[None]:
    """The parameter at `level` while the context is open; bit for bit as before afterwards."""
    dense = parameter.detach().clone()
    try:
        compressed = axis.compress(dense, level)
    except DistillerError as error:
        raise DistillerError(f"sensitivity of '{name}': {error}") from error
    try:
        with torch.no_grad():
            parameter.copy_(compressed)
        yield
    finally:
        with torch.no_grad():
            parameter.copy_(dense)


def _evaluate(model: nn.Module, test_func: TestFunction) -> Score:
    with evaluating(model), buffers_kept(model):
        top1, top5, loss = test_func(model=model)
    return Score(float(top1), float(top5), float(loss))
