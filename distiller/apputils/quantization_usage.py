"""Flags of quantization after training that contradict each other, or have no effect.

Knows nothing about how flags are parsed, nor about what the jobs do.
"""

from __future__ import annotations

from argparse import Namespace
from collections.abc import Iterator, Set

Rule = tuple[bool, str]
"""Whether it is broken, and what is told then."""

_STEPS = {
    "qe_equalize": "--qe-equalize",
    "qe_mixed_precision": "--qe-mixed-precision",
    "qe_mixed_precision_bytes": "--qe-mixed-precision-bytes",
    "qe_mixed_precision_bitops": "--qe-mixed-precision-bitops",
    "qe_clip_search": "--qe-clip-search",
    "qe_mse_scales": "--qe-mse-scales",
    "qe_lapq": "--qe-lapq",
    "qe_adaround": "--qe-adaround",
    "qe_bias_correction": "--qe-bias-correction",
}
_SEARCHES = (
    *("qe_mixed_precision", "qe_mixed_precision_bytes", "qe_mixed_precision_bitops"),
    *("qe_clip_search", "qe_lapq"),
)
_OF_A_STEP = {
    "qe_equalize_relu6": "qe_equalize",
    "qe_absorb_bias": "qe_equalize",
    "qe_adaround_iterations": "qe_adaround",
    "lapq_maxiter": "qe_lapq",
    "lapq_maxfev": "qe_lapq",
    "lapq_method": "qe_lapq",
    "lapq_basinhopping": "qe_lapq",
    "lapq_basinhopping_niter": "qe_lapq",
    "lapq_init_mode": "qe_lapq",
    "lapq_init_method": "qe_lapq",
    "lapq_search_clipping": "qe_lapq",
}
_BESIDE_A_FILE = (
    *("qe_config_file", "qe_search_size", "qe_resume", "qe_one_pass", "qe_report"),
    *("qe_convert_pytorch", "qe_pytorch_backend"),
)
"""Flags that are no settings of the quantizer, and so are heeded beside --qe-config-file."""
_WITHOUT_QUANTIZING = (
    *("qe_calibration", "qe_stats_file", "qe_one_pass"),
    *("qe_convert_pytorch", "qe_pytorch_backend", "qe_report"),
)
_IN_FLOATING_POINT = ("qe_fpq", "qe_no_quant_layers", "qe_resume", "qe_search_size", "qe_pytorch_backend")
_ON_WEIGHTS = (
    *("qe_mode_wts", "qe_per_channel", "qe_equalize", "qe_mixed_precision", "qe_mixed_precision_bytes"),
    *("qe_mixed_precision_bitops", "qe_mse_scales", "qe_adaround", "qe_bias_correction"),
)
_ON_ACTIVATIONS = ("qe_mode_acts", "qe_clip_acts", "qe_clip_search")


def flag_of(name: str) -> str:
    """The flag of a destination."""
    return f"--{name.replace('_', '-')}"


def ignored_beside_a_file(given: Set[str]) -> list[str]:
    """The flags that `--qe-config-file` makes void."""
    return [flag_of(name) for name in sorted(given) if name.startswith("qe_") and name not in _BESIDE_A_FILE]


def quantization_rules(args: Namespace, given: Set[str]) -> Iterator[Rule]:
    """The rules of quantization after training.

    Args:
        args: the flags by name.
        given: the names of those that were given.
    """
    quantizes = args.evaluate and args.quantize_eval
    has_checkpoint = bool(args.resumed_checkpoint_path or args.load_model_path)
    yield args.quantize_eval and not args.evaluate, "--quantize-eval: only with --evaluate"
    for name in sorted(given):
        if name.startswith(("qe_", "lapq_")) and name not in _WITHOUT_QUANTIZING:
            yield not quantizes, f"{flag_of(name)}: only with --evaluate --quantize-eval"
    yield (
        bool(args.qe_stats_file and not quantizes and args.activation_histograms is None),
        "--qe-stats-file: only with --evaluate --quantize-eval",
    )
    yield from _collection_rules(args, bool(quantizes))
    yield (
        bool(args.export_int8 and not quantizes and not has_checkpoint),
        "--export-int8: needs a quantized model: --evaluate --quantize-eval, or its checkpoint, given with "
        "--resume-from or --exp-load-weights-from",
    )
    for name in ("qe_convert_pytorch", "qe_report"):
        yield (
            bool(getattr(args, name) and not quantizes and not (args.evaluate and has_checkpoint)),
            f"{flag_of(name)}: needs a quantized model: --evaluate --quantize-eval, or --evaluate and its "
            "checkpoint, given with --resume-from or --exp-load-weights-from",
        )
    yield (
        "qe_pytorch_backend" in given and not args.qe_convert_pytorch,
        "--qe-pytorch-backend: goes with --qe-convert-pytorch",
    )
    yield from _clip_rules(args)
    if args.qe_fpq is not None:
        yield from _floating_point_rules(args, given)
    yield from _step_rules(args, given)
    if not args.qe_config_file:
        yield from _effect_rules(args, given)
        yield from _result_rules(args)


def _collection_rules(args: Namespace, quantizes: bool) -> Iterator[Rule]:
    """Flags of what is collected, and of jobs that only collect."""
    collects_alone = args.qe_calibration is not None and not quantizes
    yield (
        bool(args.qe_one_pass and not quantizes and not collects_alone),
        "--qe-one-pass: only where statistics are collected, with --qe-calibration or --quantize-eval",
    )
    for name, why in (("qe_stats_file", "--qe-stats-file"), ("qe_dynamic", "--qe-dynamic")):
        yield (
            bool(args.qe_one_pass and getattr(args, name)),
            f"--qe-one-pass: without effect, with {why} no statistics are collected",
        )


