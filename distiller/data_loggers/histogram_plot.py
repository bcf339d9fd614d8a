"""A histogram as a picture.

Knows nothing about what was counted, and nothing of pyplot's global state.
"""

from __future__ import annotations

import io

import matplotlib
import numpy as np
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure
from torch import Tensor

from distiller.errors import UsageError

_KINDS = (".svg", ".png", ".pdf")


def check_picture_kind(suffix: str) -> None:
    """See to it that pictures of a kind can be made.

    Raises:
        UsageError: naming the kinds that there are.
    """
    if suffix not in _KINDS:
        raise UsageError(f"hist_imgs_ext: one of {', '.join(_KINDS)} wanted, got {suffix!r}")


def histogram_figure(hist: Tensor, bin_centroids: Tensor, title: str) -> Figure:
    """The counts over the values, on a logarithmic axis, where a tail of few values can be seen.

    Args:
        hist: (nbins,): counts.
        bin_centroids: (nbins,): middles of bins of equal width.
        title: the title.
    """
    counts, middles = hist.numpy(), bin_centroids.numpy()
    width = middles[1] - middles[0] if len(middles) > 1 else 1.0
    figure = Figure(figsize=(8, 4.5), layout="constrained")
    FigureCanvasAgg(figure)
    axes = figure.subplots()
    axes.stairs(
        np.maximum(counts, 0.1),
        np.append(middles - width / 2, middles[-1] + width / 2),
        fill=True,
        baseline=0.1,
    )
    axes.set_yscale("log")
    axes.set_ylim(bottom=0.5)
    axes.set(title=title, xlabel="Value", ylabel=f"Count of {counts.sum():,}")
    return figure


def encoded(figure: Figure, suffix: str) -> bytes:
    """The bytes of a picture file; equal figures give equal bytes.

    Args:
        figure: the picture.
        suffix: .svg, .png or .pdf.
    """
    buffer = io.BytesIO()
    dates = {".svg": {"Date": None}, ".pdf": {"CreationDate": None}}
    with matplotlib.rc_context({"svg.hashsalt": "histogram"}):
        figure.savefig(buffer, format=suffix[1:], metadata=dates.get(suffix))
    return buffer.getvalue()
