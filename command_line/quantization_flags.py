"""Flags of quantization after training: its settings, steps that look at data, what is made of the result."""

from __future__ import annotations

import argparse
from typing import Any

from command_line.argument_types import at_least, fraction, not_empty, path, precision

LARGEST = 1e18
"""Of the numbers that budgets may be."""


def add_quantization_flags(parser: argparse.ArgumentParser) -> None:
    """Quantization after training."""
    group = parser.add_argument_group("post-training quantization (with --evaluate)")
    _add_settings(group)
    _add_sources(group)
    _add_steps(parser.add_argument_group("steps of post-training quantization that look at data"))
    _add_lapq(parser.add_argument_group("LAPQ: settings of --qe-lapq"))
    _add_results(parser.add_argument_group("what is made of a quantized model"))


def _add_settings(group: Any) -> None:
    modes, clips = ("sym", "sym_restr", "asym_s", "asym_u"), ("none", "avg", "n_std", "gauss", "laplace")
    bits = {"type": at_least(0), "default": 8, "metavar": "BITS"}
    group.add_argument("--quantize-eval", "--qe", action="store_true", help="quantize, then evaluate")
    group.add_argument("--qe-mode", "--qem", type=str.lower, choices=modes, default="sym",
        help="of activations and weights (default: %(default)s)")  # fmt: skip
    group.add_argument(
        "--qe-mode-acts", "--qema", type=str.lower, choices=modes, help="of activations (default: --qe-mode)"
    )
    group.add_argument(
        "--qe-mode-wts", "--qemw", type=str.lower, choices=modes, help="of weights (default: --qe-mode)"
    )
    group.add_argument("--qe-bits-acts", "--qeba", **bits, help="0: not quantized (default: %(default)s)")
    group.add_argument("--qe-bits-wts", "--qebw", **bits, help="0: not quantized (default: %(default)s)")
    group.add_argument("--qe-bits-accum", type=at_least(1), default=32, metavar="BITS",
        help="of accumulators and biases (default: %(default)s)")  # fmt: skip
    group.add_argument("--qe-fpq", type=precision, metavar="FORMAT",
        help="16, bf16, 32 or 64: no integers, the whole model in this floating-point format")  # fmt: skip
    group.add_argument("--qe-clip-acts", "--qeca", type=str.lower, choices=clips, default="none",
        help="how ranges of activations are clipped (default: %(default)s)")  # fmt: skip
    group.add_argument("--qe-clip-n-stds", type=float, metavar="N", help="with --qe-clip-acts n_std")
    group.add_argument("--qe-no-clip-layers", "--qencl", nargs="+", default=[], metavar="LAYER",
        help="not clipped; end the list with another flag")  # fmt: skip
    group.add_argument("--qe-no-quant-layers", "--qenql", nargs="+", default=[], metavar="LAYER",
        help="not quantized; likewise")  # fmt: skip
    group.add_argument("--qe-per-channel", "--qepc", action="store_true", help="weights per output channel")
    group.add_argument("--qe-scale-approx-bits", "--qesab", type=at_least(1), metavar="BITS",
        help="rescale by an integer of so many bits and a shift")  # fmt: skip
    group.add_argument(
        "--qe-save-fp-weights", action="store_true", help="keep the float weights beside the quantized"
    )


def _add_sources(group: Any) -> None:
    sources = group.add_mutually_exclusive_group()
    sources.add_argument(
        "--qe-stats-file", type=path, metavar="YAML", help="ranges from statistics collected before"
    )
    sources.add_argument("--qe-dynamic", action="store_true", help="ranges from each batch, no statistics")
    sources.add_argument("--qe-calibration", type=fraction(above=0), metavar="P",
        help="collect statistics on this share of the training set; without --evaluate --quantize-eval: "
        "and exit (default source of ranges: 0.05)")  # fmt: skip
    sources.add_argument("--qe-config-file", type=path, metavar="YAML",
        help="settings and steps (its section post_training_steps) from a file; the flags of settings are "
        "ignored then. Without model_activation_stats in it: with steps, statistics are collected; else as "
        "--qe-dynamic")  # fmt: skip
    group.add_argument("--qe-one-pass", action="store_true",
        help="collect statistics in one pass over the images, not in two: ranges, means and std are the same "
        "up to rounding, b is within 1 %%")  # fmt: skip
    group.add_argument("--activation-histograms", "--act-hist", type=fraction(above=0), metavar="P",
        help="collect histograms of activations on this share of the training set, between the ranges of "
        "--qe-stats-file, with pictures, and exit")  # fmt: skip


