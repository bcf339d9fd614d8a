"""A budget of widths in the unit that was given, and whether it can be reached: before data are looked at.

Knows nothing about sensitivities.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch

from distiller.dummy_input import forward_arguments
from distiller.errors import QuantizationError
from distiller.quantization.post_train import PostTrainLinearQuantizer
from distiller.quantization.search.copies import prepared_copy, with_statistics
from distiller.quantization.search.grids import quantized_layers
from distiller.quantization.search.layer_widths import (
    Budget,
    bytes_at,
    cost_of,
    parts_of,
    quantized_weights,
)
from distiller.quantization.search.search_log import SearchLog

WEIGHT_WIDTHS = (2, 3, 4, 6, 8)
"""To choose from, where nothing else is asked for."""
_UNITS = {"weight_bytes": "bytes", "bit_operations": "bit operations"}


def reachable_budget(
    quantizer: PostTrainLinearQuantizer,
    dummy_input: Any,
    unit: str,
    value: float,
    weight_widths: Sequence[int] = WEIGHT_WIDTHS,
    activation_widths: Sequence[int] = (),
) -> tuple[Budget, float]:
    """What `mixed_precision_search` is to limit, and to what.

    Args:
        quantizer: not prepared, not changed; needs no statistics.
        dummy_input: as of the search.
        unit: "average_bits", of the weights that are quantized; "weight_bytes"; or "bit_operations".
        value: the budget in that unit.
        weight_widths: as of the search.
        activation_widths: alike.

    Raises:
        QuantizationError: no widths keep within it; begins with the unit, and names the smallest budget.
        DistillerError: as the quantizer's `prepare_model`.
    """
    # What is fixed, and so what costs, is known with any statistics: those of the dummy input.
    prepared = prepared_copy(with_statistics(quantizer, _running(dummy_input), _no_log()), dummy_input)
    layers = quantized_layers(prepared.model, dummy_input)
    parts = parts_of(prepared, layers, weight_widths, activation_widths)
    is_average = unit == "average_bits"
    budget: Budget = "bit_operations" if unit == "bit_operations" else "weight_bytes"
    cost = cost_of(prepared.model, layers, parts, budget, dummy_input)
    limit = bytes_at(prepared.model, layers, value) if is_average else value
    smallest = cost.of({part: min(widths) for part, widths in parts.free.items()})
    if smallest <= limit:
        return budget, limit
    if is_average:
        elements = sum(weight.numel() for weight in quantized_weights(layers).values())
        pinned = bytes_at(prepared.model, layers, 0)
        least = f"are {8 * (smallest - pinned) / elements:.4g} on average"
    else:
        least = f"cost {smallest} {_UNITS[budget]}"
    raise QuantizationError(
        f"{unit}: {value:g} cannot be reached, the smallest widths {least}; give at least that, or smaller "
        "widths to choose from (weight_widths, activation_widths)"
    )


def _running(dummy_input: Any) -> Any:
    def run(model: Any) -> None:
        with torch.no_grad():
            model(*forward_arguments(model, dummy_input))

    return run


def _no_log() -> SearchLog:
    return SearchLog(None, "widths", {})
