"""What a training shows of itself when asked: its masks, its parameters, its activations."""

from __future__ import annotations

import csv

from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

from tests.end_to_end.conftest import TINY
from tests.end_to_end.program import differences, load, refused
from tests.end_to_end.test_training import AGP, TRAINED

STATISTICS = {"sparsity_ofm.csv", "l1_channels.csv", "apoz_channels.csv", "mean_channels.csv", "records.csv"}


def test_masks_parameters_and_activations_of_a_training(program):
    program.write("agp.yaml", AGP)
    train = TINY + "--epochs 3 --lr 0.02 --seed 3 --etrs 0.2 --compress agp.yaml "
    watching = "--masks-sparsity --param-hist --act-stats train valid test "
    out = program.run(train + watching + "-o watched").succeeded().out
    program.run(train + "-o plain").succeeded()

    folder = program.latest("watched")
    assert program.names(folder) == {*TRAINED, "configs", "activation_stats"}
    states = [load(program.latest(name) / "checkpoint.pth.tar") for name in ("watched", "plain")]
    for name in ("state_dict", "optimizer", "scheduler", "rng"):
        assert differences(states[0][name], states[1][name]) == []

    assert out.count("Sparsity of the masks after epoch ") == 3
    (line,) = [
        line for line in out.split("after epoch 2:")[1].splitlines() if line.startswith("| fc.weight ")
    ]
    cells = [cell.strip() for cell in line.strip("|").split("|")]
    assert (cells[2], cells[3], cells[-1]) == ("320", "64", "80.00")

    assert {path.name for path in (folder / "activation_stats").iterdir()} == {"train", "valid", "test"}
    for phase in ("train", "valid", "test"):
        assert {path.name for path in (folder / "activation_stats" / phase).iterdir()} == STATISTICS
    channels = list(csv.reader((folder / "activation_stats/test/apoz_channels.csv").read_text().splitlines()))
    assert channels[0] == ["relu1", "relu2"]
    assert len(channels) == 1 + 8
    records = list(csv.DictReader((folder / "activation_stats/test/records.csv").read_text().splitlines()))
    assert [record["layer"] for record in records].count("conv1") == 359

    events = EventAccumulator(str(folder), size_guidance={"scalars": 0, "histograms": 0}).Reload()
    assert [event.step for event in events.Histograms("fc/weight")] == [0, 1, 2]
    for phase, steps in (("train", [0, 1, 2]), ("valid", [0, 1, 2]), ("test", [2])):
        scalars = events.Scalars(f"sparsity_ofm/activations/{phase}/relu2")
        assert [event.step for event in scalars] == steps
        by_channel = events.Histograms(f"apoz_channels/activations/{phase}/relu2")
        assert [event.step for event in by_channel] == steps
        shown = [
            line
            for line in out.split(f"Activations ({phase}, epoch 2; ")[1].splitlines()
            if "| relu2 " in line
        ]
        assert f" {scalars[-1].value:.3f} " in shown[0]


def test_activations_of_a_test(program, trained):
    done = program.run(TINY + f"-e --act-stats test -o out --exp-load-weights-from {trained}").succeeded()
    assert "Activations (test, epoch 1; " in done.out
    assert program.names(program.latest("out")) == {"LOG", "EVENTS", "results.json", "activation_stats"}


def test_phases_that_a_job_does_not_have_are_refused(program):
    told = "UsageError: --activation-stats train: only when training\n"
    assert refused(program, TINY + "-e --act-stats test train") == told
