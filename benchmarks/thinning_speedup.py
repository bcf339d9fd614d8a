"""What physical removal gains: dense and thinned networks side by side, next to the MACs that are gone.

Each network loses units of all its channel groups, the same share of each and multiples of 16 left,
until half of its MACs are gone (`StructuredGroupPruner`, masks, `contract_model`). Weights are random; both
networks are in channels-last format, in which either is at its fastest on a CPU.
    resnet20         CIFAR's, images of 32
    resnet18, vgg16, mobilenet_v2   torchvision's, images of 224 (--quick: 112)
Batches of 1 and 32, in evaluation, on one thread. Under each pair of times stands where they were spent,
by kind of operation: what gained less than the MACs is what is left on the table. Convolutions keep part of
their time since narrower ones fill the processor's vectors and caches less well; batch norm, ReLU, additions
and pooling move memory, and lose only as many channels as there are fewer (about the square root).
"""

from __future__ import annotations

import os
import sys
from collections import Counter
from collections.abc import Callable
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

os.environ.setdefault("KINETO_LOG_LEVEL", "99")  # the profiler's own messages

import torch
from torch import nn
from torch.profiler import ProfilerActivity, profile

from benchmarks.side_by_side import finish, medians, parse
from distiller.macs import count_macs
from distiller.models import create_model
from distiller.policy import PruningPolicy
from distiller.pruning import StructuredGroupPruner
from distiller.scheduler import CompressionScheduler
from distiller.thinning import contract_model

NETWORKS = {"resnet20": "cifar10", "resnet18": "imagenet", "vgg16": "imagenet", "mobilenet_v2": "imagenet"}
BAR = 1.6  # of ResNet-18 and VGG-16
KINDS = {
    "convolution": ("conv",), "linear": ("addmm", "linear"), "batch norm": ("batch_norm",),
    "activation": ("relu", "clamp", "hardtanh"), "addition": ("add",), "pooling": ("pool", "mean"),
}  # fmt: skip
"""Words in the names of operations, by what they are called here; `addmm` comes before `add`."""


def thinned_pair(arch: str, dataset: str, size: int | None) -> tuple[nn.Module, nn.Module]:
    """A dense network and what is left of it at half of its MACs."""
    pair: list[nn.Module] = []
    for _ in range(2):
        torch.manual_seed(0)
        model = create_model(
            False, dataset, f"{arch}_cifar" if dataset == "cifar10" else arch, parallel=False
        )
        if size is not None:
            model.input_shape = (1, 3, size, size)  # type: ignore[assignment]
        pair.append(model.eval())
    dense, thinned = pair
    scheduler = CompressionScheduler(thinned)
    pruner = StructuredGroupPruner("half", thinned, "l1", final_macs=0.5, round_to=16)
    scheduler.add_policy(PruningPolicy(pruner), epochs=[0])
    scheduler.on_epoch_begin(0)
    with scheduler.masked():
        contract_model(thinned, scheduler.masks, arch, dataset, None)
    channels_last = torch.channels_last
    return dense.to(memory_format=channels_last), thinned.to(memory_format=channels_last)


def spent(model: nn.Module, images: torch.Tensor) -> Counter[str]:
    """Milliseconds of one pass by kind of operation."""
    with torch.inference_mode(), profile(activities=[ProfilerActivity.CPU]) as profiler:
        model(images)
    found: Counter[str] = Counter()
    for event in profiler.key_averages():
        name = event.key.removeprefix("aten::")
        kind = next((kind for kind, words in KINDS.items() if any(word in name for word in words)), "rest")
        found[kind] += event.self_cpu_time_total / 1000
    return found


def measure(arch: str, dataset: str, size: int | None, rounds: dict[int, int]) -> dict[str, float]:
    """The speed-ups of one network by batch, printed next to what was removed."""
    dense, thinned = thinned_pair(arch, dataset, size)
    shape = tuple(dense.input_shape)[1:]  # type: ignore[call-overload]
    macs = [sum(layer.macs for layer in count_macs(m, torch.zeros(1, *shape))) for m in (dense, thinned)]
    params = [sum(p.numel() for p in m.parameters()) for m in (dense, thinned)]
    print(f"{arch}, images of {shape[-1]}: MACs {macs[0]:,} -> {macs[1]:,}, {macs[0] / macs[1]:.2f}x fewer; "
          f"parameters {params[0]:,} -> {params[1]:,}")  # fmt: skip
    figures: dict[str, float] = {"MAC reduction": macs[0] / macs[1]}
    for batch, repeats in rounds.items():
        images = torch.randn(batch, *shape).contiguous(memory_format=torch.channels_last)

        def run(model: nn.Module, images: torch.Tensor = images) -> Callable[[], object]:
            return lambda: model(images)

        with torch.inference_mode():
            times = medians({"dense": run(dense), "thinned": run(thinned)}, repeats)
        figures[f"batch {batch}"] = times["dense"] / times["thinned"]
        print(f"  batch {batch}: {1000 * times['dense']:.2f} -> {1000 * times['thinned']:.2f} ms, "
              f"{figures[f'batch {batch}']:.2f}x as fast")  # fmt: skip
        before, after = spent(dense, images), spent(thinned, images)
        for kind, milliseconds in before.most_common():
            if milliseconds > 0.02 * before.total():
                gain = f"{milliseconds / after[kind]:.2f}x" if after[kind] else "gone"
                print(f"    {kind}: {100 * milliseconds / before.total():.0f} % of the dense time, {gain}; "
                      f"{100 * after[kind] / after.total():.0f} % of the thinned time")  # fmt: skip
    return figures


def main() -> None:
    args = parse(__doc__ or "")
    torch.set_num_threads(1)
    rounds = {1: 15, 32: 3} if args.quick else {1: 41, 32: 11}
    figures: dict[str, float] = {}
    for arch, dataset in NETWORKS.items():
        size = None if dataset == "cifar10" else 112 if args.quick else 224
        for name, value in measure(arch, dataset, size, rounds).items():
            figures[f"{arch}, {name}"] = value
    bars = {f"{arch}, batch {batch}": ("at least", BAR) for arch in ("resnet18", "vgg16") for batch in rounds}
    finish(figures, bars)


if __name__ == "__main__":
    main()
