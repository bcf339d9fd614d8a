"""Networks that answer with auxiliary classifiers beside the main one while they train.

torchvision's Inception v3 and GoogLeNet give a named tuple of `logits` and `aux_logits`, or `aux_logits1` and
`aux_logits2`.
Knows nothing about early exits.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from torch import Tensor

__all__ = ["loss_with_auxiliaries", "main_logits"]

_ONE, _SEVERAL = 0.4, 0.3


def main_logits(output: Any) -> Any:
    """The logits of the main classifier; what has no auxiliary ones is it itself."""
    has_auxiliaries = isinstance(output, tuple) and "logits" in getattr(output, "_fields", ())
    return output.logits if has_auxiliaries else output  # type: ignore[attr-defined]


def loss_with_auxiliaries(output: Any, labels: Tensor, criterion: Callable[[Any, Tensor], Tensor]) -> Tensor:
    """The loss of the main classifier, and that of each auxiliary one with its paper's weight.

    Args:
        output: of the network.
        labels: (batch,).
        criterion: of one classifier's logits, (batch, classes), and the labels.

    Source: the weights are 0.3 for each of GoogLeNet's two (Szegedy et al., "Going Deeper with Convolutions",
    2015, section 5), and 0.4 for Inception v3's one, as torchvision trains it.
    """
    logits = main_logits(output)
    loss = criterion(logits, labels)
    if logits is output:
        return loss
    fields = output._asdict()
    weight = _ONE if "aux_logits" in fields else _SEVERAL
    for name, auxiliary in fields.items():
        if name.startswith("aux") and auxiliary is not None:
            loss = loss + weight * criterion(auxiliary, labels)
    return loss
