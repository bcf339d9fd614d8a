"""What the channels of a layer do in training: observers on modules, and means summed up on the device.

Nothing here waits for a GPU: sums stay where the activations are, until a mean is asked for.
Knows nothing about pruning, or which module to look at.
"""

from __future__ import annotations

import weakref
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils.hooks import RemovableHandle

from distiller.names import unwrap
from distiller.observation import watch_inputs, watch_output
from distiller.tensor_cuts import Kept, cut

__all__ = ["ActivationSite", "RunningMean", "observe", "sums_per_channel", "zeros_per_channel"]


def zeros_per_channel(activations: Tensor, channel_dim: int) -> Tensor:
    """How many values of each channel are zero; shape (channels,), int64.

    Args:
        activations: any shape, channels along `channel_dim`.
        channel_dim: e.g. 1 for (images, channels, height, width).
    """
    return (activations == 0).sum(_all_but(channel_dim, activations))


def sums_per_channel(activations: Tensor, channel_dim: int) -> Tensor:
    """The sum of the values of each channel; shape (channels,), float64. Arguments of `zeros_per_channel`."""
    return activations.sum(_all_but(channel_dim, activations), dtype=torch.float64)


class RunningMean:
    """The mean of all values so far, from their sums; one sum for each device that values come from."""

    def __init__(self) -> None:
        self._sums: dict[str, tuple[Tensor, int]] = {}

    def add(self, total: Tensor, count: int) -> None:
        """Take in the sum, element by element, of `count` more values; all sums have one shape and type."""
        device = str(total.device)
        if device in self._sums:
            before, number = self._sums[device]
            total, count = before.to(total.device) + total, number + count
        self._sums[device] = total, count

    def mean(self) -> Tensor:
        """Sum by number, float64, shape of the sums; at least one was added."""
        totals = [total for total, _ in self._sums.values()]
        together = sum((total.to(totals[0].device) for total in totals[1:]), totals[0])
        return together.double() / sum(count for _, count in self._sums.values())

    def follow_thinning(self, kept: Kept) -> None:
        """Go on with the means of the elements that stay."""
        self._sums = {device: (cut(total, kept), count) for device, (total, count) in self._sums.items()}

    def state_dict(self) -> dict[str, Any]:
        """Sum and number by device."""
        return {device: {"sum": total.cpu(), "count": count} for device, (total, count) in self._sums.items()}

    @classmethod
    def from_state(cls, state: Mapping[str, Any]) -> RunningMean:
        """The mean that `state_dict` was taken of."""
        mean = cls()
        mean._sums = {device: (part["sum"], part["count"]) for device, part in state.items()}
        return mean


@dataclass(frozen=True, slots=True)
class ActivationSite:
    """Where the activations of a layer's channels are to be seen.

    Attributes:
        module_name: canonical name of the module to look at.
        of_input: whether the activations are the module's input; else they are its output.
        activation: what is still to be applied to that, as the model does behind the module; None: nothing.
        channel_dim: the dimension of the channels, counted from the last: -3 in (images, channels, h, w).
    """

    module_name: str
    of_input: bool
    activation: Callable[[Tensor], Tensor] | None
    channel_dim: int


def observe(
    owner: object, model: nn.Module, module: nn.Module, of_input: bool, take: Callable[[Tensor], None]
) -> RemovableHandle:
    """Call `take`, without gradients, with the input or output of a module while the model trains.

    What runs in evaluation mode is not looked at. Whether it is training, the model says: a batch norm may
    be frozen by itself.

    Args:
        owner: who looks; when it is gone, as after an epoch that was abandoned, nothing is looked at any
            more. `take` must refer to it weakly.
        model: the model that the module is in, or a wrapper around it.
        module: what to look at.
        of_input: whether to look at its first input; else at its output.
        take: called before a module in place, or one behind it, can change what it is given.

    Returns:
        What ends it: `.remove()`.
    """
    model = unwrap(model)

    def see(value: Tensor) -> None:
        if model.training:
            with torch.no_grad():
                take(value.detach())

    def before(module: nn.Module, inputs: tuple[Tensor, ...]) -> None:
        see(inputs[0])

    def after(module: nn.Module, inputs: tuple[Tensor, ...], output: Tensor) -> None:
        see(output)

    handle = watch_inputs(module, before) if of_input else watch_output(module, after)
    weakref.finalize(owner, handle.remove)
    return handle


def _all_but(dim: int, tensor: Tensor) -> list[int]:
    dims = list(range(tensor.dim()))
    del dims[dim]
    return dims
