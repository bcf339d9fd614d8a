from __future__ import annotations

from collections import namedtuple

import pytest
import torch
from torch.nn.functional import cross_entropy

from distiller.auxiliary_outputs import loss_with_auxiliaries, main_logits

GoogLeNetOutputs = namedtuple("GoogLeNetOutputs", ["logits", "aux_logits2", "aux_logits1"])
InceptionOutputs = namedtuple("InceptionOutputs", ["logits", "aux_logits"])
MAIN, ONE, OTHER = torch.randn(3, 5, 4, generator=torch.Generator().manual_seed(1))
LABELS = torch.tensor([0, 1, 2, 3, 0])


@pytest.mark.parametrize(
    "output, parts",
    [
        (MAIN, [(1.0, MAIN)]),
        (GoogLeNetOutputs(MAIN, ONE, OTHER), [(1.0, MAIN), (0.3, ONE), (0.3, OTHER)]),
        (GoogLeNetOutputs(MAIN, None, OTHER), [(1.0, MAIN), (0.3, OTHER)]),
        (InceptionOutputs(MAIN, ONE), [(1.0, MAIN), (0.4, ONE)]),
    ],
)
def test_each_classifier_has_its_weight(output, parts):
    assert main_logits(output) is MAIN
    expected = sum(weight * cross_entropy(logits, LABELS).item() for weight, logits in parts)
    assert loss_with_auxiliaries(output, LABELS, cross_entropy).item() == pytest.approx(expected, rel=1e-6)


@pytest.mark.parametrize("output", [None, (MAIN,), [MAIN], {"logits": MAIN}])
def test_what_has_no_auxiliary_classifiers_stays(output):
    assert main_logits(output) is output
