"""An axis of a sensitivity sweep: from a model and levels to units, each with its variants.

Knows nothing about what the axes do, or how a variant is judged.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

from torch import Tensor, nn

from distiller.errors import DistillerError, UsageError
from distiller.names import named_modules, named_parameters, resolve_all
from distiller.replay import Variant
from distiller.sensitivity.axes.levels import sparsity_levels
from distiller.sensitivity.curves import clean_level
from distiller.sensitivity.units import Unit

__all__ = ["Axis", "AxisContext", "ParameterAxis", "WeightAxis", "WeightVariants", "naming", "no_note"]


@dataclass(frozen=True, slots=True)
class AxisContext:
    """What some axes have to know besides the model.

    Attributes:
        dummy_input: a tensor, or a tuple of the model's positional arguments, for `group`; None: of the
            model's `input_shape`.
        activation_ranges: by canonical name of a layer, the least and the largest value of its input
            (`input_ranges`), for `activation-bits`.
        block: M of `n:m`, 2 to 65536.
    """

    dummy_input: Any = None
    activation_ranges: Mapping[str, tuple[float, float]] | None = None
    block: int = 4


class Axis(ABC):
    """One way to compress parts of a model by a level.

    Attributes:
        name: that `--sense` takes.
        takes: what it is meant for, in words.
        label: what a level is, for the x-axis of a plot.
        dense_level: the level at which nothing is compressed.
        default_range: (start, stop, step).
        is_sparsity: whether a level is the fraction of something that becomes zero.
    """

    name: str
    takes: str
    label: str
    dense_level: float = 0.0
    default_range: tuple[float, float, float] = (0.0, 0.95, 0.05)
    is_sparsity: bool = True

    @abstractmethod
    def units(
        self, model: nn.Module, names: Iterable[str], levels: Iterable[float], context: AxisContext
    ) -> list[Unit]:
        """What there is a curve about.

        Units keep copies of what they compress: their variants are those of the model as it is now. They can
        be pickled.

        Args:
            model: dense; stays as it is.
            names: names or patterns of parameters; those that the axis is not meant for are passed over.
            levels: in any order; the dense level may be among them.
            context: what the axis has to know besides.

        Raises:
            UnknownNameError: a name that matches nothing.
            UsageError: the axis is meant for none of the parameters, a level that it does not have, or
                something missing in the context.
        """

    def levels(self, start: float, stop: float, step: float) -> tuple[float, ...]:
        """The levels of a range, both ends included.

        Raises:
            UsageError: a number outside of its range.
        """
        return sparsity_levels(start, stop, step)

    def default_levels(self, context: AxisContext) -> tuple[float, ...]:
        """The levels of a sweep that asks for none."""
        return self.levels(*self.default_range)

    def check_level(self, level: float) -> None:
        """Refuse a level that the axis does not have; the dense one is fine.

        Raises:
            UsageError: says which there are.
        """
        if not 0 <= level <= 1:
            raise UsageError(f"sensitivity: a sparsity must lie in 0..1, got {level:g}")

    def _checked_levels(self, levels: Iterable[float]) -> tuple[float, ...]:
        """The levels without noise, repetitions and the dense one."""
        found = tuple(dict.fromkeys(clean_level(level) for level in levels))
        for level in found:
            self.check_level(level)
        return tuple(level for level in found if level != self.dense_level)

    def _require_some(self, units: list[Unit], requested: int) -> list[Unit]:
        """The units, if there is one."""
        if not units:
            raise UsageError(
                f"sensitivity: axis '{self.name}' takes {self.takes}, "
                f"got {requested} parameters without one; choose another axis or other parameters"
            )
        return units


class ParameterAxis(Axis):
    """An axis with one unit for each parameter that it is meant for."""

    def units(
        self, model: nn.Module, names: Iterable[str], levels: Iterable[float], context: AxisContext
    ) -> list[Unit]:
        """One for each parameter that the axis is meant for, in the order asked for."""
        chosen = self._checked_levels(levels)
        parameters = dict(named_parameters(model))
        requested = resolve_all(names, parameters)
        owners = weight_owners(model)
        units = []
        for name in requested:
            unit = self._unit(name, parameters[name].detach(), owners.get(name, {}), chosen, context)
            if unit is not None:
                units.append(unit)
        return self._require_some(units, len(requested))

    @abstractmethod
    def _unit(
        self,
        name: str,
        weight: Tensor,
        layers: Mapping[str, nn.Module],
        levels: tuple[float, ...],
        context: AxisContext,
    ) -> Unit | None:
        """The unit of a parameter; None when the axis is not meant for it.

        Args:
            name: canonical.
            weight: its value, not copied.
            layers: by name, the modules whose `weight` it is: several that share it; none of a parameter
                that is called otherwise, or that a parametrization makes something else of.
            levels: checked.
            context: what the axis has to know besides.
        """


class WeightAxis(ParameterAxis):
    """An axis that puts another value in the place of one weight, whatever layer it is of."""

    @abstractmethod
    def applies_to(self, name: str, weight: Tensor) -> bool:
        """Whether the axis is meant for the parameter of that canonical name."""

    @abstractmethod
    def compress(self, weight: Tensor, level: float) -> Tensor:
        """The weight at a level: a new tensor. Pure.

        Raises:
            DistillerError: the weight holds what cannot be compressed.
        """

    def _unit(
        self,
        name: str,
        weight: Tensor,
        layers: Mapping[str, nn.Module],
        levels: tuple[float, ...],
        context: AxisContext,
    ) -> Unit | None:
        if not self.applies_to(name, weight):
            return None
        make = WeightVariants(name, weight.clone(), self.compress)
        return Unit(self.name, name, levels, make, tensors=(name,), note=self._note(weight))

    def _note(self, weight: Tensor) -> Callable[[float], str]:
        """What a level really takes away of a weight, in words; it can be pickled."""
        return no_note


@dataclass(frozen=True, slots=True)
class WeightVariants:
    """Level -> the variant of one weight.

    Attributes:
        parameter: its canonical name.
        dense: its value.
        compress: (dense value, level) -> the value at that level.
    """

    parameter: str
    dense: Tensor = field(repr=False)
    compress: Callable[[Tensor, float], Tensor]

    def __call__(self, level: float) -> Variant:
        """The variant at a level."""
        with naming(self.parameter):
            return Variant({self.parameter: self.compress(self.dense, level)})


@contextmanager
def naming(parameter: str) -> Iterator[None]:
    """Errors within say whose sensitivity it was about."""
    try:
        yield
    except DistillerError as error:
        raise DistillerError(f"sensitivity of '{parameter}': {error}") from error


def no_note(level: float) -> str:
    """Nothing: the level says it all."""
    return ""


def weight_owners(model: nn.Module) -> dict[str, dict[str, nn.Module]]:
    """By parameter, the modules whose own `weight` it is."""
    names = {id(parameter): name for name, parameter in named_parameters(model)}
    owners: dict[str, dict[str, nn.Module]] = {}
    for module_name, module in named_modules(model):
        weight = module._parameters.get("weight")
        if weight is not None:
            owners.setdefault(names[id(weight)], {})[module_name] = module
    return owners
