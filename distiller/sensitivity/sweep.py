"""A sweep into a folder, which a killed run resumes: the engine and the log put together.

Knows nothing about data; `test_func` does.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from pathlib import Path

from torch import nn

from distiller.sensitivity.axes import find_axis
from distiller.sensitivity.curves import Curves, SensitivityPoint, clean_level
from distiller.sensitivity.engine import TestFunction, applicable_parameters, sensitivity_points
from distiller.sensitivity.log import SensitivityLog, SweepSettings, weights_fingerprint


def sensitivity_sweep(
    model: nn.Module,
    axis_name: str,
    levels: Sequence[float],
    test_func: TestFunction,
    folder: str | Path,
    test_images: int | str,
    net_params: Iterable[str] = ("*",),
    on_point: Callable[[SensitivityPoint, int, int], None] | None = None,
) -> Curves:
    """Sweep into `folder/sensitivity.csv`, going on where an earlier run was killed.

    The dense point (level 0) is always measured, once, so that the curves have a reference.

    Args:
        model: the dense model; it comes back unchanged.
        axis_name: `element`, `filter` or `channel`.
        levels: as from `sparsity_levels`.
        test_func: called as `test_func(model=model)`; returns (top1, top5, loss), percents first.
        folder: where the CSV and its settings go; made when missing.
        test_images: the images that `test_func` looks at: how many, or a text that identifies them.
        net_params: names or patterns; those that the axis does not apply to are passed over.
        on_point: called after every point measured now, with the point, how many are finished
            (those of an earlier run included), and how many there are in all.

    Returns:
        `{parameter: {level: (top1, top5, loss)}}`, as `perform_sensitivity_analysis`.

    Raises:
        UnknownNameError: an unknown axis, or a name that matches nothing.
        UsageError: the axis applies to none of the parameters.
        SensitivityError: the folder holds another sweep, or cannot be written.
    """
    axis = find_axis(axis_name)
    settings = SweepSettings(
        axis=axis.name,
        levels=tuple(dict.fromkeys((0.0, *map(clean_level, levels)))),
        parameters=applicable_parameters(model, axis, net_params),
        weights=weights_fingerprint(model),
        test_images=test_images,
    )
    total = len(settings.parameters) * len(settings.levels)
    with SensitivityLog(folder, settings) as log:
        points = sensitivity_points(
            model, settings.parameters, settings.levels, test_func, axis, dict(log.finished)
        )
        for point in points:
            log.append(point)
            if on_point is not None:
                on_point(point, len(log.finished), total)
        return log.complete()
