"""Flags of layer-wise compression after training."""

from __future__ import annotations

import argparse

from command_line.argument_types import at_least, not_empty, path


def add_layerwise_flags(parser: argparse.ArgumentParser) -> None:
    """The sweep, and its figures."""
    group = parser.add_argument_group("layer-wise compression after training")
    group.add_argument("--layerwise", type=_techniques, metavar="TECHNIQUES",
        help="compress each linear layer of a trained model by itself, at growing fractions, test, and exit: "
        "prune, quant, kmeans, svd, several with commas between; with a plus one after the other, as "
        "svd+prune+quant")  # fmt: skip
    group.add_argument("--fractions", nargs=3, type=float, default=[0.0, 0.9, 0.1],
        metavar=("START", "STOP", "STEP"),
        help="with --layerwise: fractions (of the weights, the distinct values, the rank) that go, both ends "
        "included (default: 0 0.9 0.1)")  # fmt: skip
    group.add_argument("--layerwise-bits", nargs="+", type=at_least(1, up_to=16), default=[], metavar="BITS",
        help="with --layerwise quant or kmeans: also with 2^BITS levels, as 8 6 4 3 2 1; end the list with "
        "another flag")  # fmt: skip
    group.add_argument("--layerwise-layers", nargs="+", type=not_empty, default=[], metavar="LAYER",
        help="with --layerwise: names or patterns of layers, convolutions too (default: all linear ones); "
        "likewise")  # fmt: skip
    group.add_argument("--layerwise-resume", type=path, metavar="RUN_FOLDER",
        help="go on with a --layerwise that was interrupted")  # fmt: skip
    group.add_argument("--layerwise-plot", type=path, metavar="FOLDER",
        help="draw the figures of a --layerwise, or of the JSON files of nn-compress-haiku, from FOLDER into "
        "OUT_DIR, and exit")  # fmt: skip


def _techniques(text: str) -> tuple[str, ...]:
    """The names between commas; what they may be, the job says."""
    return tuple(part.strip().lower() for part in not_empty(text).split(","))
