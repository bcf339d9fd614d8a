from __future__ import annotations

import pytest
import torch

from distiller.apputils import training_loop
from distiller.apputils.exit_scores import evaluate, evaluate_exits
from distiller.apputils.training_loop import train_epoch
from distiller.early_exit import JointLoss, attach_exits_to, every_exit
from distiller.errors import UsageError
from distiller.scheduler import CompressionScheduler
from tests.early_exit.nets import Chain, images, seeded


class Batches(list):
    def set_epoch(self, epoch: int) -> None:
        pass


@pytest.fixture
def batches() -> Batches:
    labels = torch.arange(20) % 10
    return Batches(zip(images(20).split(8), labels.split(8), strict=True))


@pytest.fixture
def model():
    model = seeded(Chain)
    attach_exits_to(model, ["relu1", "relu3"])
    return model


def test_every_exit_has_the_score_of_its_answers(model, batches, caplog):
    caplog.set_level("INFO")
    results = evaluate_exits(model, batches)
    with torch.no_grad(), every_exit(model):
        outputs = model.eval()(images(20))
    labels = torch.cat([labels for _, labels in batches])
    for logits, result in zip(outputs, results, strict=True):
        assert result.top1_correct == int((logits.argmax(1) == labels).sum())
        assert result.loss == pytest.approx(
            torch.nn.functional.cross_entropy(logits, labels).item(), rel=1e-5
        )
    assert evaluate(model, batches) == results[-1] == training_loop.evaluate(model, batches)
    assert [record.getMessage().split(" ==>")[0] for record in caplog.records] == [
        "exit 1 (relu1)",
        "exit 2 (relu3)",
    ]


def test_a_model_without_exits_has_one_score(batches):
    model = seeded(Chain)
    assert evaluate_exits(model, batches) == (training_loop.evaluate(model, batches),)


def test_the_loop_trains_on_the_joint_loss_and_counts_the_final_output(model, batches):
    def trained(weights: list[float]):
        twin = seeded(Chain)
        attach_exits_to(twin, ["relu1", "relu3"])
        twin.load_state_dict(model.state_dict())
        optimizer = torch.optim.SGD(twin.parameters(), lr=0.1)
        result = train_epoch(
            twin, batches, optimizer, CompressionScheduler(twin), 0, criterion=JointLoss(weights)
        )
        return twin.state_dict(), result

    state, result = trained([0.3, 0.3])
    assert result.n == 20
    assert any(
        not torch.equal(state[name], value) for name, value in model.state_dict().items() if "relu1" in name
    )
    without, _ = trained([0.0, 0.0])
    assert all(
        torch.equal(without[name], value)
        for name, value in model.state_dict().items()
        if "branch_net" in name
    )


def test_exits_are_not_trained_without_weights(model, batches):
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    with pytest.raises(UsageError) as caught:
        train_epoch(model, batches, optimizer, CompressionScheduler(model), 0)
    assert str(caught.value) == (
        "training: the model has 2 early exits, whose losses need weights; give --earlyexit-lossweights, or a "
        "JointLoss as criterion"
    )
