"""From a sensitivity sweep to a schedule that trains, with the program."""

from __future__ import annotations

import pytest

from tests.end_to_end.conftest import TINY
from tests.end_to_end.program import load, refused

SWEEP = "--sense-range 0 0.8 0.4 --etes 0.3 -o sweep "


@pytest.mark.parametrize(
    "axis, goal", [("element", "--target-sparsity 0.5"), ("filter", "--target-macs 0.8")]
)
def test_a_sweep_becomes_a_schedule_that_trains(program, trained, axis, goal):
    weights = f"--exp-load-weights-from {trained}"
    program.run(TINY + f"--sense {axis} {SWEEP} {weights}").succeeded()
    sweep = program.latest("sweep")
    done = program.run(
        TINY + f"--recommend {sweep} {goal} --verify --recommend-epochs 2 --etes 0.3 -o out {weights}"
    ).succeeded()
    assert "In one shot, without training (--verify): top-1 " in done.out
    folder = program.latest("out")
    assert program.names(folder) == {"LOG", "schedule.yaml"}
    compress = f"--compress {folder / 'schedule.yaml'} {weights} --epochs 2 --lr 0.01 --seed 1"
    assert "policies, epochs 0..1" in program.run(TINY + f"--dry-run {compress}").succeeded().out
    program.run(TINY + f"-o pruned {compress}").succeeded()
    before, after = (
        load(trained)["state_dict"],
        load(program.latest("pruned") / "checkpoint.pth.tar")["state_dict"],
    )
    if axis == "element":
        weights_of = [after[name] for name in after if name.endswith("weight") and after[name].dim() > 1]
        zeros, total = sum(int((w == 0).sum()) for w in weights_of), sum(w.numel() for w in weights_of)
        assert zeros >= 0.5 * total
    else:
        assert sum(after[name].numel() for name in after) < sum(before[name].numel() for name in before)


def test_the_sweep_of_another_network_is_refused(program, trained):
    program.run(TINY + f"--sense element {SWEEP} --exp-load-weights-from {trained}").succeeded()
    told = refused(program, TINY + f"--recommend {program.latest('sweep')} --max-drop 1 --seed 3 -o out")
    assert "is the sweep of other weights than this model's; give the checkpoint that was swept" in told
