"""What steps of quantization after training did, in lines of text.

Knows nothing about how they do it.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any

from distiller.quantization.refinement.equalization import EqualizationReport
from distiller.quantization.search.mixed_precision import PrecisionPoint
from distiller.quantization.search.search_log import SearchProgress

_UNITS = {"weight_bytes": "bytes of weights", "bit_operations": "bit operations"}
_METRICS = {"loss": "change of the loss", "kl": "divergence of the outputs"}


def equalization_told(
    report: EqualizationReport, replaces_relu6: bool = False, absorbs: bool = False
) -> Iterator[str]:
    """How many pairs were equalized; what became of ReLU6s and high biases, where that was asked for.

    Args:
        report: on the equalization.
        replaces_relu6: whether ReLU6s were to be replaced.
        absorbs: whether high biases were to be absorbed.
    """
    yield f"equalized {len(report.pairs)} pairs of layers"
    if replaces_relu6:
        yield f"replaced {len(report.replaced_relu6s)} ReLU6s by ReLUs{_listed(report.replaced_relu6s)}"
    if absorbs:
        first = [pair.first for pair in report.pairs if pair.absorbed is not None]
        yield f"absorbed high biases of {len(first)} layers{_listed(first)}"
        for name, reason in report.not_absorbed.items():
            yield f"not of {name}: {reason}"


def progress_told(search: str, progress: SearchProgress) -> str:
    """A point of a search for the least loss."""
    return f"{search} {_count(progress)}: loss {progress.value:.5g}, best {progress.best:.5g}"


def width_told(progress: SearchProgress, metric: str) -> str:
    """A point of the search of widths: what was quantized, and what that does to the model.

    Args:
        progress: of the search.
        metric: of `mixed_precision_search`.
    """
    point, head = progress.point, f"mixed precision {_count(progress)}"
    if "layer" in point:
        [(what, width)] = [(key, value) for key, value in point.items() if key != "layer"]
        measured = f"{point['layer']} alone, {what} of {width} bits"
    elif "widths" in point:
        measured = "all layers at the widths that were chosen"
    else:
        return f"{head}: in floating point, loss {progress.value:.5g}"
    sign = "+" if metric == "loss" else ""
    return f"{head}: {measured}, {_METRICS[metric]} {progress.value:{sign}.5g}"


def widths_told(point: PrecisionPoint, budget: str, metric: str) -> Iterator[str]:
    """The widths that were chosen, and what they cost and do.

    Args:
        point: within the budget.
        budget: what is limited.
        metric: of the search.
    """
    for what, widths in (("weights", point.weights), ("activations", point.activations)):
        if widths:
            yield f"widths of {what}: {_grouped({k: f'{bits} bits' for k, bits in widths.items()})}"
    sign = "+" if metric == "loss" else ""
    yield (
        f"{point.cost} {_UNITS[budget]} of {point.budget:.10g}; {_METRICS[metric]}: "
        f"{point.measured:{sign}.5g}, by the sum over layers {point.predicted:{sign}.5g}"
    )


def clip_modes_told(overrides: Mapping[str, Mapping[str, Any]]) -> str:
    """The clip modes that were chosen.

    Args:
        overrides: of `ptq_greedy_search`.
    """
    modes = {name: str(given["clip_acts"]) for name, given in overrides.items() if "clip_acts" in given}
    return f"clip modes: {_grouped(modes)}"


def _count(progress: SearchProgress) -> str:
    whole = "" if progress.left is None else f"/{progress.done + progress.left}"
    return f"[{progress.done}{whole}]"


def _grouped(chosen: Mapping[str, str]) -> str:
    """`4 bits: conv1, conv2; 8 bits: fc`."""
    groups: dict[str, list[str]] = {}
    for name, value in chosen.items():
        groups.setdefault(value, []).append(name)
    return "; ".join(f"{value}: {', '.join(groups[value])}" for value in sorted(groups)) or "none"


def _listed(names: Any) -> str:
    return f": {', '.join(names)}" if names else ""
