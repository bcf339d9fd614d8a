"""Knowledge distillation: losses, teachers, the answers that are kept, hints, and the policy."""

from distiller.distillation.hints import Hint, Hints
from distiller.distillation.logits_cache import LogitsCache
from distiller.distillation.losses import (
    attention_loss,
    attention_map,
    blended_log_probabilities,
    distillation_loss,
    divergence,
    hint_loss,
    softened_log_probabilities,
    teacher_label_loss,
)
from distiller.distillation.policy import DistillationLossWeights, KnowledgeDistillationPolicy
from distiller.distillation.teachers import Teacher, Teachers, final_logits

__all__ = [
    "DistillationLossWeights",
    "Hint",
    "Hints",
    "KnowledgeDistillationPolicy",
    "LogitsCache",
    "Teacher",
    "Teachers",
    "attention_loss",
    "attention_map",
    "blended_log_probabilities",
    "distillation_loss",
    "divergence",
    "final_logits",
    "hint_loss",
    "softened_log_probabilities",
    "teacher_label_loss",
]
