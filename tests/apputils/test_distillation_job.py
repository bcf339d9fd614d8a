from __future__ import annotations

import json
from itertools import pairwise

import pytest
import torch

from distiller.apputils.checkpoint import read_checkpoint, save_checkpoint
from distiller.apputils.classifier_jobs import dry_run, how_to_go_on, run_job
from distiller.apputils.classifier_training import ClassifierTraining
from distiller.apputils.image_classifier import ClassifierCompressor
from distiller.errors import CheckpointError, DistillerError, PolicyConflictError, UsageError
from distiller.models import create_model

pytestmark = pytest.mark.usefixtures("untimed", "global_settings_restored")
AWAITING = """
extensions:
  kd: {class: KnowledgeDistillation, temperature: 3}
policies:
  - {extension: {instance_name: kd}, epochs: [0, 1]}
"""


@pytest.fixture
def teacher(tmp_path):
    torch.manual_seed(1)
    model = create_model(False, "digits", "lenet_300_100", parallel=False)
    return save_checkpoint(0, "lenet_300_100", model, name="teacher", dir=tmp_path)


@pytest.fixture
def awaiting(tmp_path):
    file = tmp_path / "awaiting.yaml"
    file.write_text(AWAITING)
    return file


TEACHER = "--kd-teacher lenet_300_100 --kd-resume"


def test_the_flags_make_a_policy_and_the_card_tells_the_teacher(flags, open_run, teacher):
    args = flags(f"--epochs 2 --kd-temp 4 --kd-start-epoch 1 {TEACHER}", teacher)
    training = ClassifierTraining(ClassifierCompressor(args, open_run))
    (entry,) = training.scheduler.policies
    assert (entry.name, entry.window.start, entry.window.last) == ("knowledge distillation", 1, 1)
    assert entry.policy.describe(None) == (
        f"KnowledgeDistillation: from teacher 'lenet_300_100' of {teacher}: "
        "0.5 x labels + 0.5 x distillation at T 4"
    )
    card = training.run()
    (figures,) = card.teachers
    assert (figures.n, figures.parameters, figures.macs) == (71, 266_610, 266_200)
    lines = card.to_text().splitlines()
    assert lines[0].split() == ["this", "model", "teacher", "teacher", "/", "this"]
    assert json.loads(card.save(open_run.folder / "r.json").read_text())["teachers"][0]["n"] == 71
    steps = [scalars for _, _, _, scalars in open_run.logger.steps]
    assert "Distill Loss" not in steps[0]
    assert "Distill Loss" in steps[-1]


def test_of_several_teachers_each_has_a_column(flags, open_run, teacher):
    from dataclasses import replace

    from tests.apputils.figures import DENSE, PRUNED

    card = ClassifierCompressor(flags("--epochs 1"), open_run).card(None)
    text = replace(card, teachers=(DENSE, PRUNED)).to_text()
    assert "teacher 1" in text.splitlines()[0]
    assert "teacher 2 / this" in text.splitlines()[0]
    assert "teachers" not in card.to_json()


def test_a_dry_run_tells_of_the_teacher(flags, teacher, awaiting):
    told = dry_run(flags(f"--dry-run --epochs 2 --compress {awaiting} {TEACHER}", teacher))
    assert f"extension kd: KnowledgeDistillation: from teacher 'lenet_300_100' of {teacher}: " in told
    told = dry_run(flags(f"--dry-run --epochs 2 --compress {awaiting}"))
    assert "extension kd: KnowledgeDistillation: from a teacher that is not given yet: " in told


def test_a_schedule_that_awaits_a_teacher_gets_that_of_the_flags(flags, open_run, teacher, awaiting):
    args = flags(f"--epochs 2 --compress {awaiting} {TEACHER}", teacher)
    training = ClassifierTraining(ClassifierCompressor(args, open_run))
    (entry,) = training.scheduler.policies
    assert (entry.name, entry.policy.temperature) == ("extension kd", 3)
    assert len(training.run().teachers) == 1


