"""Training: dense, under a schedule, resumed, with a network, data and pruner of the user's own."""

from __future__ import annotations

import csv
import json

import pytest

from tests.end_to_end.conftest import TINY
from tests.end_to_end.program import differences, in_a_fresh_interpreter, load, refused

TRAINED = {"LOG", "EVENTS", "checkpoint.pth.tar", "best.pth.tar", "epochs.csv", "results.json"}
LINKS = {"latest_log_dir", "latest_log_file"}
AGP = """
pruners:
  agp:
    class: AutomatedGradualPruner
    initial_sparsity: 0.1
    final_sparsity: 0.8
    weights: [conv2.weight, fc.weight]
lr_schedulers:
  decay: {class: ExponentialLR, gamma: 0.5}
policies:
  - pruner: {instance_name: agp}
    starting_epoch: 0
    ending_epoch: 3
    frequency: 1
  - lr_scheduler: {instance_name: decay}
    starting_epoch: 0
    ending_epoch: 4
    frequency: 1
"""


def test_a_first_training_as_the_readme_shows_it(tmp_path):
    command = "--arch lenet_300_100 --dataset digits --epochs 2 --lr 0.05 -b 64 --seed 0 --etrs 0.5"
    done = in_a_fresh_interpreter(tmp_path, command)
    assert (done.returncode, done.stderr) == (0, "")
    out = done.stdout
    assert [path.name for path in tmp_path.iterdir()] == ["logs"]
    assert {path.name for path in (tmp_path / "logs").iterdir()} > LINKS
    folder = (tmp_path / "logs/latest_log_dir").resolve()
    assert out.startswith(f"Random seed: 0\nLog file for this run: {folder / folder.name}.log\n")
    assert "Epoch: [1][   10/   11]    Overall Loss " in out
    assert out.count("==> Best [Top1: ") == 2
    assert "--- results card" in out
    card = json.loads((folder / "results.json").read_text())
    assert card["measured"]["parameters"] == 266_610
    assert card["measured"]["top1_correct"] > 0.5 * card["measured"]["n"] == 0.5 * 359
    assert set(card["measured"]) >= {"macs", "bytes_sparse", "latency_single", "latency_batch", "nonzeros"}
    assert card["reference"] is None


def test_a_training_writes_its_files_into_its_run_folder_and_nowhere_else(program):
    program.run(TINY + "--epochs 1 --etrs 0.1 -o out -n exp").succeeded()
    assert program.names() == {"nets.py", "out"}
    folder = program.latest("out")
    assert program.names("out") == {*LINKS, folder.name}
    assert program.names(folder) == {"LOG", "EVENTS", "exp_checkpoint.pth.tar", "exp_best.pth.tar",
                                     "epochs.csv", "results.json"}  # fmt: skip
    assert folder.name.startswith("exp___")


def test_what_is_printed_is_in_the_log_with_the_surroundings_of_the_run(program):
    done = program.run(TINY + "--epochs 1 --etrs 0.1 -o out").succeeded()
    log = (program.folder / "out/latest_log_file").read_text()
    messages = [line.partition(" - ")[2] or line for line in log.splitlines()]
    assert set(done.out.splitlines()) <= set(messages)
    for key in ("cpus", "torch", "python", "packages", "git", "command_line"):
        assert any(message.startswith(f"{key}: ") for message in messages)
        assert f"\n{key}: " not in done.out


def test_verbose_shows_what_otherwise_only_the_log_has(program):
    assert "\ncommand_line: " in program.run(TINY + "-e --etes 0.1 -v").succeeded().out


