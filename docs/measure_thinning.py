"""Measure thinning: of every family of networks, 30 % of every channel group masked and removed.

    python -m docs.measure_thinning                  # every network, each in processes of its own
    python -m docs.measure_thinning --only swin      # the networks whose name has this in it
    python -m docs.measure_thinning --table          # nothing; only write the table anew

What was measured is kept in docs/results/thinning_families.json; docs/thinning_families.md is made of it.
Knows nothing about how channels are found or removed.
"""

from __future__ import annotations

import argparse
import copy
import json
import subprocess
import sys
import tempfile
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils import _pytree as pytree

from distiller.atomic_file import write_whole
from distiller.channel_groups import ChannelGroups, find_channel_groups
from distiller.dummy_input import get_dummy_input
from distiller.export.onnx_export import export_onnx
from distiller.export.onnx_parity import check_onnx
from distiller.macs import count_macs
from distiller.models import create_model
from distiller.models.create import find_spec
from distiller.names import named_parameters
from distiller.pruning.channel_units import unit_masks
from distiller.registry import MODELS
from distiller.thinning import ThinningRecipe, apply_recipe, thinning_recipe
from distiller.thinning.trial import measured_change, removable_groups

ROOT = Path(__file__).resolve().parents[1]
RESULTS = ROOT / "docs" / "results" / "thinning_families.json"
TABLE = ROOT / "docs" / "thinning_families.md"

SHARE = 0.3
SAME = 1e-4
MOST_SECONDS = 60.0
SMALL_SIZE = 64
FAMILIES = (
    "alexnet", "convnext_tiny", "densenet121", "efficientnet_b0", "efficientnet_v2_s", "googlenet",
    "inception_v3", "maxvit_t", "mnasnet0_5", "mobilenet_v2", "mobilenet_v3_small", "regnet_y_400mf",
    "resnet18", "resnext50_32x4d", "shufflenet_v2_x1_0", "squeezenet1_1", "swin_t", "swin_v2_t", "vgg11_bn",
    "vit_b_16", "wide_resnet50_2",
)  # fmt: skip
"""One member of each of torchvision's families of classifiers."""


def zoo() -> tuple[str, ...]:
    """The project's networks for CIFAR and MNIST.

    But for the one of 1,202 layers, which takes hours, and those without a channel that could be removed:
    all channels of the haiku student are averaged with a neighbour.
    """
    left_out = ("resnet1202_cifar_earlyexit", "haiku_student_cifar", "haiku_student_mnist")
    return tuple(
        name
        for name in MODELS
        if MODELS[name].dataset in ("cifar10", "mnist") and name not in left_out  # type: ignore[attr-defined]
    )


def chosen_units(groups: ChannelGroups) -> dict[str, list[int]]:
    """Of every group that can lose units, 30 % of them at random: at least one, and not all."""
    generator = torch.Generator().manual_seed(0)
    chosen = {}
    for group in groups.removable():
        count = min(group.size - 1, max(1, round(SHARE * group.size)))
        chosen[group.name] = sorted(torch.randperm(group.size, generator=generator)[:count].tolist())
    return {name: units for name, units in chosen.items() if units}


def build(arch: str) -> nn.Module:
    """An untrained network in which no channel, scale or shift is like the next."""
    torch.manual_seed(0)
    model = create_model(False, None, arch, input_shape=_input_shape(arch))
    with torch.no_grad():
        for name, buffer in model.named_buffers():
            if name.endswith("running_mean"):
                buffer.normal_(0, 0.3)
            elif name.endswith("running_var"):
                buffer.uniform_(0.5, 1.5)
        for param in model.parameters():
            first = param.flatten()[0]
            if param.numel() > 1 and bool((param == first).all()):
                param.copy_(first + torch.empty_like(param).uniform_(-0.5, 0.5))
    return model.eval()


