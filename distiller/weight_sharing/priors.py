"""Hyper-priors of a mixture: Gamma on a component's precision, Beta on the share of the zero component.

Each is the negative logarithm of the density, without the constants that nothing is learned from.
Source: Ullrich, Meeds, Welling, arXiv 1702.04008, section 4 and appendix A.
Knows nothing about weights or training.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

from torch import Tensor

from distiller.errors import DistillerError
from distiller.pruning.settings import LARGEST
from distiller.schedule_yaml import shown
from distiller.signatures import Checked

__all__ = ["BETA_SETTINGS", "GAMMA_SETTINGS", "BetaPrior", "GammaPrior"]

_BY_MOMENTS, _BY_SHAPE = ("mean", "variance"), ("alpha", "beta")


@dataclass(frozen=True, slots=True)
class GammaPrior:
    """Gamma(lambda; alpha, beta), of mean alpha / beta and mode (alpha - 1) / beta.

    Attributes:
        alpha: shape, above 0.
        beta: rate, above 0.
    """

    alpha: float
    beta: float

    @classmethod
    def of(cls, settings: Mapping[str, float], argument: str = "") -> GammaPrior:
        """From {alpha, beta}, or from {mean, variance}: beta = mean / variance, alpha = mean * beta.

        Raises:
            DistillerError: other keys, or a number that is not above 0.
        """
        _check(settings, (_BY_SHAPE, _BY_MOMENTS), argument)
        if "alpha" in settings:
            return cls(settings["alpha"], settings["beta"])
        rate = settings["mean"] / settings["variance"]
        return cls(settings["mean"] * rate, rate)

    def penalty(self, log_precisions: Tensor) -> Tensor:
        """sum_j (1 - alpha) log lambda_j + beta lambda_j, a scalar."""
        return ((1 - self.alpha) * log_precisions + self.beta * log_precisions.exp()).sum()


@dataclass(frozen=True, slots=True)
class BetaPrior:
    """Beta(pi_0; alpha, beta), of mean alpha / (alpha + beta).

    Attributes:
        alpha: above 0; larger: more weights at zero.
        beta: above 0; larger: fewer.
    """

    alpha: float
    beta: float

    @classmethod
    def of(cls, settings: Mapping[str, float], argument: str = "") -> BetaPrior:
        """From {alpha, beta}.

        Raises:
            DistillerError: other keys, or a number that is not above 0.
        """
        _check(settings, (_BY_SHAPE,), argument)
        return cls(settings["alpha"], settings["beta"])

    def penalty(self, log_share: Tensor) -> Tensor:
        """(1 - alpha) log pi_0 + (1 - beta) log(1 - pi_0), a scalar.

        Args:
            log_share: log pi_0, below 0.
        """
        return ((1 - self.alpha) * log_share + (1 - self.beta) * (-log_share.expm1()).log()).sum()


def _check(settings: Mapping[str, float], choices: tuple[tuple[str, str], ...], argument: str) -> None:
    where = f"{argument} " if argument else ""
    if set(settings) not in [set(keys) for keys in choices]:
        wanted = " or ".join(f"{{{first}: ..., {second}: ...}}" for first, second in choices)
        raise DistillerError(f"{where}must be {wanted}, got {shown(dict(settings))}")
    for key, value in settings.items():
        if isinstance(value, bool) or not isinstance(value, int | float) or not 0 < value <= LARGEST:
            raise DistillerError(
                f"{where}{key}: must be more than 0 and at most {LARGEST:g}, got {shown(value)}"
            )


def _schema(*choices: tuple[str, str]) -> dict[str, object]:
    number = {"type": "number", "exclusiveMinimum": 0, "maximum": LARGEST}
    either = [
        {
            "type": "object",
            "properties": dict.fromkeys(keys, number),
            "required": list(keys),
            "additionalProperties": False,
        }
        for keys in choices
    ]
    return {"anyOf": either}


GAMMA_SETTINGS = Checked(GammaPrior.of, _schema(_BY_SHAPE, _BY_MOMENTS))
"""For the annotation of a dict: what `GammaPrior.of` takes."""
BETA_SETTINGS = Checked(BetaPrior.of, _schema(_BY_SHAPE))
"""For the annotation of a dict: what `BetaPrior.of` takes."""
