"""The curve of accuracy against work as a table in a file and as a picture.

Knows nothing about how it came about, and nothing of pyplot's global state.
"""

from __future__ import annotations

import csv
import io
from collections.abc import Sequence
from pathlib import Path

from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure

from distiller.atomic_file import write_whole
from distiller.early_exit.calibration import Trade


def save_curve_csv(trades: Sequence[Trade], chosen: Trade, path: str | Path) -> Path:
    """Write one line for each rule, the chosen one last; returns the file, written whole or not at all."""
    exits = len(chosen.rule.thresholds)
    text = io.StringIO()
    table = csv.writer(text, lineterminator="\n")
    table.writerow(
        [
            "criterion",
            *(f"threshold_{index + 1}" for index in range(exits)),
            *(f"share_exit_{index + 1}" for index in range(exits)),
            "share_final",
            "top1_percent",
            "mean_macs",
            "is_chosen",
        ]
    )
    for trade, is_chosen in (*((trade, 0) for trade in trades), (chosen, 1)):
        thresholds = ["never" if t is None else f"{t:g}" for t in trade.rule.thresholds]
        shares = [f"{share:.6g}" for share in trade.shares]
        table.writerow(
            [
                trade.rule.criterion,
                *thresholds,
                *shares,
                f"{trade.top1:.6g}",
                f"{trade.mean_macs:.10g}",
                is_chosen,
            ]
        )
    path = Path(path)
    write_whole(path, text.getvalue())
    return path


def save_curve_png(trades: Sequence[Trade], chosen: Trade, whole_macs: float, path: str | Path) -> Path:
    """Draw accuracy against the share of the network's work that is done.

    Args:
        trades: the curve.
        chosen: the rule that was chosen; it has a mark.
        whole_macs: of an image that goes through, without branches.
        path: the picture, a PNG; written whole or not at all.

    Returns:
        `path`.
    """
    figure = Figure(figsize=(7, 4.5), layout="constrained")
    axes = figure.add_subplot()
    work = [100 * trade.mean_macs / whole_macs for trade in trades]
    axes.plot(work, [trade.top1 for trade in trades], "o-", markersize=3, label="one threshold for all exits")
    axes.axvline(100, color="0.7", linewidth=1, linestyle="--", label="the network without exits")
    axes.plot(
        [100 * chosen.mean_macs / whole_macs],
        [chosen.top1],
        "*",
        markersize=14,
        color="black",
        label="chosen",
    )
    axes.set_xlabel("Mean multiply-accumulates for an image (% of the network's)")
    axes.set_ylabel("Top-1 accuracy (%)")
    axes.set_title(f"Early exit by {chosen.rule.criterion}, on validation images")
    axes.grid(color="0.9")
    axes.legend(loc="lower right")
    picture = io.BytesIO()
    FigureCanvasAgg(figure).print_png(picture)
    path = Path(path)
    write_whole(path, picture.getvalue())
    return path