def thin(arch: str, folder: Path) -> dict[str, Any]:
    """Do everything but reload with one network; leaves in `folder` what a reload needs.

    Raises:
        Exception: whatever goes wrong; an AssertionError says what does not hold.
    """
    model = build(arch)
    inputs = get_dummy_input(input_shape=(2, *model.input_shape[1:]))  # type: ignore[index]
    find_channel_groups(nn.Linear(1, 1), torch.zeros(1, 1))  # PyTorch's exporter takes seconds to import
    started = time.process_time()
    found = find_channel_groups(model, inputs[:1])
    analysed = time.process_time()
    groups = removable_groups(model, inputs[:1], "the table")
    tried = time.process_time()
    removed = chosen_units(groups)
    optimizer = torch.optim.SGD(model.parameters(), lr=1e-4, momentum=0.9)
    _train_step(model, optimizer, inputs)
    before = (_parameters(model), _macs(model, inputs[:1]))

    params = dict(named_parameters(model))
    for name, mask in unit_masks(params, groups, removed).items():
        params[name].data.mul_(mask)
    masked = copy.deepcopy(model)
    apply_recipe(model, thinning_recipe(model, groups, removed), optimizer)

    difference = measured_change(masked, model, inputs)
    after = (_parameters(model), _macs(model, inputs[:1]))
    _train_step(model, optimizer, inputs)
    parity = check_onnx(export_onnx(model, folder / "model.onnx", inputs), model, inputs)
    with torch.no_grad():
        torch.save((inputs, model(inputs)), folder / "answers.pt")
    torch.save(model.state_dict(), folder / "state.pt")
    recipes = json.dumps(model.thinning_recipes)
    (folder / "recipes.json").write_text(recipes, encoding="utf-8")
    again = find_channel_groups(model, inputs[:1])
    result = {
        "arch": arch,
        "input": list(model.input_shape),  # type: ignore[arg-type]
        "seconds": round(analysed - started, 1),
        "seconds with trial": round(tried - analysed, 1),
        "groups": len(groups),
        "removable": len(groups.removable()),
        "kept": {
            group.name: group.reason
            for group in groups
            if group.reason and group.reason not in ("it is of the network's input", "the network returns it")
        },
        "units": sum(group.size for group in groups.removable()),
        "units removed": sum(map(len, removed.values())),
        "parameters": [before[0], after[0]],
        "macs": [before[1], after[1]],
        "difference": difference,
        "onnx difference": parity.relative_difference,
        "removable again": len(again.removable()),
    }
    assert analysed - started < MOST_SECONDS, f"analysed in {analysed - started:.0f} s"
    assert len(found) == len(groups)
    assert difference < SAME, f"masked and thinned differ by {difference:.1e}"
    assert after[0] < before[0], "no fewer parameters"
    assert after[1] == groups.macs(removed) < before[1], "other MACs than the groups say"
    assert parity.relative_difference < SAME, f"ONNX differs by {parity.relative_difference:.1e}"
    return result


def reload(arch: str, folder: Path) -> float:
    """Thin a fresh network by the recipes in `folder`, load its weights; the largest difference."""
    model = create_model(False, None, arch, input_shape=_input_shape(arch)).eval()
    for recipe in json.loads((folder / "recipes.json").read_text(encoding="utf-8")):
        apply_recipe(model, ThinningRecipe.from_plain(recipe, "recipes.json"))
    model.load_state_dict(torch.load(folder / "state.pt", weights_only=True))
    inputs, answers = torch.load(folder / "answers.pt", weights_only=True)
    with torch.no_grad():
        return float((model(inputs) - answers).abs().max())


def measure(arch: str) -> dict[str, Any]:
    """Measure one network in two processes: one thins, the other reloads."""
    with tempfile.TemporaryDirectory() as folder:
        result: dict[str, Any] = {"arch": arch}
        for job in ("--thin", "--reload"):
            command = [sys.executable, "-m", "docs.measure_thinning", job, arch, folder]
            done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=False)
            if done.returncode:
                lines = done.stderr.strip().splitlines() or [f"exit status {done.returncode}"]
                return {**result, "failure": f"{job[2:]}: {lines[-1]}"}
            result.update(json.loads(done.stdout.splitlines()[-1]))
        if result["reload difference"] != 0:
            result["failure"] = f"reload: differs by {result['reload difference']:.1e}"
        return result


def table(results: Mapping[str, Mapping[str, Any]]) -> str:
    """The page of the results."""
    done = {name: result for name, result in results.items() if "failure" not in result}
    failed = {name: result["failure"] for name, result in results.items() if "failure" in result}
    parts = [_INTRODUCTION.format(share=f"{SHARE:.0%}".replace("%", " %"), same="0.0001")]
    for title, names in (("torchvision, one member of each family", FAMILIES), ("CIFAR and MNIST", zoo())):
        rows = [_row(done[name]) for name in names if name in done]
        parts.append("\n".join([f"## {title}\n", _HEAD, *rows]) + "\n")
    listed = "\n".join(f"- `{name}`: {reason}" for name, reason in failed.items())
    parts.append(f"## What cannot be done\n\n{listed or 'Every network above can be thinned.'}\n")
    kept = [
        f"- `{name}`: `{group}`: {reason}"
        for name, result in done.items()
        for group, reason in result["kept"].items()
    ]
    if kept:
        parts.append("## Groups that stay, beside inputs and classes\n\n" + "\n".join(kept) + "\n")
    return "\n".join(parts)


