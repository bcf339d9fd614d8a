"""Two ways to the groups of coupled channels, on the same networks: this project's, and Torch-Pruning's.

    pip install torch-pruning==1.6.1            # nothing else needs it
    python -m docs.compare_dependency_graphs    # writes docs/dependency_graphs.md

Each network of `docs.measure_thinning` loses 30 % of the units of all its groups by Torch-Pruning's
`BasePruner`, in a process that is given 60 seconds. The figures of this project are those of
docs/results/thinning_families.json.
"""

from __future__ import annotations

import json
import subprocess
import sys
import time

import torch
from torch import nn

from distiller.atomic_file import write_whole
from distiller.dummy_input import get_dummy_input
from docs.measure_thinning import FAMILIES, RESULTS, ROOT, SHARE, build

PAGE = ROOT / "docs" / "dependency_graphs.md"
MOST_SECONDS = 60
_TEXT = """# Two ways to groups of coupled channels

Written by `python -m docs.compare_dependency_graphs`: {share:.0f} % of all groups' units removed from one
member of each of torchvision's families, by Torch-Pruning {version}, whose dependency graph goes from
module to module along the gradients, and by this project's channel groups, ids that are run through the
exported graph. "Answers" says that the smaller network runs; seconds are processor time of one thread, for
finding the groups.

Thinning goes the second way ([architecture.md](architecture.md)): it does every family, says why a group
cannot be cut, keeps what the masked network answered, and its result is plain data that a checkpoint can
hold. Torch-Pruning, where it answers, cuts units of its own choice and promises the shapes alone.

| network | Torch-Pruning | seconds | MACs left | channel groups | seconds | MACs left |
|---|---|--:|--:|---|--:|--:|
"""


def with_torch_pruning(arch: str) -> dict[str, object]:
    """What becomes of one network: seconds, and the share of the MACs that is left."""
    import torch_pruning  # type: ignore[import-not-found]

    model = build(arch)
    inputs = get_dummy_input(input_shape=(1, *model.input_shape[1:]))  # type: ignore[index]
    layers = [module for module in model.modules() if isinstance(module, (nn.Linear, nn.Conv2d))]
    classes = [layer for layer in layers if layer.weight.shape[0] == 1000]
    before, _ = torch_pruning.utils.count_ops_and_params(model, inputs)
    started = time.process_time()
    pruner = torch_pruning.pruner.BasePruner(
        model,
        inputs,
        importance=torch_pruning.importance.MagnitudeImportance(p=1),
        pruning_ratio=SHARE,
        ignored_layers=classes,
    )
    seconds = time.process_time() - started
    pruner.step()
    with torch.no_grad():
        scores = model(inputs)
    after, _ = torch_pruning.utils.count_ops_and_params(model, inputs)
    return {"seconds": round(seconds, 1), "macs": after / before, "classes": scores.shape[-1]}


def compare(arch: str) -> dict[str, object]:
    """`with_torch_pruning` in a process of its own."""
    command = [sys.executable, "-m", "docs.compare_dependency_graphs", arch]
    try:
        done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=MOST_SECONDS)
    except subprocess.TimeoutExpired:
        return {"failure": f"not back within {MOST_SECONDS} s"}
    lines = (done.stdout if done.returncode == 0 else done.stderr).strip().splitlines()
    if done.returncode:
        return {"failure": f"fails: {lines[-1][:80]}"}
    return json.loads(lines[-1])


def main() -> None:
    """The command line."""
    if len(sys.argv) > 1:
        sys.stdout.write(f"{json.dumps(with_torch_pruning(sys.argv[1]))}\n")
        return
    import torch_pruning  # type: ignore[import-not-found]

    ours = json.loads(RESULTS.read_text(encoding="utf-8"))
    rows = []
    for arch in FAMILIES:
        theirs, own = compare(arch), ours[arch]
        if "failure" in theirs:
            cells = [str(theirs["failure"]), "", ""]
        else:
            cells = ["answers", f"{theirs['seconds']}", f"{theirs['macs']:.2f}"]
        left = own["macs"][1] / own["macs"][0]
        rows.append(f"| {arch} | {' | '.join(cells)} | answers | {own['seconds']} | {left:.2f} |")
        sys.stdout.write(f"{rows[-1]}\n")
        sys.stdout.flush()
    text = _TEXT.format(share=100 * SHARE, version=torch_pruning.__version__)
    write_whole(PAGE, text + "\n".join(rows) + "\n")


if __name__ == "__main__":
    main()
