"""Magnitude pruning with one threshold for many tensors.

Knows nothing about when it is called or how masks are applied.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import torch
from torch import Tensor

from distiller.interfaces import StepContext
from distiller.names import named_parameters
from distiller.pruning.automated_gradual import SparsityTargetPruner
from distiller.pruning.criteria import lowest, mask_like, refuse_nan, snap
from distiller.pruning.schedule import ConstantSparsity, GradualSparsity
from distiller.pruning.settings import FractionBelowOne, Names, check_fraction, naming
from distiller.registry import PRUNERS

__all__ = ["GlobalMagnitudePruner", "global_magnitude_masks"]


def global_magnitude_masks(tensors: Sequence[Tensor], sparsity: float) -> list[Tensor]:
    """Prune the int(sparsity * N) smallest magnitudes among the N elements of all tensors together.

    Exactly so many go: of equal magnitudes those of earlier tensors, and there of lower index.

    Args:
        tensors: any shapes, on one device.
        sparsity: fraction to prune, 0..1.

    Returns:
        The masks, in the order of the tensors.

    Raises:
        DistillerError: a tensor holds NaN, or the fraction is out of range.

    Source: Han et al., "Learning both Weights and Connections for Efficient Neural Networks" (2015), with
    the threshold of Blalock et al., "What is the State of Neural Network Pruning?" (arXiv 2003.03033).
    """
    check_fraction("sparsity", sparsity, one_allowed=True)
    if not tensors:
        return []
    for tensor in tensors:
        refuse_nan(tensor)
    magnitudes = torch.cat([tensor.detach().abs().flatten() for tensor in tensors])
    gone = lowest(magnitudes, int(snap(sparsity * magnitudes.numel())))
    parts = gone.split([tensor.numel() for tensor in tensors])
    return [mask_like(tensor, ~part.view(tensor.shape)) for tensor, part in zip(tensors, parts, strict=True)]


@PRUNERS.register
class GlobalMagnitudePruner(SparsityTargetPruner):
    """Prunes the elements of least magnitude of all its weights together, so that layers share unevenly.

    The sparsity aimed at, which `target_sparsity` gives under each name, is that of all of them together.

    Args:
        name: the instance's name in the schedule.
        final_sparsity: of all the weights together, at the policy's last active epoch: a fraction
            in [0, 1).
        weights: parameter names and shell patterns, or a single one.
        initial_sparsity: at the policy's first epoch, a fraction in [0, 1); rises or falls to the final one
            (`agp_sparsity`). Left out: `final_sparsity` from the first epoch on.

    Raises:
        DistillerError: a sparsity out of range, both alike, or no weights.

    Source: Blalock et al., "What is the State of Neural Network Pruning?" (arXiv 2003.03033), section 2.
    """

    def __init__(
        self,
        name: str,
        final_sparsity: FractionBelowOne,
        weights: Names,
        initial_sparsity: FractionBelowOne | None = None,
    ) -> None:
        check_fraction("final_sparsity", final_sparsity, one_allowed=False)
        if initial_sparsity is None:
            sparsity = ConstantSparsity(final_sparsity)
        else:
            sparsity = GradualSparsity(initial_sparsity, final_sparsity)
        super().__init__(name, weights, sparsity)

    def too_small(self, params: Mapping[str, Tensor], ctx: StepContext) -> tuple[str, ...]:
        """All of `params`, or none: how many elements go is a fraction of all of them together."""
        total = sum(param.numel() for param in params.values())
        return () if int(snap(self.sparsity.at(ctx) * total)) else tuple(params)

    def _masks(self, params: Mapping[str, Tensor], ctx: StepContext) -> dict[str, Tensor]:
        in_model = {name: param.detach() for name, param in named_parameters(ctx.model)}
        everything = {**in_model, **params}  # the model's stand in for weights that were not passed in
        ranked = {name: everything[name] for name in self.select(list(everything))} if params else {}
        for name, param in ranked.items():
            with naming(self.name, name):
                refuse_nan(param)
        masks = global_magnitude_masks(list(ranked.values()), self.sparsity.at(ctx))
        return {name: mask for name, mask in zip(ranked, masks, strict=True) if name in params}
