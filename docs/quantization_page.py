"""The page of what quantization costs in accuracy: methods, widths and bars, and the tables of the results.

Written by `docs/measure_quantization.py`. Knows nothing about networks.
"""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from distiller.apputils.intervals import wilson_interval

ROOT = Path(__file__).resolve().parents[1]
RESULTS = ROOT / "docs" / "results" / "quantization.json"
PAGE = ROOT / "docs" / "quantization_accuracy.md"

WIDTHS = {"W8A8": (8, 8), "W6A6": (6, 6), "W4A8": (4, 8), "W4A4": (4, 4)}
"""Bits of weights and activations."""


@dataclass(frozen=True, slots=True)
class Network:
    """A network of the table.

    Attributes:
        title: what the page calls it.
        stem: what the names of its schedules begin with.
        ends: its first and its last layer.
    """

    title: str
    stem: str
    ends: tuple[str, str]


NETWORKS = {
    "resnet20_cifar": Network("ResNet-20", "resnet20", ("conv1", "fc")),
    "mobilenet_025_cifar": Network("MobileNet, a quarter of the width", "mobilenet", ("model.0.0", "fc")),
}


@dataclass(frozen=True, slots=True)
class Method:
    """A way to quantize after training.

    Attributes:
        title: what the page calls it.
        per_channel: weights with a scale for each output channel.
        mode: of `PostTrainLinearQuantizer`.
        clip_acts: likewise.
        steps: of `DataSteps`.
        in_integers: whether its integer file is measured, too.
    """

    title: str
    per_channel: bool = True
    mode: Any = field(default_factory=lambda: {"activations": "ASYMMETRIC_UNSIGNED", "weights": "SYMMETRIC"})
    clip_acts: str = "NONE"
    steps: Mapping[str, Any] = field(default_factory=dict)
    in_integers: bool = False

    def steps_at(self, weight_bits: int) -> dict[str, Any]:
        """The steps, at a width of the weights: that is the average where each layer gets its own."""
        steps = dict(self.steps)
        if "mixed_precision" in steps:
            steps["mixed_precision"] = {"average_bits": weight_bits, **steps["mixed_precision"]}
        return steps


_LAPQ = {"lapq": {"init_method": "quadratic", "maxiter": 1, "maxfev": 300, "search_clipping": True}}
_ADAROUND = {"adaround": {"iterations": 2000}, "bias_correction": True}
POST_TRAINING = {
    "rounded_symmetric": Method(
        "round to nearest, per tensor, symmetric", False, "SYMMETRIC", in_integers=True
    ),
    "rounded_tensor": Method("round to nearest, per tensor", False, in_integers=True),
    "rounded": Method("round to nearest", in_integers=True),
    "clip_laplace": Method("activations clipped (ACIQ, Laplace)", clip_acts="LAPLACE"),
    "clip_gauss": Method("activations clipped (ACIQ, Gauss)", clip_acts="GAUSS"),
    "equalized": Method(
        "cross-layer equalization and bias correction, per tensor",
        False,
        steps={"cross_layer_equalization": True, "bias_correction": True},
        in_integers=True,
    ),
    "bias_correction": Method("bias correction", steps={"bias_correction": True}),
    "mse": Method(
        "weight scales of least squared error, bias correction",
        steps={"mse_weight_scales": True, "bias_correction": True},
    ),
    "clip_search": Method("greedy clip search", steps={"clip_search": True}),
    "lapq": Method("LAPQ", steps=_LAPQ),
    "adaround": Method("AdaRound, bias correction", steps=_ADAROUND, in_integers=True),
    "adaround_lapq": Method("LAPQ, AdaRound, bias correction", steps={**_LAPQ, **_ADAROUND}),
    "mixed": Method("mixed precision, at most that width on average", steps={"mixed_precision": {}}),
}


@dataclass(frozen=True, slots=True)
class Training:
    """A way to train with quantization.

    Attributes:
        title: what the page calls it.
        schedule: the end of its schedules' names: its own word and the width.
    """

    title: str
    schedule: str


