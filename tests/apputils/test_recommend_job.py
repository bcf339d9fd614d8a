from __future__ import annotations

import json
import logging

import pytest
import torch
import yaml
from torch import nn

from distiller.apputils import classifier_jobs as jobs
from distiller.apputils import recommend_job
from distiller.apputils.checkpoint import read_checkpoint, save_checkpoint
from distiller.apputils.image_classifier import ClassifierCompressor
from distiller.config import file_config
from distiller.errors import DistillerError, SensitivityError, UsageError
from distiller.names import named_parameters, unwrap
from distiller.sensitivity.curves import Score, SensitivityPoint
from distiller.sensitivity.fingerprint import weights_fingerprint
from distiller.sensitivity.report import points_to_csv

pytestmark = pytest.mark.usefixtures("untimed", "global_settings_restored")

LEVELS = (0.3, 0.6, 0.9)
FC = {"fc1.weight": 0.5, "fc2.weight": 1.0, "fc3.weight": 4.0}
"""Points of top-1 that each weight costs at level 0.3; twice and thrice as many at the next ones."""
NET = "-a simplenet_mnist "


def sweep_of(args, folder, axis, steepness, levels=LEVELS, dense=0.0, weights=None):
    """The files of a finished sweep of the flags' model."""
    folder.mkdir(exist_ok=True)
    points = []
    for name, slope in steepness.items():
        for step, level in enumerate((dense, *levels)):
            score = Score(90 - slope * step, 100.0, 0.5 + slope * step)
            n = 500 if name == "fc2.weight" else 1000
            ends = (score.top1 - 1, 91.0) if name == "fc2.weight" else (None, None)
            points.append(
                SensitivityPoint(axis, name, level, score, n, round(score.top1 * n / 100), n, *ends)
            )
    points_to_csv(points, folder / "sensitivity.csv")
    fingerprint = weights or weights_fingerprint(unwrap(ClassifierCompressor(args).model))
    (folder / "sensitivity.json").write_text(json.dumps({"weights": fingerprint}))
    return folder


def recommended(flags, open_run, command, folder):
    args = flags(f"{command} --recommend", folder)
    compressor = ClassifierCompressor(args, open_run)
    recommend_job.recommend_schedule(compressor)
    text = (open_run.folder / "schedule.yaml").read_text()
    optimizer = compressor.make_optimizer()
    file_config(compressor.model, optimizer, open_run.folder / "schedule.yaml")
    return text, yaml.safe_load(text)


@pytest.fixture
def element(flags, tmp_path):
    return sweep_of(flags(), tmp_path / "sweep", "element", FC)


def said_in(text):
    """The comments of a schedule, unwrapped."""
    return " ".join(line.removeprefix("# ") for line in text.splitlines() if line.startswith("# "))


def levels_in(schedule):
    return {
        name: pruner["final_sparsity"]
        for pruner in schedule["pruners"].values()
        for name in pruner["weights"]
    }


def test_the_schedule_has_the_levels_and_says_what_they_come_to(flags, open_run, element, caplog):
    with caplog.at_level(logging.INFO, logger="distiller"):
        text, schedule = recommended(flags, open_run, "--target-sparsity 0.7", element)
    # fc1 has 235,200 elements of 266,200, fc2 30,000, fc3 1,000
    assert levels_in(schedule) == {"fc1.weight": 0.9}
    head = [line.removeprefix("# ") for line in text.splitlines() if line.startswith("#")]
    assert head[0] == (
        "Levels of axis 'element', recommended from a sensitivity sweep: lenet_300_100, digits."
    )
    said = said_in(text)
    assert "From sensitivity.csv: the dense model has a top-1 of 90.00 % (900 of 1,000)." in said
    assert "Asked for: target_sparsity 0.7. Reached: 79.52 % of the elements" in said
    assert "      0.9    1.50  88.50                  fc1.weight" in head
    assert "        0    0.00  90.00 (89.00 to 91.00) fc2.weight" in head
    assert "Sum of the drops, as counted: 1.50 points of top-1. That sum is an estimate" in said
    assert (
        "python compress_classifier.py --arch lenet_300_100 --dataset digits --compress schedule.yaml \\ "
        "      --resume-from CHECKPOINT --reset-optimizer --epochs 10 -b 64 --lr 0.02 --wd 1e-4 --seed 1"
    ) in said
    assert str(element) not in text
    assert open_run.names() == {"schedule.yaml"}
    assert "Saved " in caplog.text


