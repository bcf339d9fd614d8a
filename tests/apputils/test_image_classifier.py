from __future__ import annotations

import copy
import logging

import pytest
import torch
from torch import nn

from distiller.apputils.checkpoint import save_checkpoint
from distiller.apputils.image_classifier import ClassifierCompressor, Run
from distiller.errors import CheckpointError, DatasetError, ScheduleError, UnknownNameError, UsageError
from distiller.model_summaries import total_macs

pytestmark = pytest.mark.usefixtures("untimed", "global_settings_restored")

SCHEDULE = """
pruners:
  p: {class: SparsityLevelParameterPruner, levels: {fc1.weight: 0.5}}
policies:
  - {pruner: {instance_name: p}, epochs: [0]}
"""


@pytest.fixture
def checkpoint(flags, tmp_path):
    """Of the network with all parameters 0.5, in epoch 4, by seed 99."""
    model = ClassifierCompressor(flags()).model
    with torch.no_grad():
        for param in model.parameters():
            param.fill_(0.5)
    extras = {"seed": 99}
    return save_checkpoint(4, "lenet_300_100", model, extras=extras, name="given", dir=tmp_path)


def test_putting_a_classifier_together_writes_nothing_and_reads_no_more_than_it_needs(flags, open_run):
    args = flags()
    before = copy.deepcopy(vars(args))
    compressor = ClassifierCompressor(args, open_run)
    assert open_run.calls == 0
    assert vars(args) == before
    assert compressor.input_shape == (1, 28, 28)
    assert compressor.facts.num_classes == 10
    assert compressor.macs == 266_200 == total_macs(compressor.model, (1, 1, 28, 28))
    assert "data" not in vars(compressor)


def test_the_run_is_opened_once_and_only_when_it_is_asked_for(flags, open_run):
    compressor = ClassifierCompressor(flags(), open_run)
    assert compressor.run is compressor.run
    assert open_run.calls == 1


def test_without_a_run_folder_a_job_that_writes_says_what_it_lacks(flags):
    with pytest.raises(UsageError, match="this job writes files and needs a run folder; pass open_run"):
        ClassifierCompressor(flags()).run.require_folder()
    assert Run(None).folder is None


def test_sizes_of_the_data_follow_the_flags(flags):
    data = ClassifierCompressor(flags("--vs 0.2")).data
    assert data.train is not None
    assert data.valid is not None
    assert (data.train.num_samples, data.valid.num_samples, data.test.num_samples) == (230, 143, 71)
    assert data.train.batch_size == 64


@pytest.mark.parametrize("seed", [0, 12])
def test_the_seed_decides_the_weights(flags, seed):
    first, second, other = (
        ClassifierCompressor(flags(f"--seed {number}")).model.state_dict()["fc1.weight"]
        for number in (seed, seed, seed + 1)
    )
    assert torch.equal(first, second)
    assert not torch.equal(first, other)


@pytest.mark.parametrize(
    "command, seed",
    [
        ("--seed 3", 3),
        ("--seed 0 --deterministic", 0),
        ("--deterministic", 0),
        ("-e", 0),
        ("--sense element", 0),
        ("--qe-calibration 0.1", 0),
        ("--seed 5 -e", 5),
    ],
)
def test_the_seed_is_the_one_given_or_0_where_results_are_to_repeat(flags, command, seed):
    args = flags(command)
    if "--seed" not in command:
        args.seed = None
    assert ClassifierCompressor(args).seed == seed


def test_a_training_without_a_seed_draws_and_tells_one(flags, caplog):
    args = flags()
    args.seed = None
    with caplog.at_level(logging.INFO, logger="distiller"):
        seeds = {ClassifierCompressor(args).seed for _ in range(3)}
    assert len(seeds) > 1
    assert all(1 <= seed <= 100_000 for seed in seeds)
    assert {f"Random seed: {seed}" for seed in seeds} <= set(caplog.messages)


def test_a_resumed_training_takes_the_seed_of_the_checkpoint_unless_one_is_given(flags, checkpoint):
    args = flags("--resume-from", checkpoint)
    assert ClassifierCompressor(args).seed == 7
    args.seed = None
    assert ClassifierCompressor(args).seed == 99


