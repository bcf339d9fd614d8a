"""Measure quantization: two networks, every method, W8A8, W6A6, W4A8 and W4A4, on all test images.

    python -m docs.measure_quantization                      # what is missing
    python -m docs.measure_quantization --only adaround      # cells with this in network/method/width
    python -m docs.measure_quantization --again              # everything anew
    python -m docs.measure_quantization --table              # nothing; only write the page anew

Post-training methods take seconds to minutes, trainings minutes. The dense networks, and trainings at the
widths of shipped schedules, are those of `make results-schedules`, and are made where they are missing.
What was measured is kept in docs/results/quantization.json; docs/quantization_accuracy.md is made of it.
Knows nothing about how networks are quantized.
"""

from __future__ import annotations

import copy
import json
import subprocess
import sys
import tempfile
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from functools import cached_property
from typing import Any

import torch
import yaml
from torch import nn
from torch.nn import functional as F

from distiller.apputils.training_loop import evaluate
from distiller.atomic_file import write_whole
from distiller.export.integer_parity import IntegerParity, compare_integer
from distiller.export.integer_view import MAX_BITS
from distiller.export.onnx_export import onnx_bytes
from distiller.export.qdq_export import Int8Onnx, int8_onnx
from distiller.model_transforms import fold_batch_norms
from distiller.quantization import PostTrainLinearQuantizer
from distiller.quantization.data_steps import DataSteps
from distiller.quantization.with_data import quantize_with_data
from docs.dense_networks import dense_checkpoint, loaded, measure_missing, require, say
from docs.measure_schedules import latest_checkpoint, logs_of, measure
from docs.quantization_page import (
    NETWORKS,
    NOT_IN_INTEGERS_AT_8_BITS,
    PAGE,
    POST_TRAINING,
    RESULTS,
    TRAINED,
    WIDTHS,
    Method,
    bars,
    cell_name,
    page,
)
from docs.schedule_headers import ROOT, shipped

CALIBRATION_IMAGES, LOSS_IMAGES = 1024, 1024
"""Training images that ranges, rounding and biases come from, and that searches measure the loss on."""
_BATCH = 128


@dataclass(frozen=True, slots=True)
class Cell:
    """One number to measure."""

    arch: str
    method: str
    width: str

    @property
    def name(self) -> str:
        """As `--only` and the results know it."""
        return cell_name(self.arch, self.method, self.width)


def cells() -> Iterator[Cell]:
    """All of them, the dense networks first."""
    for arch in NETWORKS:
        yield Cell(arch, "fp32", "fp32")
    for arch in NETWORKS:
        for method in (*POST_TRAINING, *TRAINED):
            yield from (Cell(arch, method, width) for width in WIDTHS)


class Dense:
    """A trained network, its data, and how it is evaluated.

    Attributes:
        compressor: the program's, with the network.
        calibration: batches of training images.
        stats: of activations on these, once they are collected.
    """

    def __init__(self, arch: str) -> None:
        checkpoint = str(dense_checkpoint(arch))
        self.compressor = loaded(arch, "--exp-load-weights-from", checkpoint, "--channels-last")
        self.dummy_input = torch.zeros(1, *self.compressor.input_shape)
        share = (CALIBRATION_IMAGES + LOSS_IMAGES) / 54000
        images, labels = (
            torch.cat(parts) for parts in zip(*self.compressor.data.calibration(share), strict=True)
        )
        self.calibration = list(images[:CALIBRATION_IMAGES].split(_BATCH))
        self.stats: Mapping[str, Any] | None = None
        self._held_out = images[CALIBRATION_IMAGES:], labels[CALIBRATION_IMAGES:]

    def loss(self, model: nn.Module) -> float:
        """On training images that nothing is calibrated on."""
        images, labels = self._held_out
        with torch.inference_mode():
            total = sum(
                float(F.cross_entropy(model(x), y, reduction="sum"))
                for x, y in zip(images.split(_BATCH), labels.split(_BATCH), strict=True)
            )
        return total / len(labels)

    @cached_property
    def float_bytes(self) -> int:
        """Of its ONNX file in floating point, batch norms folded."""
        model = fold_batch_norms(copy.deepcopy(self.compressor.model).eval(), self.dummy_input)
        return len(onnx_bytes(model, self.dummy_input))

    def scores(self, model: nn.Module) -> dict[str, Any]:
        """Of all test images."""
        result = evaluate(model, self.compressor.data.test)
        return {"top1_correct": result.top1_correct, "n": result.n}


