"""8-bit grids for the tensors that training with quantization left without, over ranges that batches show.

Knows nothing about file formats.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn

from distiller.export.integer_view import MAX_BITS, IntegerView, is_tensor_quantizer
from distiller.export.missing_grids import MissingGrid, missing_grids
from distiller.names import named_modules
from distiller.observation import watch_inputs, watch_output
from distiller.quantization.affine import LinearQuantMode
from distiller.quantization.refinement.capture import Batches, each_batch, run
from distiller.quantization.training.attachments import (
    INPUT_QUANTIZER,
    attach_input_quantizer,
    attach_output_quantizer,
)
from distiller.quantization.training.deploy import GridQuantizer
from distiller.quantization.training.fake_quant import Grid, linear_grid

_STEPS = 2**MAX_BITS - 1


def add_missing_grids(
    view: IntegerView, batches: Batches, dummy_input: Any, quantize_activations: bool = False
) -> tuple[str, ...]:
    """Put what `missing_grids` finds on grids, in the view's model: `GridQuantizer`s behind its modules.

    Args:
        view: of a trained model; its model is changed.
        batches: inputs of the model, of the kind that it is used on.
        dummy_input: an input, or a tuple of them.
        quantize_activations: also where the model has no grids of activations at all (weights only).

    Returns:
        Names of the tensors that have a grid now: of the modules that make them, or `<module>.input`.

    Raises:
        UsageError: `batches` has not the form it must have.
        GraphTraceError: the model cannot be traced.
    """
    model = view.model
    if not quantize_activations and not any(is_tensor_quantizer(module) for module in model.modules()):
        return ()
    modules = dict(named_modules(model))
    places = missing_grids(view, dummy_input)
    if not places:
        return ()
    for place, (lo, hi) in zip(places, _ranges(model, modules, places, batches), strict=True):
        module = modules[place.module]
        grid = _finer([getattr(modules[name], INPUT_QUANTIZER) for name in place.readers], lo, hi)
        quantizer = GridQuantizer(grid or asymmetric_grid(lo, hi)).eval()
        attach = attach_output_quantizer if place.is_output else attach_input_quantizer
        attach(module, quantizer)
    return tuple(place.module if place.is_output else f"{place.module}.input" for place in places)


def asymmetric_grid(lo: Tensor, hi: Tensor) -> Grid:
    """The grid of 0..255 over a range and 0."""
    scale, zero_point = linear_grid(lo, hi, MAX_BITS, LinearQuantMode.ASYMMETRIC_UNSIGNED)
    assert zero_point is not None
    return Grid(scale, zero_point.to(torch.int32), 0, _STEPS)


def finer_grid(scale: Tensor, lo: Tensor, hi: Tensor) -> Grid | None:
    """A grid of 0..255 over a range and 0 with `scale` / k, k odd and as large as possible; None if the range
    is too wide for k = 1.

    Between any two neighbours of the coarser grid there is then the same number of its steps, and none lies
    halfway: rounding to it first changes nothing of rounding to the coarser one.
    """
    lo, hi = lo.clamp(max=0), hi.clamp(min=0)
    most = torch.floor(_STEPS * scale / (hi - lo).clamp_min(torch.finfo(scale.dtype).tiny))
    count = int(most.clamp(max=_STEPS))
    count -= 1 - count % 2
    if count < 1:
        return None
    step = scale / count
    zero_point = torch.round(-lo / step).clamp(0, _STEPS)
    return Grid(step, zero_point.to(torch.int32), 0, _STEPS)


def _finer(quantizers: list[Any], lo: Tensor, hi: Tensor) -> Grid | None:
    """`finer_grid` of the one grid that all readers round to; None if they are several, or there is none."""
    scales = {float(quantizer.scale): quantizer.scale for quantizer in quantizers}
    return finer_grid(next(iter(scales.values())), lo, hi) if len(scales) == 1 else None


def _ranges(
    model: nn.Module, modules: dict[str, nn.Module], places: list[MissingGrid], batches: Batches
) -> list[tuple[Tensor, Tensor]]:
    """The smallest and the largest value at each place."""
    found: list[list[Tensor]] = [[] for _ in places]

    def seeing(seen: list[Tensor]) -> Callable[..., None]:
        def see(_module: nn.Module, inputs: Any, *output: Any) -> None:
            lo, hi = (output[0] if output else inputs[0]).detach().aminmax()
            seen[:] = [lo, hi] if not seen else [torch.minimum(seen[0], lo), torch.maximum(seen[1], hi)]

        return see

    handles = [
        (watch_output if place.is_output else watch_inputs)(modules[place.module], seeing(seen))
        for place, seen in zip(places, found, strict=True)
    ]
    try:
        with torch.no_grad():
            for arguments in each_batch(batches):
                run(model, arguments)
    finally:
        for handle in handles:
            handle.remove()
    return [(seen[0].float().cpu(), seen[1].float().cpu()) for seen in found]
