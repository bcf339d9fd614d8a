"""A mixture whose means, precisions and mixing weights are learned; the zero component's mean is not.

The mixing weights are a softmax: of all components where the share of zero is learned too, else of the
others, which have 1 - pi_0 between them.

`okz12` is a setting that reproduces the figures of okz12/NeuralNetworkCompression: its mixing weights of the
components other than zero are squared, so that all of them sum to less than 1, and its density has the
constant sqrt(lambda) / (2 pi), with pi to seven digits.
Knows nothing about models or training.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor

from distiller.weight_sharing.mixture import LOG_2PI, Mixture, mixture_penalty
from distiller.weight_sharing.priors import BetaPrior, GammaPrior

__all__ = ["LearnedMixture"]

_OKZ12_CONSTANT = math.log(2 * 3.1415928) - LOG_2PI / 2
"""Its pi: with it the figures of its first batch come out to the last digit."""


class LearnedMixture:
    """The parameters of a mixture, as float64 tensors that an optimizer can be given.

    Args:
        start: where they begin; its mixing weights sum to 1.
        learns_zero_share: pi_0 is learned too.
        okz12: see the module.
        device: where the tensors live.

    Attributes:
        free_means: (components - 1,).
        log_precisions: (components,).
        logits: of the mixing weights, (components,) if pi_0 is learned, else (components - 1,).
    """

    def __init__(
        self,
        start: Mixture,
        learns_zero_share: bool = False,
        okz12: bool = False,
        device: torch.device | str = "cpu",
    ) -> None:
        def learned(values: Tensor) -> Tensor:
            return values.detach().to(device, torch.float64, copy=True).requires_grad_()

        self.learns_zero_share, self.okz12 = learns_zero_share, okz12
        self.free_means = learned(start.means[1:])
        self.log_precisions = learned(start.precisions.log())
        self.logits = learned(start.mixing.log()[0 if learns_zero_share else 1 :])
        self._log_fixed_share = float(start.mixing[0].log())

    @property
    def tensors(self) -> dict[str, Tensor]:
        """What is learned, by name."""
        return {"means": self.free_means, "log_precisions": self.log_precisions, "logits": self.logits}

    def means(self) -> Tensor:
        """(components,); the first is 0."""
        return torch.cat((torch.zeros_like(self.free_means[:1]), self.free_means))

    def log_mixing(self) -> Tensor:
        """log pi, (components,)."""
        if self.learns_zero_share:
            return self.logits.log_softmax(0)
        fixed = torch.full_like(self.logits[:1], self._log_fixed_share)
        others = self.logits.log_softmax(0) + math.log(-math.expm1(self._log_fixed_share))
        return torch.cat((fixed, 2 * others if self.okz12 else others))

    def penalty(self, values: Tensor) -> Tensor:
        """-sum_i log sum_j pi_j N(w_i; mu_j, 1 / lambda_j), a scalar."""
        log_mixing = self.log_mixing() - (_OKZ12_CONSTANT if self.okz12 else 0.0)
        return mixture_penalty(values, self.means(), self.log_precisions, log_mixing)

    def hyper_penalty(
        self, of_zero: GammaPrior | None, of_others: GammaPrior | None, of_zero_share: BetaPrior | None
    ) -> Tensor:
        """The sum of the priors' penalties, a scalar."""
        total = self.log_precisions.new_zeros(())
        if of_zero is not None:
            total = total + of_zero.penalty(self.log_precisions[:1])
        if of_others is not None:
            total = total + of_others.penalty(self.log_precisions[1:])
        if of_zero_share is not None:
            total = total + of_zero_share.penalty(self.log_mixing()[0])
        return total

    @torch.no_grad()
    def mixture(self) -> Mixture:
        """As it is now, in main memory."""

        def plain(values: Tensor) -> Tensor:
            return values.detach().double().cpu()

        return Mixture(plain(self.means()), plain(self.log_precisions).exp(), plain(self.log_mixing()).exp())

    @torch.no_grad()
    def load(self, tensors: dict[str, Tensor]) -> None:
        """Take over `tensors` of a mixture of as many components."""
        for name, tensor in self.tensors.items():
            tensor.copy_(tensors[name])
