"""What a model must be, seen before anything is done with it; names and weights are tested where they are used."""

from __future__ import annotations

import pytest
import torch

from distiller.apputils.model_checks import check_single_image
from distiller.errors import UsageError
from tests.apputils.test_training_loop import LEFT_OVER, Pooled


def test_a_batch_norm_over_one_value_is_refused_before_training():
    with pytest.raises(UsageError) as error:
        check_single_image(Pooled(), torch.zeros(1, 1, 4, 4))
    assert str(error.value) == LEFT_OVER


@pytest.mark.parametrize("is_frozen", [True, False])
def test_nothing_changes_by_the_check(is_frozen):
    model = Pooled()
    if is_frozen:  # a batch norm that is never in training mode takes no statistics
        model[1].train = lambda mode=True: model[1]
        model[1].training = False
    else:
        model[0] = torch.nn.AdaptiveAvgPool2d(2)
        model[4] = torch.nn.Linear(4, 2)
    model[2].eval()
    before = {name: value.clone() for name, value in model.state_dict().items()}
    modes = [module.training for module in model.modules()]
    generator = torch.get_rng_state()
    check_single_image(model, torch.randn(1, 1, 4, 4, generator=torch.Generator().manual_seed(1)))
    assert all(torch.equal(before[name], value) for name, value in model.state_dict().items())
    assert [module.training for module in model.modules()] == modes
    assert torch.equal(torch.get_rng_state(), generator)
