import math

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from sklearn.metrics import confusion_matrix, top_k_accuracy_score
from torch import nn

from distiller.apputils.meters import ClassificationMeter, EvalResult, LossPartsMeter, correct_counts
from distiller.errors import DatasetError


def batch(n: int, classes: int, seed: int = 0):
    generator = torch.Generator().manual_seed(seed)
    logits = torch.randn(n, classes, generator=generator)
    labels = torch.randint(classes, (n,), generator=generator)
    return logits, labels, nn.functional.cross_entropy(logits, labels)


def test_counts_agree_with_sklearn():
    logits, labels, _ = batch(200, 10)
    for k, count in zip((1, 5), correct_counts(logits, labels).tolist(), strict=True):
        expected = top_k_accuracy_score(
            labels.numpy(), logits.numpy(), k=k, normalize=False, labels=list(range(10))
        )
        assert count == expected


@pytest.mark.parametrize("classes", [1, 2, 4, 5])
def test_with_five_classes_or_fewer_every_label_is_among_the_top_five(classes):
    logits, labels, _ = batch(30, classes)
    assert correct_counts(logits, labels)[1] == 30


@settings(max_examples=30, deadline=None)
@given(sizes=st.lists(st.integers(1, 20), min_size=1, max_size=5), seed=st.integers(0, 1000))
def test_result_is_independent_of_the_batch_split(sizes, seed):
    logits, labels, loss = batch(sum(sizes), 7, seed)
    meter = ClassificationMeter(num_classes=7)
    for part, part_labels in zip(logits.split(sizes), labels.split(sizes), strict=True):
        meter.update(part, part_labels, nn.functional.cross_entropy(part, part_labels))

    whole = ClassificationMeter(num_classes=7)
    whole.update(logits, labels, loss)
    assert meter.result() == EvalResult(
        pytest.approx(float(loss), rel=1e-5),
        whole.result().top1_correct,
        whole.result().top5_correct,
        sum(sizes),
    )
    first, second = meter.result().confusion, whole.result().confusion
    assert first is not None
    assert second is not None
    assert first.equal(second)


def test_loss_is_weighted_by_the_size_of_the_batch():
    meter = ClassificationMeter()
    meter.update(torch.zeros(3, 2), torch.zeros(3, dtype=torch.long), torch.tensor(1.0))
    meter.update(torch.zeros(1, 2), torch.zeros(1, dtype=torch.long), torch.tensor(5.0))
    assert meter.result().loss == 2.0  # (3 * 1 + 1 * 5) / 4


def test_result_can_be_read_between_batches():
    meter = ClassificationMeter()
    meter.update(torch.tensor([[0.0, 1.0]]), torch.tensor([1]), torch.tensor(0.25))
    assert meter.result() == EvalResult(loss=0.25, top1_correct=1, top5_correct=1, n=1)
    meter.update(torch.tensor([[0.0, 1.0]]), torch.tensor([0]), torch.tensor(0.75))
    assert meter.result() == EvalResult(loss=0.5, top1_correct=1, top5_correct=2, n=2)


def test_meter_keeps_no_graph_of_the_loss():
    logits = torch.zeros(2, 3, requires_grad=True)
    loss = nn.functional.cross_entropy(logits, torch.tensor([0, 1]))
    meter = ClassificationMeter()
    meter.update(logits, torch.tensor([0, 1]), loss)
    loss.backward()  # the meter has not consumed the graph
    assert meter._loss_sum is not None
    assert not meter._loss_sum.requires_grad


@pytest.mark.parametrize("bad", [math.nan, math.inf])
def test_one_bad_loss_shows_in_the_result(bad):
    meter = ClassificationMeter()
    for loss in (0.5, bad, 0.5):
        meter.update(torch.zeros(4, 3), torch.zeros(4, dtype=torch.long), torch.tensor(loss))
    assert not meter.result().loss_is_finite


def test_half_precision_logits_and_loss_are_summed_in_double():
    meter = ClassificationMeter()
    for _ in range(1000):
        meter.update(
            torch.zeros(8, 3).bfloat16(), torch.zeros(8, dtype=torch.long), torch.tensor(0.5).bfloat16()
        )
    assert meter.result().loss == 0.5


def test_confusion_matrix_agrees_with_sklearn():
    logits, labels, loss = batch(100, 4)
    meter = ClassificationMeter(num_classes=4)
    meter.update(logits, labels, loss)
    expected = confusion_matrix(labels.numpy(), logits.argmax(1).numpy(), labels=range(4))
    found = meter.result().confusion
    assert found is not None
    assert found.tolist() == expected.tolist()


