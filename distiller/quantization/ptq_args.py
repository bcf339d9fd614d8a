"""The program's `--qe-*` flags as arguments of `PostTrainLinearQuantizer`.

Knows nothing about models.
"""

from __future__ import annotations

from typing import Any

from distiller.errors import QuantizationError
from distiller.names import strip_wrappers
from distiller.quantization.ptq_settings import parse_multiplier_bits

_MODES = {
    "sym": "SYMMETRIC",
    "sym_restr": "SYMMETRIC_RESTRICTED",
    "asym_u": "ASYMMETRIC_UNSIGNED",
    "asym_s": "ASYMMETRIC_SIGNED",
}


def quantizer_arguments(args: Any) -> dict[str, Any]:
    """The keywords that the flags stand for.

    Args:
        args: a namespace with the flags' destinations, `qe_mode`, `qe_bits_acts`, ...; `qe_stats_file`
            may also be statistics at hand.

    Raises:
        QuantizationError: flags that do not go together.
    """
    if parse_multiplier_bits(args.qe_scale_approx_bits, "--qe-scale-approx-bits") is not None:
        other = "--qe-dynamic" if args.qe_dynamic else None if args.qe_bits_acts else "--qe-bits-acts 0"
        if other is not None:
            raise QuantizationError(
                f"--qe-scale-approx-bits: with {other} there is no change of scale that is known "
                "beforehand; leave one of them out"
            )
    precision = getattr(args, "qe_fpq", None)
    if precision is None and args.qe_stats_file is None and not args.qe_dynamic and args.qe_bits_acts:
        raise QuantizationError(
            "post-training quantization: activations need statistics; give --qe-stats-file, "
            "--qe-calibration or --qe-dynamic, or --qe-bits-acts 0 for weights only"
        )
    overrides: dict[str, Any] = {
        strip_wrappers(name): {"clip_acts": "NONE"} for name in args.qe_no_clip_layers
    }
    left = {"bits_activations": None, "bits_weights": None}
    if precision is not None:
        left["fpq_module"] = None
    for name in args.qe_no_quant_layers:
        overrides[strip_wrappers(name)] = dict(left)
    modes = {
        "activations": args.qe_mode_acts or args.qe_mode,
        "weights": args.qe_mode_wts or args.qe_mode,
    }
    return {
        "bits_activations": args.qe_bits_acts,
        "bits_parameters": args.qe_bits_wts,
        "bits_accum": args.qe_bits_accum,
        "overrides": overrides,
        "mode": {key: _MODES.get(value, value) for key, value in modes.items()},
        "clip_acts": args.qe_clip_acts,
        "per_channel_wts": args.qe_per_channel,
        "model_activation_stats": None if args.qe_dynamic else args.qe_stats_file,
        "clip_n_stds": args.qe_clip_n_stds,
        "scale_approx_mult_bits": args.qe_scale_approx_bits,
        "save_fp_weights": args.qe_save_fp_weights,
        "fpq_module": precision,
    }