def test_weights_alone_bring_no_seed(flags, checkpoint):
    args = flags("--deterministic --exp-load-weights-from", checkpoint)
    args.seed = None
    assert ClassifierCompressor(args).seed == 0


@pytest.mark.parametrize("flag", ["--resume-from", "--exp-load-weights-from"])
def test_the_weights_of_a_checkpoint_are_in_the_model(flags, checkpoint, flag):
    compressor = ClassifierCompressor(flags(flag, checkpoint))
    assert all(bool((param == 0.5).all()) for param in compressor.model.parameters())
    assert not compressor.is_quantized
    assert compressor.known_reference() is None


@pytest.mark.parametrize(
    "command, error, message",
    [
        ("--arch lenet5 --resume-from {checkpoint}", CheckpointError, "is of another model"),
        ("--resume-from nowhere.pth.tar", CheckpointError, "nowhere.pth.tar: no such file; check the path"),
        ("--arch lenett5", UnknownNameError, "did you mean 'lenet5'"),
        ("--dataset digitts", UnknownNameError, "did you mean 'digits'"),
        ("--gpus 99", UsageError, "--gpus: no GPU 99; this machine has"),
        ("--pretrained", UsageError, "no trained weights are offered for 'lenet_300_100'"),
    ],
)
def test_what_cannot_be_met_is_told_before_a_run_is_opened(
    flags, open_run, checkpoint, command, error, message
):
    with pytest.raises(error, match=message):
        ClassifierCompressor(flags(command.format(checkpoint=checkpoint)), open_run)
    assert open_run.calls == 0


def test_missing_data_are_told_at_the_first_use(flags):
    compressor = ClassifierCompressor(flags("--dataset mnist"))
    with pytest.raises(DatasetError, match="no DATASET_DIR was given"):
        _ = compressor.data


@pytest.mark.parametrize(
    "command, kind, settings",
    [
        ("--wd 0.01", torch.optim.SGD, {"lr": 0.05, "momentum": 0.9, "weight_decay": 0.01}),
        ("--momentum 0.5 --lr 1", torch.optim.SGD, {"lr": 1.0, "momentum": 0.5, "weight_decay": 1e-4}),
        ("--optimizer adam", torch.optim.Adam, {"lr": 0.05, "weight_decay": 1e-4, "betas": (0.9, 0.999)}),
        ("--optimizer adamw --wd 0", torch.optim.AdamW, {"lr": 0.05, "weight_decay": 0.0}),
    ],
)
def test_the_optimizer_is_the_one_asked_for(flags, command, kind, settings):
    compressor = ClassifierCompressor(flags(command))
    optimizer = compressor.make_optimizer()
    assert type(optimizer) is kind
    group = optimizer.param_groups[0]
    assert {name: group[name] for name in settings} == settings
    assert group["params"] == list(compressor.model.parameters())


def test_the_scheduler_is_that_of_the_schedule_or_has_no_policies(flags, tmp_path):
    assert ClassifierCompressor(flags()).make_scheduler(None).policies == []
    file = tmp_path / "s.yaml"
    file.write_text(SCHEDULE)
    policies = ClassifierCompressor(flags("--compress", file)).make_scheduler(None).policies
    assert [policy.name for policy in policies] == ["pruner p"]
    file.write_text(SCHEDULE.replace("fc1.weight", "fc9.weight"))
    with pytest.raises(ScheduleError, match="no parameter 'fc9.weight' in the model"):
        ClassifierCompressor(flags("--compress", file)).make_scheduler(None)


