"""What a pruning schedule costs: training steps with it, against the same steps without any scheduler.

Each side trains its own copy of a model on the same random images; a round is one short epoch (8 steps of
ResNet-20, 200 of LeNet-300-100; real ones have hundreds), in which the schedule computes its masks once
and applies them after each step.
    resnet20: an element-wise AGP policy on all convolutions.
    resnet20, three policies: the same layers divided among three AGP policies.
    lenet-300-100: an AGP policy on its three layers; a step is about 50 times shorter.
All in this one process, on one thread.
"""

from __future__ import annotations

import copy
import sys
from collections.abc import Callable, Sequence
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

import torch
from torch import Tensor, nn

from benchmarks.side_by_side import finish, medians, parse
from distiller.models import create_model
from distiller.names import named_parameters
from distiller.policy import PruningPolicy
from distiller.pruning import AutomatedGradualPruner
from distiller.scheduler import CompressionScheduler

Round = Callable[[], None]


def plain(model: nn.Module, images: Tensor, labels: Tensor, steps: int) -> Round:
    """A round of training steps without a scheduler."""
    optimizer, criterion = _optimizer(model), nn.CrossEntropyLoss()

    def run() -> None:
        for _ in range(steps):
            loss = criterion(model(images), labels)
            optimizer.zero_grad(set_to_none=True)
            loss.backward()
            optimizer.step()

    return run


def scheduled(model: nn.Module, images: Tensor, labels: Tensor, steps: int, policies: int) -> Round:
    """A round of the same steps with the callbacks of a scheduler that has so many AGP policies."""
    optimizer, criterion = _optimizer(model), nn.CrossEntropyLoss()
    scheduler = CompressionScheduler(model)
    for index, names in enumerate(_shares(_weights(model), policies)):
        pruner = AutomatedGradualPruner(f"agp{index}", 0.05, 0.8, names)
        scheduler.add_policy(PruningPolicy(pruner), starting_epoch=0, ending_epoch=100)
    epochs = iter(range(100))

    def run() -> None:
        epoch = next(epochs)
        scheduler.on_epoch_begin(epoch, optimizer)
        for step in range(steps):
            scheduler.on_minibatch_begin(epoch, step, steps, optimizer)
            loss = criterion(model(images), labels)
            total = scheduler.before_backward_pass(epoch, step, steps, loss, optimizer)
            assert isinstance(total, Tensor)
            optimizer.zero_grad(set_to_none=True)
            total.backward()
            scheduler.before_parameter_optimization(epoch, step, steps, optimizer)
            optimizer.step()
            scheduler.on_minibatch_end(epoch, step, steps, optimizer)
        scheduler.on_epoch_end(epoch, optimizer, {"loss": 0.0, "top1": 0.0})

    return run


def _optimizer(model: nn.Module) -> torch.optim.Optimizer:
    return torch.optim.SGD(model.parameters(), lr=0.01, momentum=0.9, weight_decay=1e-4)


def _weights(model: nn.Module) -> list[str]:
    return [name for name, param in named_parameters(model) if param.dim() >= 2]


def _shares(names: list[str], count: int) -> list[list[str]]:
    return [names[index::count] for index in range(count)]


def _sides(
    dataset: str, arch: str, shape: Sequence[int], steps: int, policies: Sequence[int]
) -> dict[str, Round]:
    torch.manual_seed(0)
    images, labels = torch.randn(*shape), torch.randint(10, shape[:1])
    model = create_model(False, dataset, arch, parallel=False)
    sides = {"without": plain(copy.deepcopy(model), images, labels, steps)}
    for count in policies:
        sides[f"{count} policies"] = scheduled(copy.deepcopy(model), images, labels, steps, count)
    return sides


def main() -> None:
    args = parse(__doc__ or "")
    torch.set_num_threads(1)  # two threads wait for each other wherever the machine is shared
    resnet_rounds, lenet_rounds = (9, 15) if args.quick else (41, 61)
    resnet = medians(_sides("cifar10", "resnet20_cifar", (32, 3, 32, 32), 8, (1, 3)), resnet_rounds)
    lenet = medians(_sides("mnist", "lenet_300_100", (128, 1, 28, 28), 200, (1,)), lenet_rounds)
    for name, times, steps in (("resnet20", resnet, 8), ("lenet-300-100", lenet, 200)):
        for side, seconds in times.items():
            print(f"{name}, {side}: {1000 * seconds / steps:.2f} ms a step")
    figures = {
        "resnet20": resnet["1 policies"] / resnet["without"],
        "resnet20, three policies": resnet["3 policies"] / resnet["without"],
        "lenet-300-100": lenet["1 policies"] / lenet["without"],
    }
    bars = {"resnet20": 1.03, "resnet20, three policies": 1.05, "lenet-300-100": 1.15}
    finish(figures, {name: ("at most", bar) for name, bar in bars.items()})


if __name__ == "__main__":
    main()
