"""The steps of post-training quantization that flags ask for, and the record that an interrupted run leaves.

Knows nothing about models; what the steps do is in `quantization/with_data.py`.
"""

from __future__ import annotations

import shutil
from argparse import Namespace
from collections.abc import Mapping
from dataclasses import asdict
from pathlib import Path
from typing import Any

from distiller.errors import QuantizationError, UsageError
from distiller.quantization.data_steps import DataSteps
from distiller.quantization.rounding_state import read_rounding
from distiller.quantization.search.lapq_settings import WHERE, LapqSettings
from distiller.quantization.search.search_log import SearchLog, check_search_log
from distiller.quantization.with_data import ROUNDING_STATE, STATE_FILES

RECORD = "quantization_steps.jsonl"
"""In the run folder: says which steps, of which model and data, the states beside it are of."""
FLAGS = {
    "cross_layer_equalization": "--qe-equalize",
    "mixed_precision": "--qe-mixed-precision",
    "clip_search": "--qe-clip-search",
    "mse_weight_scales": "--qe-mse-scales",
    "lapq": "--qe-lapq",
    "adaround": "--qe-adaround",
    "bias_correction": "--qe-bias-correction",
}
"""The flag that asks for each step."""
RESUMABLE = ("mixed_precision", "clip_search", "lapq", "adaround")
SEARCHES = ("mixed_precision", "clip_search", "lapq")
"""The steps that measure the loss."""
BUDGET_FLAGS = {
    "average_bits": "--qe-mixed-precision",
    "weight_bytes": "--qe-mixed-precision-bytes",
    "bit_operations": "--qe-mixed-precision-bitops",
}
"""The flag of each unit of a budget."""
_LIMITS = ("maxiter", "maxfev", "basinhopping_niter")


def steps_of_flags(args: Namespace) -> DataSteps:
    """The steps that `--qe-equalize`, `--qe-adaround`, ... ask for.

    Args:
        args: the flags by name.

    Raises:
        QuantizationError: a setting is wrong; names its flag.
    """
    budgets = {unit: getattr(args, flag[2:].replace("-", "_")) for unit, flag in BUDGET_FLAGS.items()}
    budget = {name: value for name, value in budgets.items() if value is not None}
    plain: dict[str, Any] = {
        "clip_search": args.qe_clip_search,
        "mse_weight_scales": args.qe_mse_scales,
        "bias_correction": args.qe_bias_correction,
        "mixed_precision": budget or None,
    }
    if args.qe_equalize:
        plain["cross_layer_equalization"] = {
            "replace_relu6": args.qe_equalize_relu6,
            "absorb_bias": args.qe_absorb_bias,
        }
    if args.qe_adaround:
        plain["adaround"] = {"iterations": args.qe_adaround_iterations}
    if args.qe_lapq:
        plain["lapq"] = _lapq(args)
    return DataSteps.from_plain(plain)


def _lapq(args: Namespace) -> dict[str, Any]:
    settings = {
        "method": args.lapq_method,
        "maxiter": args.lapq_maxiter,
        "maxfev": args.lapq_maxfev,
        "basinhopping": args.lapq_basinhopping,
        "basinhopping_niter": args.lapq_basinhopping_niter,
        "init_mode": args.lapq_init_mode,
        "init_method": args.lapq_init_method,
        "search_clipping": args.lapq_search_clipping,
    }
    try:
        LapqSettings(**settings)
    except QuantizationError as error:
        setting, _, text = str(error).removeprefix(f"{WHERE}: ").partition(": ")
        if setting not in settings:  # about two of them together
            raise QuantizationError(f"--qe-lapq: {str(error).removeprefix(f'{WHERE}: ')}") from error
        raise QuantizationError(f"--lapq-{setting.replace('_', '-')}: {text}") from error
    return settings


def told_of_flags(error: QuantizationError) -> QuantizationError:
    """What is wrong with a budget of mixed precision, told of its flag; any other error as it is."""
    step, _, text = str(error).partition(": ")
    unit, _, rest = text.partition(": ")
    if step != "mixed_precision" or unit not in BUDGET_FLAGS:
        return error
    rest = rest.removesuffix(", or smaller widths to choose from (weight_widths, activation_widths)")
    return QuantizationError(f"{BUDGET_FLAGS[unit]}: {rest}")


def steps_identity(steps: DataSteps, **others: Any) -> dict[str, Any]:
    """What gives the states of steps their meaning, as plain data; limits of a search may be others later.

    Args:
        steps: the steps.
        others: what else does: the model, the quantizer's settings, the data.
    """
    plain: dict[str, Any] = {name: dict(value) for name, value in asdict(steps).items() if value is not None}
    if "lapq" in plain:
        plain["lapq"] = {key: value for key, value in plain["lapq"].items() if key not in _LIMITS}
    return {"steps": plain, **others}


def check_resumable(folder: str | Path, identity: Mapping[str, Any]) -> None:
    """See to it that a folder holds states of the same steps, of the same model and data, all undamaged.

    Raises:
        UsageError: it holds none.
        QuantizationError: they are of others: names the first thing that differs; or a state cannot be read:
            names the file.
    """
    path = Path(folder) / RECORD
    if not path.is_file():
        raise UsageError(
            f"--qe-resume {folder}: nothing to go on with, there is no {RECORD}; give the run folder of an "
            "interrupted quantization with a search or AdaRound, or leave the flag out"
        )
    SearchLog(path, "quantization steps", identity)
    for name in STATE_FILES:
        state = Path(folder) / name
        if state.is_file():
            (read_rounding if name == ROUNDING_STATE else check_search_log)(state)


def begin_record(folder: Path, identity: Mapping[str, Any], resumed: str | Path | None) -> None:
    """Put the record into a new run folder, and the states of the interrupted run, if there was one.

    Args:
        folder: of the new run.
        identity: of its steps.
        resumed: the folder of the run that was interrupted; stays as it is.
    """
    for name in STATE_FILES:
        if resumed is not None and (Path(resumed) / name).is_file():
            shutil.copyfile(Path(resumed) / name, folder / name)
    SearchLog(folder / RECORD, "quantization steps", identity)