def test_as_much_goes_as_the_budget_of_drops_allows(flags, open_run, element):
    _, schedule = recommended(flags, open_run, "--max-drop 2.5 --recommend-epochs 4", element)
    assert levels_in(schedule) == {"fc1.weight": 0.9, "fc2.weight": 0.3}
    assert schedule["lr_schedulers"]["cosine"]["T_max"] == 4


def test_macs_of_elements_are_multiplications_that_dense_kernels_do_anyway(flags, open_run, element):
    text, schedule = recommended(flags, open_run, "--target-macs 0.4", element)
    assert levels_in(schedule) == {"fc1.weight": 0.9}
    assert "20.48 % of the MACs are multiplications by weights that are not zero; dense kernels" in said_in(
        text
    )


def test_sensitivities_begin_with_the_levels_and_are_verified(flags, open_run, element, caplog):
    with caplog.at_level(logging.INFO, logger="distiller"):
        text, schedule = recommended(
            flags, open_run, "--target-sparsity 0.7 --recommend-pruner sensitivity --verify", element
        )
    (sensitivities,) = [pruner["sensitivities"] for pruner in schedule["pruners"].values()]
    assert list(sensitivities) == ["fc1.weight"]
    assert "In one shot, without training (--verify): top-1 " in caplog.text
    assert "1.50 were predicted by the images of the sweep." in said_in(text)


def test_one_shot_is_the_test_of_the_masked_model(flags, open_run, element):
    text, _ = recommended(flags, open_run, "--target-sparsity 0.7 --verify", element)
    compressor = ClassifierCompressor(flags("-e"))
    dense = compressor.test()
    weight = dict(named_parameters(compressor.model))["fc1.weight"].data
    count = int(0.9 * weight.numel())
    smallest = weight.abs().flatten().kthvalue(count).values
    weight[weight.abs() <= smallest] = 0
    pruned = compressor.test()
    said = said_in(text)
    assert f"top-1 {pruned.top1:.2f} % ({pruned.top1_correct:,} of {pruned.n:,})" in said
    assert f"dense {dense.top1:.2f} % ({dense.top1_correct:,})" in said


@pytest.mark.parametrize("axis", ["filter", "group"])
def test_filters_are_pruned_and_removed(flags, open_run, tmp_path, axis):
    slopes = {"conv1.weight": 4.0, "conv2.weight": 1.0}
    folder = sweep_of(flags(NET), tmp_path / "sweep", axis, slopes)
    text, schedule = recommended(flags, open_run, f"{NET} --target-macs 0.6 --verify", folder)
    assert schedule["pruners"]["to_levels"]["levels"] == {"conv2.weight": 0.6}
    assert schedule["extensions"] == {"smaller": {"class": "FilterRemover"}}
    said = said_in(text)
    assert "MACs stay" in said
    share = float(said.split("MACs stay (")[1].split(" %")[0])
    assert share <= 60
    assert "In one shot, without training" in said


def test_bits_become_overrides(flags, open_run, tmp_path):
    folder = sweep_of(flags(), tmp_path / "sweep", "weight-bits", FC, levels=(8.0, 4.0), dense=32.0)
    text, schedule = recommended(flags, open_run, "--max-drop 2.5 --verify", folder)
    assert schedule["quantizers"]["bits_by_layer"]["overrides"] == {
        "fc1": {"bits_weights": 4}, "fc2": {"bits_weights": 8},
    }  # fmt: skip
    assert "bits an element of the swept weights, 32 before" in text
    with pytest.raises(UsageError) as error:
        recommended(flags, open_run, "--target-sparsity 0.5", folder)
    assert str(error.value) == ("--recommend: axis 'weight-bits' has no target_sparsity; give --max-drop")


class Tied(nn.Sequential):
    """Two layers have one weight."""

    def __init__(self) -> None:
        super().__init__(
            nn.Flatten(), nn.Linear(64, 16), nn.Linear(16, 16), nn.Linear(16, 16), nn.Linear(16, 10)
        )
        self[3].weight = self[2].weight


def test_bits_of_a_weight_that_layers_share_are_those_of_all_of_them(flags, open_run, tmp_path):
    arch = f"-a {__name__}:Tied "
    folder = sweep_of(
        flags(arch), tmp_path / "sweep", "weight-bits", {"2.weight": 0.1, "4.weight": 9}, (4.0,), 32.0
    )
    _, schedule = recommended(flags, open_run, f"{arch} --max-drop 1 --verify", folder)
    overrides = schedule["quantizers"]["bits_by_layer"]["overrides"]
    assert overrides == {"2": {"bits_weights": 4}, "3": {"bits_weights": 4}}


