"""What integers gain: an exported int8 model next to the exported fp32 one, both in onnxruntime, and PyTorch.

ResNet-18, ResNet-50 and MobileNet-V2 of torchvision at images of 224, with random weights, quantized after
training by `PostTrainLinearQuantizer`: 8 bits, weights symmetric and by channel, activations unsigned, over
the ranges that random images show. The three forms take turns in this one process, with as many threads each
(--threads, default 1), at batch 1 and without --quick also 8; times are medians. Under each line where int8
is not faster, or misses its bar, stands why. The bars are those of processors that have instructions for sums
of 8-bit products (VNNI, AMX, ARM's); on others there are none.
"""

from __future__ import annotations

import argparse
import copy
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

import onnxruntime
import torch
from torch import nn

from benchmarks.side_by_side import finish
from distiller.data_loggers import collect_quant_stats
from distiller.export import onnx_bytes
from distiller.export.cpu_facts import CpuFacts, cpu_facts
from distiller.export.integer_latency import IntegerLatency, integer_latency
from distiller.export.qdq_export import int8_onnx_bytes
from distiller.functional_modules import to_modules
from distiller.models import create_model
from distiller.quantization import PostTrainLinearQuantizer

NETWORKS = ("resnet18", "resnet50", "mobilenet_v2")
SIZE = 224
BAR = 2.5  # of the ResNets at batch 1
BARRED = ("resnet18", "resnet50")
MODE = {"activations": "ASYMMETRIC_UNSIGNED", "weights": "SYMMETRIC"}


def three_forms(arch: str, size: int = SIZE) -> tuple[nn.Module, bytes, bytes]:
    """A network in PyTorch, in ONNX and in ONNX with integers."""
    torch.manual_seed(0)
    model = create_model(False, "imagenet", arch, parallel=False).eval()
    images = torch.randn(2, 3, size, size)
    quantized = copy.deepcopy(model)
    to_modules(quantized, images[:1])  # MobileNet adds with `+`
    stats = collect_quant_stats(quantized, lambda model: model(images))
    quantizer = PostTrainLinearQuantizer(
        quantized, mode=MODE, per_channel_wts=True, model_activation_stats=stats
    )
    quantizer.prepare_model(images[:1])
    return model, onnx_bytes(model, images[:1]), int8_onnx_bytes(quantized.eval(), images[:1])


def measure(arch: str, batches: list[int], threads: int, seconds: float, cpu: CpuFacts) -> dict[str, float]:
    """The speed-ups of one network by batch, printed with the times; `seconds` for each form."""
    model, in_float, in_integers = three_forms(arch)
    print(f"{arch}, images of {SIZE}: files {len(in_float) / 1e6:.2f} -> {len(in_integers) / 1e6:.2f} MB")
    figures: dict[str, float] = {}
    for batch in batches:
        found = integer_latency(
            model, in_float, in_integers, (3, SIZE, SIZE), batch, threads=threads, min_time=seconds
        )
        figures[f"batch {batch}"] = found.speedup
        print("\n".join(lines(found, bar_of(arch, batch, cpu))))
    return figures


def lines(found: IntegerLatency, bar: float | None) -> list[str]:
    """What is printed of a measurement: the times, and why int8 is not faster where it should be."""
    float_ms, int8_ms, torch_ms = (
        1e3 * form.median_s for form in (found.float_onnx, found.int8_onnx, found.torch_float)
    )
    text = [
        f"  batch {found.int8_onnx.batch_size}: onnxruntime fp32 {float_ms:.2f} ms, int8 {int8_ms:.2f} ms, "
        f"{found.speedup:.2f}x as fast; PyTorch fp32 {torch_ms:.2f} ms"
    ]
    if found.speedup <= max(1.0, bar or 0):
        text.append(f"    why: {'; '.join(found.reasons()) or 'nothing in its graph; is the machine busy?'}")
    return text


def bar_of(arch: str, batch: int, cpu: CpuFacts) -> float | None:
    """How much faster int8 must be; None where nothing is asked for."""
    return BAR if arch in BARRED and batch == 1 and cpu.dot_products else None


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--quick", action="store_true", help="batch 1, fewer repeats: ends within a minute")
    parser.add_argument("--threads", type=int, default=1, help="of each form (default 1)")
    args = parser.parse_args()
    torch.set_num_threads(args.threads)
    cpu = cpu_facts()
    print(
        f"{cpu}, threads: {args.threads}; onnxruntime {onnxruntime.__version__}, PyTorch {torch.__version__}"
    )
    batches, seconds = ([1], 1.5) if args.quick else ([1, 8], 4.0)
    figures: dict[str, float] = {}
    bars: dict[str, tuple[str, float]] = {}
    for arch in NETWORKS:
        for name, speedup in measure(arch, batches, args.threads, seconds, cpu).items():
            figures[f"{arch}, {name}"] = speedup
        bar = bar_of(arch, 1, cpu)
        if bar is not None:
            bars[f"{arch}, batch 1"] = ("at least", bar)
    if not bars:
        print("no bars: this processor has no instructions for sums of 8-bit products, or it is not known")
    finish(figures, bars)


if __name__ == "__main__":
    main()