_INTRODUCTION = """# Thinning, family by family

Written by `python -m docs.measure_thinning`. Random weights, norms with statistics, scales and shifts of
their own; {share} of the units of every channel group, drawn at random, masked and then removed. Each
network

- answers as it did when masked: *difference* is the largest one between the outputs of the masked and the
  thinned network, as a share of the largest output (below {same} is asked for; float32 rounds by as much as
  is shown);
- has the MACs that its channel groups say; heads of attention, widths of MLPs and streams are cut all at
  once;
- trains a step with SGD and momentum before the thinning and one after it, with the optimizer's state cut
  along;
- is reloaded in a new process from its recipe as JSON and its state dict, with outputs equal to the last
  bit;
- is exported to ONNX with a free batch size: *ONNX* is the difference between onnxruntime and PyTorch;
- is analysed again when thinned, so that it can be thinned further.

*Seconds* are for finding the channel groups, processor time of one thread; *trial* is for finding them and
running a copy without one unit of each. *Groups* are those that can lose units, of all: the network's input
and its classes stay. GoogLeNet and Inception have their auxiliary classifiers, which become smaller with
what they read.
"""
_HEAD = (
    "| network | seconds | trial | groups | units removed | parameters | MACs | difference | ONNX |\n"
    "|---|--:|--:|--:|--:|--:|--:|--:|--:|"
)


def _row(result: Mapping[str, Any]) -> str:
    def shrunk(key: str) -> str:
        was, now = result[key]
        return f"{was:,} -> {now:,} ({now / was:.2f})"

    size = "x".join(str(length) for length in result["input"][1:])
    cells = (
        f"{result['arch']} ({size})",
        f"{result['seconds']:.1f}",
        f"{result['seconds with trial']:.1f}",
        f"{result['removable']} of {result['groups']}",
        f"{result['units removed']:,} of {result['units']:,}",
        shrunk("parameters"),
        shrunk("macs"),
        f"{result['difference']:.1e}",
        f"{result['onnx difference']:.1e}",
    )
    return f"| {' | '.join(cells)} |"


def _input_shape(arch: str) -> tuple[int, int, int, int] | None:
    """Of one image: small where the network takes small ones, as the network was designed for otherwise."""
    spec = find_spec(arch)
    is_native = spec.dataset != "imagenet" or spec.smallest_size is None or spec.smallest_size > SMALL_SIZE
    return None if is_native else (1, spec.native_shape[0], SMALL_SIZE, SMALL_SIZE)


def _train_step(model: nn.Module, optimizer: torch.optim.Optimizer, inputs: Tensor) -> None:
    """One step on a loss of everything that the network returns in training."""
    model.train()
    optimizer.zero_grad()
    outputs = [out for out in pytree.tree_leaves(model(inputs)) if isinstance(out, Tensor)]
    loss = torch.stack([out.log_softmax(-1)[:, 0].mean() for out in outputs]).sum()
    loss.neg().backward()
    optimizer.step()
    model.eval()
    assert bool(loss.isfinite()), f"the loss is {loss.item()}"


def _parameters(model: nn.Module) -> int:
    return sum(param.numel() for param in model.parameters())


def _macs(model: nn.Module, inputs: Tensor) -> int:
    return sum(layer.macs for layer in count_macs(model, inputs))


def _measure_all(names: Sequence[str]) -> None:
    kept = json.loads(RESULTS.read_text(encoding="utf-8")) if RESULTS.exists() else {}
    for name in names:
        kept[name] = measure(name)
        told = kept[name].get("failure") or f"difference {kept[name]['difference']:.1e}"
        sys.stdout.write(f"{name}: {told}\n")
        sys.stdout.flush()
        RESULTS.parent.mkdir(parents=True, exist_ok=True)
        write_whole(RESULTS, json.dumps(kept, indent=1, allow_nan=False) + "\n")


def main() -> None:
    """The command line."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n\n")[0])
    parser.add_argument("--only", metavar="TEXT", default="", help="part of a network's name")
    parser.add_argument(
        "--table", action="store_true", help="measure nothing: write the table from kept results"
    )
    for job in ("--thin", "--reload"):
        parser.add_argument(job, nargs=2, metavar=("NETWORK", "FOLDER"), help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.thin:
        sys.stdout.write(json.dumps(thin(args.thin[0], Path(args.thin[1]))) + "\n")
    elif args.reload:
        difference = reload(args.reload[0], Path(args.reload[1]))
        sys.stdout.write(json.dumps({"reload difference": difference}) + "\n")
    else:
        if not args.table:
            _measure_all([name for name in (*FAMILIES, *zoo()) if args.only in name])
        write_whole(TABLE, table(json.loads(RESULTS.read_text(encoding="utf-8"))))


if __name__ == "__main__":
    main()