def test_confusion_has_a_column_for_classes_that_the_data_do_not_have():
    meter = ClassificationMeter(num_classes=2)
    meter.update(torch.tensor([[0.0, 1, 2], [5, 1, 0]]), torch.tensor([1, 0]), torch.tensor(1.0))
    found = meter.result().confusion
    assert found is not None
    assert found.tolist() == [[1, 0, 0], [0, 0, 1]]


def test_result_of_nothing_is_refused():
    with pytest.raises(DatasetError) as error:
        ClassificationMeter().result()
    assert str(error.value) == "evaluation: no image was seen; give more data or a larger effective size"


def test_confusion_is_not_counted_unless_asked_for():
    meter = ClassificationMeter()
    meter.update(*batch(4, 3))
    assert meter.result().confusion is None


def test_result_in_percent_and_as_distillers_line():
    result = EvalResult(loss=0.30149, top1_correct=365, top5_correct=398, n=400)
    assert (result.top1, result.top5) == (91.25, 99.5)
    assert result.line() == "==> Top1: 91.250    Top5: 99.500    Loss: 0.301"


# ---------------------------------------------------------------- parts of the loss


def test_parts_of_the_loss_are_means_over_the_images():
    meter = LossPartsMeter()
    meter.update([("Objective Loss", torch.tensor(1.0)), ("L1_loss", torch.tensor(0.5))], 3)
    meter.update([("Objective Loss", torch.tensor(5.0)), ("L1_loss", torch.tensor(0.25))], 1)
    assert meter.result() == {"Objective Loss": (3 * 1 + 5) / 4, "L1_loss": (3 * 0.5 + 0.25) / 4}


def test_parts_of_one_name_are_added_up():
    meter = LossPartsMeter()
    for _ in range(2):
        meter.update([("L1_loss", torch.tensor(0.5)), ("L1_loss", torch.tensor(0.25))], 4)
    assert meter.result() == {"L1_loss": 0.75}


def test_a_part_that_comes_later_is_averaged_over_its_own_batches():
    meter = LossPartsMeter()
    meter.update([("a", torch.tensor(1.0))], 2)
    meter.update([("a", torch.tensor(1.0)), ("b", torch.tensor(3.0))], 2)
    assert meter.result() == {"a": 1.0, "b": 3.0}


@settings(max_examples=20, deadline=None)
@given(sizes=st.lists(st.integers(1, 20), min_size=1, max_size=5), seed=st.integers(0, 1000))
def test_the_parts_add_up_to_the_loss_of_the_other_meter(sizes, seed):
    generator = torch.Generator().manual_seed(seed)
    whole, parts = ClassificationMeter(), LossPartsMeter()
    for size in sizes:
        objective, penalty = torch.rand(2, generator=generator, dtype=torch.float64)
        labels = torch.zeros(size, dtype=torch.long)
        whole.update(torch.zeros(size, 2), labels, objective + penalty)
        parts.update([("objective", objective), ("penalty", penalty)], size)
    assert whole.result().loss == pytest.approx(sum(parts.result().values()))


def test_parts_keep_no_graph_and_wait_for_nothing_until_they_are_read(monkeypatch):
    monkeypatch.setattr(torch.Tensor, "__float__", lambda self: pytest.fail("the device was waited for"))
    monkeypatch.setattr(torch.Tensor, "item", lambda self: pytest.fail("the device was waited for"))
    meter = LossPartsMeter()
    meter.update([("a", torch.ones((), requires_grad=True) * 2)], 4)
    assert not meter._sums["a"].requires_grad


def test_without_parts_there_is_nothing_to_read():
    assert LossPartsMeter().result() == {}


@given(st.integers(2, 9), st.integers(1, 12), st.integers(0, 10_000))
def test_of_equal_logits_the_lower_class_is_the_higher(classes, images, seed):
    """Quantized networks often answer with equal logits; the count must agree with the confusion matrix."""
    generator = np.random.default_rng(seed)
    logits = generator.integers(0, 3, (images, classes)).astype(np.float32)
    labels = generator.integers(0, classes, images)
    order = np.argsort(-logits, axis=1, kind="stable")
    top1 = int((order[:, 0] == labels).sum())
    top5 = int((order[:, :5] == labels[:, None]).sum())
    counts = correct_counts(torch.from_numpy(logits), torch.from_numpy(labels))
    assert counts.tolist() == [top1, top5]
    assert top1 == int((torch.from_numpy(logits).argmax(dim=1).numpy() == labels).sum())


def test_a_label_without_a_number_for_a_logit_is_wrong():
    logits = torch.tensor([[math.nan, 1.0], [math.nan, 1.0], [2.0, 1.0]])
    assert correct_counts(logits, torch.tensor([0, 1, 0])).tolist() == [1, 3]
