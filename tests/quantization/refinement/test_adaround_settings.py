"""Settings of AdaRound."""

from __future__ import annotations

import json
import re

import pytest

from distiller.errors import UsageError
from distiller.quantization.refinement.adaround_settings import AdaRoundSettings

WRONG = {
    "iterations": (0, "a whole number from 1 on"),
    "batch_size": (1.5, "a whole number from 1 on"),
    "samples": (True, "a whole number from 1 on"),
    "learning_rate": (0, "a number > 0"),
    "regularization": (float("nan"), "a number > 0"),
    "warm_start": (1.0, "0 to below 1"),
    "beta": ((2.0, 20.0), "two numbers, start >= end >= 2"),
    "scales": ("mse", "one of kept, weights, outputs"),
    "seed": (0.5, "a whole number"),
}


@pytest.mark.parametrize("name", WRONG)
def test_a_setting_out_of_range_is_refused(name) -> None:
    value, wanted = WRONG[name]
    text = f"AdaRoundSettings: {name} must be {wanted}, got {value!r}"
    with pytest.raises(UsageError, match=f"^{re.escape(text)}$"):
        AdaRoundSettings(**{name: value})


def test_settings_are_plain_data() -> None:
    plain = AdaRoundSettings(beta=(10, 2)).as_plain()
    assert json.loads(json.dumps(plain)) == plain
    assert plain["beta"] == [10, 2]
    assert AdaRoundSettings(**plain).as_plain() == plain