def test_ranks_become_two_layers_each(flags, open_run, tmp_path):
    folder = sweep_of(flags(), tmp_path / "sweep", "rank", FC, levels=(0.1, 0.8))
    text, schedule = recommended(flags, open_run, "--max-drop 1 --verify", folder)
    # At a tenth less rank, 270 of 300, the factors would be no smaller: that is no level.
    assert schedule["extensions"]["low_rank"]["layers"] == {"fc1": {"rank": 60}}
    said = said_in(text)
    stay = 60 * (784 + 300) + 300 * 100 + 100 * 10
    assert f"{stay:,} of the 266,200 elements" in said
    assert f"{stay:,} of 266,200 MACs stay" in said
    assert "240 of 300" in text
    assert "In one shot, without training" in said
    with pytest.raises(UsageError) as error:
        recommended(flags, open_run, "--target-sparsity 0.5", folder)
    assert str(error.value) == (
        "--recommend: axis 'rank' has no target_sparsity; give --max-drop or --target-macs"
    )


def test_ranks_in_one_shot_are_the_test_of_the_factored_model(flags, open_run, tmp_path):
    folder = sweep_of(flags(), tmp_path / "sweep", "rank", FC, levels=(0.8,))
    text, _ = recommended(flags, open_run, "--max-drop 0.5 --verify", folder)
    compressor = ClassifierCompressor(flags())
    weight = dict(unwrap(compressor.model).named_parameters())["fc1.weight"].data
    u, s, v = torch.linalg.svd(weight.double(), full_matrices=False)
    weight.copy_((u[:, :60] * s[:60]) @ v[:60])
    factored = compressor.test()
    assert f"top-1 {factored.top1:.2f} % ({factored.top1_correct:,} of {factored.n:,})" in said_in(text)


def test_n_to_m_becomes_its_pruner(flags, open_run, tmp_path):
    folder = sweep_of(flags(), tmp_path / "sweep", "n:m", FC, levels=(0.25, 0.5))
    _, schedule = recommended(flags, open_run, "--max-drop 1.2 --verify", folder)
    assert schedule["pruners"] == {"2_of_4": {"class": "NMPruner", "n": 2, "m": 4, "weights": ["fc1.weight"]}}


@pytest.mark.parametrize(
    "axis, slopes",
    [("element", {"conv2.weight": 0.5, "fc1.weight": 0.1}), ("filter", {"conv1.weight": 4.0, "conv2.weight": 1.0})],
)  # fmt: skip
def test_the_schedule_trains_to_its_levels(flags, open_run, tmp_path, axis, slopes):
    folder = sweep_of(flags(NET), tmp_path / "sweep", axis, slopes, levels=(0.5,))
    recommended(flags, open_run, f"{NET} --max-drop 2 --recommend-epochs 2", folder)
    schedule = open_run.folder / "schedule.yaml"
    jobs.run_job(flags(f"{NET} --epochs 2 --etrs 0.05 --compress", schedule), open_run)
    trained = read_checkpoint(open_run.folder / "checkpoint.pth.tar").state_dict
    if axis == "filter":
        assert tuple(trained["conv2.weight"].shape) == (25, 20, 5, 5)
    else:
        for name in slopes:
            assert int((trained[name] == 0).sum()) == trained[name].numel() // 2


def test_a_residual_network_trains_to_the_macs_that_are_said(flags, open_run, tmp_path):
    net = "-a resnet20_cifar "
    coupled = ["conv1.weight", *(f"layer1.{block}.conv2.weight" for block in range(3))]
    slopes = dict.fromkeys([*coupled, *(f"layer1.{block}.conv1.weight" for block in range(3))], 0.5)
    folder = sweep_of(flags(net), tmp_path / "sweep", "filter", slopes, levels=(0.25, 0.5))
    text, _ = recommended(flags, open_run, f"{net} --target-macs 0.8 --recommend-epochs 2", folder)
    schedule = open_run.folder / "schedule.yaml"
    jobs.run_job(flags(f"{net} --epochs 2 --etrs 0.02 --etes 0.05 --compress", schedule), open_run)
    card = json.loads((open_run.folder / "results.json").read_text())
    stay, total = card["measured"]["macs"], card["reference"]["macs"]
    assert stay <= 0.8 * total
    assert f"{stay:,} of {total:,} MACs stay" in said_in(text)


