from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from typing import Any, Literal

import pytest
import torch

from distiller.signatures import check_settings, injected


class Component:
    def __init__(
        self,
        name: str,
        model: object,
        level: float,
        weights: list[str] | str,
        count: int = 1,
        kind: Literal["a", "b"] = "a",
        table: Mapping[str, float] | None = None,
        pair: tuple[int, int] = (1, 2),
        anything: Any = None,
        steps: Iterable[int] = (),
        flags: Sequence[bool] = (),
    ) -> None: ...


GOOD = {"level": 0.5, "weights": ["w"]}


@pytest.mark.parametrize(
    "more",
    [
        {},
        {"level": 1},
        {"weights": "w"},
        {"count": 3, "kind": "b", "table": {"x": 1}, "pair": [3, 4], "anything": object(), "steps": [1, 2]},
        {"table": None},
    ],
)
def test_good_settings_have_no_faults(more):
    assert check_settings(Component, GOOD | more) == []


@pytest.mark.parametrize(
    ("settings", "path", "text"),
    [
        ({"weights": ["w"]}, ("level",), "missing; Component needs it"),
        (GOOD | {"levle": 1}, ("levle",), "unknown to Component; did you mean 'level'?"),
        (
            GOOD | {"zzz": 1},
            ("zzz",),
            "unknown to Component; it takes level, weights, count, kind, table, pair, anything, steps, flags",
        ),
        (GOOD | {"level": "high"}, ("level",), "must be a number, got 'high'"),
        (GOOD | {"level": None}, ("level",), "must be a number, got None"),
        (GOOD | {"count": 1.5}, ("count",), "must be a whole number, got 1.5"),
        (GOOD | {"count": True}, ("count",), "must be a whole number, got True"),
        (GOOD | {"kind": "c"}, ("kind",), "must be 'a' or 'b', got 'c'"),
        (GOOD | {"weights": 3}, ("weights",), "must be a list, got 3, or must be text, got 3"),
        (GOOD | {"weights": ["w", 3]}, ("weights", 1), "must be text, got 3"),
        (GOOD | {"table": {"x": "y"}}, ("table", "x"), "must be a number, got 'y'"),
        (GOOD | {"steps": [1, "x"]}, ("steps", 1), "must be a whole number, got 'x'"),
        (GOOD | {"flags": [1]}, ("flags", 0), "must be true or false, got 1"),
    ],
)
def test_a_fault_has_its_path_and_its_text(settings, path, text):
    faults = dict(check_settings(Component, settings))
    assert text in faults[path]


def test_all_faults_are_told_at_once():
    assert len(check_settings(Component, {"levle": 1, "count": "x"})) == 4


def test_what_the_reader_supplies_is_not_asked_of_the_schedule():
    assert injected(Component) == {"name", "model"}
    assert injected(torch.optim.lr_scheduler.StepLR) == {"optimizer", "last_epoch"}


def test_torchs_own_classes_are_checked_too():
    faults = dict(check_settings(torch.optim.lr_scheduler.MultiStepLR, {"milestones": [1, "x"]}))
    assert faults == {("milestones", 1): "must be a whole number, got 'x'"}