def test_training_under_a_schedule_reaches_its_sparsity_and_best_is_an_epoch_that_has_it(program, trained):
    schedule = program.write("agp.yaml", AGP)
    done = program.run(
        TINY
        + f"--epochs 4 --lr 0.02 --seed 3 -o out --compress agp.yaml --resume-from {trained} --reset-optimizer"
    ).succeeded()
    folder = program.latest("out")
    assert program.names(folder) == {*TRAINED, "configs"}
    assert (folder / "configs/agp.yaml").read_text() == schedule.read_text()
    rows = list(csv.DictReader((folder / "epochs.csv").read_text().splitlines()))
    assert [int(row["epoch"]) for row in rows] == [0, 1, 2, 3]
    assert [float(row["lr"]) for row in rows] == pytest.approx([0.02, 0.01, 0.005, 0.0025])
    sparsities = [float(row["sparsity"]) for row in rows]
    assert sparsities == sorted(sparsities)
    assert sparsities[2] == sparsities[3] == pytest.approx(0.8 * (432 + 320) / (54 + 432 + 320), abs=0.01)

    state = load(folder / "checkpoint.pth.tar")["state_dict"]
    for name in ("conv2.weight", "fc.weight"):
        assert float((state[name] == 0).float().mean()) == pytest.approx(0.8, abs=0.01)
    assert load(folder / "best.pth.tar")["epoch"] in (2, 3)
    assert "among the epochs in which pruning is complete" in done.out

    card = json.loads((folder / "results.json").read_text())
    assert card["reference"]["nonzeros"] == card["reference"]["parameters"] == card["measured"]["parameters"]
    assert card["ratios"]["nonzeros"] > 2.5
    assert any(statement.startswith("sparsity: zeros are stored") for statement in card["simulated"])


def test_the_same_seed_gives_the_same_network_and_another_seed_another_one(program):
    for out, seed in (("a", 5), ("b", 5), ("c", 6)):
        program.run(TINY + f"--epochs 1 --etrs 0.1 --seed {seed} -o {out}").succeeded()
    a, b, c = (load(program.latest(out) / "checkpoint.pth.tar")["state_dict"] for out in "abc")
    assert differences(a, b) == []
    assert differences(a, c) != []


def test_a_drawn_seed_is_printed_and_deterministic_chooses_seed_0(program):
    first = program.run(TINY + "--epochs 1 --etrs 0.05").succeeded().out.splitlines()[0]
    seed = int(first.removeprefix("Random seed: "))
    assert 1 <= seed <= 100_000
    done = program.run(TINY + "--epochs 1 --etrs 0.05 --deterministic").succeeded()
    assert done.out.startswith("Random seed: 0\n")


def test_resuming_goes_on_after_the_last_epoch_and_says_whose_learning_rate_holds(program, trained):
    done = program.run(TINY + f"--epochs 3 --lr 7 --etrs 0.2 -o out --resume-from {trained}").succeeded()
    assert "Random seed: 1\n" in done.out
    assert (
        "resumed after epoch 1; the optimizer goes on as it was saved, with learning rate 0.05: "
        "--lr, --momentum and --weight-decay take effect with --reset-optimizer only" in done.out
    )
    assert "Epoch: [2]" in done.out
    assert "Epoch: [1]" not in done.out
    assert load(program.latest("out") / "checkpoint.pth.tar")["epoch"] == 2


def test_the_deprecated_resume_starts_at_epoch_0_with_a_new_optimizer(program, trained):
    done = program.run(TINY + f"--epochs 1 --lr 0.01 --etrs 0.05 -o out --resume {trained}").succeeded()
    assert "--resume is deprecated: use --resume-from, with --reset-optimizer" in done.out
    optimizer = load(program.latest("out") / "checkpoint.pth.tar")["optimizer"]
    assert optimizer["state_dict"]["param_groups"][0]["lr"] == 0.01


def test_without_a_schedule_the_masks_of_a_checkpoint_stay_in_force(program, trained):
    program.write("agp.yaml", AGP)
    program.run(
        TINY + f"--epochs 3 --etrs 0.1 -o out --compress agp.yaml --resume-from {trained} --reset-optimizer"
    ).succeeded()
    pruned = program.latest("out") / "checkpoint.pth.tar"
    done = program.run(TINY + f"--epochs 4 --etrs 0.1 -o tuned --resume-from {pruned}").succeeded()
    assert "no --compress: the checkpoint's masks stay in force, its schedule does not go on" in done.out
    before, after = (
        load(path)["state_dict"]["fc.weight"] for path in (pruned, program.latest("tuned") / pruned.name)
    )
    assert bool(((before == 0) == (after == 0)).all())
    assert not bool((before == after).all())


