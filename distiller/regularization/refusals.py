"""What no regularizer takes.

Knows nothing about penalties, masks or training.
"""

from __future__ import annotations

from collections.abc import Mapping

from torch import Tensor

from distiller.errors import DistillerError

__all__ = ["refuse_nan"]


def refuse_nan(regularizer_name: str, params: Mapping[str, Tensor]) -> None:
    """See to it that parameters may be penalised; waits for their device once for each.

    Args:
        regularizer_name: the instance's name in the schedule.
        params: the regularized parameters by name.

    Raises:
        DistillerError: one of them holds NaN; names regularizer and parameter.
    """
    for param_name, param in params.items():
        count = int(param.isnan().sum())
        if count:
            raise DistillerError(
                f"regularizer '{regularizer_name}', '{param_name}': cannot be penalised, got {count} NaN in "
                f"{param.numel()} elements; training has diverged: resume from an earlier checkpoint with a "
                "lower learning rate"
            )
