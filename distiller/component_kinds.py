"""The kinds of components that a schedule is made of, and what a policy makes of each.

Knows nothing about files.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import distiller.factorization
import distiller.learning_rate
import distiller.pruning
import distiller.quantization
import distiller.quantization.codebook
import distiller.quantization.training
import distiller.regularization
import distiller.weight_sharing  # noqa: F401 - importing a package fills its registry
from distiller.interfaces import Policy
from distiller.policy import LRPolicy, PruningPolicy, QuantizationPolicy, RegularizationPolicy
from distiller.policy_args import PruningArgs, RegularizationArgs
from distiller.registry import EXTENSIONS, LR_SCHEDULERS, PRUNERS, QUANTIZERS, REGULARIZERS, Registry
from distiller.schedule_shape import SECTION_OF


@dataclass(frozen=True, slots=True)
class Kind:
    """A kind of component: its section, its word in a policy, its registry, and how it becomes a policy.

    Attributes:
        args: factory whose keywords are the policy's `args:`; None when it takes none.
    """

    section: str
    word: str
    registry: Registry
    make_policy: Callable[..., Policy]
    args: Callable[..., Any] | None = None


# In the order of instantiation: a quantizer may change the optimizer that an LR scheduler is given.
KINDS = (
    Kind("quantizers", "quantizer", QUANTIZERS, QuantizationPolicy),
    Kind("pruners", "pruner", PRUNERS, lambda pruner, args: PruningPolicy(pruner, args), PruningArgs),
    Kind(
        "regularizers",
        "regularizer",
        REGULARIZERS,
        lambda regularizer, args: RegularizationPolicy(regularizer, **args),
        RegularizationArgs,
    ),
    Kind("lr_schedulers", "lr_scheduler", LR_SCHEDULERS, LRPolicy),
    Kind("extensions", "extension", EXTENSIONS, lambda extension: extension),
)
LR_KIND, EXTENSION_KIND = KINDS[3:]
assert {kind.word: kind.section for kind in KINDS} == SECTION_OF
