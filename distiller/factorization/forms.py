"""The forms that a layer can be factored into: what they cost at a rank, and from which rank on more.

    form     | layers               | becomes                       | parameters, besides the bias
    svd      | linear               | n -> r -> m                   | r (n + m)
    channel  | convolutions         | kernel to r, 1x1 to m         | r (n k + m)
    spatial  | 2-D convolutions     | (kh, 1) to r, (1, kw) to m    | r (n kh + m kw)
    tucker2  | convolutions         | 1x1 to a, kernel to b, 1x1    | n a + a b k + b m

with n channels read, m made and k elements of a kernel. To each of `svd` and `channel` a sparse layer of the
shape of the whole can be added, whose non-zero elements count. A rank of `tucker2` is a pair (a, b); the
pairs of `candidate_ranks` have both in the ratio of n to m.
Knows nothing about values of weights.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from math import prod
from typing import Literal, get_args

from torch import nn

from distiller.errors import DistillerError, UsageError

__all__ = [
    "FORMS",
    "Form",
    "LayerShape",
    "Rank",
    "candidate_ranks",
    "checked_rank",
    "default_form",
    "plain_rank",
    "refusal",
    "require_factorable",
    "shape_of",
]

Form = Literal["svd", "channel", "spatial", "tucker2"]
FORMS: tuple[Form, ...] = get_args(Form)
"""The forms by name."""
_KINDS = (nn.Linear, nn.Conv1d, nn.Conv2d)

Rank = tuple[int, ...]
"""One number, or (in, out) of `tucker2`."""


@dataclass(frozen=True, slots=True)
class LayerShape:
    """What the costs of a layer and its factors follow from.

    Attributes:
        weight: its shape, (m, n, *kernel).
        positions_in: elements of a channel that all calls together read, for one sample.
        positions: elements of a channel that they make; of a linear layer, the vectors.
        positions_between: of a `spatial` form, elements of a channel between both convolutions.
    """

    weight: tuple[int, ...]
    positions_in: int = 1
    positions: int = 1
    positions_between: int = 1

    @property
    def parameters(self) -> int:
        """Elements of the weight."""
        return prod(self.weight)

    @property
    def macs(self) -> int:
        """Multiply-accumulates for one sample."""
        return self.parameters * self.positions

    @property
    def default_form(self) -> Form:
        """Where none is asked for."""
        return "svd" if len(self.weight) == 2 else "channel"

    def most(self, form: Form) -> Rank:
        """The full rank: there is none above it."""
        m, n, *kernel = self.weight
        if form == "tucker2":
            return (min(n, m * prod(kernel)), min(m, n * prod(kernel)))
        if form == "spatial":
            return (min(n * kernel[0], m * kernel[1]),)
        return (min(m, n * prod(kernel)),)

    def factored_parameters(self, form: Form, rank: Rank, nonzeros: int = 0) -> int:
        """Elements of the factors, and non-zero ones of the sparse layer."""
        return sum(self._sizes(form, rank)) + nonzeros

    def factored_macs(self, form: Form, rank: Rank, nonzeros: int = 0) -> int:
        """Multiply-accumulates of the factors; a sparse layer's zeros are multiplied too."""
        sizes, last = self._sizes(form, rank), self.positions
        if form == "tucker2":
            return sizes[0] * self.positions_in + (sizes[1] + sizes[2]) * last
        if form == "spatial":
            return sizes[0] * self.positions_between + sizes[1] * last
        return sum(sizes) * last + (self.macs if nonzeros else 0)

    def shrinks(self, form: Form, rank: Rank, nonzeros: int = 0) -> bool:
        """Whether it has fewer parameters factored, and, but for a sparse layer's zeros, fewer MACs."""
        fewer = self.factored_parameters(form, rank, nonzeros) < self.parameters
        return fewer and (nonzeros > 0 or self.factored_macs(form, rank) < self.macs)

    def break_even(self, form: Form, nonzeros: int = 0) -> Rank | None:
        """The highest of the `candidate_ranks` at which it `shrinks`; None: it does at none."""
        fitting = [rank for rank in candidate_ranks(self, form) if self.shrinks(form, rank, nonzeros)]
        return fitting[-1] if fitting else None

    def break_even_exact(self, form: Form) -> float:
        """The rank at which a factored layer has as many parameters as a whole one: m n / (m + n) of `svd`.

        Of `tucker2`, the number of channels made by the core (b), with a in the ratio of n to m.
        """
        m, n, *kernel = self.weight
        k = prod(kernel)
        if form == "spatial":
            return m * n * k / (n * kernel[0] + m * kernel[1])
        if form == "tucker2":  # a = b n / m: b^2 k n / m + b (n^2 / m + m) = m n k
            square, linear = k * n / m, n * n / m + m
            return ((linear * linear + 4 * square * m * n * k) ** 0.5 - linear) / (2 * square)
        return m * n * k / (n * k + m)

    def _sizes(self, form: Form, rank: Rank) -> tuple[int, ...]:
        m, n, *kernel = self.weight
        if form == "tucker2":
            into, out = rank
            return n * into, into * out * prod(kernel), out * m
        r = rank[0]
        if form == "spatial":
            return r * n * kernel[0], r * m * kernel[1]
        return r * n * prod(kernel), r * m


