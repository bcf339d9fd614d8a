"""Schedule extensions that make the model smaller in training, once the weights to be removed are zero.

Three names of Distiller's, for one thing: which structures are removed says `thinning_func_str`.
Knows nothing about how structures become zero.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Literal

from torch import nn

from distiller.channel_groups import find_channel_groups
from distiller.dummy_input import resolve_input_shape
from distiller.errors import DistillerError
from distiller.interfaces import Policy, StepContext
from distiller.names import unwrap
from distiller.registry import EXTENSIONS
from distiller.thinning.thin_model import (
    ThinningReport,
    contract_model,
    random_inputs,
    remove_channels,
    remove_filters,
)
from distiller.thinning.trial import copied

ThinningFunction = Literal["remove_filters", "remove_channels", "contract_model"]

_FUNCTIONS: Mapping[ThinningFunction, Callable[..., ThinningReport]] = {
    "remove_filters": remove_filters,
    "remove_channels": remove_channels,
    "contract_model": contract_model,
}


class Remover(Policy):
    """Removes zero structures from the model before the first mini-batch of each epoch of its policy.

    The pruners of that epoch have computed their masks by then, wherever they stand in the schedule. What
    is masked counts as zero, but by masks that last one mini-batch only: dropped filters, and the gates of
    an L0 regularizer that is still learning. With the weights go the optimizer's state, the masks, and
    what other policies keep of the removed weights.

    Attributes:
        name: the instance's name in the schedule.
        report: of the last thinning; None before the first.
    """

    def __init__(
        self,
        name: str,
        thinning_func_str: ThinningFunction,
        arch: str | None = None,
        dataset: str | None = None,
    ) -> None:
        self.name = name
        self.thinning_func_str: ThinningFunction = thinning_func_str
        self.arch = arch
        self.dataset = dataset
        self.report: ThinningReport | None = None

    def check(self, model: nn.Module) -> None:
        """See to it, before training, that the model can be traced and copied.

        Raises:
            DistillerError: it cannot, or nothing says what input it takes.
        """
        where = f"'{self.name}'"
        if self.dataset is not None:
            resolve_input_shape(self.dataset, None)
        find_channel_groups(model, random_inputs(model, self.arch, self.dataset, where), where)
        copied(unwrap(model), where)

    def on_minibatch_begin(self, ctx: StepContext) -> None:
        """Before the first mini-batch, when the masks of this epoch are there, thin the model."""
        if ctx.minibatch != 0:
            return
        if ctx.optimizer is None:
            raise DistillerError(
                f"'{self.name}': needs the optimizer, whose state becomes smaller with the weights; "
                "pass it to on_minibatch_begin"
            )
        thin = _FUNCTIONS[self.thinning_func_str]
        self.report = thin(
            ctx.model, ctx.masks, self.arch, self.dataset, ctx.optimizer, policies=ctx.policies
        )

    def has_final_sparsity(self, ctx: StepContext) -> bool:
        """Whether nothing more is removed: the best epoch is looked for among those of the smallest model."""
        return ctx.epoch >= ctx.window.last

    def describe(self, ctx: StepContext) -> str:  # noqa: D102
        structures = {
            "remove_filters": "filters",
            "remove_channels": "channels",
            "contract_model": "filters and channels",
        }[self.thinning_func_str]
        return f"{type(self).__name__}: removes the {structures} that are zero before the first mini-batch"


@EXTENSIONS.register
class FilterRemover(Remover):
    """Removes the filters that are zero, physically, and all that goes with them.

    It acts before the first mini-batch of each epoch of its policy, after the pruners of that epoch. Masked
    weights count as zero. A filter goes when those of all layers that are coupled with its own are zero.
    What is zero and cannot go is told in the log, with what keeps it.

    Args:
        name: the instance's name in the schedule.
        thinning_func_str: what is removed: filters, channels, or filters and then channels.
        arch: name of the architecture; looked at only when the model does not say what its input is like.
        dataset: name of the data set, likewise.

    Source: Distiller's own.
    """

    def __init__(
        self,
        name: str,
        thinning_func_str: ThinningFunction = "remove_filters",
        arch: str | None = None,
        dataset: str | None = None,
    ) -> None:
        super().__init__(name, thinning_func_str, arch, dataset)


@EXTENSIONS.register
class ChannelRemover(Remover):
    """Removes the channels that no layer reads, physically, and the filters that make them.

    It acts before the first mini-batch of each epoch of its policy, after the pruners of that epoch. Masked
    weights count as zero. A channel goes when its weights are zero in all layers that read it. What is zero
    and cannot go is told in the log, with what keeps it.

    Args:
        name: the instance's name in the schedule.
        thinning_func_str: what is removed: filters, channels, or filters and then channels.
        arch: name of the architecture; looked at only when the model does not say what its input is like.
        dataset: name of the data set, likewise.

    Source: Distiller's own.
    """

    def __init__(
        self,
        name: str,
        thinning_func_str: ThinningFunction = "remove_channels",
        arch: str | None = None,
        dataset: str | None = None,
    ) -> None:
        super().__init__(name, thinning_func_str, arch, dataset)


@EXTENSIONS.register
class StructureRemover(Remover):
    """Removes both filters and channels that are zero, physically, and all that goes with them.

    It acts before the first mini-batch of each epoch of its policy, after the pruners of that epoch. Masked
    weights count as zero. A filter goes when those of all layers that are coupled with its own are zero, a
    channel when its weights are zero in all layers that read it. What is zero and cannot go is told in the
    log, with what keeps it.

    Args:
        name: the instance's name in the schedule.
        thinning_func_str: what is removed: filters, channels, or filters and then channels.
        arch: name of the architecture; looked at only when the model does not say what its input is like.
        dataset: name of the data set, likewise.

    Source: Distiller's own.
    """

    def __init__(
        self,
        name: str,
        thinning_func_str: ThinningFunction = "contract_model",
        arch: str | None = None,
        dataset: str | None = None,
    ) -> None:
        super().__init__(name, thinning_func_str, arch, dataset)
