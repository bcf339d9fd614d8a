"""The texts of `--summary`."""

from __future__ import annotations

import pytest

from distiller.model_summaries import model_summary


@pytest.mark.parametrize("what", ["sparsity", "compute", "modules"])
def test_the_text_of_a_summary(golden, fixed_net, what):
    golden(f"summary_{what}.txt", model_summary(fixed_net, what) + "\n")
