from __future__ import annotations

import pytest
import torch

from distiller.apputils.device import choose_device, usable_processors
from distiller.errors import UsageError


def test_the_cpu_overrides_gpus():
    assert choose_device(None, True, "0,1") == (torch.device("cpu"), None)


def test_without_gpus_the_cpu_is_chosen(monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    assert choose_device() == (torch.device("cpu"), None)


def test_all_gpus_are_chosen_where_there_are_any(monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 2)
    assert choose_device() == (torch.device("cuda", 0), [0, 1])
    assert choose_device(gpus="1") == (torch.device("cuda", 1), [1])


def test_of_pytorchs_reason_the_first_sentence_is_told(monkeypatch):
    def failing(*_args, **_options):
        raise NotImplementedError(
            "Could not run 'aten::empty.memory_format' here. This could be because ...\nmore"
        )

    monkeypatch.setattr(torch, "ones", failing)
    with pytest.raises(UsageError) as caught:
        choose_device("mps")
    assert str(caught.value) == (
        "--device mps: cannot be used here: Could not run 'aten::empty.memory_format' here; try --device cpu"
    )


@pytest.mark.parametrize(
    ("device", "gpus", "text"),
    [
        ("tpu9", None, "--device tpu9: cannot be used here: "),
        (
            "meta",
            None,
            "--device meta: cannot be used here: Cannot copy out of meta tensor; no data!; try --device cpu",
        ),
        ("hpu", None, "--device hpu: cannot be used here: "),
        (None, "a", "--gpus: must be comma-separated numbers, got 'a'"),
        (None, "7", "--gpus: no GPU 7; this machine has 0. Try --cpu"),
    ],
)
def test_a_device_that_is_not_there_is_refused(monkeypatch, device, gpus, text):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    with pytest.raises(UsageError) as caught:
        choose_device(device, gpus=gpus)
    assert text in str(caught.value)


def test_processors_are_counted_where_affinity_is_unknown(monkeypatch):
    monkeypatch.delattr("os.sched_getaffinity", raising=False)
    monkeypatch.setattr("os.cpu_count", lambda: None)
    assert usable_processors() == 1