def test_a_data_set_of_the_users_own_is_a_function_at_a_dotted_path_below_the_current_folder(program):
    program.write("mine/__init__.py", "")
    program.write(
        "mine/data.py",
        "import torch\n"
        "def stripes(folder):\n"
        "    images = torch.zeros(60, 1, 8, 8, dtype=torch.uint8)\n"
        "    labels = torch.arange(60) % 3\n"
        "    for image, label in zip(images, labels):\n"
        "        image[0, 2 * int(label)] = 255\n"
        "    print('called with', folder)\n"
        "    return (images, labels), (images[:12], labels[:12])\n",
    )
    done = program.run(
        "data --arch nets:Tiny --dataset mine.data:stripes -b 8 --epochs 2 --lr 0.05 --seed 0 -o out"
    ).succeeded()
    assert "called with data" in done.out
    card = json.loads((program.latest("out") / "results.json").read_text())
    assert card["measured"]["n"] == 12
    assert card["measured"]["top5_correct"] == 12
    assert load(program.latest("out") / "checkpoint.pth.tar")["state_dict"]["fc.weight"].shape[0] == 3


def test_a_file_of_the_current_folder_never_stands_in_for_a_module_of_the_library(program):
    program.write("random.py", "raise SystemExit('the wrong random')\n")
    program.write("distiller.py", "raise SystemExit('the wrong distiller')\n")
    program.run(TINY + "-e --etes 0.1").succeeded()


def test_a_network_with_nothing_to_train_is_refused_and_can_be_tested(program):
    program.write(
        "flat.py",
        "from torch import nn\n"
        "class Flat(nn.Module):\n"
        "    def __init__(self, num_classes, in_channels):\n"
        "        super().__init__()\n"
        "    def forward(self, x):\n"
        "        return x.flatten(1)[:, :10]\n",
    )
    message = refused(program, "--arch flat:Flat --dataset digits --epochs 1")
    assert message.startswith("UsageError: arch: 'flat:Flat' has no parameters that can be trained; ")
    program.run("--arch flat:Flat --dataset digits -e -o out").succeeded()
    card = json.loads((program.latest("out") / "results.json").read_text())
    assert card["measured"]["parameters"] == 0


def test_a_training_on_other_data_is_no_resumption(program, trained):
    program.write(
        "mine.py",
        "import torch\n"
        "def noise(folder):\n"
        "    return 2 * ((torch.rand(20, 1, 8, 8), torch.arange(20) % 10),)\n",
    )
    other = "--arch nets:Tiny --dataset mine:noise -b 8 --epochs 3 -o out "
    message = refused(program, other + f"--resume-from {trained}")
    assert message == (
        f"CheckpointError: {trained}: is of data set 'digits', this run is on 'mine:noise'; "
        "give --dataset digits, or take the weights only, with --exp-load-weights-from\n"
    )
    program.run(other + f"--exp-load-weights-from {trained}").succeeded()


@pytest.mark.parametrize("flags, images", [("-b 100000", 359), ("-b 100000 --etes 0.1", 35), ("-b 16", 16)])
@pytest.mark.parametrize("job", ["-e", "--epochs 1 --etrs 0.1"])
def test_latency_is_of_a_mini_batch_that_the_test_set_has(program, job, flags, images):
    done = program.run(f"--arch nets:Tiny --dataset digits -o out {job} {flags}").succeeded()
    card = json.loads((program.latest("out") / "results.json").read_text())
    assert card["measured"]["latency_batch"]["batch_size"] == images
    assert f"median latency, batch {images} (" in done.out


def test_tensorboard_has_distillers_scalars_of_an_epoch(program):
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    program.run(TINY + "--epochs 1 --etrs 0.1 -o out").succeeded()
    found = EventAccumulator(str(program.latest("out"))).Reload().Tags()["scalars"]
    weights = {f"weights/{layer}.weight" for layer in ("conv1", "conv2", "fc")}
    assert set(found) == {
        *(f"Performance/Training/{name}" for name in
          ("Overall Loss", "Objective Loss", "Top1", "Top5", "LR", "Time")),
        *(f"Performance/Validation/{name}" for name in ("Loss", "Top1", "Top5")),
        *(f"{kind}/{name}" for kind in ("sparsity", "sparsity-2D") for name in weights),
        "sparsity/weights/total",
    }  # fmt: skip


