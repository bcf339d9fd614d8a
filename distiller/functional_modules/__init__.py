"""Functional operations as modules: in the forwards of a model, in attention and in the LSTM."""

from distiller.functional_modules.attention import DecomposedAttention, ScaledDotProductAttention
from distiller.functional_modules.lstm import DistillerLSTM, convert_model_to_distiller_lstm
from distiller.functional_modules.lstm_cell import DistillerLSTMCell
from distiller.functional_modules.rewritten_class import is_rewritten
from distiller.functional_modules.to_modules import LeftOperations, ModulesReport, to_modules

__all__ = [
    "DecomposedAttention",
    "DistillerLSTM",
    "DistillerLSTMCell",
    "LeftOperations",
    "ModulesReport",
    "ScaledDotProductAttention",
    "convert_model_to_distiller_lstm",
    "is_rewritten",
    "to_modules",
]
