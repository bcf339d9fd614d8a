"""Learning-rate schedulers that a schedule may name, how they follow the epoch, and whether they can.

Registers an explicit list of PyTorch's schedulers, all of whose arguments are plain data,
and two of Distiller's. Knows nothing about policies or YAML.
"""

from __future__ import annotations

import math
import operator
import warnings
from bisect import bisect_right
from collections.abc import Callable, Iterator, Mapping, Sequence
from itertools import accumulate, takewhile
from typing import Any

import torch
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
from distiller.interfaces import EpochWindow
from distiller.registry import LR_SCHEDULERS

__all__ = [
    "MultiStepMultiGammaLR",
    "PolynomialLR",
    "advance_to",
    "check_arguments",
    "copy_groups",
    "put_back_groups",
    "rehearse",
]

_MOST_REHEARSED = 1000
_ROUNDING = 1e-12
_HIGHEST = torch.finfo(torch.float32).max
_COUNTS_FROM_1 = (
    "step_size", "step_size_up", "step_size_down", "T_max", "T_0", "T_mult", "total_iters", "total_steps",
    "epochs", "steps_per_epoch",
)  # fmt: skip
_RATES = ("lr", "momentum", "betas")
_ABOVE_0 = ("div_factor", "final_div_factor")


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


def check_arguments(
    make: Callable[..., Any], arguments: Mapping[str, Any]
) -> list[tuple[tuple[str | int, ...], str]]:
    """What is wrong with arguments that PyTorch's constructors let pass: (path within them, text) for each.

    Of all of PyTorch's schedulers, numbers are finite and not negative, what counts epochs is 1 or more, and
    milestones are in increasing order. With others their schedulers follow wrong rates without a word.

    Args:
        make: a registered class; one that is not PyTorch's checks its arguments itself.
        arguments: as for `make`; values that are not numbers are passed over.
    """
    if make not in _TORCHS:
        return []
    faults: list[tuple[tuple[str | int, ...], str]] = []
    for path, number in _numbers((), arguments):
        least = 1 if path[0] in _COUNTS_FROM_1 else 0
        if isinstance(number, float) and not math.isfinite(number):
            faults.append((path, f"must be a finite number, got {number}"))
        elif number < least:
            faults.append((path, f"must be {least} or more, got {number}"))
        elif number == 0 and path[0] in _ABOVE_0:
            faults.append((path, f"must be more than 0, got {number}"))
    milestones = [number for path, number in _numbers((), arguments) if path[0] == "milestones"]
    if milestones != sorted(milestones):
        faults.append((("milestones",), f"must be in increasing order, got {milestones}"))
    return faults


def rehearse(
    make: Callable[..., LRScheduler],
    groups: Sequence[Mapping[str, Any]],
    optimizer: Optimizer,
    window: EpochWindow,
) -> None:
    """Follow a scheduler through the epochs of its policy, as `LRPolicy` will; up to epoch 1000.

    Neither `optimizer` nor the global random numbers are touched: the scheduler is made for a stand-in that
    has the same groups.

    Args:
        make: makes the scheduler for an `optimizer`, a keyword.
        groups: the optimizer's parameter groups as they are when training starts (`copy_groups`).
        optimizer: the real one, whose defaults a scheduler may ask for.
        window: the epochs of the policy.

    Raises:
        DistillerError: the scheduler fails at an epoch, or has a rate or momentum there that is negative,
            not finite or too large for a parameter of 32 bits, or a momentum that is no beta.
    """
    lr_scheduler = make(optimizer=_StandIn(optimizer, groups))
    if isinstance(lr_scheduler, OneCycleLR):
        _epoch_of_cycle(lr_scheduler, window.last + 1)
    if window.start == 0:
        _check_rates(lr_scheduler, optimizer, 0)
    for epoch in takewhile(lambda epoch: epoch < _MOST_REHEARSED, window.epochs):
        try:
            if isinstance(lr_scheduler, ReduceLROnPlateau):
                lr_scheduler.step(0.0)
            else:
                advance_to(lr_scheduler, epoch + 1)
        except DistillerError:
            raise
        except Exception as error:  # whatever a scheduler raises here, it would raise in training
            raise DistillerError(
                f"{type(lr_scheduler).__name__} fails at epoch {epoch + 1}: {type(error).__name__}: {error}"
            ) from error
        _check_rates(lr_scheduler, optimizer, epoch + 1)


def copy_groups(optimizer: Optimizer | None) -> list[dict[str, Any]]:
    """An optimizer's parameter groups as they are now; their parameters are not copied."""
    return [dict(group) for group in optimizer.param_groups] if optimizer is not None else []