TRAINED = {
    "range_linear": Training("`QuantAwareTrainRangeLinearQuantizer`", "range_linear_w8a8"),
    "lsq": Training("`LSQQuantizer`", "lsq_w4a4"),
    "dorefa": Training("`DorefaQuantizer`", "dorefa_w4a8"),
    "pact": Training("`PACTQuantizer`", "pact_w4a8"),
    "wrpn": Training("`WRPNQuantizer`", "wrpn_w4a8"),
}
NOT_IN_INTEGERS_AT_8_BITS = ("dorefa", "pact")
"""Their weights have no zero: in whole numbers those of 8 bits need 9."""
FEW_BITS = {
    "binary_w1a32": "`BinaryQuantizer`, weights of 1 bit",
    "ternary_w2a32": "`TernaryQuantizer`, weights of 2 bits",
}
"""Trainings at widths of their own: results of their schedules."""


@dataclass(frozen=True, slots=True)
class Bar:
    """Something that is asked of the results.

    Attributes:
        text: what, and what came of it.
        holds: whether it does; a bar without results does not.
    """

    text: str
    holds: bool


def cell_name(arch: str, method: str, width: str) -> str:
    """A cell's key in the results."""
    return f"{arch}/{method}/{width}"


def read_results() -> dict[str, Any]:
    """What was measured: cell -> {top1_correct, n, loss, ...}."""
    return json.loads(RESULTS.read_text(encoding="utf-8")) if RESULTS.exists() else {}


def few_bits(arch: str, key: str) -> dict[str, Any] | None:
    """The results of a training at a width of its own, None if there are none."""
    path = RESULTS.parent / f"{arch}_fashion_mnist" / f"{key}.json"
    return json.loads(path.read_text(encoding="utf-8"))["measured"] if path.exists() else None


def bars(results: Mapping[str, Any]) -> list[Bar]:
    """What is asked of the results, for each network."""
    found = []
    for arch, network in NETWORKS.items():
        dense = results.get(cell_name(arch, "fp32", "fp32"))

        def lost(
            methods: Mapping[str, Any], width: str, arch: str = arch, dense: Any = dense
        ) -> dict[str, float]:
            cells = {method: results.get(cell_name(arch, method, width)) for method in methods}
            return {method: _points(dense, cell) for method, cell in cells.items() if cell and dense}

        post, everything = lost(POST_TRAINING, "W8A8"), lost({**POST_TRAINING, **TRAINED}, "W4A8")
        found.append(_bar(network, "W8A8, round to nearest, after training", post.get("rounded"), 0.3))
        best = min(everything, key=everything.__getitem__, default=None)
        found.append(_bar(network, f"W4A8, the best method ({best})", everything.get(best or ""), 1.0))
        found.append(_bar(network, "W4A4, LSQ", lost(TRAINED, "W4A4").get("lsq"), 1.0))
        found += [
            _bar(network, f"W4A8, {TRAINED[method].title}", everything.get(method), 1.5)
            for method in ("dorefa", "pact", "wrpn")
        ]
        binary = few_bits(arch, "binary_w1a32")
        found.append(
            _bar(network, "weights of 1 bit", _points(dense, binary) if dense and binary else None, 4.0)
        )
        found += _integer_bars(results, arch, network)
    return found


def page(results: Mapping[str, Any]) -> str:
    """The whole page."""
    parts = [_INTRODUCTION]
    for arch, network in NETWORKS.items():
        dense = results.get(cell_name(arch, "fp32", "fp32"))
        parts.append(f"## {network.title} (`{arch}`)\n\nIn float32: {_accuracy(dense)}.\n")
        rows = [
            _row(results, arch, method, title)
            for method, title in [
                *((key, method.title) for key, method in POST_TRAINING.items()),
                *((key, f"trained: {training.title}") for key, training in TRAINED.items()),
            ]
        ]
        parts.append("\n".join([_HEAD, *rows]) + "\n")
        for key, title in FEW_BITS.items():
            parts.append(f"Trained: {title}: {_accuracy(few_bits(arch, key))}.\n")
        parts.append(_integer_table(results, arch))
    listed = [f"- {'holds' if bar.holds else '**missed**'}: {bar.text}" for bar in bars(results)]
    parts.append("## What is asked for\n\n" + "\n".join(listed) + "\n")
    return "\n".join(parts)


