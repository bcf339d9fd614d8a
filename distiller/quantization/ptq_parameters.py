"""Scales, zero points and clipping values as Distiller names them: read, and set.

In Distiller's convention the scale multiplies: q = round(scale * x - zero_point). A grid's clipping
values are the ends of the real range that it was laid over: `clipping`, the one absolute value of a
symmetric grid, or `clip_min` and `clip_max`.
Knows nothing about layers or models.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Protocol

import torch
from torch import Tensor

from distiller.errors import QuantizationError, UnknownNameError, did_you_mean
from distiller.quantization import affine
from distiller.quantization.activation_quant import QuantSettings


class AdjustableGrid(Protocol):
    """A fixed grid that can be replaced: that of an output (`ActivationQuantizer`) or of a weight."""

    @property
    def settings(self) -> QuantSettings:
        """Width, mode, clipping."""
        ...

    @property
    def scale(self) -> Tensor:
        """PyTorch's convention, scalar or one for each channel."""
        ...

    @property
    def zero_point(self) -> Tensor:
        """In the shape of `scale`."""
        ...

    @property
    def where(self) -> str:
        """Whose it is, for messages."""
        ...

    def set_grid(self, scale: Tensor, zero_point: Tensor | None = None) -> None:
        """Replace scale and zero point."""
        ...

    def set_range(self, lo: Tensor, hi: Tensor) -> None:
        """Lay the grid over another range."""
        ...


def scale_params(grid: AdjustableGrid, is_filtered: bool = False) -> dict[str, Tensor]:
    """`scale` and `zero_point` of a grid, in Distiller's convention.

    Args:
        grid: the grid.
        is_filtered: without the zero point, which a search over scales leaves alone.
    """
    scale, zero_point = affine.to_distiller(grid.scale, grid.zero_point)
    return {"scale": scale} if is_filtered else {"scale": scale, "zero_point": zero_point}


def clipping_params(grid: AdjustableGrid, is_filtered: bool = False) -> dict[str, Tensor]:
    """`clipping` of a symmetric grid, or `clip_min` and `clip_max`.

    Args:
        grid: the grid.
        is_filtered: without the lower end of a grid behind a ReLU, which is always 0.
    """
    settings = grid.settings
    lo, hi = settings.ends(grid.scale, grid.zero_point)
    if settings.quant_mode.is_symmetric:
        return {"clipping": hi}
    return {"clip_max": hi} if is_filtered and settings.clip_half_range else {"clip_min": lo, "clip_max": hi}


def set_params(grid: AdjustableGrid, changes: Mapping[str, float | Tensor]) -> None:
    """Replace some of the values of `scale_params` or of `clipping_params`; what is not named stays.

    Args:
        grid: the grid.
        changes: numbers, or tensors in the shape of the grid's scale, by name.

    Raises:
        UnknownNameError: the grid has no such value.
        QuantizationError: an impossible value, or scales and clipping values at once.
    """
    scales, ends = scale_params(grid), clipping_params(grid)
    for key in changes:
        if key not in scales and key not in ends:
            hint = did_you_mean(key, [*scales, *ends]) or f"; there are {', '.join([*scales, *ends])}"
            raise UnknownNameError(f"{grid.where}: no value '{key}' that could be set{hint}", key)
    new = {key: _shaped(value, grid, key) for key, value in changes.items()}
    if scales.keys() & new.keys() and ends.keys() & new.keys():
        raise QuantizationError(f"{grid.where}: {', '.join(new)}: give scales or clipping values, not both")
    if scales.keys() & new.keys():
        if not bool((new.get("scale", grid.scale) > 0).all()):
            raise QuantizationError(f"{grid.where}: scale: must be a number > 0, got {changes['scale']}")
        scale = 1 / new["scale"] if "scale" in new else grid.scale
        grid.set_grid(scale, -new["zero_point"] if "zero_point" in new else grid.zero_point)
    elif "clipping" in new:
        if not bool((new["clipping"] > 0).all()):
            raise QuantizationError(
                f"{grid.where}: clipping: must be a number > 0, got {changes['clipping']}"
            )
        grid.set_range(-new["clipping"], new["clipping"])
    elif new:
        lo, hi = new.get("clip_min", ends["clip_min"]), new.get("clip_max", ends["clip_max"])
        if not bool((lo < hi).all()) or not bool((lo <= 0).all()) or not bool((hi >= 0).all()):
            raise QuantizationError(
                f"{grid.where}: clip_min, clip_max: must be a range that contains 0, got {lo.tolist()} "
                f"and {hi.tolist()}"
            )
        if grid.settings.clip_half_range and bool((lo != 0).any()):
            raise QuantizationError(f"{grid.where}: clip_min: is 0 behind a ReLU, got {lo.tolist()}")
        grid.set_range(lo, hi)


def _shaped(value: float | Tensor, grid: AdjustableGrid, key: str) -> Tensor:
    """The value as a tensor of the shape, type and device of the grid's scale."""
    tensor = torch.as_tensor(value, dtype=grid.scale.dtype, device=grid.scale.device).detach()
    if not bool(torch.isfinite(tensor).all()):
        raise QuantizationError(f"{grid.where}: {key}: must be finite, got {tensor.tolist()}")
    if tensor.numel() == 1:
        return tensor.reshape(()).expand_as(grid.scale).clone()
    if tensor.shape != grid.scale.shape:
        raise QuantizationError(
            f"{grid.where}: {key}: must be a number or of shape {tuple(grid.scale.shape)}, "
            f"got shape {tuple(tensor.shape)}"
        )
    return tensor.clone()
