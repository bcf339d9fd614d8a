"""Pictures of soft weight sharing: weights against what they were, their histogram, and how the mixture went.

    joint       each weight before (x) and now (y), densities at both sides, bands of two standard deviations
    histogram   of all weights, linear and logarithmic, with the components; and one for each parameter
    evolution   means, standard deviations, shares, accuracy and sparsity, by epoch
    animation   the joint plot of every epoch, as a GIF

Knows nothing about how mixtures are learned, nor of pyplot's global state.
"""

from __future__ import annotations

import io
import math
import tempfile
from collections.abc import Mapping, Sequence
from pathlib import Path

import numpy as np
from matplotlib import colormaps
from matplotlib.animation import PillowWriter
from matplotlib.axes import Axes
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure
from torch import Tensor

from distiller.atomic_file import write_whole
from distiller.errors import UsageError
from distiller.weight_sharing.history import EpochOfSharing
from distiller.weight_sharing.mixture import Mixture

__all__ = [
    "draw_joint",
    "evolution_figure",
    "histogram_figure",
    "joint_figure",
    "layers_figure",
    "save_animation",
    "save_figure",
]

_BINS = 200
_LEAST_STD = 1e-4
_FRAMES_PER_SECOND = 5


def joint_figure(before: Mapping[str, Tensor], now: EpochOfSharing, group: str) -> Figure:
    """The joint plot of an epoch.

    Args:
        before: the sample of the weights before the first epoch, by parameter.
        now: an epoch.
        group: whose mixture is drawn: a key of `now.mixtures`. Of a parameter's own, its weights alone.

    Raises:
        UsageError: no weights were kept.
    """
    figure = _figure((8.0, 8.0))
    draw_joint(figure, before, now, group)
    return figure


def draw_joint(
    figure: Figure,
    before: Mapping[str, Tensor],
    now: EpochOfSharing,
    group: str,
    limits: tuple[float, float] | None = None,
) -> None:
    """Draw `joint_figure` into a figure, which is cleared.

    Args:
        limits: of both axes; None: of the weights that are drawn.
    """
    x, y = _values(before, group), _values(now.weights, group)
    low, high = limits or _limits(x, y)
    figure.clear()
    grid = figure.add_gridspec(2, 2, width_ratios=(4, 1), height_ratios=(1, 4), wspace=0.04, hspace=0.04)
    joint = figure.add_subplot(grid[1, 0])
    above, beside = figure.add_subplot(grid[0, 0]), figure.add_subplot(grid[1, 1])
    mixture = now.mixtures[group]
    for mean, std, colour in _components(mixture):
        joint.axhspan(mean - 2 * std, mean + 2 * std, color=colour, alpha=0.12, lw=0)
        joint.axhline(mean, color=colour, lw=0.6)
    joint.scatter(x, y, s=3, alpha=0.35, color="black", linewidths=0)
    joint.set(xlim=(low, high), ylim=(low, high), xlabel="Weight before", ylabel="Weight now")
    edges = np.linspace(low, high, 5 * _BINS + 1)
    above.hist(x, bins=edges.tolist(), color="0.4", histtype="stepfilled")
    beside.hist(
        y, bins=edges.tolist(), color="0.4", histtype="stepfilled", orientation="horizontal", log=True
    )
    above.set(xlim=(low, high), xticks=[], yticks=[])
    beside.set(ylim=(low, high), yticks=[])
    figure.suptitle(_title(now), fontsize="medium", y=0.94)


def histogram_figure(now: EpochOfSharing, group: str) -> Figure:
    """The density of the weights of an epoch, on a linear and on a logarithmic axis, with the components.

    Arguments as of `joint_figure`.
    """
    figure = _figure((11.0, 4.5), constrained=True)
    values, mixture = _values(now.weights, group), now.mixtures[group]
    for axes, is_log in zip(figure.subplots(1, 2), (False, True), strict=True):
        _draw_histogram(axes, values, mixture, is_log)
        axes.set(xlabel="Weight", ylabel="Density")
    figure.suptitle(_title(now), fontsize="medium")
    return figure


def layers_figure(now: EpochOfSharing) -> Figure:
    """The density of the weights of each parameter, on a logarithmic axis, with its components.

    Raises:
        UsageError: no weights were kept.
    """
    names = [name for name, values in now.weights.items() if values.numel()]
    if not names:
        raise UsageError(_NOTHING)
    columns = min(3, len(names))
    rows = math.ceil(len(names) / columns)
    figure = _figure((4.6 * columns, 3.4 * rows + 0.4), constrained=True)
    grid = figure.subplots(rows, columns, squeeze=False).ravel()
    for axes, name in zip(grid, names, strict=False):
        mixture = now.mixtures.get(name) or next(iter(now.mixtures.values()))
        _draw_histogram(axes, now.weights[name].numpy(), mixture, is_log=True)
        axes.set_title(name, fontsize="small")
    for axes in grid[len(names) :]:
        axes.set_axis_off()
    figure.suptitle(_title(now), fontsize="medium")
    return figure


