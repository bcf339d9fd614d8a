"""The ids of a network's parameters and buffers, and the work of its layers.

A weight of a layer has a vector of ids along each dimension that stands for channels. A parameter
that is a plain operand (a position embedding, a layer scale) has an id for each element.
Knows nothing about operations.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Literal

from torch import Tensor

from distiller.channel_groups.ids import IdSpace, squeezed

Role = Literal["output", "through", "input", "channel"]


@dataclass(frozen=True, slots=True, eq=False)
class State:
    """A parameter, buffer or constant of the network, as a value of its graph.

    Attributes:
        name: canonical; None of a constant.
        tensor: what it holds.
    """

    name: str | None
    tensor: Tensor


Value = Tensor | State | tuple["Value", ...] | None
"""A value of the graph: ids; a parameter; several results; None has no channels that could be removed."""


@dataclass(frozen=True, slots=True)
class Work:
    """Multiply-accumulates of one call, and the ids that they are in proportion to.

    Attributes:
        name: the weight's; of a product without one, where it stands.
        macs: of the dense network, batch of the traced input.
        factors: ids; removed ones take their share of the work, each factor for itself.
    """

    name: str
    macs: int
    factors: tuple[Tensor, ...]


@dataclass(slots=True)
class NetworkIds:
    """What following the channels through a network finds.

    Attributes:
        space: all ids.
        vectors: by (parameter, dimension): the ids along it.
        roles: what a removal along that dimension removes: an output of a layer, an output that is made
            of the same channel alone (depthwise), an input, or an element of what is held for each channel.
        elements: by parameter that is an operand: an id for each element.
        work: of convolutions, linear layers and products, in the order of execution.
    """

    space: IdSpace = field(default_factory=IdSpace)
    vectors: dict[tuple[str, int], Tensor] = field(default_factory=dict)
    roles: dict[tuple[str, int], Role] = field(default_factory=dict)
    elements: dict[str, Tensor] = field(default_factory=dict)
    work: list[Work] = field(default_factory=list)

    def vector(self, state: State, dim: int, role: Role) -> Tensor:
        """The ids along a dimension of a parameter, (size of it,); the same at every call."""
        if state.name is None:
            ids = self.space.new(state.tensor.shape[dim])
            self.space.fix(ids, "it is in step with a constant of the network")
            return ids
        key = (state.name, dim)
        if key not in self.vectors:
            self.vectors[key] = self.space.new(state.tensor.shape[dim])
        if self.roles.get(key) != "output":  # of a weight that serves twice: what makes channels says so
            self.roles[key] = role
        return self.vectors[key]

    def of_elements(self, state: State) -> Tensor | None:
        """The ids of a parameter's elements; None of a single number."""
        if state.tensor.numel() == 1:
            return None
        if state.name is None:
            ids = self.space.new(1).expand(state.tensor.shape)
            self.space.fix(ids, "it is in step with a constant of the network")
            return ids
        if state.name not in self.elements:
            self.elements[state.name] = self.space.new(*state.tensor.shape)
            self.space.cut_as_slices(self.elements[state.name])
        return self.elements[state.name]

    def add_work(self, name: str, macs: int, *factors: Tensor | None) -> None:
        """Book the work of one call."""
        kept = tuple(squeezed(ids).reshape(-1) for ids in factors if ids is not None)
        self.work.append(Work(name, macs, kept))
