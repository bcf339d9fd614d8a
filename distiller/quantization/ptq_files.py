"""How a model was quantized after training, as plain data and in files of Distiller's form.

Knows nothing about models.
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import yaml
from torch import Tensor

from distiller.atomic_file import write_whole
from distiller.errors import QuantizationError
from distiller.quantization.affine import LinearQuantMode
from distiller.quantization.clipping import ClipMode
from distiller.quantization.ptq_settings import LayerSettings

PARAMETERS_FILE = "layer_quant_params.yaml"
STATS_FILE = "quant_stats_after_prepare_model.yaml"


def write_parameters(
    save_dir: str | Path,
    settings: Mapping[str, LayerSettings],
    params: Mapping[str, Tensor],
    stats: Mapping[str, Any] | None,
) -> list[Path]:
    """Write `layer_quant_params.yaml` and, with statistics, `quant_stats_after_prepare_model.yaml`.

    Args:
        save_dir: an existing folder.
        settings: of the layers that were replaced.
        params: scales and zero points, `<layer>.<output_scale, ...>`, in Distiller's convention.
        stats: the statistics as they were used, None where ranges are dynamic.

    Returns:
        The files.

    Raises:
        QuantizationError: the folder cannot be written.
    """
    contents: dict[str, Any] = {}
    for name, layer in settings.items():
        contents[name] = layer.as_parameters()
        if stats is not None:
            contents[name]["model_activation_stats"] = stats.get(name)
    contents["linear_quant_params"] = {key: value.tolist() for key, value in params.items()}
    files: dict[str, Any] = {PARAMETERS_FILE: contents}
    if stats is not None:
        files[STATS_FILE] = stats
    try:
        for file, content in files.items():
            write_whole(Path(save_dir) / file, yaml.dump(content, Dumper=_NoAliasDumper, sort_keys=False))
    except OSError as error:
        raise QuantizationError(f"{save_dir}: cannot be written, {error.strerror or error}") from error
    return [Path(save_dir) / file for file in files]


def plain_overrides(value: Any) -> Any:
    """Overrides with members of enumerations by their names, and without what is deprecated."""
    if not isinstance(value, Mapping):
        return value.name if isinstance(value, LinearQuantMode | ClipMode) else value
    plain = {key: plain_overrides(item) for key, item in value.items() if key != "fp16"}
    return {**plain, "fpq_module": 16} if value.get("fp16") is True else plain


class _NoAliasDumper(yaml.SafeDumper):
    """Writes equal parts out again: a file for people, not a graph."""

    def ignore_aliases(self, data: Any) -> bool:
        return True