def test_a_schedule_that_awaits_a_teacher_and_gets_none(flags, awaiting):
    with pytest.raises(UsageError) as error:
        ClassifierTraining(ClassifierCompressor(flags(f"--epochs 2 --compress {awaiting}")))
    assert str(error.value) == (
        "--compress: 'extension kd' names no teacher; give one in the schedule, or --kd-teacher ARCH with "
        "--kd-resume CHECKPOINT"
    )


def test_how_to_distil_is_said_once(flags, teacher, awaiting):
    args = flags(f"--epochs 2 --kd-temp 4 --compress {awaiting} {TEACHER}", teacher)
    with pytest.raises(UsageError) as error:
        ClassifierTraining(ClassifierCompressor(args))
    assert str(error.value) == (
        "--kd-temperature: 'extension kd' of the schedule says how to distil; leave it out, or say it there"
    )


def test_two_distillations_at_once(flags, teacher, tmp_path):
    file = tmp_path / "s.yaml"
    file.write_text(AWAITING.replace("temperature: 3", f"teacher: {{checkpoint: {teacher}}}"))
    with pytest.raises(PolicyConflictError, match="both weigh the loss of the labels"):
        ClassifierTraining(ClassifierCompressor(flags(f"--epochs 2 --compress {file} {TEACHER}", teacher)))


def test_a_run_that_goes_on_without_its_teacher_says_so(flags, open_run, teacher, caplog):
    ClassifierTraining(ClassifierCompressor(flags(f"--epochs 1 {TEACHER}", teacher), open_run)).run()
    left = open_run.folder / "checkpoint.pth.tar"
    caplog.clear()
    ClassifierTraining(ClassifierCompressor(flags(f"--epochs 2 --resume-from {left}")))
    assert [record.message for record in caplog.records if record.levelname == "WARNING"] == [
        f"{left}: its run learned from a teacher, given with --kd-teacher, and none is given now: training goes "
        "on from the labels alone. Give the --kd-* flags of that run to go on as it began"
    ]
    caplog.clear()
    for flag in ("--reset-optimizer --resume-from", "--exp-load-weights-from"):
        ClassifierTraining(ClassifierCompressor(flags(f"--epochs 2 {flag} {left}")))
    assert "teacher" not in caplog.text


def test_a_run_with_a_schedule_does_not_go_on_without_its_teacher(flags, open_run, teacher, tmp_path, caplog):
    file = tmp_path / "s.yaml"
    file.write_text(
        "regularizers:\n  r: {class: L1Regularizer, reg_regims: {fc1.weight: 0.01}}\n"
        "policies:\n  - {regularizer: {instance_name: r}, epochs: [0]}\n"
    )
    args = flags(f"--epochs 1 --compress {file} {TEACHER}", teacher)
    ClassifierTraining(ClassifierCompressor(args, open_run)).run()
    left = open_run.folder / "checkpoint.pth.tar"
    with pytest.raises(UsageError) as error:
        ClassifierTraining(ClassifierCompressor(flags(f"--epochs 2 --compress {file} --resume-from {left}")))
    assert str(error.value) == (
        f"{left}: its run learned from a teacher, given with --kd-teacher, and none is given now; give the "
        "--kd-* flags of that run, or start anew from its weights with --exp-load-weights-from or "
        "--reset-optimizer"
    )
    caplog.clear()
    ClassifierTraining(ClassifierCompressor(flags(f"--epochs 2 --resume-from {left}")))
    assert "learned from a teacher" in caplog.text
    assert (
        "no --compress: the checkpoint's masks stay in force, its schedule does not go on" in caplog.messages
    )


def test_a_flag_at_its_default_beside_a_schedule_that_says_how_to_distil(flags, teacher, awaiting):
    """It was ignored in silence once: the schedule's temperature is 3."""
    args = flags(f"--epochs 2 --kd-temp 1 --compress {awaiting} {TEACHER}", teacher)
    with pytest.raises(
        UsageError, match="--kd-temperature: 'extension kd' of the schedule says how to distil"
    ):
        ClassifierTraining(ClassifierCompressor(args))


