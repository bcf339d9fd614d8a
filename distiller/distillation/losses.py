"""What a student loses by answering otherwise than its teacher: pure functions of logits and of features.

    softened probabilities   p_c = exp(z_c / T) / sum_j exp(z_j / T), over the classes c
    kl                       KL(p_teacher || p_student) = sum_c p_teacher,c * log(p_teacher,c / p_student,c)
    cross_entropy            - sum_c p_teacher,c * log p_student,c

Both have the same gradient; they differ by the entropy of the teacher's answer. Gradients of softened
probabilities shrink as 1 / T^2, so that the loss is multiplied by T^2 where its weight is to mean the same at
every temperature (Hinton et al., and Distiller), or is not, where figures of papers without it are repeated.
Knows nothing about networks or training.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Literal

import torch
from torch import Tensor
from torch.nn import functional as F

from distiller.errors import DistillerError

__all__ = [
    "LEAST_TEMPERATURE",
    "MOST_TEMPERATURE",
    "LossKind",
    "attention_loss",
    "attention_map",
    "blended_log_probabilities",
    "check_temperature",
    "distillation_loss",
    "divergence",
    "hint_loss",
    "softened_log_probabilities",
    "teacher_label_loss",
]

LossKind = Literal["kl", "cross_entropy"]
LEAST_TEMPERATURE, MOST_TEMPERATURE = 0.01, 1000.0
"""Below, only the most likely class counts, and T^2 vanishes; above, all classes do alike, to float32."""


def check_temperature(argument: str, value: float) -> None:
    """Refuse a temperature that nothing can be learned at.

    Args:
        argument: what it is called, for the message; empty: nothing.
        value: T.

    Raises:
        DistillerError: it is not a number from 0.01 to 1000.
    """
    if not LEAST_TEMPERATURE <= value <= MOST_TEMPERATURE:
        told = f"must be a number from {LEAST_TEMPERATURE:g} to {MOST_TEMPERATURE:g}, got {value}"
        raise DistillerError(f"{argument} {told}".lstrip())


def distillation_loss(
    student_logits: Tensor,
    teacher_logits: Tensor,
    temperature: float = 1.0,
    kind: LossKind = "kl",
    scale_by_temperature_squared: bool = True,
) -> Tensor:
    """How far a student's answers are from its teacher's: mean over the batch, sum over the classes.

    Args:
        student_logits: (batch, classes), or (batch, classes, ...) for answers at several places.
        teacher_logits: of the same shape; no gradient flows into them.
        temperature: T, from 0.01 to 1000; the higher, the more the unlikely classes weigh.
        kind: the divergence.
        scale_by_temperature_squared: multiply by T^2.

    Returns:
        A scalar.

    Raises:
        DistillerError: the shapes differ, or the temperature is out of its range.

    Source: Hinton, Vinyals, Dean, "Distilling the Knowledge in a Neural Network" (arXiv 1503.02531).
    """
    targets = softened_log_probabilities(teacher_logits.detach(), temperature)
    loss = divergence(student_logits, targets, temperature, kind)
    return loss * temperature**2 if scale_by_temperature_squared else loss


def divergence(
    student_logits: Tensor, target_log_probabilities: Tensor, temperature: float, kind: LossKind = "kl"
) -> Tensor:
    """`distillation_loss`, without T^2, from a teacher's softened log-probabilities.

    Raises:
        DistillerError: the shapes differ.
    """
    if student_logits.shape != target_log_probabilities.shape:
        raise DistillerError(
            f"distillation: the student answers with {tuple(student_logits.shape)}, the teacher with "
            f"{tuple(target_log_probabilities.shape)}; both must have the same classes"
        )
    ours = softened_log_probabilities(student_logits, temperature)
    targets = target_log_probabilities.to(ours.dtype)
    probabilities = targets.exp()
    if kind == "cross_entropy":
        return -(probabilities * ours).sum(1).mean()
    return (probabilities * (targets - ours)).sum(1).mean()


def softened_log_probabilities(logits: Tensor, temperature: float) -> Tensor:
    """log softmax(logits / T) over the classes, which are dimension 1; computed in float32 at least.

    Raises:
        DistillerError: there are no two dimensions, or the temperature is out of its range.
    """
    if logits.dim() < 2:
        raise DistillerError(
            f"distillation: logits must have the shape (batch, classes), got {tuple(logits.shape)}"
        )
    check_temperature("distillation: temperature", temperature)
    precise = logits if logits.dtype == torch.float64 else logits.float()
    return F.log_softmax(precise / temperature, dim=1)


def blended_log_probabilities(
    teachers_logits: Sequence[Tensor], weights: Sequence[float], temperature: float
) -> Tensor:
    """log sum_k w_k softmax(z_k / T): what several teachers say together, as softened probabilities.

    Args:
        teachers_logits: of each teacher, of one shape.
        weights: above 0; divided by their sum.
        temperature: T, from 0.01 to 1000.
    """
    answers = [softened_log_probabilities(logits, temperature) for logits in teachers_logits]
    if len(answers) == 1:
        return answers[0]
    total = sum(weights)
    shares = [math.log(weight / total) for weight in weights]
    return torch.logsumexp(
        torch.stack([answer + share for answer, share in zip(answers, shares, strict=True)]), 0
    )


def teacher_label_loss(student_logits: Tensor, target_log_probabilities: Tensor) -> Tensor:
    """Cross-entropy with the class that the teacher finds most likely; a scalar."""
    precise = student_logits if student_logits.dtype == torch.float64 else student_logits.float()
    return F.cross_entropy(precise, target_log_probabilities.argmax(1))


def hint_loss(student_features: Tensor, teacher_features: Tensor) -> Tensor:
    """The mean squared difference of two layers' outputs.

    Args:
        student_features: brought to the teacher's channels by a regressor where these are others.
        teacher_features: of the same shape.

    Source: Romero et al., "FitNets: Hints for Thin Deep Nets" (arXiv 1412.6550), equation 3, without its 1/2.
    """
    return F.mse_loss(student_features, teacher_features)


def attention_map(features: Tensor) -> Tensor:
    """Where a layer looks: its squared outputs summed over the channels, scaled to an L2 norm of 1.

    (batch, channels, height, width) -> (batch, height * width)
    """
    return F.normalize(features.square().sum(1).flatten(1), dim=1)


def attention_loss(student_features: Tensor, teacher_features: Tensor) -> Tensor:
    """The L2 distance of two layers' attention maps: mean over the batch; a scalar.

    Args:
        student_features: (batch, channels, height, width).
        teacher_features: (batch, any channels, height, width).

    Source: Zagoruyko, Komodakis, "Paying More Attention to Attention" (arXiv 1612.03928), equation 2; its
    authors' code squares the distance.
    """
    difference = attention_map(student_features) - attention_map(teacher_features)
    return torch.linalg.vector_norm(difference, dim=1).mean()