def evolution_figure(epochs: Sequence[EpochOfSharing], group: str) -> Figure:
    """Means, standard deviations and shares of the components, accuracy and sparsity, by epoch.

    Args:
        epochs: at least one.
        group: a key of their mixtures.
    """
    figure = _figure((11.0, 7.5), constrained=True)
    means, stds, shares, figures = figure.subplots(2, 2, sharex=True).ravel()
    x = [entry.epoch for entry in epochs]
    mixtures = [entry.mixtures[group] for entry in epochs]
    for index, colour in enumerate(_colours(len(mixtures[0]))):
        style = {"color": colour, "lw": 2.0 if index == 0 else 1.0, "marker": "." if len(x) == 1 else ""}
        means.plot(x, [float(mixture.means[index]) for mixture in mixtures], **style)
        stds.plot(x, [float(mixture.stds[index]) for mixture in mixtures], **style)
        shares.plot(x, [float(mixture.mixing[index]) for mixture in mixtures], **style)
    means.set_title("Means (black: zero)", fontsize="small")
    stds.set_title("Standard deviations", fontsize="small")
    shares.set_title("Mixing weights", fontsize="small")
    stds.set_yscale("log")
    shares.set_yscale("log")
    marker = "." if len(x) == 1 else ""
    for key, label, factor, colour in (
        ("top1", "Top-1 of validation (%)", 1.0, "tab:blue"),
        ("sparsity", "Sparsity by the nearest mean (%)", 100.0, "tab:red"),
    ):
        known = [(entry.epoch, factor * entry.figures[key]) for entry in epochs if key in entry.figures]
        if known:
            figures.plot(*zip(*known, strict=True), label=label, color=colour, marker=marker)
    figures.legend(fontsize="small")
    for axes in (shares, figures):
        axes.set_xlabel("Epoch")
    return figure


def save_figure(figure: Figure, path: str | Path, dpi: int = 110) -> Path:
    """Write a figure as PNG, whole or not at all."""
    buffer = io.BytesIO()
    figure.savefig(buffer, format="png", dpi=dpi)
    write_whole(path, buffer.getvalue())
    return Path(path)


def save_animation(
    path: str | Path,
    before: Mapping[str, Tensor],
    epochs: Sequence[EpochOfSharing],
    group: str,
    dpi: int = 60,
) -> Path:
    """Write the joint plots of all epochs as a GIF, whole or not at all.

    Args:
        path: where.
        before: as of `joint_figure`.
        epochs: at least one.
        group: as of `joint_figure`.
        dpi: pixels per inch; a frame is 8 by 8 inches.

    Raises:
        UsageError: no weights were kept.
    """
    figure = _figure((8.0, 8.0))
    every = [_values(before, group), *(_values(entry.weights, group) for entry in epochs)]
    limits = _limits(*every)
    writer = PillowWriter(fps=_FRAMES_PER_SECOND)
    with tempfile.TemporaryDirectory() as folder:
        target = Path(folder) / "frames.gif"
        with writer.saving(figure, str(target), dpi):
            for entry in epochs:
                draw_joint(figure, before, entry, group, limits)
                writer.grab_frame()
        write_whole(path, target.read_bytes())
    return Path(path)


_NOTHING = "mixture plots: no weights were kept; give SoftWeightSharing a 'history' above 0 next time"


def _figure(size: tuple[float, float], constrained: bool = False) -> Figure:
    figure = Figure(figsize=size, layout="constrained" if constrained else None)
    FigureCanvasAgg(figure)
    return figure


def _values(weights: Mapping[str, Tensor], group: str) -> np.ndarray:
    """The weights of a group: of one parameter, or of all."""
    chosen = [weights[group]] if group in weights else list(weights.values())
    values = np.concatenate([tensor.numpy() for tensor in chosen]) if chosen else np.zeros(0)
    if not values.size:
        raise UsageError(_NOTHING)
    return values


def _limits(*values: np.ndarray) -> tuple[float, float]:
    low = min(float(array.min()) for array in values)
    high = max(float(array.max()) for array in values)
    margin = 0.05 * (high - low) or 0.05
    return low - margin, high + margin


def _draw_histogram(axes: Axes, values: np.ndarray, mixture: Mixture, is_log: bool) -> None:
    low, high = _limits(values)
    for mean, std, colour in _components(mixture):
        axes.axvspan(mean - std, mean + std, color=colour, alpha=0.18, lw=0)
        axes.axvline(mean, color=colour, lw=0.8)
    edges = np.linspace(low, high, _BINS + 1).tolist()
    axes.hist(values, bins=edges, density=True, color="0.25", histtype="stepfilled", log=is_log)
    axes.set_xlim(low, high)


def _components(mixture: Mixture) -> list[tuple[float, float, object]]:
    means, stds = mixture.means.tolist(), mixture.stds.clamp(min=_LEAST_STD).tolist()
    return list(zip(means, stds, _colours(len(mixture)), strict=True))


def _colours(count: int) -> list[object]:
    """Black for zero, then along a colour map."""
    return ["black", *colormaps["turbo"](np.linspace(0.05, 0.95, max(count - 1, 1)))][:count]


def _title(now: EpochOfSharing) -> str:
    shown = {"top1": "top-1 of validation {:.2f} %", "sparsity": "sparsity by the nearest mean {:.2%}"}
    told = [form.format(now.figures[key]) for key, form in shown.items() if key in now.figures]
    return ", ".join([f"Epoch {now.epoch}", *told])