def test_zeros_of_groups_are_counted_as_they_are_masked(flags, open_run, tmp_path):
    """With the channels of what reads them, each element once."""
    swept = ["conv1.weight", "conv2.weight", "fc1.weight"]
    folder = sweep_of(flags(NET), tmp_path / "sweep", "group", dict.fromkeys(swept, 1.0), levels=(0.3, 0.5))
    command = f"{NET} --target-sparsity 0.6 --recommend-epochs 2"
    text, schedule = recommended(flags, open_run, command, folder)
    del schedule["extensions"]
    schedule["policies"] = [entry for entry in schedule["policies"] if "extension" not in entry]
    masked = tmp_path / "masked.yaml"
    masked.write_text(yaml.safe_dump(schedule))
    jobs.run_job(flags(f"{NET} --epochs 2 --etrs 0.05 --compress", masked), open_run)
    trained = read_checkpoint(open_run.folder / "checkpoint.pth.tar").state_dict
    zeros, elements = (sum(map(count, (trained[name] for name in swept))) for count in (
        lambda weight: int((weight == 0).sum()), torch.Tensor.numel,
    ))  # fmt: skip
    assert zeros / elements >= 0.6
    assert f"({zeros:,} of {elements:,})" in said_in(text)


def refused(flags, open_run, command, folder, kind: type[DistillerError] = UsageError):
    with pytest.raises(kind) as error:
        recommended(flags, open_run, command, folder)
    assert open_run.calls == 0
    return str(error.value)


@pytest.mark.parametrize("axis, level", [("weight-bits", 4.0), ("rank", 0.8), ("n:m", 0.5)])
def test_sensitivities_are_of_elements_only(flags, open_run, tmp_path, axis, level):
    dense = 32.0 if axis == "weight-bits" else 0.0
    folder = sweep_of(flags(), tmp_path / "sweep", axis, FC, levels=(level,), dense=dense)
    told = refused(flags, open_run, "--max-drop 1 --recommend-pruner sensitivity", folder)
    assert told == f"pruner 'sensitivity': prunes elements, got axis '{axis}'; take 'agp'"


def test_the_sweep_of_other_weights_is_refused(flags, open_run, tmp_path):
    folder = sweep_of(flags(), tmp_path / "sweep", "element", FC, weights="0" * 64)
    told = refused(flags, open_run, "--max-drop 1", folder, SensitivityError)
    assert told == (
        f"--recommend {folder}: is the sweep of other weights than this model's; give the checkpoint that was "
        "swept, with --resume-from or --exp-load-weights-from"
    )


def test_a_file_that_does_not_say_its_axis_needs_it_told(flags, open_run, tmp_path, caplog):
    file = tmp_path / "old.csv"
    lines = [
        f"{name},{level},{90 - step},100.0,0.5" for name in FC for step, level in enumerate((0.0, *LEVELS))
    ]
    file.write_text("\n".join(["parameter,sparsity,top1,top5,loss", *lines, ""]))
    assert refused(flags, open_run, "--max-drop 1", file) == (
        f"--recommend {file}: the file does not say its axis; give it with --recommend-axis"
    )
    _, schedule = recommended(flags, open_run, "--max-drop 1 --recommend-axis element", file)
    assert levels_in(schedule) == {"fc1.weight": 0.3}
    assert "nothing tells whether it is of this model's weights" in caplog.text


def test_a_file_that_is_none_or_empty_names_the_flag_and_a_remedy(flags, open_run, tmp_path):
    assert refused(flags, open_run, "--max-drop 1", tmp_path / "none", SensitivityError) == (
        f"--recommend: {tmp_path / 'none'}: cannot be read, No such file or directory; "
        "give the run folder of a sweep, or its CSV file"
    )
    empty = tmp_path / "empty.csv"
    empty.write_text("parameter,sparsity,top1,top5,loss\n")
    for command in ("--max-drop 1", "--max-drop 1 --recommend-axis element"):
        assert refused(flags, open_run, command, empty) == (
            f"--recommend {empty}: there is no point in it; give a finished sweep"
        )


def test_of_several_axes_one_has_to_be_named(flags, open_run, element):
    with (element / "sensitivity.csv").open("a") as file:
        file.write("fc1.weight,0.5,80.0,100.0,0.7,channel,0.5,,,,,,\n")
    assert refused(flags, open_run, "--max-drop 1", element) == (
        f"--recommend {element}: has the axes element, channel; say which with --recommend-axis"
    )
    assert refused(flags, open_run, "--max-drop 1 --recommend-axis group", element) == (
        "--recommend-axis group: the sweep has element, channel"
    )
    _, schedule = recommended(flags, open_run, "--max-drop 1 --recommend-axis element", element)
    assert levels_in(schedule) == {"fc1.weight": 0.6}


