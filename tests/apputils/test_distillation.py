from __future__ import annotations

import copy

import pytest
import torch
from torch.nn import functional as F

from distiller.apputils.checkpoint import save_checkpoint
from distiller.apputils.distillation import KnowledgeDistillation
from distiller.config import dict_config, file_config
from distiller.errors import DistillerError, ScheduleError
from distiller.models import create_model
from distiller.names import named_parameters
from distiller.quantization import DorefaQuantizer
from distiller.scheduler import CompressionScheduler

IMAGES, LABELS = torch.randn(16, 1, 28, 28), torch.arange(16) % 10


def network(arch="lenet_300_100"):
    return create_model(False, "digits", arch, parallel=False)


@pytest.fixture
def teacher(tmp_path):
    """The checkpoint of a teacher."""
    torch.manual_seed(1)
    return str(save_checkpoint(0, "lenet5", network("lenet5"), dir=tmp_path))


def schedule(settings, **more):
    return {
        "version": 1,
        "extensions": {"kd": {"class": "KnowledgeDistillation", **settings}},
        "policies": [{"extension": {"instance_name": "kd"}, "epochs": [0, 1]}],
        **more,
    }


def train(model, scheduler, optimizer, epochs=range(2), labels=LABELS):
    model.train()
    for epoch in epochs:
        scheduler.on_epoch_begin(epoch, optimizer)
        for step, chosen in enumerate(torch.arange(16).split(8)):
            scheduler.on_minibatch_begin(epoch, step, 2, optimizer)
            loss = F.cross_entropy(model(IMAGES[chosen]), labels[chosen])
            loss = scheduler.before_backward_pass(epoch, step, 2, loss, optimizer)
            optimizer.zero_grad()
            loss.backward()
            scheduler.before_parameter_optimization(epoch, step, 2, optimizer)
            optimizer.step()
            scheduler.on_minibatch_end(epoch, step, 2, optimizer)
        scheduler.on_epoch_end(epoch, optimizer, {"loss": 1.0, "top1": 10.0})


def test_a_schedule_says_who_teaches_and_how(teacher):
    model = network()
    settings = {
        "teachers": [{"checkpoint": teacher}, {"arch": "lenet5", "checkpoint": teacher, "weight": 2}],
        "temperature": 4,
        "distill_weight": 0.7,
        "student_weight": 0.2,
        "teacher_weight": 0.1,
        "loss": "cross_entropy",
        "temperature_squared": False,
        "hints": [{"teacher": "fc1", "student": "fc1", "weight": 0.5}],
        "regressor_lr": 0.01,
        "half": True,
        "cache_logits": False,
    }
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    scheduler = dict_config(model, optimizer, schedule(settings))
    policy = scheduler.policies[0].policy
    assert isinstance(policy, KnowledgeDistillation)
    assert policy.describe(None) == (
        f"KnowledgeDistillation: from teacher 'lenet5' of {teacher} and teacher 'lenet5' of {teacher}: "
        "0.2 x labels + 0.7 x distillation at T 4 + 0.1 x its labels + 0.5 x fc1 (fitnets)"
    )
    before = copy.deepcopy(model.state_dict())
    train(model, scheduler, optimizer)
    assert not torch.equal(before["fc1.weight"], model.fc1.weight)


def test_pruning_and_quantization_in_the_same_schedule(teacher, tmp_path):
    """Apprentice, with pruning besides."""
    file = tmp_path / "s.yaml"
    file.write_text(f"""
quantizers:
  q: {{class: DorefaQuantizer, bits_activations: 8, bits_weights: 4}}
pruners:
  p: {{class: AutomatedGradualPruner, initial_sparsity: 0.1, final_sparsity: 0.5, weights: [fc1.weight]}}
extensions:
  kd: {{class: KnowledgeDistillation, teacher: {{checkpoint: {teacher}}}, temperature: 4, labels: none}}
policies:
  - {{quantizer: {{instance_name: q}}, starting_epoch: 0, ending_epoch: 3, frequency: 1}}
  - {{pruner: {{instance_name: p}}, starting_epoch: 0, ending_epoch: 3, frequency: 1}}
  - {{extension: {{instance_name: kd}}, starting_epoch: 0, ending_epoch: 3, frequency: 1}}
""")
    model = network()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.05)
    scheduler = file_config(model, optimizer, file)
    policy = scheduler.policies[2].policy
    before = policy.teachers.fingerprint
    train(model, scheduler, optimizer, range(3))
    with scheduler.masked():
        weights = dict(named_parameters(model))["fc1.weight"]
        assert 0.45 <= (weights == 0).float().mean() <= 0.55
    del policy.teachers.__dict__["fingerprint"]
    assert policy.teachers.fingerprint == before


def test_a_student_that_is_factored_in_the_same_schedule(teacher):
    model = network()
    settings = {"teacher": {"checkpoint": teacher}, "hints": [{"teacher": "fc1", "student": "fc2"}]}
    plan = schedule(settings)
    plan["extensions"]["low_rank"] = {"class": "LowRankFactorization", "layers": {"fc2": {"rank": 5}}}
    plan["policies"].insert(0, {"extension": {"instance_name": "low_rank"}, "epochs": [1]})
    optimizer = torch.optim.SGD(model.parameters(), lr=0.05)
    scheduler = dict_config(model, optimizer, plan)
    train(model, scheduler, optimizer)
    assert dict(named_parameters(model))["fc2.first.weight"].shape == (5, 300)
    (distillation,) = [e.policy for e in scheduler.policies if isinstance(e.policy, KnowledgeDistillation)]
    assert distillation.state_dict()["hints"]["0"]["weight"].shape == (500, 100)
    assert not any(module._forward_hooks for module in model.modules())


