"""Movement pruning: what training moves towards zero goes.

Knows nothing about when it is called or how masks are applied.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, nn

from distiller.errors import DistillerError
from distiller.interfaces import DataDrivenPruner, StepContext
from distiller.pruning.automated_gradual import SparsityTargetPruner
from distiller.pruning.criteria import lowest, mask_like, refuse_nan, snap, widened
from distiller.pruning.schedule import GradualSparsity
from distiller.pruning.scored_filters import zeros_first
from distiller.pruning.settings import FractionBelowOne, Names, check_fraction, naming
from distiller.registry import PRUNERS
from distiller.tensor_cuts import TensorCuts, cut

__all__ = ["MovementPruner", "movement_mask"]


def movement_mask(scores: Tensor, weights: Tensor, sparsity: float) -> Tensor:
    """Prune the int(sparsity * numel) weights of lowest score; of equal scores those of lower index.

    Weights that are zero go first, so that under a plain mask what is pruned stays pruned.

    Args:
        scores: shape of `weights`.
        weights: any shape.
        sparsity: fraction to prune, 0..1.

    Returns:
        The mask.

    Raises:
        DistillerError: NaN in the scores or weights, or the fraction is out of range.
    """
    check_fraction("sparsity", sparsity, one_allowed=True)
    refuse_nan(weights)
    ranked = zeros_first(scores, weights.detach() != 0).flatten()
    gone = lowest(ranked, int(snap(sparsity * ranked.numel())))
    return mask_like(weights, ~gone.view(weights.shape))


@PRUNERS.register
class MovementPruner(SparsityTargetPruner, DataDrivenPruner):
    """Prunes the weights that training has moved towards zero, more of them from epoch to epoch.

        score(w) = - sum over steps of w * gradient

    The sum is over all mini-batches of training in the policy's epochs, and goes on after new masks. The
    fraction follows `agp_sparsity`, the cubic of the paper.

    With the policy's arguments `mask_on_forward_only: true` and `use_double_copies: true` pruned weights go
    on being trained, their dense values count in the score, and they return if it rises: the paper's method,
    whose estimator passes gradients straight through the mask. Without them what is pruned stays pruned.

    Args:
        name: the instance's name in the schedule.
        initial_sparsity: at the policy's first epoch, a fraction in [0, 1).
        final_sparsity: at its last active epoch, a fraction in [0, 1).
        weights: parameter names and shell patterns, or a single one.

    Raises:
        DistillerError: a sparsity out of range, or both alike.

    Source: Sanh et al., "Movement Pruning: Adaptive Sparsity by Fine-Tuning" (arXiv 2005.07683), section 4.
    """

    ranks_by_weight = False

    def __init__(
        self, name: str, initial_sparsity: FractionBelowOne, final_sparsity: FractionBelowOne, weights: Names
    ) -> None:
        super().__init__(name, weights, GradualSparsity(initial_sparsity, final_sparsity))
        self._scores: dict[str, Tensor] = {}

    def check(self, params: Mapping[str, Tensor]) -> None:
        """Raise a DistillerError if a parameter is not trained."""
        for name, param in params.items():
            with naming(self.name, name):
                if isinstance(param, nn.Parameter) and not param.requires_grad:
                    raise DistillerError(
                        "it is not trained (requires_grad is False), and has no gradients to rank by; train "
                        "it, or take another pruner"
                    )

    def attach(self, model: nn.Module) -> None:
        """Nothing: gradients come with `after_backward`."""

    def detach(self) -> None:
        """Nothing."""

    def reset(self) -> None:
        """Count mini-batches anew; the scores go on."""
        self.seen = 0

    def after_backward(self, params: Mapping[str, nn.Parameter], ctx: StepContext) -> None:
        """Take in the gradients of a mini-batch; a parameter that none has reached does not move."""
        self.seen += 1
        for name, param in params.items():
            if param.grad is not None:
                dense = ctx.masks[name].dense
                weights, gradients = widened(param if dense is None else dense), widened(param.grad)
                before = self._scores.get(name)
                before = torch.zeros_like(weights) if before is None else before.to(weights.device)
                self._scores[name] = torch.addcmul(before, weights, gradients, value=-1)

    def state_dict(self) -> dict[str, Any]:
        """Mini-batches seen since the last masks, and the score of each weight."""
        return {"seen": self.seen, "scores": {name: scores.cpu() for name, scores in self._scores.items()}}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Go on with the scores in `state`."""
        self.seen, self._scores = state["seen"], dict(state["scores"])

    def follow_thinning(self, cuts: TensorCuts) -> None:
        """Go on with the scores of the weights that stay."""
        self._scores = {name: cut(scores, cuts.get(name, {})) for name, scores in self._scores.items()}

    def _masks(self, params: Mapping[str, Tensor], ctx: StepContext) -> dict[str, Tensor]:
        sparsity = self.sparsity.at(ctx)
        masks: dict[str, Tensor] = {}
        for name, param in params.items():
            with naming(self.name, name):
                if name not in self._scores:
                    raise DistillerError(
                        f"there are no scores to rank by after {self.seen} mini-batches; no gradient reaches "
                        "the parameter: train it, or take another pruner"
                    )
                masks[name] = movement_mask(self._scores[name].to(param.device), param, sparsity)
        return masks
