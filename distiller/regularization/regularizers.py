"""Regularizers: a penalty for the loss, and masks of what it has made small.

    L1Regularizer             lambda * sum |w|
    GroupLassoRegularizer     lambda * sum_g ||w_g||_2
    GroupVarianceRegularizer  lambda / var_j ||w[:, j]||_2

Which parameters, how strongly and in which groups: `regimes`. Knows nothing about when
they are called, losses or how masks are applied.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Annotated, Any, Literal, get_args

import torch
from torch import Tensor, nn

from distiller.errors import DistillerError, did_you_mean
from distiller.names import named_parameters
from distiller.pruning.criteria import create_mask_threshold_criterion
from distiller.pruning.settings import NumbersByName, some_by_name
from distiller.registry import REGULARIZERS
from distiller.regularization.penalties import group_lasso, group_mask, group_variance, l1
from distiller.regularization.regimes import FAMILIES, Regime, Regimes, checked_entry

__all__ = ["GroupLassoRegularizer", "GroupVarianceRegularizer", "L1Regularizer"]

GroupCriteria = Literal["Max", "Mean_Abs"]
_GROUP, _CHANNELS = checked_entry(tuple(FAMILIES)), checked_entry(("Channels",))


class _PenaltyPerParameter(ABC):
    """A regularizer whose penalty is a sum over parameters."""

    def __init__(self, name: str, regimes: Regimes) -> None:
        self.name = name
        self._regimes = regimes

    def select(self, param_names: Sequence[str]) -> tuple[str, ...]:
        """Every parameter that `reg_regims` names."""
        return self._regimes.select(param_names)

    def penalty(self, params: Mapping[str, Tensor]) -> Tensor:
        """The sum of lambda * penalty over the parameters in `params` that `reg_regims` names."""
        terms = [
            regime.strength * self._penalty(param, regime) for _, param, regime in self._regimes.of(params)
        ]
        return torch.stack(terms).sum() if terms else torch.zeros(())

    def threshold_masks(self, params: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """Masks of the parameters in `params` that `reg_regims` names; {} without threshold criteria.

        Raises:
            DistillerError: a parameter holds NaN.
        """
        masks: dict[str, Tensor] = {}
        for param_name, param, regime in self._regimes.of(params):
            with self._naming(param_name):
                mask = self._mask(param, regime)
            if mask is not None:
                masks[param_name] = mask
        return masks

    @abstractmethod
    def _penalty(self, param: Tensor, regime: Regime) -> Tensor:
        """The penalty without lambda."""

    def _mask(self, param: Tensor, regime: Regime) -> Tensor | None:
        return None

    @contextmanager
    def _naming(self, param_name: str) -> Iterator[None]:
        try:
            yield
        except DistillerError as error:
            raise DistillerError(f"regularizer '{self.name}', '{param_name}': {error}") from error


@REGULARIZERS.register
class L1Regularizer(_PenaltyPerParameter):
    """Draws single elements to zero: lambda * sum |w|.

    On the scales of batch norms it is the penalty of network slimming.

    Args:
        name: the instance's name in the schedule.
        model: the model in training; names are checked against it.
        reg_regims: lambda, 0 or more, by parameter name, pattern or `*`.
        threshold_criteria: 'Max' or 'Mean_Abs', which are the same for single elements: after each step
            those with |w| <= lambda are set to zero. None (default): they are not. (Distiller took any text.)

    Raises:
        DistillerError: a name that the model does not have, unknown criteria, or a lambda that is no number
            of 0 or more.

    Source: Liu et al., "Learning Efficient Convolutional Networks through Network Slimming" (2017).
    """

    def __init__(
        self,
        name: str,
        model: nn.Module,
        reg_regims: NumbersByName,
        threshold_criteria: GroupCriteria | None = None,
    ) -> None:
        super().__init__(name, Regimes(model, reg_regims))
        _check_criteria(threshold_criteria)
        self._has_threshold = threshold_criteria is not None

    def _penalty(self, param: Tensor, regime: Regime) -> Tensor:
        return l1(param)

    def _mask(self, param: Tensor, regime: Regime) -> Tensor | None:
        return create_mask_threshold_criterion(param, regime.strength) if self._has_threshold else None


@REGULARIZERS.register
class GroupLassoRegularizer(_PenaltyPerParameter):
    """Draws whole groups of elements to zero: lambda * sum_g ||w_g||_2.

    Args:
        name: the instance's name in the schedule.
        model: the model in training; names and shapes are checked against it.
        reg_regims: [lambda, group] by parameter name, pattern or `*`: lambda is 0 or more, group one of
            2D, Rows, Cols, Rows+Cols, Channels, Filters, 3D, 4D and Channels+4D (table in `regimes`).
            (Distiller failed at Channels+4D.)
        threshold_criteria: 'Max' or 'Mean_Abs': after each step the groups whose largest or mean
            magnitude is at most lambda are set to zero. (Distiller could not do it for Rows+Cols, 4D and
            Channels+4D.) None (default): they are not.

    Raises:
        DistillerError: a name that the model does not have, an unknown group or criteria, a lambda that
            is no number of 0 or more, or a tensor that does not have such groups.

    Source: Wen et al., "Learning Structured Sparsity in Deep Neural Networks" (2016).
    """

    def __init__(
        self,
        name: str,
        model: nn.Module,
        reg_regims: Annotated[dict[str, Annotated[list[Any], _GROUP]], some_by_name],
        threshold_criteria: GroupCriteria | None = None,
    ) -> None:
        super().__init__(name, Regimes(model, reg_regims, groups=tuple(FAMILIES)))
        _check_criteria(threshold_criteria)
        self._criteria = threshold_criteria

    def _penalty(self, param: Tensor, regime: Regime) -> Tensor:
        assert regime.group is not None
        return group_lasso(param, regime.group)

    def _mask(self, param: Tensor, regime: Regime) -> Tensor | None:
        assert regime.group is not None
        if self._criteria is None:
            return None
        return group_mask(param, regime.group, regime.strength, self._criteria)


@REGULARIZERS.register
class GroupVarianceRegularizer(_PenaltyPerParameter):
    """Drives the norms of the channels apart, so that some can go: lambda / var_j ||w[:, j]||_2.

    Args:
        name: the instance's name in the schedule.
        model: the model in training; names and shapes are checked against it.
        reg_regims: [lambda, Channels] by parameter name, pattern or `*`; lambda is 0 or more.

    Raises:
        DistillerError: a name that the model does not have, another group than Channels, a lambda that
            is no number of 0 or more, or a tensor with fewer than two channels.
    """

    def __init__(
        self,
        name: str,
        model: nn.Module,
        reg_regims: Annotated[dict[str, Annotated[list[Any], _CHANNELS]], some_by_name],
    ) -> None:
        super().__init__(name, Regimes(model, reg_regims, groups=("Channels",)))
        for param_name, param, _ in self._regimes.of(dict(named_parameters(model))):
            if param.size(1) < 2:
                raise DistillerError(
                    f"reg_regims, '{param_name}': the variance of channel norms wants two channels or more, "
                    f"got shape {tuple(param.shape)}"
                )

    def _penalty(self, param: Tensor, regime: Regime) -> Tensor:
        return group_variance(param)


def _check_criteria(criteria: str | None) -> None:
    accepted = get_args(GroupCriteria)
    if criteria is not None and criteria not in accepted:
        raise DistillerError(
            f"threshold_criteria must be {' or '.join(accepted)}, or none, got '{criteria}'"
            + did_you_mean(criteria, accepted)
        )