PLUGIN = '''
from distiller.interfaces import Pruner
from distiller.names import resolve_all


class FirstRows(Pruner):
    """Prunes the first `rows` rows."""

    def __init__(self, name: str, rows: int, weights: list[str]):
        self.name, self.rows, self.weights = name, rows, weights

    def select(self, param_names):
        return resolve_all(self.weights, param_names)

    def compute_masks(self, params, ctx):
        masks = {name: param.detach().clone().fill_(1) for name, param in params.items()}
        for mask in masks.values():
            mask[: self.rows] = 0
        return masks
'''
OWN_PRUNER = """
pruners:
  mine: {class: mine.pruners.FirstRows, rows: 2, weights: [fc.weight]}
policies:
  - pruner: {instance_name: mine}
    epochs: [0]
"""


def test_a_schedule_may_name_a_class_of_a_package_that_the_command_line_allows(program):
    program.write("mine/__init__.py", "")
    program.write("mine/pruners.py", PLUGIN)
    program.write("own.yaml", OWN_PRUNER)
    program.run(TINY + "--epochs 1 --etrs 0.1 -o out --compress own.yaml --plugin mine").succeeded()
    weight = load(program.latest("out") / "checkpoint.pth.tar")["state_dict"]["fc.weight"]
    assert (weight == 0).all(1).tolist() == [True] * 2 + [False] * 8


@pytest.mark.parametrize(
    "flags", ["--optimizer adam --lr 0.001", "--optimizer adamw --lr 0.001", "--momentum 0"]
)
def test_other_optimizers_train(program, flags):
    program.run(TINY + f"--epochs 1 --etrs 0.1 -o out {flags}").succeeded()
    optimizer = load(program.latest("out") / "checkpoint.pth.tar")["optimizer"]
    assert optimizer["class"] == {"adam": "Adam", "adamw": "AdamW"}.get(flags.split()[1], "SGD")


def test_num_best_scores_prints_that_many_epochs_the_best_first(program):
    done = program.run(TINY + "--epochs 3 --etrs 0.2 --num-best-scores 2 --seed 1").succeeded()
    after_last = done.out.split("--- validate (epoch=2)")[1].split("--- test ")[0]
    scores = [line for line in after_last.splitlines() if line.startswith("==> Best [Top1: ")]
    assert len(scores) == 2
    assert scores[0] > scores[1]


def test_confusion_prints_a_matrix_whose_rows_are_the_classes(program):
    done = program.run(TINY + "-e --confusion").succeeded()
    matrix = done.out.split("(rows: true class, columns: predicted):\n")[1].split("]]")[0]
    rows = [[int(number) for number in line.strip("[] ").split()] for line in matrix.splitlines()]
    assert [sum(row) for row in rows] == [36, 36, 35, 37, 36, 36, 36, 36, 35, 36]


@pytest.mark.parametrize(
    "flags, samples",
    [
        ("--validation-split 0", 359),
        ("--vs 0.0007", 1),
        ("--effective-valid-size 0.5", 71),
        ("--evs 0.001", 1),
        ("-b 5000", 143),
    ],
)
def test_validation_sets_of_every_size_do(program, flags, samples):
    done = program.run(TINY + f"--epochs 1 --etrs 0.05 {flags}").succeeded()
    assert f"\n{samples} samples (" in done.out.split("--- validate")[1].split("--- test")[0]
    is_told = "no validation set (--validation-split 0): the test set is used" in done.out
    assert is_told == (flags == "--validation-split 0")


def test_a_training_set_of_one_image_does(program):
    assert (
        "Epoch: [0][    1/    1]"
        in program.run("--arch lenet5 --dataset digits --epochs 1 --etrs 0.0001").out
    )
