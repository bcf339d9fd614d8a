"""A policy that replaces layers of the model: what the scheduler and a schedule's reader must know of it.

Policies of other epochs name parameters that the model does not have yet, or no longer has; they are checked
against copies of the model as it will be, and as it was.
Knows nothing about what layers are replaced by.
"""

from __future__ import annotations

from abc import abstractmethod

from torch import nn

from distiller.epoch_window import EpochWindow
from distiller.interfaces import Policy


class LayerReplacer(Policy):
    """Replaces layers of the model once, when an epoch begins, before any other policy acts in it."""

    @abstractmethod
    def epoch_of_replacement(self, window: EpochWindow) -> int:
        """The epoch at whose beginning it acts, if its policy has this window."""

    @abstractmethod
    def is_done(self, model: nn.Module) -> bool:
        """Whether the model has been changed so already."""

    @abstractmethod
    def foreseen(self, model: nn.Module) -> nn.Module:
        """A copy of the model as it will be, with other values.

        Raises:
            DistillerError: it cannot be done.
        """

    @abstractmethod
    def recalled(self, model: nn.Module) -> nn.Module:
        """A copy of the model, on which it has been done, as it was before, with other values."""
