"""The axis of rank: a layer's weight as the nearest product of two smaller ones.

Linear layers are taken for the `svd` form of `distiller.factorization`, convolutions for its `channel` form:
the matrix is (output channels, everything else). The variants hold the product, in the shape of the weight.
Knows nothing about how a compressed model is judged.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from functools import cached_property

from torch import Tensor, nn

from distiller.errors import UsageError
from distiller.factorization.decompositions import truncated_svd
from distiller.factorization.forms import Form, LayerShape, default_form, refusal, shape_of
from distiller.factorization.planning import rank_text
from distiller.factorization.ranks import matrix_of, rank_without
from distiller.replay import Variant
from distiller.sensitivity.axes.axis import AxisContext, ParameterAxis, naming
from distiller.sensitivity.axes.levels import share_levels
from distiller.sensitivity.units import Unit

__all__ = ["RankAxis"]


class RankAxis(ParameterAxis):
    """Level s takes floor(s r) of the full rank r of a layer's weight away; 1 stays."""

    name = "rank"
    takes = "weights of linear layers and of convolutions (1-d, 2-d) without groups, of a rank above 1"
    label = "Share of the rank taken away"
    is_sparsity = False

    def levels(self, start: float, stop: float, step: float) -> tuple[float, ...]:
        """The levels of a range, both ends included."""
        return share_levels(start, stop, step, "the share of the rank that is taken away")

    def check_level(self, level: float) -> None:
        """Refuse what is no fraction."""
        if not 0 <= level <= 1:
            raise UsageError(
                f"sensitivity: a level of rank is the share taken away and must lie in 0..1, got {level:g}"
            )

    def _unit(
        self,
        name: str,
        weight: Tensor,
        layers: Mapping[str, nn.Module],
        levels: tuple[float, ...],
        context: AxisContext,
    ) -> Unit | None:
        if len(layers) != 1:  # a shared weight cannot be factored
            return None
        (layer,) = layers.values()
        if refusal(layer) is not None:
            return None
        form, shape = default_form(layer), shape_of(layer)
        make = _LowRankVariants(name, weight.clone(), form)
        return Unit(self.name, name, levels, make, tensors=(name,), note=_RankNote(form, shape))


@dataclass(frozen=True)
class _LowRankVariants:
    """Level -> the variant of lower rank. The decomposition is computed once, when it is first asked for."""

    parameter: str
    dense: Tensor = field(repr=False)
    form: Form

    def __call__(self, level: float) -> Variant:
        with naming(self.parameter):
            left, right = self._factors
        rank = rank_without(right.shape[0], level)
        return Variant({self.parameter: (left[:, :rank] @ right[:rank]).reshape(self.dense.shape)})

    @cached_property
    def _factors(self) -> tuple[Tensor, Tensor]:
        """Those of full rank: of the first r columns and rows the product is the nearest of rank r."""
        matrix = matrix_of(self.dense, self.form)
        return truncated_svd(matrix, min(matrix.shape))


@dataclass(frozen=True, slots=True)
class _RankNote:
    """Level -> the rank and what the factors cost."""

    form: Form
    shape: LayerShape

    def __call__(self, level: float) -> str:
        (full,) = self.shape.most(self.form)
        rank = (rank_without(full, level),)
        factored, whole = self.shape.factored_parameters(self.form, rank), self.shape.parameters
        told = f"rank {rank[0]} of {full}: {factored:,} instead of {whole:,} parameters"
        if self.shape.shrinks(self.form, rank):
            return told
        return (
            f"{told}, no smaller than whole (break-even rank {rank_text(self.shape.break_even(self.form))})"
        )