def test_another_teacher_on_resuming_is_refused(flags, open_run, teacher, tmp_path):
    ClassifierTraining(ClassifierCompressor(flags(f"--epochs 1 {TEACHER}", teacher), open_run)).run()
    left = open_run.folder / "checkpoint.pth.tar"
    torch.manual_seed(2)
    other = save_checkpoint(
        0,
        "lenet_300_100",
        create_model(False, "digits", "lenet_300_100", parallel=False),
        name="other",
        dir=tmp_path,
    )
    args = flags(f"--epochs 2 --resume-from {left} {TEACHER}", other)
    with pytest.raises(CheckpointError, match="has other weights than when the checkpoint was written"):
        ClassifierTraining(ClassifierCompressor(args))


# ------------------------------------------------------------------------------ chains

CHAIN = "--epochs 2 --kd-temp 2 --kd-chain lenet_300_100,lenet_300_100 "


def state_of(folder):
    return read_checkpoint(folder / "checkpoint.pth.tar").state_dict


def test_each_stage_of_a_chain_learns_from_the_one_before(flags, open_run, teacher, caplog):
    caplog.set_level("INFO", logger="distiller")
    card = run_job(flags(CHAIN + TEACHER, teacher), open_run)
    stages = [f"{number}_lenet_300_100" for number in (1, 2, 3)]
    assert open_run.names() == {*stages, "chain.json", "results.json"}
    record = json.loads((open_run.folder / "chain.json").read_text())
    assert record["seed"] == 7
    assert [row[:3] for row in record["stages"]] == [
        ["0", "lenet_300_100", ""],
        *[[str(number), "lenet_300_100", "lenet_300_100"] for number in (1, 2, 3)],
    ]
    cards = [json.loads((open_run.folder / stage / "results.json").read_text()) for stage in stages]
    for before, after in pairwise(cards):
        assert after["teachers"][0]["top1_correct"] == before["measured"]["top1_correct"]
    assert card.measured.top1_correct == cards[-1]["measured"]["top1_correct"]
    (table,) = [message for message in caplog.messages if message.startswith("--- chain ---")]
    assert len(table.splitlines()) == 1 + 2 + 4


def test_a_stage_is_the_training_that_it_would_be_alone(flags, open_run, teacher):
    run_job(flags(CHAIN + TEACHER, teacher), open_run)
    chain = open_run.folder
    alone = f"--epochs 2 --kd-temp 2 {TEACHER} {chain / '1_lenet_300_100' / 'checkpoint.pth.tar'}"
    run_job(flags(alone), open_run)
    theirs = state_of(chain / "2_lenet_300_100")
    assert all(torch.equal(value, theirs[name]) for name, value in state_of(open_run.folder).items())


class Killed(Exception):
    pass


@pytest.mark.parametrize("saves", [1, 3, 4])
def test_an_interrupted_chain_goes_on(flags, open_run, teacher, monkeypatch, saves):
    from distiller.apputils import classifier_training

    run_job(flags(CHAIN + TEACHER, teacher), open_run)
    whole = open_run.folder
    count, save = [], classifier_training.save_checkpoint

    def save_or_die(*args, **kwargs):
        path = save(*args, **kwargs)
        count.append(path)
        if len(count) == saves:
            raise Killed
        return path

    args = flags(CHAIN + TEACHER, teacher)
    with monkeypatch.context() as patched:
        patched.setattr(classifier_training, "save_checkpoint", save_or_die)
        with pytest.raises(Killed):
            run_job(args, open_run)
    assert how_to_go_on(args, open_run.folder) == f"--kd-chain-resume {open_run.folder}"
    assert how_to_go_on(args, None) is None
    resume = flags(f"{CHAIN} --kd-chain-resume {open_run.folder} {TEACHER}", teacher)
    assert how_to_go_on(resume, None) == f"--kd-chain-resume {open_run.folder}"
    run_job(resume, open_run)
    assert {"chain.json", "results.json"} <= open_run.names()
    for stage in ("1_lenet_300_100", "2_lenet_300_100", "3_lenet_300_100"):
        ours, theirs = state_of(open_run.folder / stage), state_of(whole / stage)
        assert all(torch.equal(value, theirs[name]) for name, value in ours.items()), stage
    assert (open_run.folder / "chain.json").read_text() == (whole / "chain.json").read_text()