@pytest.mark.parametrize("labels", ["none", "given"])
def test_labels_none_learns_nothing_from_them(teacher, labels):
    ended = []
    for shift in (0, 3):
        torch.manual_seed(0)
        model = network()
        optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
        scheduler = dict_config(
            model, optimizer, schedule({"teacher": {"checkpoint": teacher}, "labels": labels})
        )
        train(model, scheduler, optimizer, labels=(LABELS + shift) % 10)
        ended.append(model.fc3.weight.detach().clone())
    assert torch.equal(*ended) == (labels == "none")


def test_without_a_teacher_it_awaits_one(teacher):
    model = network()
    scheduler = dict_config(model, None, schedule({"temperature": 2}))
    policy = scheduler.policies[0].policy
    assert policy.describe(None) == (
        "KnowledgeDistillation: from a teacher that is not given yet: 0.5 x labels + 0.5 x distillation at T 2"
    )
    with pytest.raises(DistillerError, match="distillation: there is no teacher; name it in the schedule"):
        scheduler.on_epoch_begin(0, None)
    policy.learn_from_files([{"checkpoint": teacher}])
    scheduler.on_epoch_begin(0, None)


@pytest.mark.parametrize(
    "settings, told",
    [
        ({"teacher": {"arch": "lenet5"}}, "extensions.kd.teacher: a teacher needs its weights: give one of"),
        ({"teacher": {"checkpoint": "gone.pth.tar"}}, "extensions.kd: gone.pth.tar: "),
        ({"teachers": [{"arch": 1}]}, "extensions.kd.teachers[0]: 'arch' of a teacher must be text, got 1"),
        ({"temperature": 0}, "extensions.kd.temperature: must be a number from 0.01 to 1000, got 0"),
        ({"temperature": 1e-30}, "extensions.kd.temperature: must be a number from 0.01 to 1000, got 1e-30"),
        ({"distill_weight": -1}, "extensions.kd.distill_weight: must be 0 or more, got -1"),
        ({"loss": "mse"}, "extensions.kd.loss: must be 'kl' or 'cross_entropy', got 'mse'"),
        ({"labels": "no"}, "extensions.kd.labels: must be 'given' or 'none', got 'no'"),
        (
            {"hints": [{"student": "fc1"}]},
            "extensions.kd.hints[0]: a hint needs the name of a layer of the teacher, 'teacher'",
        ),
        (
            {"hints": [{"teacher": "a", "student": "fc1", "kind": "at"}]},
            "extensions.kd.hints[0]: 'kind' of a hint must be fitnets or attention, got 'at'",
        ),
        (
            {"hints": [{"teacher": "a", "student": "fc1", "wieght": 1}]},
            "extensions.kd.hints[0]: 'wieght' is unknown to a hint; did you mean 'weight'?",
        ),
        (
            {"hints": [{"teacher": "a", "student": "fc1", "weight": 0}]},
            "extensions.kd.hints[0]: 'weight' of a hint must be a number more than 0, got 0",
        ),
        (
            {"hints": [{"teacher": "a", "student": 1}]},
            "extensions.kd.hints[0]: 'student' of a hint must be the name of a layer, got 1",
        ),
        ({"hints": [{"teacher": "a", "student": "fc9"}]}, "no module 'fc9' in the model; did you mean 'fc"),
        (
            {"labels": "none", "student_weight": 0.5},
            "extensions.kd.labels: the weight of labels is 0.5, and labels: none says there are none; leave one of them out",
        ),
        (
            {"distill_weight": 0},
            "extensions.kd: distillation: nothing to learn from the teacher: the weights 'distill' and "
            "'teacher' are 0 and there are no hints",
        ),
        ({"alpha": 1}, "extensions.kd.alpha: unknown to KnowledgeDistillation; it takes teacher, teachers,"),
    ],
)
def test_what_is_wrong_is_told_at_its_place(settings, told):
    with pytest.raises(ScheduleError) as error:
        dict_config(network(), None, schedule(settings))
    assert told in str(error.value)


def test_one_teacher_or_several(teacher):
    both = {"teacher": {"checkpoint": teacher}, "teachers": [{"checkpoint": teacher}]}
    with pytest.raises(ScheduleError, match="both 'teacher' and 'teachers' given; give one"):
        dict_config(network(), None, schedule(both))
    with pytest.raises(ScheduleError, match="teachers: at least one is wanted"):
        dict_config(network(), None, schedule({"teachers": []}))


def test_a_quantized_teacher_stays_as_it_is(tmp_path):
    quantized = network("lenet5")
    quantizer = DorefaQuantizer(quantized, torch.optim.SGD(quantized.parameters(), lr=0.1), bits_weights=4)
    quantizer.prepare_model()
    path = save_checkpoint(0, "lenet5", quantized, dir=tmp_path)
    with pytest.raises(DistillerError) as error:
        KnowledgeDistillation("kd", network(), teacher={"checkpoint": str(path)}, half=True)
    assert (
        str(error.value)
        == f"half: teacher 'lenet5' of {path} is quantized, and stays as it is; leave half out"
    )


def test_a_state_of_other_settings_is_refused(teacher):
    def scheduler(temperature):
        settings = {"teacher": {"checkpoint": teacher}, "temperature": temperature}
        return dict_config(network(), None, schedule(settings))

    state = scheduler(2).state_dict()
    with pytest.raises(
        DistillerError,
        match="'extension kd': the checkpoint was written with temperature 2, the schedule has 4",
    ):
        scheduler(4).load_state_dict(state)
    assert isinstance(scheduler(2), CompressionScheduler)