@pytest.mark.parametrize("frozen", [False, True])
def test_a_model_with_nothing_to_train_has_no_optimizer_and_can_be_tested(flags, monkeypatch, frozen):
    class Nothing(nn.Module):
        def __init__(self, num_classes, in_channels):
            super().__init__()
            if frozen:
                self.bias = nn.Parameter(torch.zeros(num_classes), requires_grad=False)

        def forward(self, x):
            return x.flatten(1)[:, :10] + getattr(self, "bias", 0)

    monkeypatch.setattr("tests.apputils.test_image_classifier.user_model", Nothing, raising=False)
    compressor = ClassifierCompressor(flags("--arch tests.apputils.test_image_classifier:user_model"))
    with pytest.raises(UsageError) as error:
        compressor.make_optimizer()
    assert str(error.value) == (
        "arch: 'tests.apputils.test_image_classifier:user_model' has no parameters that can be trained; "
        "give a model that has some, or test this one with --evaluate"
    )
    assert compressor.card(compressor.test()).measured.parameters == (10 if frozen else 0)


@pytest.mark.parametrize("flag", ["", "-e", "--reset-optimizer"])
def test_a_training_goes_on_with_its_own_data_set_only(flags, checkpoint, caplog, flag):
    args = flags(f"--dataset fashion-mnist {flag} --resume-from", checkpoint)
    told = f"{checkpoint}: is of data set 'digits', this run is on 'fashion-mnist'"
    if flag:
        ClassifierCompressor(args)
        assert told in caplog.messages
        return
    with pytest.raises(CheckpointError) as error:
        ClassifierCompressor(args)
    assert str(error.value) == (
        f"{told}; give --dataset digits, or take the weights only, with --exp-load-weights-from"
    )


def test_a_checkpoint_of_an_unknown_data_set_is_resumed(flags, checkpoint, caplog):
    stored = torch.load(checkpoint, weights_only=True)
    torch.save({"epoch": 3, "arch": "lenet_300_100", "state_dict": stored["state_dict"]}, checkpoint)
    ClassifierCompressor(flags("--dataset fashion-mnist --resume-from", checkpoint))
    assert not any("data set" in message for message in caplog.messages)


@pytest.mark.parametrize(
    "command, is_told",
    [
        ("--seed 98 --resume-from", True),
        ("--seed 99 --resume-from", False),
        ("--seed 98 --reset-optimizer --resume-from", False),
        ("--seed 98 -e --resume-from", False),
        ("--seed 98 --exp-load-weights-from", False),
    ],
)
def test_another_seed_on_resuming_is_told_to_change_the_data(flags, checkpoint, caplog, command, is_told):
    ClassifierCompressor(flags(command, checkpoint))
    warnings = [record.getMessage() for record in caplog.records if record.levelname == "WARNING"]
    assert warnings == is_told * [
        "--seed 98: the resumed run's seed is 99. With another one the order and augmentation of the images "
        "change, and which of them validate (some were trained on): the run does not end as it would have "
        "without the interruption. Leave --seed out to go on with 99"
    ]


@pytest.mark.parametrize(
    "command, macs, images",
    [
        ("-b 64 --etes 1", 10, 64),
        ("-b 100000 --etes 1", 10, 359),
        ("-b 100000 --etes 0.2", 10, 71),
        ("-b 100000 --etes 1", 10**9, 256),  # at least what the default of --batch-size is
        ("-b 100000 --etes 1", 890 * 10**6, 280),
        ("-b 100000 --etes 1", 0, 359),
    ],
)
def test_a_timed_mini_batch_is_that_of_the_evaluation_unless_it_takes_too_long(flags, command, macs, images):
    compressor = ClassifierCompressor(flags(command))
    compressor.macs = macs
    assert compressor.latency_batch == images


class Constant(nn.Module):
    """Answers the same class for every image."""

    def __init__(self, answer: int):
        super().__init__()
        self.logits = nn.Parameter(torch.nn.functional.one_hot(torch.tensor(answer), 10).float())

    def forward(self, x):
        return self.logits.expand(len(x), 10)


def test_a_test_counts_over_the_test_set_and_logs_the_result_line(flags, caplog):
    compressor = ClassifierCompressor(flags("--etes 1"))
    with caplog.at_level(logging.INFO, logger="distiller"):
        result = compressor.test(Constant(3))
    assert (result.top1_correct, result.n) == (37, 359)
    assert (
        caplog.messages[-1]
        == result.line()
        == f"==> Top1: 10.306    Top5: {result.top5:.3f}    Loss: {result.loss:.3f}"
    )
    assert "359 samples (64 per mini-batch)" in caplog.messages


