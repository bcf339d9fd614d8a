"""How high an image's label stands among the classes, by its logits.

Knows nothing about models or data.
"""

from __future__ import annotations

import torch
from torch import Tensor


def label_ranks(logits: Tensor, labels: Tensor) -> Tensor:
    """How many classes stand above the label: 0 is a right answer.

    Of equal logits, which quantized networks often have, that of the lower class counts as the higher, as in
    `argmax`; NaN is above every number, and a label whose logit is NaN is wrong.

    Args:
        logits: (batch, classes).
        labels: (batch,), integers.

    Returns:
        (batch,) integers, 0 .. classes.
    """
    of_label = logits.gather(1, labels.unsqueeze(1))  # (batch, 1)
    is_lower_class = torch.arange(logits.shape[1], device=logits.device) < labels.unsqueeze(1)
    is_above = ~(logits <= of_label) | ((logits == of_label) & is_lower_class)
    return is_above.sum(dim=1)
