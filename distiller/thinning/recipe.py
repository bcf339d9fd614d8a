"""A thinning recipe: what stays of which tensors, and what modules are told, as plain data.

A recipe and the weights that were saved after it make the thinned model out of a fresh one; nothing of
Python's is stored. Recipes of the archived Distiller are read into the same form.
Knows nothing about how a recipe comes about or is carried out.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from math import prod
from typing import Any

import torch

from distiller.errors import CheckpointError
from distiller.tensor_cuts import TensorCuts


@dataclass(frozen=True, slots=True)
class ThinningRecipe:
    """How a model becomes smaller.

    Attributes:
        tensors: by canonical name of a parameter or buffer, and dimension: the indices that stay,
            ascending.
        modules: by canonical name of a module, attributes and their new values (numbers, and lists of
            numbers).
        classes: by canonical name of a module, the class of `thinned_layers` that takes over:
            one that computes the same as before, of fewer channels.
    """

    tensors: TensorCuts
    modules: Mapping[str, Mapping[str, Any]] = field(default_factory=dict)
    classes: Mapping[str, str] = field(default_factory=dict)

    def to_plain(self) -> dict[str, Any]:
        """The recipe as dicts, lists, numbers and strings; as JSON it stays the same."""
        return {
            "modules": {name: dict(attributes) for name, attributes in self.modules.items()},
            "parameters": {
                name: [[dim, list(indices)] for dim, indices in kept.items()]
                for name, kept in self.tensors.items()
            },
            "classes": dict(self.classes),
        }

    @classmethod
    def from_plain(cls, plain: Mapping[str, Any], where: str) -> ThinningRecipe:
        """Read what `to_plain` wrote, or the dicts of a recipe of Distiller.

        Distiller's recipes give the indices of buffers among the attributes of modules, and those of a
        linear layer behind a flattened convolution by views: (dimension, indices, view, shape afterwards).

        Args:
            plain: `modules`, `parameters`, and in ours `classes`.
            where: the file, named in errors.

        Raises:
            CheckpointError: it is malformed; says where.
        """
        tensors: dict[str, dict[int, tuple[int, ...]]] = {}
        modules: dict[str, dict[str, Any]] = {}
        for name in _table(plain, "modules", where):
            for attribute, value in _table(plain["modules"], name, where).items():
                place = f"{where}: thinning recipe: {name}.{attribute}"
                if attribute in ("running_mean", "running_var"):
                    dim, indices, _ = _directive(value, place)
                    tensors[f"{name}.{attribute}"] = {dim: indices}
                else:
                    modules.setdefault(name, {})[attribute] = _setting(value, place)
        for name, directives in _table(plain, "parameters", where).items():
            place = f"{where}: thinning recipe: {name}"
            if not isinstance(directives, Sequence) or isinstance(directives, str):
                raise CheckpointError(f"{place}: must be a list, got {type(directives).__name__}")
            for directive in directives:
                dim, indices, view = _directive(directive, place)
                if view is not None:
                    dim, indices = _through_view(dim, indices, view, place)
                tensors.setdefault(name, {})[dim] = indices
        classes = plain.get("classes", {})
        if not isinstance(classes, Mapping) or not all(isinstance(v, str) for v in classes.values()):
            raise CheckpointError(f"{where}: thinning recipe: 'classes' must be names by module")
        return cls(tensors, modules, dict(classes))


def _table(data: Mapping[str, Any], key: str, where: str) -> Mapping[str, Any]:
    part = data.get(key, {})
    if not isinstance(part, Mapping):
        raise CheckpointError(f"{where}: thinning recipe: '{key}' must be a dict, got {type(part).__name__}")
    return part


def _setting(value: Any, place: str) -> Any:
    items = value if isinstance(value, (list, tuple)) else [value]
    if not all(isinstance(item, (bool, int, float)) for item in items):
        raise CheckpointError(f"{place}: must be a number or numbers, got {value!r}")
    return list(items) if isinstance(value, (list, tuple)) else value


def _directive(value: Any, place: str) -> tuple[int, tuple[int, ...], tuple[int, ...] | None]:
    """Dimension, indices, and the view that they are of (None: the tensor as it is)."""
    if not isinstance(value, (list, tuple)) or len(value) not in (2, 4):
        raise CheckpointError(f"{place}: must be (dimension, indices), got {value!r}")
    dim, indices, *views = value
    indices = indices.flatten().tolist() if isinstance(indices, torch.Tensor) else indices
    if type(dim) is not int or dim < 0 or not _whole_numbers(indices) or not indices:
        raise CheckpointError(f"{place}: must be a dimension and at least one index, got {value!r}")
    if sorted(set(indices)) != list(indices):
        raise CheckpointError(f"{place}: indices must ascend, got {list(indices)}")
    if views and not (_whole_numbers(views[0]) and dim < len(views[0])):
        raise CheckpointError(f"{place}: must have a view with dimension {dim}, got {views[0]!r}")
    return dim, tuple(indices), tuple(views[0]) if views else None


def _whole_numbers(value: Any) -> bool:
    return isinstance(value, (list, tuple)) and all(type(item) is int and item >= 0 for item in value)


def _through_view(
    dim: int, indices: tuple[int, ...], view: tuple[int, ...], place: str
) -> tuple[int, tuple[int, ...]]:
    """The columns of a (out, in) weight that are `indices` along `dim` of its view (out, C, H, W)."""
    if dim == 0 or max(indices) >= view[dim]:
        raise CheckpointError(f"{place}: indices {list(indices)} are not of dimension {dim} of {view}")
    columns = torch.arange(prod(view[1:])).view(view[1:])
    chosen = columns.index_select(dim - 1, torch.tensor(indices))
    return 1, tuple(chosen.flatten().tolist())