def test_no_schedule_is_made_of_activation_bits(flags, open_run, tmp_path):
    folder = sweep_of(flags(), tmp_path / "sweep", "activation-bits", FC, (8.0, 4.0), 32.0)
    assert refused(flags, open_run, "--max-drop 1", folder) == (
        "axis 'activation-bits': no schedule is made of it, only of element, channel, n:m, weight-bits, rank, "
        "filter, group"
    )


def test_levels_that_take_nothing_away_are_refused(flags, open_run, tmp_path):
    folder = sweep_of(flags(NET), tmp_path / "sweep", "filter", {"conv1.weight": 1.0}, levels=(0.01,))
    assert refused(flags, open_run, f"{NET} --max-drop 9", folder) == (
        "--recommend: nothing of what was swept can be pruned: no level takes anything away"
    )


def test_a_sweep_that_is_not_over_is_refused(flags, open_run, element):
    (element / "sensitivity.blocks").touch()
    assert refused(flags, open_run, "--max-drop 1", element, SensitivityError) == (
        f"--recommend {element}: the sweep is not over; finish it with --sense-resume"
    )


def test_of_each_m_m_is_that_of_the_sweep(flags, open_run, tmp_path):
    folder = sweep_of(flags(), tmp_path / "sweep", "n:m", FC, levels=(0.5,))
    path = folder / "sensitivity.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), "context": {"block": 8}}))
    _, schedule = recommended(flags, open_run, "--max-drop 0.6", folder)
    assert list(schedule["pruners"]) == ["4_of_8"]


def test_the_flag_chooses_the_job(flags):
    assert jobs.choose_job(flags("--recommend x --max-drop 1")) is recommend_job.recommend_schedule


def test_settings_that_are_no_settings_are_refused(flags, open_run, element):
    path = element / "sensitivity.json"
    path.write_text("[1]")
    told = refused(flags, open_run, "--max-drop 1", element, SensitivityError)
    assert told.startswith(f"{path}: not the settings of a sweep, got a list; ")


@pytest.mark.parametrize(
    "settings, fault",
    [
        ({"context": [1]}, "AttributeError: 'list' object has no attribute 'get'"),
        ({"context": {"block": "x"}}, "ValueError: invalid literal for int() with base 10: 'x'"),
        ({"axes": [{"axis": "element"}]}, "KeyError: 'parameters'"),
    ],
)
def test_settings_that_no_sweep_has_are_refused(flags, open_run, element, settings, fault):
    path = element / "sensitivity.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), **settings}))
    assert refused(flags, open_run, "--max-drop 1", element, SensitivityError) == (
        f"--recommend {element}: sensitivity.json is not of a sweep, {fault}; give the run folder of one, or its CSV "
        "file alone"
    )


def test_a_file_that_lost_some_of_its_points_is_refused(flags, open_run, element):
    path, file = element / "sensitivity.json", element / "sensitivity.csv"
    axes = [{"axis": "element", "levels": [0.0, *LEVELS], "parameters": list(FC)}]
    path.write_text(json.dumps({**json.loads(path.read_text()), "axes": axes}))
    recommended(flags, open_run, "--max-drop 1", element)
    file.write_text("".join(file.read_text().splitlines(keepends=True)[:-4]))
    with pytest.raises(SensitivityError) as error:
        recommended(flags, open_run, "--max-drop 1", element)
    assert str(error.value) == (
        f"--recommend {element}: 4 points of the sweep are not in sensitivity.csv, the first is fc3.weight at 0 along "
        "element; sweep anew, or give the whole file"
    )


def test_the_training_has_the_seed_of_the_checkpoint(flags, open_run, tmp_path):
    model = unwrap(ClassifierCompressor(flags()).model)
    path = save_checkpoint(0, "lenet_300_100", model, name="x", dir=tmp_path, extras={"seed": 77})
    folder = sweep_of(flags(), tmp_path / "sweep", "element", FC, weights=weights_fingerprint(model))
    command = f"--exp-load-weights-from {path} --max-drop 1"
    text, _ = recommended(flags, open_run, command, folder)
    assert "--seed 77" in text


def test_names_that_the_model_does_not_have_are_refused(flags, open_run, tmp_path):
    folder = sweep_of(flags(), tmp_path / "sweep", "element", {"fc9.weight": 1.0})
    assert refused(flags, open_run, "--max-drop 1", folder, SensitivityError) == (
        f"{folder / 'sensitivity.csv'}: the model has no 'fc9.weight'; it is of another model"
    )
