"""Second moments of what layers read, collected while a model runs: what whitened factorization asks for.

Knows nothing about factors.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from distiller.errors import CheckpointError
from distiller.names import named_modules

__all__ = ["InputMoments", "input_moments"]


def input_moments(layer: nn.Module, x: Tensor) -> Tensor:
    """X^T X of the vectors, or of the patches, that a layer multiplies with its weight; float32.

    Args:
        layer: linear, Conv1d or Conv2d without groups.
        x: its input.

    Returns:
        (n, n), n being the elements of a row of the flattened weight.
    """
    if isinstance(layer, nn.Linear):
        rows = x.detach().flatten(0, -2)
    else:
        rows = _patches(layer, x.detach())
    rows = rows.float()
    return rows.T @ rows


class InputMoments:
    """Sums, over the mini-batches that are seen, of the second moments of layers' inputs.

    Args:
        names: canonical names of the layers.
    """

    def __init__(self, names: Iterable[str]) -> None:
        self.names = tuple(names)
        self.sums: dict[str, Tensor] = {}
        """By name of a layer that was seen, X^T X in float64 on the CPU."""
        self._handles: list[Any] = []

    def attach(self, model: nn.Module) -> None:
        """Begin to collect from a model's forward passes."""
        self.detach()
        modules = dict(named_modules(model))
        for name in self.names:
            self._handles.append(modules[name].register_forward_pre_hook(self._taking(name)))

    def detach(self) -> None:
        """End collecting, and leave nothing on the model."""
        for handle in self._handles:
            handle.remove()
        self._handles = []

    def state_dict(self) -> dict[str, Tensor]:
        """The sums by name of a layer."""
        return dict(self.sums)

    def load_state_dict(self, state: Mapping[str, Tensor]) -> None:
        """Go on with the sums in `state`.

        Raises:
            CheckpointError: they are of other layers.
        """
        unknown = [name for name in state if name not in self.names]
        if unknown:
            raise CheckpointError(
                f"the checkpoint has moments of the inputs of '{unknown[0]}', which is not to be whitened "
                "here; resume with the same schedule"
            )
        self.sums = {name: value.to("cpu", torch.float64) for name, value in state.items()}

    def _taking(self, name: str) -> Any:
        def take(module: nn.Module, inputs: tuple[Any, ...]) -> None:
            own = input_moments(module, inputs[0]).to("cpu", torch.float64)
            self.sums[name] = self.sums[name] + own if name in self.sums else own

        return take


def _patches(layer: Any, x: Tensor) -> Tensor:
    """What the filters of a convolution are laid over: (positions, channels * kernel elements)."""
    dims = layer.weight.dim() - 2
    if x.dim() == dims + 1:
        x = x.unsqueeze(0)
    padding = layer._reversed_padding_repeated_twice
    if isinstance(layer.padding, str) or layer.padding_mode != "zeros" or any(layer.padding):
        x = F.pad(x, padding, mode="constant" if layer.padding_mode == "zeros" else layer.padding_mode)
    kernel, stride, dilation = layer.kernel_size, layer.stride, layer.dilation
    if dims == 1:
        x, kernel, stride, dilation = x.unsqueeze(2), (1, *kernel), (1, *stride), (1, *dilation)
    columns = F.unfold(x, kernel, dilation=dilation, stride=stride)
    return columns.transpose(1, 2).flatten(0, 1)