def _add_steps(group: Any) -> None:
    switch: dict[str, Any] = {"action": "store_true"}
    group.add_argument("--qe-equalize", "--qe-cle", **switch,
        help="cross-layer equalization: ranges of weights made alike between layers, before statistics are "
        "collected")  # fmt: skip
    group.add_argument("--qe-equalize-relu6", **switch,
        help="with --qe-equalize: ReLU6 between such layers becomes ReLU")  # fmt: skip
    group.add_argument("--qe-absorb-bias", **switch,
        help="with --qe-equalize: high biases go into the next layer")  # fmt: skip
    budgets = group.add_mutually_exclusive_group()
    budgets.add_argument("--qe-mixed-precision", type=fraction(2, up_to=16), metavar="AVERAGE_BITS",
        help="2, 3, 4, 6 or 8 bits for each layer's weight, by measured sensitivity, no more than so many on "
        "average")  # fmt: skip
    budgets.add_argument("--qe-mixed-precision-bytes", type=fraction(above=0, up_to=LARGEST), metavar="N",
        help="likewise, with all weights in so many bytes")  # fmt: skip
    budgets.add_argument("--qe-mixed-precision-bitops", type=fraction(above=0, up_to=LARGEST), metavar="N",
        help="likewise, with so many bit operations (MACs * bits * bits) for an image")  # fmt: skip
    group.add_argument("--qe-clip-search", **switch,
        help="choose the clip mode of each layer in turn, by the loss")  # fmt: skip
    group.add_argument("--qe-mse-scales", **switch, help="scales of weights of least squared error")
    group.add_argument("--qe-lapq", "--qe-coordinate-search", **switch,
        help="LAPQ: search the scales of all layers together, by the loss")  # fmt: skip
    group.add_argument("--qe-adaround", **switch,
        help="AdaRound: learn which weights are rounded up and which down, layer by layer")  # fmt: skip
    group.add_argument("--qe-adaround-iterations", type=at_least(1), default=2000, metavar="N",
        help="with --qe-adaround: steps for each layer (default: %(default)s)")  # fmt: skip
    group.add_argument("--qe-bias-correction", **switch,
        help="take the mean error of each output channel from its bias")  # fmt: skip
    group.add_argument(
        "--qe-search-size", "--lapq-eval-size", type=fraction(above=0), metavar="P",
        help="share of the training set (never of the test set) on which --qe-mixed-precision, "
        "--qe-clip-search and --qe-lapq measure the loss (default: 0.05)",
    )  # fmt: skip
    group.add_argument("--lapq-eval-memoize-dataloader", **switch,
        help="keep the images of --qe-search-size in memory as they go into the model")  # fmt: skip
    group.add_argument("--qe-resume", type=path, metavar="RUN_FOLDER",
        help="go on with the searches and the AdaRound of a run that was interrupted")  # fmt: skip


def _add_lapq(group: Any) -> None:
    group.add_argument("--lapq-maxiter", type=at_least(1), metavar="N", help="iterations of the method")
    group.add_argument("--lapq-maxfev", type=at_least(1), metavar="N", help="points evaluated, in all")
    group.add_argument("--lapq-method", type=not_empty, metavar="METHOD", default="Powell",
        help="of scipy.optimize.minimize (default: %(default)s)")  # fmt: skip
    group.add_argument("--lapq-basinhopping", "--lapq-bh", action="store_true",
        help="minimise again and again, from a point nearby")  # fmt: skip
    group.add_argument("--lapq-basinhopping-niter", "--lapq-bh-niter", type=at_least(1), default=100,
        metavar="N", help="how often (default: %(default)s)")  # fmt: skip
    group.add_argument("--lapq-init-mode", type=str.upper, default="NONE", metavar="MODE",
        help="where to start: NONE, AVG, LAPLACE, GAUSS, or a norm: L1, L2, L3, ... "
        "(default: %(default)s)")  # fmt: skip
    group.add_argument("--lapq-init-method", type=not_empty, metavar="METHOD",
        help="how a norm's range is found: a method of scipy.optimize.minimize, or quadratic, which chooses "
        "the norm as well (default: exhaustively, channel by channel)")  # fmt: skip
    group.add_argument("--lapq-search-clipping", action="store_true",
        help="search the ends of ranges (of asymmetric ones both), not the scales, beside which zero points "
        "stay")  # fmt: skip


def _add_results(group: Any) -> None:
    group.add_argument("--export-int8", nargs="?", const="model.int8.onnx", type=not_empty, metavar="FILE",
        help="with --evaluate --quantize-eval, or a quantized checkpoint: write an ONNX file of integers and "
        "compare it with the simulation in onnxruntime, in accuracy, size and latency; a bare name is put "
        "into the run folder (default: model.int8.onnx)")  # fmt: skip
    group.add_argument("--qe-convert-pytorch", "--qept", action="store_true",
        help="with --evaluate --quantize-eval, or --evaluate of a quantized checkpoint: convert to PyTorch's "
        "own quantized modules, and evaluate those too")  # fmt: skip
    group.add_argument("--qe-pytorch-backend", type=str.lower, default="fbgemm", metavar="BACKEND",
        help="with --qe-convert-pytorch: fbgemm, x86, onednn or qnnpack (default: %(default)s)")  # fmt: skip
    group.add_argument("--qe-report", action="store_true",
        help="write ranges, errors and accuracy of each quantized layer by itself, as CSV and "
        "picture")  # fmt: skip