def put_back_groups(
    optimizer: Optimizer | None, groups: Sequence[Mapping[str, Any]], rates_only: bool = False
) -> None:
    """Make the optimizer's groups what `copy_groups` gave, or only what schedulers set in each epoch."""
    for group, before in zip(optimizer.param_groups if optimizer is not None else [], groups, strict=False):
        if not rates_only:
            group.clear()
        group.update({key: before[key] for key in (_RATES if rates_only else before) if key in before})


@LR_SCHEDULERS.register
class PolynomialLR(LRScheduler):
    """Learning rates that fall to 0 as a power of the epochs left.

        lr = base_lr (1 - epoch / T_max)^power,  0 from T_max on

    Distiller's scheduler of this name; PyTorch's has other arguments.

    Args:
        optimizer: whose learning rates to set.
        T_max: the epoch at which they reach 0, 1 or more.
        power: more than 0, finite.
        last_epoch: -1, or the last epoch done when resuming without a state_dict.

    Raises:
        DistillerError: an argument out of range.
    """

    def __init__(self, optimizer: Optimizer, T_max: int, power: float, last_epoch: int = -1) -> None:
        if T_max < 1:
            raise DistillerError(f"T_max must be 1 or more, got {T_max}")
        if not 0 < power < math.inf:
            raise DistillerError(f"power must be more than 0 and finite, got {power}")
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
        milestones: epochs from 0, in increasing order.
        gammas: one factor for each milestone, 0 or more.
        last_epoch: -1, or the last epoch done when resuming without a state_dict.

    Attributes:
        multiplicative_gammas: the factor before the first milestone (1.0), and from each one on.

    Raises:
        DistillerError: milestones out of order, not as many gammas, or one of them out of range.
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
        for name, numbers in (("milestones", milestones), ("gammas", gammas)):
            if not all(0 <= number < math.inf for number in numbers):
                raise DistillerError(f"{name} must be numbers of 0 or more, got {list(numbers)}")
        self.milestones = list(milestones)
        self.multiplicative_gammas = list(accumulate(gammas, operator.mul, initial=1.0))
        super().__init__(optimizer, last_epoch)

    def get_lr(self) -> list[float | Tensor]:
        """The learning rates at `last_epoch`, one per parameter group."""
        factor = self.multiplicative_gammas[bisect_right(self.milestones, self.last_epoch)]
        return [base_lr * factor for base_lr in self.base_lrs]


_TORCHS = (
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
)
for _scheduler in _TORCHS:
    LR_SCHEDULERS.register(_scheduler)


class _StandIn(Optimizer):
    """An optimizer of other parameters, in the same groups as another one."""

    def __init__(self, optimizer: Optimizer, groups: Sequence[Mapping[str, Any]]) -> None:
        copies = [
            {
                key: value.detach().clone() if isinstance(value, Tensor) else value
                for key, value in group.items()
            }
            | {"params": [torch.nn.Parameter(torch.zeros(1))]}
            for group in groups
        ]
        super().__init__(copies, dict(optimizer.defaults))

    def step(self, closure: Any = None) -> None:
        """Nothing: only its learning rates are looked at."""


def _check_rates(lr_scheduler: LRScheduler, optimizer: Optimizer, epoch: int) -> None:
    for group in lr_scheduler.optimizer.param_groups:
        rate = float(group["lr"])
        if not -_ROUNDING <= rate <= _HIGHEST:
            raise DistillerError(
                f"{type(lr_scheduler).__name__} has a learning rate of {rate:.6g} at epoch {epoch}; "
                f"rates must be from 0 to {_HIGHEST:.2g}"
            )
        momentum, beta = float(group.get("momentum", 0)), float(group.get("betas", (0,))[0])
        if not 0 <= momentum <= _HIGHEST:
            raise DistillerError(
                f"{type(lr_scheduler).__name__} has a momentum of {momentum:.6g} at epoch {epoch}; "
                f"it must be from 0 to {_HIGHEST:.2g}"
            )
        if not 0 <= beta < 1:
            raise DistillerError(
                f"{type(lr_scheduler).__name__} has a momentum of {beta:.6g} at epoch {epoch}; "
                f"as the first of {type(optimizer).__name__}'s betas it must be from 0 to below 1"
            )


def _numbers(path: tuple[str | int, ...], value: Any) -> Iterator[tuple[tuple[str | int, ...], float]]:
    if isinstance(value, (int, float)) and not isinstance(value, bool):
        yield path, value
    elif isinstance(value, (Mapping, list, tuple)):
        for key, item in value.items() if isinstance(value, Mapping) else enumerate(value):
            yield from _numbers((*path, key), item)


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
