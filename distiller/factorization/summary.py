"""What ranks a model's layers have: where factors break even, and how many singular values hold its energy.

Knows nothing about how tables are shown.
"""

from __future__ import annotations

from typing import Any

import pandas as pd
from torch import nn

from distiller.errors import UsageError
from distiller.factorization.forms import default_form, refusal, shape_of
from distiller.factorization.ranks import rank_for_energy
from distiller.macs import count_macs
from distiller.names import named_modules

__all__ = ["low_rank_summary"]

_ENERGIES = (0.90, 0.95, 0.99)


def low_rank_summary(model: nn.Module, dummy_input: Any) -> pd.DataFrame:
    """A row for each layer that can be factored, in the form that it would get.

    Columns: Name, Shape (of its weight), Form (svd of linear layers, channel of convolutions), Full rank,
    Break-even rank (m n / (m + n) of a matrix m x n: the rank at which factors have as many parameters, and
    of these forms as many MACs), Rank for 90 %, 95 % and 99 % of the sum of squared singular values; MACs.

    Args:
        model: the model.
        dummy_input: a tensor, or a tuple of the model's arguments: a batch of one.

    Raises:
        UsageError: no layer can be factored.
    """
    costs = {cost.name: cost for cost in count_macs(model, dummy_input)}
    rows = []
    for name, layer in named_modules(model):
        if name not in costs or refusal(layer) is not None:
            continue
        form = default_form(layer)
        shape = shape_of(layer, costs[name].input_shape, costs[name].macs)
        weight: Any = layer.weight
        ranks = [rank_for_energy(weight.detach(), form, energy)[0] for energy in _ENERGIES]
        exact = shape.break_even_exact(form)
        rows.append([name, str(shape.weight), form, shape.most(form)[0], exact, *ranks, shape.macs])
    if not rows:
        raise UsageError("summary low-rank: the model has no layer that can be factored")
    columns = ["Name", "Shape", "Form", "Full rank", "Break-even rank"]
    columns += [f"Rank for {energy:.0%}".replace("%", " %") for energy in _ENERGIES] + ["MACs"]
    return pd.DataFrame(rows, columns=pd.Index(columns))