def post_training(dense: Dense, arch: str, method: Method, width: str) -> dict[str, Any]:
    """Quantize the dense network and test it: simulated, of some methods in integers, too."""
    weights, activations = WIDTHS[width]
    plain = method.steps_at(weights)
    quantizer = PostTrainLinearQuantizer(
        copy.deepcopy(dense.compressor.model),
        bits_activations=activations,
        bits_parameters=weights,
        overrides={name: {"bits_weights": 8, "bits_activations": 8} for name in NETWORKS[arch].ends},
        mode=method.mode,
        clip_acts=method.clip_acts,
        per_channel_wts=method.per_channel,
        model_activation_stats=None if "cross_layer_equalization" in plain else dense.stats,
    )
    torch.manual_seed(0)
    with tempfile.TemporaryDirectory() as folder:
        done = quantize_with_data(
            quantizer,
            DataSteps.from_plain(plain),
            dense.dummy_input,
            dense.calibration,
            dense.loss,
            folder=folder,
            progress=say,
        )
    if "cross_layer_equalization" not in plain:
        dense.stats = done.stats or dense.stats
    if not method.in_integers:
        return dense.scores(done.quantizer.model)
    parity, found = in_integers(dense, int8_onnx(done.quantizer.model, dense.dummy_input))
    return {"top1_correct": parity.simulation_correct, "n": parity.samples, **found}


def in_integers(dense: Dense, integer: Int8Onnx) -> tuple[IntegerParity, dict[str, int]]:
    """Run an integer file on the test images; what is kept of it."""
    parity = compare_integer(integer.simulation, integer.content, dense.compressor.data.test)
    return parity, {
        "integer_correct": parity.integer_correct,
        "agreeing": parity.agreeing,
        "integer_bytes": len(integer.content),
        "float_bytes": dense.float_bytes,
    }


def trained(dense: Dense, arch: str, method: str, width: str) -> dict[str, Any]:
    """Train with quantization as the shipped schedule of the method does, at some width; and its integers."""
    (schedule,) = [s for s in shipped() if s.path.stem == f"{NETWORKS[arch].stem}_{TRAINED[method].schedule}"]
    weights, activations = WIDTHS[width]
    own = f"{method}_{width.lower()}"
    results = RESULTS.parent / f"{arch}_fashion_mnist" / f"{own}.json"
    if own == TRAINED[method].schedule:
        if latest_checkpoint(results) is None or not results.exists():
            require(not measure([schedule], shipped(), again=True), f"{own}: the training failed")
        card = json.loads(results.read_text(encoding="utf-8"))
    else:
        data = schedule.data
        data["quantizers"]["quantizer"].update(bits_weights=weights, bits_activations=activations)
        folder = logs_of(results)
        folder.mkdir(parents=True, exist_ok=True)
        path = folder / f"{own}.yaml"
        write_whole(path, yaml.safe_dump(data, sort_keys=False))
        flags = schedule.flags
        for flag, value in (("--compress", str(path)), ("-n", own)):
            flags[flags.index(flag) + 1] = value
        flags[flags.index("CHECKPOINT")] = str(dense_checkpoint(arch))
        command = [sys.executable, "compress_classifier.py", *flags, "-o", str(folder), "-p", "200"]
        subprocess.run(command, cwd=ROOT, check=True, stdout=subprocess.DEVNULL)
        card = json.loads((folder / "latest_log_dir" / "results.json").read_text(encoding="utf-8"))
    scores = {key: card["measured"][key] for key in ("top1_correct", "n")}
    if weights == MAX_BITS and method in NOT_IN_INTEGERS_AT_8_BITS:
        return scores
    model = loaded(arch, "--resume-from", str(latest_checkpoint(results))).model
    integer = int8_onnx(model, dense.dummy_input, batches=dense.calibration)
    as_trained = compare_integer(model, integer.content, dense.compressor.data.test)
    return {**scores, **in_integers(dense, integer)[1], "agreeing_as_trained": as_trained.agreeing}


def _measured(dense: dict[str, Dense], cell: Cell) -> dict[str, Any]:
    if cell.arch not in dense:
        dense[cell.arch] = Dense(cell.arch)
    own = dense[cell.arch]
    if cell.method == "fp32":
        return own.scores(own.compressor.model)
    if cell.method in POST_TRAINING:
        return post_training(own, cell.arch, POST_TRAINING[cell.method], cell.width)
    return trained(own, cell.arch, cell.method, cell.width)


def main() -> None:
    """The command line."""
    dense: dict[str, Dense] = {}
    results = measure_missing(__doc__, cells(), lambda cell: _measured(dense, cell), RESULTS)
    write_whole(PAGE, page(results))
    missed = [bar.text for bar in bars(results) if not bar.holds]
    if missed:
        sys.exit("missed:\n" + "\n".join(missed))


if __name__ == "__main__":
    main()
