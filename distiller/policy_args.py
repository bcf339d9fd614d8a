"""The `args:` of policies: what a schedule may say of a component in some epochs only.

Knows nothing about models or components.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Annotated, Any

from distiller.errors import DistillerError
from distiller.pruning.settings import LONGEST, check_whole_number, checked_whole_number

__all__ = ["PolicyArgsError", "PruningArgs", "RegularizationArgs"]


class PolicyArgsError(DistillerError):
    """The `args:` of a policy, or their absence, do not fit its component."""


@dataclass(frozen=True, slots=True)
class PruningArgs:
    """The `args:` of a pruning policy.

    Attributes:
        levels: stands in for the pruner's `levels` in this policy.
        keep_mask: after the policy's last epoch the mask is a plain one, whatever it was until then.
            (Without it the mask stays in force as it is.)
        mini_batch_pruning_frequency: new masks every so many mini-batches too (0: once an epoch).
        mask_on_forward_only: weights are masked for the forward and backward pass, not after the step.
        mask_gradients: gradients are masked too; needs mask_on_forward_only.
        use_double_copies: the optimizer updates dense copies of the weights; needs mask_on_forward_only,
            for otherwise masks act on what it made of them, too.
        discard_masks_at_minibatch_end: masks last one mini-batch.
        skip_first_minibatch: masks are computed anew in the second mini-batch of training (when there are
            gradients to rank by).
        fold_batchnorm: rank convolution weights times gamma / sqrt(running_var + eps) of the batch norm
            that follows; masks still go on the weights.
    """

    levels: Any = None
    keep_mask: bool = False
    mini_batch_pruning_frequency: Annotated[int, checked_whole_number(0)] = 0
    mask_on_forward_only: bool = False
    mask_gradients: bool = False
    use_double_copies: bool = False
    discard_masks_at_minibatch_end: bool = False
    skip_first_minibatch: bool = False
    fold_batchnorm: bool = False

    def __post_init__(self) -> None:
        if self.mask_gradients and not self.mask_on_forward_only:
            raise DistillerError("'mask_gradients' needs 'mask_on_forward_only: true'")
        if self.use_double_copies and not self.mask_on_forward_only:
            raise DistillerError(
                "'use_double_copies' needs 'mask_on_forward_only: true'; without it masks act after each "
                "step too, and nothing is left of the dense copies"
            )
        if self.keep_mask and self.discard_masks_at_minibatch_end:
            raise DistillerError(
                "'keep_mask' has no mask to keep with 'discard_masks_at_minibatch_end'; leave one of them out"
            )
        check_whole_number(
            "'mini_batch_pruning_frequency'", self.mini_batch_pruning_frequency, least=0, most=LONGEST
        )


@dataclass(frozen=True, slots=True)
class RegularizationArgs:
    """The `args:` of a regularization policy.

    Attributes:
        keep_mask: what lies under the regularizer's threshold after the last mini-batch of the last
            epoch stays masked.
    """

    keep_mask: bool = False
