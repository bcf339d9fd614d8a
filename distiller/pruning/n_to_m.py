"""N:M pruning: of each M neighbouring input channels at most N stay.

Knows nothing about when it is called or how masks are applied.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Annotated

import torch
from torch import Tensor

from distiller.errors import DistillerError
from distiller.interfaces import Pruner, StepContext
from distiller.names import named_parameters, resolve_all
from distiller.pruning.criteria import mask_like, refuse_nan
from distiller.pruning.settings import (
    Names,
    as_names,
    check_whole_number,
    checked_whole_number,
    is_listed,
    naming,
)
from distiller.registry import PRUNERS

__all__ = ["NMPruner", "n_to_m_mask", "n_to_m_sparsity"]

_LARGEST = 2**16
_Count = Annotated[int, checked_whole_number(1, _LARGEST)]


def n_to_m_mask(t: Tensor, n: int = 2, m: int = 4) -> Tensor:
    """Keep the n largest magnitudes of each m neighbours along the input channels.

    Groups are w[o, g m : (g + 1) m, y, x], for each output channel and each position of the kernel. When m
    does not divide the channels, the last group has r < m of them and keeps n too, or all r if r <= n: so
    in no aligned group more than n weights stay, but the tensor's sparsity falls short of 1 - n / m.
    Of equal magnitudes those of lower index go.

    Args:
        t: the weights, (out, in) or (out, in, ...).
        n: how many stay, 1..m.
        m: the size of a group, at most 65536.

    Returns:
        The mask.

    Raises:
        DistillerError: n or m out of range, a tensor of less than 2 dimensions, or NaN.

    Source: Mishra et al., "Accelerating Sparse Deep Neural Networks" (arXiv 2104.08378), section 3.
    """
    _check_ratio(n, m)
    refuse_nan(t)
    _check_dimensions(t)
    channels_last = t.detach().abs().movedim(1, -1)  # (out, ..., in)
    m = min(m, max(1, channels_last.size(-1)))  # a longer group than all the channels is all of them
    whole = channels_last.size(-1) // m * m
    groups = channels_last[..., :whole].unflatten(-1, (whole // m, m))  # (out, ..., groups, m)
    keep = (_largest(groups, n).flatten(-2), _largest(channels_last[..., whole:], n))
    return mask_like(t, torch.cat(keep, dim=-1).movedim(-1, 1))


def n_to_m_sparsity(channels: int, n: int = 2, m: int = 4) -> float:
    """The sparsity that `n_to_m_mask` gives a tensor of so many input channels, 0..1.

    It is 1 - n / m when m divides them, less when a last group is shorter, and 0 for n or fewer.
    """
    whole, rest = divmod(channels, m)
    return 1 - (whole * n + min(rest, n)) / channels if channels else 0.0


@PRUNERS.register
class NMPruner(Pruner):
    """Prunes to N:M sparsity along the input channels (`n_to_m_mask`), as sparse tensor cores want it.

    Args:
        name: the instance's name in the schedule.
        weights: parameter names and shell patterns, or a single one; of 2 dimensions or more.
        n: how many of each group stay, 1..m, default 2.
        m: how many neighbouring input channels make a group, at most 65536, default 4.

    Raises:
        DistillerError: n or m out of range, or no weights.

    Source: Mishra et al., "Accelerating Sparse Deep Neural Networks" (arXiv 2104.08378).
    """

    reads_dimensions = True

    def __init__(self, name: str, weights: Names, n: _Count = 2, m: _Count = 4) -> None:
        _check_ratio(n, m)
        self.name = name
        self.weights = as_names(weights)
        self.n = n
        self.m = m

    def select(self, param_names: Sequence[str]) -> tuple[str, ...]:
        """The parameters that `weights` names, in its order."""
        return resolve_all(self.weights, param_names)

    def check(self, params: Mapping[str, Tensor]) -> None:
        """Raise a DistillerError if a parameter has less than 2 dimensions."""
        for param_name, param in params.items():
            with naming(self.name, param_name):
                _check_dimensions(param)

    def target_sparsity(self, ctx: StepContext) -> Mapping[str, float]:
        """The sparsity that each parameter comes to, by its name: 1 - n / m where m divides its channels."""
        params = dict(named_parameters(ctx.model))
        return {
            name: n_to_m_sparsity(params[name].size(1), self.n, self.m) for name in self.select(list(params))
        }

    def too_small(self, params: Mapping[str, Tensor], ctx: StepContext) -> tuple[str, ...]:
        """Those of `params` that have no more than n input channels: all of them stay."""
        return tuple(name for name, param in params.items() if param.size(1) <= self.n)

    def compute_masks(self, params: Mapping[str, Tensor], ctx: StepContext) -> dict[str, Tensor]:
        """Masks of the parameters in `params` that `weights` names.

        Raises:
            DistillerError: a parameter holds NaN, or has less than 2 dimensions.
        """
        masks: dict[str, Tensor] = {}
        for param_name, param in params.items():
            if is_listed(param_name, self.weights):
                with naming(self.name, param_name):
                    masks[param_name] = n_to_m_mask(param, self.n, self.m)
        return masks


def _largest(groups: Tensor, n: int) -> Tensor:
    """Which are the n largest along the last dimension; of equal ones those of higher index."""
    order = groups.argsort(dim=-1, stable=True)
    gone = order[..., : max(0, groups.size(-1) - n)]
    return torch.ones_like(groups, dtype=torch.bool).scatter_(-1, gone, False)


def _check_dimensions(t: Tensor) -> None:
    if t.dim() < 2:
        raise DistillerError(
            f"N:M pruning wants a tensor of 2 dimensions or more, got shape {tuple(t.shape)}"
        )


def _check_ratio(n: int, m: int) -> None:
    check_whole_number("m", m, least=1, most=_LARGEST)
    if not 1 <= n <= m:
        raise DistillerError(f"n must be from 1 to m, which is {m}, got {n}")
