"""What simulated quantization costs, side by side with the same work in full precision.

For ResNet-20 on images of 32 and ResNet-18 on images of 224, random ones, with random weights:
    W8A8: evaluation of the model quantized after training (8-bit weights per channel, 8-bit unsigned
        activations) against evaluation of the model itself; of the model with folded batch norms, which the
        quantized one has too, beside.
    statistics: evaluation of a few batches while a new one-pass collector looks on, against evaluation alone;
        two exact passes, which run the model twice, beside.
    QAT: a training step with each training quantizer, everything but the first layer quantized, against the
        same step in full precision; folded batch norms simulated, which runs each convolution twice, beside.
What is beside is not measured with --quick. All in this one process, on one thread.
"""

from __future__ import annotations

import copy
import gc
import sys
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

import torch
from torch import Tensor, nn

from benchmarks.side_by_side import finish, medians, parse
from distiller.data_loggers import collect_quant_stats
from distiller.evaluation_mode import evaluating
from distiller.model_transforms import fold_batch_norms
from distiller.models import create_model
from distiller.quantization import PostTrainLinearQuantizer
from distiller.quantization.training import (
    DorefaQuantizer,
    LSQQuantizer,
    PACTQuantizer,
    QatQuantizer,
    QuantAwareTrainRangeLinearQuantizer,
    WRPNQuantizer,
)

Round = Callable[[], None]

_W8A8 = {
    "mode": {"activations": "ASYMMETRIC_UNSIGNED", "weights": "SYMMETRIC"},
    "per_channel_wts": True,
}
_QAT: dict[str, tuple[type[QatQuantizer], dict[str, Any]]] = {
    "range linear W8A8": (QuantAwareTrainRangeLinearQuantizer, {"bits_weights": 8}),
    "LSQ W4A4": (LSQQuantizer, {"bits_weights": 4, "bits_activations": 4}),
    "DoReFa W4A8": (DorefaQuantizer, {"bits_weights": 4}),
    "PACT W4A8": (PACTQuantizer, {"bits_weights": 4}),
    "WRPN W4A8": (WRPNQuantizer, {"bits_weights": 4}),
}
_FOLDED = "range linear W8A8, folding simulated"


class _Workload(NamedTuple):
    dataset: str
    arch: str
    size: int
    evaluated: int  # images in a batch of evaluation,
    batches: int  # batches in a round of it,
    trained: int  # and images of a training step
    rounds: tuple[int, int]  # of evaluation: quick, and not
    steps: tuple[int, int]  # of training: quick, and not


_WORKLOADS = {
    "resnet20": _Workload("cifar10", "resnet20_cifar", 32, 256, 6, 64, (3, 11), (3, 21)),
    "resnet18": _Workload("imagenet", "resnet18", 224, 16, 2, 4, (2, 9), (2, 9)),
}


def evaluation(model: nn.Module, batches: Sequence[Tensor]) -> Round:
    """A round of evaluation: the forward passes alone."""

    def run() -> None:
        with evaluating(model):
            for batch in batches:
                model(batch)

    return run


def statistics(model: nn.Module, batches: Sequence[Tensor], passes: int) -> Round:
    """A round of evaluation that collects statistics from nothing."""
    return lambda: _ignored(
        collect_quant_stats(model, lambda model: evaluation(model, batches)(), passes=passes)
    )


def quantized(model: nn.Module, batches: Sequence[Tensor]) -> nn.Module:
    """The model quantized to 8 bits after training."""
    stats = collect_quant_stats(model, lambda model: evaluation(model, batches[:1])(), passes=1)
    quantizer = PostTrainLinearQuantizer(copy.deepcopy(model), model_activation_stats=stats, **_W8A8)
    quantizer.prepare_model(batches[0][:1])
    return quantizer.model


def training(
    model: nn.Module,
    images: Tensor,
    kind: type[QatQuantizer] | None = None,
    settings: Mapping[str, Any] | None = None,
) -> Round:
    """A training step, of the model as a training quantizer of this kind makes it."""
    model = copy.deepcopy(model).train()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.001, momentum=0.9, weight_decay=1e-4)
    if kind is not None:
        first = next(name for name, module in model.named_modules() if isinstance(module, nn.Conv2d))
        given = {
            "bits_activations": 8,
            "overrides": {first: {"bits_weights": None, "bits_activations": None}},
        }
        kind(model, optimizer, **{**given, **(settings or {})}).prepare_model(images[:1])
    labels, criterion = torch.randint(10, images.shape[:1]), nn.CrossEntropyLoss()

    def run() -> None:
        loss = criterion(model(images), labels)
        optimizer.zero_grad(set_to_none=True)
        loss.backward()
        optimizer.step()

    return run


def _ignored(_: object) -> None:
    """What is timed returns nothing."""


def _evaluation_figures(name: str, work: _Workload, is_quick: bool) -> dict[str, float]:
    model = create_model(False, work.dataset, work.arch, parallel=False)
    batches = [torch.randn(work.evaluated, 3, work.size, work.size) for _ in range(work.batches)]
    sides = {
        "fp32": evaluation(model, batches),
        "W8A8": evaluation(quantized(model, batches), batches),
        "statistics": statistics(model, batches, passes=1),
    }
    if not is_quick:
        folded = fold_batch_norms(copy.deepcopy(model).eval(), batches[0][:1])
        sides["fp32, batch norms folded"] = evaluation(folded, batches)
        sides["statistics in two passes"] = statistics(model, batches, passes=2)
    times = medians(sides, work.rounds[not is_quick])
    for side, seconds in times.items():
        print(
            f"{name}, {side}: {1000 * seconds / len(batches):.1f} ms a batch of {work.evaluated}", flush=True
        )
    return _ratios(name, times)


def _training_figures(name: str, work: _Workload, is_quick: bool) -> dict[str, float]:
    model = create_model(False, work.dataset, work.arch, parallel=False)
    images = torch.randn(work.trained, 3, work.size, work.size)
    sides = {"fp32": training(model, images)}
    sides |= {method: training(model, images, kind, settings) for method, (kind, settings) in _QAT.items()}
    if not is_quick:
        kind, settings = _QAT["range linear W8A8"]
        sides[_FOLDED] = training(model, images, kind, {**settings, "simulate_bn_folding": True})
    times = medians(sides, work.steps[not is_quick])
    for side, seconds in times.items():
        print(f"{name}, {side}: {1000 * seconds:.1f} ms a step of {work.trained} images", flush=True)
    return _ratios(name, times)


def _ratios(name: str, times: Mapping[str, float]) -> dict[str, float]:
    return {f"{name}, {side}": seconds / times["fp32"] for side, seconds in times.items() if side != "fp32"}


def main() -> None:
    args = parse(__doc__ or "")
    torch.manual_seed(0)
    torch.set_num_threads(1)  # two threads wait for each other wherever the machine is shared
    figures: dict[str, float] = {}
    for name, work in _WORKLOADS.items():
        figures |= _evaluation_figures(name, work, args.quick)
        gc.collect()
        figures |= _training_figures(name, work, args.quick)
        gc.collect()
    bars = {
        **{f"{name}, W8A8": 1.4 for name in _WORKLOADS},
        **{f"{name}, statistics": 1.5 for name in _WORKLOADS},
        **{f"{name}, {method}": 1.8 for name in _WORKLOADS for method in _QAT},
    }
    finish(figures, {name: ("at most", bar) for name, bar in bars.items()})


if __name__ == "__main__":
    main()