def test_a_finished_chain_only_tells_its_table_again(flags, open_run, teacher):
    run_job(flags(CHAIN + TEACHER, teacher), open_run)
    whole = open_run.folder
    args = flags(f"{CHAIN} --kd-chain-resume {whole} {TEACHER}", teacher)
    assert run_job(args, open_run) is None
    assert (open_run.folder / "results.json").read_text() == (
        whole / "3_lenet_300_100/results.json"
    ).read_text()


def test_other_flags_than_the_interrupted_chains_are_refused(flags, open_run, teacher, tmp_path):
    run_job(flags(CHAIN + TEACHER, teacher), open_run)
    left = open_run.folder
    flag = f"--kd-chain-resume {left}"
    cases = {
        f"{CHAIN} --kd-dw 0.9": (
            f"{flag}: the chain was begun with --kd-distill-wt 0.5, now it is 0.9; give the flags of the "
            "interrupted chain"
        ),
        f"{CHAIN} --seed 8": f"{flag}: the chain was begun with --seed 7, now it is 8; leave it out",
    }
    for command, told in cases.items():
        with pytest.raises(UsageError) as error:
            run_job(flags(f"{command} {flag} {TEACHER}", teacher), open_run)
        assert str(error.value) == told
    with pytest.raises(UsageError) as error:
        run_job(flags(f"{CHAIN} --kd-chain-resume {tmp_path} {TEACHER}", teacher), open_run)
    assert str(error.value) == (
        f"--kd-chain-resume {tmp_path}: no chain to go on with, there is no chain.json of one; give the run "
        "folder of a chain, or leave the flag out"
    )


def test_all_stages_are_checked_before_the_first_one_begins(flags, open_run, teacher):
    args = flags(f"--epochs 1 --kd-chain lenet_300_100,lenet_5 {TEACHER}", teacher)
    with pytest.raises(
        UsageError, match="--kd-chain: stage 2, 'lenet_5': arch: unknown architecture 'lenet_5'"
    ):
        run_job(args, open_run)
    assert open_run.calls == 0


@pytest.mark.parametrize(
    ("more", "told"),
    [
        ("--kd-no-labels", "has no labels"),
        ("--kd-student-wt 0 --kd-distill-wt 1", "gives the labels no weight"),
    ],
)
def test_early_exits_need_labels(flags, open_run, teacher, more, told):
    command = f"--epochs 2 --earlyexit-layers relu1 --earlyexit-lossweights 0.3 {more} {TEACHER}"
    with pytest.raises(UsageError) as error:
        run_job(flags(command, teacher), open_run)
    assert str(error.value) == (
        f"'knowledge distillation': {told}, and early exits (relu1) learn from labels alone; train with labels, or a "
        "network without exits"
    )
    assert open_run.calls == 0


@pytest.mark.parametrize(
    ("hint", "told"),
    [
        ("{teacher: conv1, student: fc1}", "'fc1' gives (2, 300), 'conv1' of the teacher (2, 20, 24, 24)"),
        ("{teacher: fc1, student: fc1, kind: attention}", "attention is of maps"),
    ],
)
def test_hints_that_cannot_be_compared_are_refused_before_anything_is_written(
    flags, open_run, tmp_path, hint, told
):
    lenet = create_model(False, "digits", "lenet5", parallel=False)
    path = save_checkpoint(0, "lenet5", lenet, name="hinting", dir=tmp_path)
    schedule = tmp_path / "hints.yaml"
    schedule.write_text(AWAITING.replace("temperature: 3", f"temperature: 3, hints: [{hint}]"))
    command = f"--epochs 2 --kd-teacher lenet5 --kd-resume {path} --compress {schedule}"
    with pytest.raises(DistillerError) as error:
        run_job(flags(command), open_run)
    assert told in str(error.value)
    assert open_run.calls == 0