def test_a_confusion_matrix_is_printed_whole_when_asked_for(flags, caplog):
    compressor = ClassifierCompressor(flags("--etes 1 --confusion"))
    with caplog.at_level(logging.INFO, logger="distiller"):
        compressor.test(Constant(3))
    text = next(message for message in caplog.messages if message.startswith("confusion matrix"))
    rows = [[int(number) for number in line.strip("[] ").split()] for line in text.splitlines()[1:]]
    assert [row[3] for row in rows] == [36, 36, 35, 37, 36, 36, 36, 36, 35, 36]
    assert sum(map(sum, rows)) == 359


def test_a_confusion_matrix_of_many_classes_is_not_abridged(flags, caplog, monkeypatch):
    compressor = ClassifierCompressor(flags("--confusion"))
    monkeypatch.setattr(compressor, "facts", type("Facts", (), {"num_classes": 60}))
    with caplog.at_level(logging.INFO, logger="distiller"):
        compressor.test(nn.Sequential(nn.Flatten(), nn.Linear(784, 60)))
    text = next(message for message in caplog.messages if message.startswith("confusion matrix"))
    assert "..." not in text
    assert len(text.splitlines()) == 61


def test_validation_evaluates_the_validation_set(flags):
    compressor = ClassifierCompressor(flags("--evs 1"))
    compressor.model = Constant(0)
    assert compressor.validate(0).n == 143


def test_a_card_is_of_the_model_and_its_reference(flags):
    compressor = ClassifierCompressor(flags())
    dense = copy.deepcopy(compressor.model)
    with torch.no_grad():
        compressor.model.get_parameter("fc1.weight").zero_()
    reference = compressor.measure(dense, None)
    card = compressor.card(compressor.test(), reference, dense)
    assert card.reference is not None
    assert card.measured.nonzeros == 266_610 - 784 * 300
    assert card.measured.macs == card.reference.macs == 266_200
    assert card.measured.n == 71
    assert card.reference.nonzeros == 266_610


class Counting(nn.Module):
    """Answers as many numbers as it is told to; in evaluation a tensor, in training a tuple."""

    def __init__(self, answers: int):
        super().__init__()
        self.fc = nn.LazyLinear(answers)

    def forward(self, x):
        answer = self.fc(x.flatten(1))
        return (answer,) if self.training else answer


@pytest.mark.parametrize("answers", [10, 20])
def test_a_model_of_the_users_own_may_answer_more_classes_and_be_lazy(flags, monkeypatch, answers):
    monkeypatch.setattr(
        "tests.apputils.test_image_classifier.user_model", lambda: Counting(answers), raising=False
    )
    compressor = ClassifierCompressor(flags("--arch tests.apputils.test_image_classifier:user_model"))
    assert compressor.model.training
    assert compressor.model.get_parameter("fc.weight").shape == (answers, 64)
    assert not compressor.model.get_parameter("fc.weight").is_inference()


def test_a_model_of_the_users_own_with_too_few_answers_is_refused(flags, monkeypatch):
    monkeypatch.setattr("tests.apputils.test_image_classifier.user_model", lambda: Counting(9), raising=False)
    with pytest.raises(UsageError) as error:
        ClassifierCompressor(flags("--arch tests.apputils.test_image_classifier:user_model"))
    assert str(error.value) == (
        "arch: 'tests.apputils.test_image_classifier:user_model' must answer images of shape (1, 1, 8, 8) with "
        "logits of shape (1, 10), got (1, 9); build it with the parameters num_classes and in_channels"
    )


def test_channels_last_lays_out_the_models_weights_and_changes_no_value(flags):
    plain, laid_out = (
        ClassifierCompressor(flags("--arch lenet5 " + more)).model for more in ("", "--channels-last")
    )
    for name, param in laid_out.named_parameters():
        assert torch.equal(param, dict(plain.named_parameters())[name])
    assert laid_out.conv2.weight.is_contiguous(memory_format=torch.channels_last)
    assert not plain.conv2.weight.is_contiguous(memory_format=torch.channels_last)