def candidate_ranks(shape: LayerShape, form: Form) -> list[Rank]:
    """Ranks from the lowest to the full one, the costs of which ascend."""
    most = shape.most(form)
    if form != "tucker2":
        return [(rank,) for rank in range(1, most[0] + 1)]
    m, n, *kernel = shape.weight
    k, ranks = prod(kernel), {}
    for step in range(1, max(most) + 1):
        into, out = max(1, round(step * most[0] / max(most))), max(1, round(step * most[1] / max(most)))
        ranks[(min(into, out * k, n), min(out, into * k, m))] = None
    return list(ranks)


def shape_of(
    layer: nn.Module, input_shape: Sequence[int] | None = None, macs: int | None = None
) -> LayerShape:
    """The shape of a layer, and how often it is computed.

    Args:
        layer: linear, or a convolution without groups.
        input_shape: of its first call, batch included; None: each weight is used once.
        macs: of all its calls, as `count_macs` counts them with a batch of one; None: one call.
    """
    assert isinstance(layer, _KINDS)
    weight = tuple(layer.weight.shape)
    if input_shape is None:
        return LayerShape(weight)
    if isinstance(layer, nn.Linear):
        positions = prod(input_shape[:-1]) if macs is None else macs // max(1, prod(weight))
        return LayerShape(weight, positions, positions, positions)
    spatial = tuple(input_shape[-(layer.weight.dim() - 2) :])
    batch = prod(input_shape[: -(layer.weight.dim() - 1)]) if len(input_shape) == layer.weight.dim() else 1
    out = tuple(_output_size(layer, axis, size) for axis, size in enumerate(spatial))
    once = prod(out) * batch
    calls = 1 if macs is None else max(1, macs // max(1, prod(weight) * once))
    between = out[0] * prod(spatial[1:]) * batch
    return LayerShape(weight, prod(spatial) * batch * calls, once * calls, between * calls)


def default_form(layer: nn.Module) -> Form:
    """The form of a layer for which none is asked for."""
    assert isinstance(layer, _KINDS)
    return LayerShape(tuple(layer.weight.shape)).default_form


def refusal(layer: nn.Module, form: Form | None = None) -> str | None:
    """Why a layer cannot be factored (into a form); None: it can."""
    kind = type(layer).__name__
    if type(layer) not in _KINDS:
        return f"it is a {kind}; Linear, Conv1d and Conv2d can be"
    if isinstance(layer, (nn.Conv1d, nn.Conv2d)) and layer.groups != 1:
        return f"it is a convolution of {layer.groups} groups, whose filters read different channels"
    if getattr(layer, "parametrizations", None):
        return "a parametrization makes its weight of other tensors; take that off first"
    if form is None:
        return _of_rank_1(layer, default_form(layer))
    if (form == "svd") != isinstance(layer, nn.Linear):
        others = "channel, spatial and tucker2" if form == "svd" else "svd"
        return f"it is a {kind}, and form {form} is not for it; {others} can be"
    if form == "spatial" and not isinstance(layer, nn.Conv2d):
        return f"it is a {kind}, and form spatial is for Conv2d; channel and tucker2 can be"
    return _of_rank_1(layer, form)


def _of_rank_1(layer: nn.Module, form: Form) -> str | None:
    most = shape_of(layer).most(form)
    return "its rank is 1 already" if max(most) == 1 else None


def plain_rank(rank: Rank) -> int | list[int]:
    """A rank as a user gives it: a number, or [in, out]."""
    first, *others = rank
    return [first, *others] if others else first


def checked_rank(shape: LayerShape, form: Form, rank: int | Sequence[int]) -> Rank:
    """A rank as the user gave it: one number, or for `tucker2` also [in, out].

    One number of `tucker2` is the larger of both; the other is in the ratio of the full ranks.

    Raises:
        UsageError: the layer has no such rank.
    """
    most = shape.most(form)
    if isinstance(rank, int) and form == "tucker2":
        if not 1 <= rank <= max(most):
            raise UsageError(f"rank must be 1 to {max(most)}, got {rank}")
        m, n, *kernel = shape.weight
        pair = [max(1, round(rank * size / max(most))) for size in most]
        k = prod(kernel)
        return (min(pair[0], pair[1] * k, n), min(pair[1], pair[0] * k, m))
    ranks = (rank,) if isinstance(rank, int) else tuple(rank)
    if len(ranks) != len(most):
        wanted = "a pair [in, out], or one number" if form == "tucker2" else "one number"
        raise UsageError(f"rank must be {wanted} for form {form}, got {list(ranks)}")
    if form == "tucker2":
        m, n, *kernel = shape.weight
        into, out = ranks[0], ranks[-1]
        most = (min(n, out * prod(kernel)), min(m, into * prod(kernel)))
    if not all(1 <= own <= limit for own, limit in zip(ranks, most, strict=True)):
        raise UsageError(f"rank must be at least 1 and at most {plain_rank(most)}, got {plain_rank(ranks)}")
    return ranks


def _output_size(layer: nn.Conv1d | nn.Conv2d, axis: int, size: int) -> int:
    kernel, stride, dilation = layer.kernel_size[axis], layer.stride[axis], layer.dilation[axis]
    reach = dilation * (kernel - 1)
    if isinstance(layer.padding, str):
        padding = reach if layer.padding == "same" else 0
    else:
        padding = 2 * layer.padding[axis]
    return (size + padding - reach - 1) // stride + 1


def require_factorable(name: str, layer: nn.Module, form: Form | None) -> None:
    """Refuse a layer that cannot be factored.

    Raises:
        DistillerError: says why.
    """
    reason = refusal(layer, form)
    if reason is not None:
        raise DistillerError(f"factorization: '{name}' cannot be factored: {reason}")
