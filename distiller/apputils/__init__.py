"""What a program around the library needs: data, training loop, checkpoints, results."""

from distiller.apputils.checkpoint import (
    Checkpoint,
    load_checkpoint,
    load_lean_checkpoint,
    load_state,
    read_checkpoint,
    save_checkpoint,
)
from distiller.apputils.data_loaders import DataBundle, load_data
from distiller.apputils.determinism import set_deterministic
from distiller.apputils.distillation import KnowledgeDistillation
from distiller.apputils.image_classifier import ClassifierCompressor
from distiller.apputils.inference_state import inference_state
from distiller.apputils.packed_checkpoint import pack
from distiller.apputils.results_card import ResultsCard, build_card
from distiller.apputils.rewind import WeightRewinder
from distiller.apputils.training_loop import evaluate, train_epoch

__all__ = [
    "Checkpoint",
    "ClassifierCompressor",
    "DataBundle",
    "KnowledgeDistillation",
    "ResultsCard",
    "WeightRewinder",
    "build_card",
    "evaluate",
    "inference_state",
    "load_checkpoint",
    "load_data",
    "load_lean_checkpoint",
    "load_state",
    "pack",
    "read_checkpoint",
    "save_checkpoint",
    "set_deterministic",
    "train_epoch",
]
