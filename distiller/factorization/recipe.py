"""A factorization recipe: which layers became which factors, as plain data.

A recipe and the weights that were saved after it make the factored model out of a fresh one. It says how many
thinning recipes came before it, so that both kinds are carried out in the order in which they came about.
Knows nothing about how a recipe comes about or is carried out.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from distiller.errors import CheckpointError, did_you_mean
from distiller.factorization.forms import FORMS, Form, Rank
from distiller.schedule_yaml import shown

__all__ = ["FactoredLayer", "FactorizationRecipe"]


@dataclass(frozen=True, slots=True)
class FactoredLayer:
    """What one layer becomes.

    Attributes:
        name: canonical name of the layer.
        form: of its factors.
        rank: one number; two of `tucker2`.
        shape: of the weight that is replaced.
        is_sparse: whether a sparse layer of the same shape is added.
    """

    name: str
    form: Form
    rank: Rank
    shape: tuple[int, ...]
    is_sparse: bool = False


@dataclass(frozen=True, slots=True)
class FactorizationRecipe:
    """One factorization of a model.

    Attributes:
        layers: those that were factored.
        kept: names of those that were looked at and left whole.
        after_thinnings: how many of the model's thinning recipes came before.
    """

    layers: tuple[FactoredLayer, ...]
    kept: tuple[str, ...] = ()
    after_thinnings: int = 0

    def to_plain(self) -> dict[str, Any]:
        """The recipe as dicts, lists, numbers and strings; as JSON it stays the same."""
        return {
            "layers": {
                layer.name: {
                    "form": layer.form,
                    "rank": list(layer.rank),
                    "shape": list(layer.shape),
                    "sparse": layer.is_sparse,
                }
                for layer in self.layers
            },
            "kept": list(self.kept),
            "after_thinnings": self.after_thinnings,
        }

    @classmethod
    def from_plain(cls, plain: Any, where: str) -> FactorizationRecipe:
        """Read what `to_plain` wrote.

        Args:
            plain: `layers`, `kept` and `after_thinnings`.
            where: the file and the place in it, named in errors.

        Raises:
            CheckpointError: it is malformed; says where.
        """
        if not isinstance(plain, Mapping):
            raise CheckpointError(f"{where}: must be a dict, got {shown(plain)}")
        layers, kept, after = (plain.get(key) for key in ("layers", "kept", "after_thinnings"))
        if not isinstance(layers, Mapping):
            raise CheckpointError(f"{where}.layers: must be a dict by name of a layer, got {shown(layers)}")
        if not isinstance(kept, list) or not all(isinstance(name, str) for name in kept):
            raise CheckpointError(f"{where}.kept: must be a list of names, got {shown(kept)}")
        if type(after) is not int or after < 0:
            raise CheckpointError(
                f"{where}.after_thinnings: must be a whole number from 0, got {shown(after)}"
            )
        read = tuple(_layer(name, entry, f"{where}.layers['{name}']") for name, entry in layers.items())
        return cls(read, tuple(kept), after)


def _layer(name: Any, entry: Any, where: str) -> FactoredLayer:
    if not isinstance(name, str) or not isinstance(entry, Mapping):
        raise CheckpointError(f"{where}: must be a dict, by the name of a layer, got {shown(entry)}")
    unknown = [key for key in entry if key not in ("form", "rank", "shape", "sparse")]
    if unknown:
        raise CheckpointError(f"{where}: '{unknown[0]}' is unknown; there are form, rank, shape and sparse")
    form, is_sparse = entry.get("form"), entry.get("sparse", False)
    if form not in FORMS:
        hint = did_you_mean(str(form), FORMS)
        raise CheckpointError(f"{where}.form: must be one of {', '.join(FORMS)}, got {shown(form)}{hint}")
    rank = _sizes(entry.get("rank"), f"{where}.rank", (2,) if form == "tucker2" else (1,))
    shape = _sizes(entry.get("shape"), f"{where}.shape", (2,) if form == "svd" else (3, 4))
    if not isinstance(is_sparse, bool) or (is_sparse and form not in ("svd", "channel")):
        raise CheckpointError(
            f"{where}.sparse: must be true or false, and true of svd and channel only, got {shown(is_sparse)}"
        )
    return FactoredLayer(name, form, rank, shape, is_sparse)


def _sizes(value: Any, where: str, lengths: tuple[int, ...]) -> tuple[int, ...]:
    is_sizes = isinstance(value, list) and len(value) in lengths
    if not is_sizes or not all(type(size) is int and 0 < size < 2**31 for size in value):
        wanted = " or ".join(map(str, lengths))
        raise CheckpointError(f"{where}: must be a list of {wanted} whole numbers from 1, got {shown(value)}")
    return tuple(value)
