"""Learning-rate schedulers that a schedule may name, and how they follow the epoch.

Registers an explicit list of PyTorch's schedulers, all of whose arguments are plain data,
and two of Distiller's. Knows nothing about policies or YAML.
"""

from __future__ import annotations

import operator
import warnings
from bisect import bisect_right
from collections.abc import Sequence
from itertools import accumulate

from torch import Tensor
from torch.optim import Optimizer
from torch.optim.lr_scheduler import (
    ConstantLR,
    CosineAnnealingLR,
    CosineAnnealingWarmRestarts,
    CyclicLR,
    ExponentialLR,
    LinearLR,
    LRScheduler,
    MultiStepLR,
    OneCycleLR,
    ReduceLROnPlateau,
    StepLR,
)

from distiller.errors import DistillerError
from distiller.registry import LR_SCHEDULERS

__all__ = ["MultiStepMultiGammaLR", "PolynomialLR", "advance_to"]


def advance_to(lr_scheduler: LRScheduler, epoch: int) -> None:
    """Set the optimizer's learning rates to those that a scheduler has for `epoch`.

    The rates are a function of the absolute epoch and of the optimizer's base learning rates: it does not
    matter when the scheduler was called before, or what another one did to the optimizer meanwhile. (That is
    what Distiller's `step(epoch=epoch)` did; PyTorch 2 has only `step()`.) Afterwards
    `lr_scheduler.last_epoch` is `epoch`.

    A OneCycleLR has rates for epochs 0 to total_steps - 1; at total_steps, the end of the last one, it keeps
    the last.

    Args:
        lr_scheduler: a registered scheduler other than ReduceLROnPlateau, which is stepped with a metric.
        epoch: the epoch to come, from 0.

    Raises:
        DistillerError: the epoch lies past the total_steps of a OneCycleLR.
    """
    if isinstance(lr_scheduler, OneCycleLR):
        epoch = _epoch_of_cycle(lr_scheduler, epoch)
    if lr_scheduler.last_epoch <= 0 or lr_scheduler.last_epoch > epoch:
        _set_lrs(lr_scheduler.optimizer, lr_scheduler.base_lrs)
        lr_scheduler.last_epoch = -1
        lr_scheduler._initial_step()  # what the constructor does: no public call sets the rates of epoch 0
    else:
        _set_lrs(lr_scheduler.optimizer, lr_scheduler.get_last_lr())
    with warnings.catch_warnings():
        # PyTorch expects an optimizer.step() between two steps; epochs skipped have none.
        warnings.filterwarnings("ignore", message=r".*lr_scheduler\.step\(\)", category=UserWarning)
        while lr_scheduler.last_epoch < epoch:
            lr_scheduler.step()


@LR_SCHEDULERS.register
class PolynomialLR(LRScheduler):
    """Learning rates that fall to 0 as a power of the epochs left.

        lr = base_lr (1 - epoch / T_max)^power,  0 from T_max on

    Distiller's scheduler of this name; PyTorch's has other arguments.

    Args:
        optimizer: whose learning rates to set.
        T_max: the epoch at which they reach 0, 1 or more.
        power: more than 0.
        last_epoch: -1, or the last epoch done when resuming without a state_dict.

    Raises:
        DistillerError: an argument out of range.
    """

    def __init__(self, optimizer: Optimizer, T_max: int, power: float, last_epoch: int = -1) -> None:
        if T_max < 1:
            raise DistillerError(f"T_max must be 1 or more, got {T_max}")
        if not power > 0:
            raise DistillerError(f"power must be more than 0, got {power}")
        self.T_max = T_max
        self.power = power
        super().__init__(optimizer, last_epoch)

    def get_lr(self) -> list[float | Tensor]:
        """The learning rates at `last_epoch`, one per parameter group."""
        factor = (1 - min(self.last_epoch, self.T_max) / self.T_max) ** self.power
        return [base_lr * factor for base_lr in self.base_lrs]


@LR_SCHEDULERS.register
class MultiStepMultiGammaLR(LRScheduler):
    """Learning rates that are multiplied at each milestone, by a factor of its own.

        lr = base_lr * product of gammas[i] over all i with milestones[i] <= epoch

    Args:
        optimizer: whose learning rates to set.
        milestones: epochs, in increasing order.
        gammas: one factor for each milestone.
        last_epoch: -1, or the last epoch done when resuming without a state_dict.

    Attributes:
        multiplicative_gammas: the factor before the first milestone (1.0), and from each one on.

    Raises:
        DistillerError: milestones out of order, or not as many gammas.
    """

    def __init__(
        self, optimizer: Optimizer, milestones: list[int], gammas: list[float], last_epoch: int = -1
    ) -> None:
        if list(milestones) != sorted(milestones):
            raise DistillerError(f"milestones must be in increasing order, got {list(milestones)}")
        if len(milestones) != len(gammas):
            raise DistillerError(
                f"gammas must be as many as milestones, got {len(gammas)} for {len(milestones)}"
            )
        self.milestones = list(milestones)
        self.multiplicative_gammas = list(accumulate(gammas, operator.mul, initial=1.0))
        super().__init__(optimizer, last_epoch)

    def get_lr(self) -> list[float | Tensor]:
        """The learning rates at `last_epoch`, one per parameter group."""
        factor = self.multiplicative_gammas[bisect_right(self.milestones, self.last_epoch)]
        return [base_lr * factor for base_lr in self.base_lrs]


for _scheduler in (
    ConstantLR,
    CosineAnnealingLR,
    CosineAnnealingWarmRestarts,
    CyclicLR,
    ExponentialLR,
    LinearLR,
    MultiStepLR,
    OneCycleLR,
    ReduceLROnPlateau,
    StepLR,
):
    LR_SCHEDULERS.register(_scheduler)


def _epoch_of_cycle(lr_scheduler: OneCycleLR, epoch: int) -> int:
    if epoch > lr_scheduler.total_steps:
        raise DistillerError(
            f"OneCycleLR: total_steps (or epochs * steps_per_epoch) must reach to the end of its policy, "
            f"epoch {epoch}, got {lr_scheduler.total_steps}; it is stepped once an epoch"
        )
    return min(epoch, lr_scheduler.total_steps - 1)


def _set_lrs(optimizer: Optimizer, lrs: Sequence[float | Tensor]) -> None:
    for group, lr in zip(optimizer.param_groups, lrs, strict=True):
        group["lr"] = lr