def _clip_rules(args: Namespace) -> Iterator[Rule]:
    yield (
        args.qe_clip_acts == "n_std" and args.qe_clip_n_stds is None,
        "--qe-clip-acts n_std: needs --qe-clip-n-stds N",
    )
    yield (
        args.qe_clip_acts != "n_std" and args.qe_clip_n_stds is not None,
        "--qe-clip-n-stds: only with --qe-clip-acts n_std",
    )
    yield (
        args.qe_bits_acts == args.qe_bits_wts == 0 and not args.qe_config_file,
        "--qe-bits-acts 0 --qe-bits-wts 0: nothing would be quantized; give one of them bits",
    )


def _floating_point_rules(args: Namespace, given: Set[str]) -> Iterator[Rule]:
    """Nothing that is about integers goes with a model in floating point."""
    for name in sorted(given):
        if name.startswith(("qe_", "lapq_")) and name not in (*_IN_FLOATING_POINT, "qe_config_file"):
            yield True, f"{flag_of(name)}: not with --qe-fpq, which makes no integers"
    yield bool(args.export_int8), "--export-int8: not with --qe-fpq, which makes no integers"


def _step_rules(args: Namespace, given: Set[str]) -> Iterator[Rule]:
    """Steps that look at data, and what belongs to them."""
    steps = [name for name in _STEPS if name in given]
    searches = [name for name in _SEARCHES if name in given]
    for name in [*steps, *(name for name in _OF_A_STEP if name in given)]:
        yield (
            bool(args.qe_config_file),
            f"{flag_of(name)}: not with --qe-config-file; write the step into the file, under "
            "post_training_steps",
        )
    for name, step in _OF_A_STEP.items():
        yield name in given and step not in given, f"{flag_of(name)}: goes with {flag_of(step)}"
    yield (
        "lapq_basinhopping_niter" in given and not args.lapq_basinhopping,
        "--lapq-basinhopping-niter: goes with --lapq-basinhopping",
    )
    for name in steps:
        yield (
            args.qe_dynamic,
            f"{flag_of(name)}: not with --qe-dynamic, it is for ranges that are fixed beforehand",
        )
    yield (
        bool(args.qe_equalize and args.qe_stats_file),
        "--qe-equalize: not with --qe-stats-file, it changes the ranges that the file tells of; leave the "
        "file out, or give --qe-calibration: statistics are collected afterwards",
    )
    yield (
        bool(args.qe_equalize and args.qe_scale_approx_bits is not None),
        "--qe-scale-approx-bits: not with --qe-equalize, statistics come after it, and scales with them",
    )
    yield (
        bool(args.qe_lapq and args.qe_mse_scales),
        "--qe-mse-scales: not with --qe-lapq, whose scales of weights it would replace",
    )
    for name in ("qe_search_size", "lapq_eval_memoize_dataloader"):
        yield (
            name in given and not searches and not args.qe_config_file,
            f"{flag_of(name)}: goes with --qe-mixed-precision, --qe-clip-search or --qe-lapq",
        )
    yield (
        bool(args.qe_resume and not searches and not args.qe_adaround and not args.qe_config_file),
        "--qe-resume: goes with what can be resumed: --qe-mixed-precision, --qe-clip-search, --qe-lapq or "
        "--qe-adaround",
    )


def _effect_rules(args: Namespace, given: Set[str]) -> Iterator[Rule]:
    """Settings of what is not quantized, or not clipped."""
    for name in _ON_ACTIVATIONS:
        yield (
            args.qe_bits_acts == 0 and name in given,
            f"{flag_of(name)}: without effect, with --qe-bits-acts 0 activations are not quantized",
        )
    yield (
        args.qe_bits_acts == 0 and args.qe_one_pass and args.qe_calibration is None,
        "--qe-one-pass: without effect, with --qe-bits-acts 0 no statistics are collected",
    )
    for name in _ON_WEIGHTS:
        yield (
            args.qe_bits_wts == 0 and name in given,
            f"{flag_of(name)}: without effect, with --qe-bits-wts 0 weights are not quantized",
        )
    yield (
        bool(args.qe_no_clip_layers and args.qe_clip_acts == "none" and not args.qe_clip_search),
        "--qe-no-clip-layers: without effect, nothing is clipped; goes with --qe-clip-acts",
    )


def _result_rules(args: Namespace) -> Iterator[Rule]:
    """What can be made of a quantized model with these settings."""
    if args.quantize_eval:
        for name in ("qe_report", "qe_convert_pytorch", "export_int8"):
            yield (
                bool(getattr(args, name) and args.qe_dynamic),
                f"{flag_of(name)}: not with --qe-dynamic, the ranges have to be fixed",
            )
        for name in ("qe_convert_pytorch", "export_int8"):
            yield (
                bool(getattr(args, name) and args.qe_scale_approx_bits is not None),
                f"{flag_of(name)}: not with --qe-scale-approx-bits, scales are stored as they are",
            )
            for bits in ("qe_bits_acts", "qe_bits_wts"):
                yield (
                    bool(getattr(args, name) and getattr(args, bits) > 8),
                    f"{flag_of(name)}: takes at most 8 bits, got {flag_of(bits)} {getattr(args, bits)}",
                )
        yield (
            bool(args.qe_convert_pytorch and args.qe_bits_acts != 8),
            "--qe-convert-pytorch: PyTorch computes with activations of 8 bits, got --qe-bits-acts "
            f"{args.qe_bits_acts}; --export-int8 takes fewer",
        )
