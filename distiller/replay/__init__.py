"""Running a model in part: what depends on a few of its tensors, for several values of them."""

from distiller.replay.clean_pass import clean_pass
from distiller.replay.folding import Fold, folded_norms
from distiller.replay.program import Program, read_program
from distiller.replay.rerun import Rerun
from distiller.replay.variant import Variant, applied

__all__ = [
    "Fold",
    "Program",
    "Rerun",
    "Variant",
    "applied",
    "clean_pass",
    "folded_norms",
    "read_program",
]
