from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any, Literal

import pytest
import torch

from distiller.signatures import check_settings, injected, takes


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
        (GOOD | {"weights": 3}, ("weights",), "must be a list or text, got 3"),
        (GOOD | {"weights": ["w", 3]}, ("weights", 1), "must be text, got 3"),
        (GOOD | {"table": {"x": "y"}}, ("table", "x"), "must be a number, got 'y'"),
        (GOOD | {"steps": [1, "x"]}, ("steps", 1), "must be a whole number, got 'x'"),
        (GOOD | {"flags": [1]}, ("flags", 0), "must be true or false, got 1"),
        (GOOD | {"table": {1: 2.0}}, ("table", 1), "a name here must be text, got 1"),
        (GOOD | {None: 1}, (None,), "a setting's name must be text, got None"),
    ],
)
def test_a_fault_has_its_path_and_its_text(settings, path, text):
    faults = dict(check_settings(Component, settings))
    assert text in faults[path]


def test_what_is_wrong_inside_of_the_kind_that_fits_is_told_once():
    """`weights` may be a list or text: of a list, only its items are wrong."""
    assert check_settings(Component, GOOD | {"weights": [1]}) == [(("weights", 0), "must be text, got 1")]


class Rounding:
    def __init__(
        self, level: float, rounding_fn: Callable[[float], int] = int, key: Callable | None = None
    ): ...


def test_a_function_is_taken_but_not_offered():
    assert takes(Rounding) == {"level", "rounding_fn", "key"}
    assert check_settings(Rounding, {"level": 1, "rounding_fn": round, "key": None}) == []
    assert check_settings(Rounding, {"level": 1, "zzz": 1, "rounding_fn": "floor"}) == [
        (("rounding_fn",), "takes a function, which a file cannot hold; leave it out, got 'floor'"),
        (("zzz",), "unknown to Rounding; it takes level"),
    ]


def test_long_values_are_cut_short():
    ((_, text),) = check_settings(Component, GOOD | {"level": ["x"] * 100_000})
    assert text.startswith("must be a number, got ['x', 'x', ")
    assert len(text) < 200


def test_all_faults_are_told_at_once():
    assert len(check_settings(Component, {"levle": 1, "count": "x"})) == 4


def test_what_the_reader_supplies_is_not_asked_of_the_schedule():
    assert injected(Component) == {"name", "model"}
    assert injected(torch.optim.lr_scheduler.StepLR) == {"optimizer", "last_epoch"}


def test_torchs_own_classes_are_checked_too():
    faults = dict(check_settings(torch.optim.lr_scheduler.MultiStepLR, {"milestones": [1, "x"]}))
    assert faults == {("milestones", 1): "must be a whole number, got 'x'"}