_INTRODUCTION = """# What quantization costs in accuracy

Written by `python -m docs.measure_quantization`. Top-1 of all 10,000 test images of Fashion-MNIST, simulated
in floating point: correct decisions, and the 95 % interval (Wilson) of the percentage. Each cell is one run.
W4A8: weights of 4 bits, activations of 8.

After training: asymmetric activations, symmetric weights with a scale for each output channel, unless it says
otherwise; the first and the last layer at 8 bits at least. Ranges, roundings and biases come from 1,024
training images, searches measure the loss on 1,024 others; the test images choose nothing.

Trained: as the schedules under `schedules/quantization/quant_aware_train` do, with the widths exchanged; the
first and the last layer in floating point, or at 8 bits where the schedule says so.

*In integers* is the QDQ ONNX file of the same network: how many of the 10,000 decisions of onnxruntime are
those of the simulation, and the size of the file against that of the float32 network. The simulation of a
trained network has its biases as whole numbers and sums on 8-bit grids, which training knows nothing of; *as
trained* says how many decisions are those of the network as it was trained.
"""
_HEAD = f"| method | {' | '.join(WIDTHS)} |\n|---|{'---|' * len(WIDTHS)}"


def _row(results: Mapping[str, Any], arch: str, method: str, title: str) -> str:
    return f"| {title} | {' | '.join(_accuracy(results.get(cell_name(arch, method, w))) for w in WIDTHS)} |"


def _integer_table(results: Mapping[str, Any], arch: str) -> str:
    rows = [
        f"| {title} | {width} | {cell['agreeing']:,} of {cell['n']:,} "
        f"| {_count(cell.get('agreeing_as_trained'))} | {cell['integer_correct']:,} "
        f"| {cell['integer_bytes']:,} of {cell['float_bytes']:,} "
        f"({cell['integer_bytes'] / cell['float_bytes']:.3f}) |"
        for title, width, cell in _integer_cells(results, arch)
    ]
    head = (
        "| in integers | width | same decisions | as trained | correct | bytes |\n|---|---|--:|--:|--:|--:|"
    )
    return "\n".join([head, *rows]) + "\n"


def _count(value: int | None) -> str:
    return "" if value is None else f"{value:,}"


def _integer_cells(results: Mapping[str, Any], arch: str) -> Iterator[tuple[str, str, Mapping[str, Any]]]:
    for method, kind in {**POST_TRAINING, **TRAINED}.items():
        for width in WIDTHS:
            cell = results.get(cell_name(arch, method, width))
            if cell and "agreeing" in cell:
                yield kind.title, width, cell


def _integer_bars(results: Mapping[str, Any], arch: str, network: Network) -> list[Bar]:
    found = [cell for _, _, cell in _integer_cells(results, arch)]
    if not found:
        return [Bar(f"{network.title}: in integers: not measured", holds=False)]
    least = min(cell["agreeing"] / cell["n"] for cell in found)
    largest = max(cell["integer_bytes"] / cell["float_bytes"] for cell in found)
    return [
        Bar(
            f"{network.title}: onnxruntime decides as the simulation in at least {100 * least:.2f} % of the "
            "images (at least 99.5 % asked for)",
            least >= 0.995,
        ),
        Bar(
            f"{network.title}: integer files of at most {largest:.3f} of the float32 file (0.30 allowed)",
            largest <= 0.30,
        ),
    ]


def _bar(network: Network, what: str, lost: float | None, allowed: float) -> Bar:
    if lost is None:
        return Bar(f"{network.title}: {what}: not measured", holds=False)
    told = f"{lost:.2f} points below float32" if lost > 0 else f"{-lost:.2f} points above float32"
    return Bar(f"{network.title}: {what}: {told} ({allowed} allowed)", round(lost, 6) <= allowed)


def _points(dense: Mapping[str, Any], cell: Mapping[str, Any]) -> float:
    return 100 * (dense["top1_correct"] / dense["n"] - cell["top1_correct"] / cell["n"])


def _accuracy(cell: Mapping[str, Any] | None) -> str:
    if cell is None:
        return "not measured"
    k, n = cell["top1_correct"], cell["n"]
    low, high = wilson_interval(k, n)
    return f"{100 * k / n:.2f} % ({k:,}; {100 * low:.1f}-{100 * high:.1f})"
