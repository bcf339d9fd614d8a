import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from distiller.errors import DistillerError
from distiller.interfaces import EpochWindow, StepContext
from distiller.masks import MaskStore
from distiller.pruning.schedule import ConstantSparsity, GradualSparsity, agp_sparsity

fractions = st.floats(0, 1)


def at(schedule, window: EpochWindow, epoch: int) -> float:
    model = torch.nn.Linear(1, 1)
    return schedule.at(StepContext(model, MaskStore(model), None, window, epoch))


def distillers_agp(epoch, start, end, frequency, initial, final):
    """Reference: Distiller's formula, in its own variables (D 2.5)."""
    span = ((end - start - 1) // frequency) * frequency
    return final + (initial - final) * (1.0 - (epoch - start) / span) ** 3


def test_agp_by_hand():
    # s_i = 0, s_f = 0.8: half-way 0.8 (1 - 1/8) = 0.7, a quarter 0.8 (1 - 27/64) = 0.4625
    assert agp_sparsity(0.0, 0.0, 0.8) == 0.0
    assert agp_sparsity(0.25, 0.0, 0.8) == pytest.approx(0.4625, abs=1e-15)
    assert agp_sparsity(0.5, 0.0, 0.8) == pytest.approx(0.7, abs=1e-15)


@given(initial=fractions, final=fractions)
def test_agp_starts_near_initial_and_ends_exactly_at_final(initial, final):
    assert agp_sparsity(0.0, initial, final) == pytest.approx(initial, abs=1e-15)
    assert agp_sparsity(1.0, initial, final) == final


@given(early=fractions, late=fractions, initial=fractions, final=fractions)
def test_agp_is_monotone_in_progress(early, late, initial, final):
    early, late = sorted((early, late))
    low, high = sorted((initial, final))
    assert agp_sparsity(early, low, high) <= agp_sparsity(late, low, high) + 1e-15
    assert agp_sparsity(early, high, low) >= agp_sparsity(late, high, low) - 1e-15


@pytest.mark.parametrize(("start", "end", "frequency"), [(0, 30, 1), (5, 38, 2), (0, 20, 3), (1, 7, 5)])
def test_gradual_sparsity_is_distillers_over_a_window(start, end, frequency):
    window = EpochWindow.spanning(start, end, frequency)
    for epoch in window.epochs:
        expected = distillers_agp(epoch, start, end, frequency, 0.05, 0.87)
        assert at(GradualSparsity(0.05, 0.87), window, epoch) == pytest.approx(expected, abs=1e-15)


def test_defect_epoch_lists_have_a_schedule_too():
    """Distiller's `epochs:` policies gave frequency None, on which its AGP pruners failed."""
    window = EpochWindow((2, 3, 6))
    assert [at(GradualSparsity(0.0, 0.8), window, epoch) for epoch in window.epochs] == [
        0.0,
        pytest.approx(0.4625),
        0.8,
    ]


def test_a_window_of_one_epoch_prunes_to_the_final_sparsity():
    assert at(GradualSparsity(0.1, 0.6), EpochWindow((4,)), 4) == 0.6


def test_constant_sparsity_does_not_depend_on_the_epoch():
    window = EpochWindow.spanning(0, 10)
    assert {at(ConstantSparsity(0.3), window, epoch) for epoch in range(10)} == {0.3}


@pytest.mark.parametrize(
    ("initial", "final", "text"),
    [
        (-0.1, 0.5, "initial_sparsity must be in [0, 1), got -0.1"),
        (0.1, 1.0, "final_sparsity must be in [0, 1), got 1.0"),
        (0.1, 87, "final_sparsity must be in [0, 1), got 87"),
        (
            0.5,
            0.5,
            "final_sparsity must differ from initial_sparsity, got 0.5 for both; "
            "a pruner without a schedule prunes at one level",
        ),
    ],
)
def test_gradual_sparsity_refuses(initial, final, text):
    with pytest.raises(DistillerError) as error:
        GradualSparsity(initial, final)
    assert str(error.value) == text


def test_constant_sparsity_refuses_more_than_all():
    with pytest.raises(DistillerError) as error:
        ConstantSparsity(1.1)
    assert str(error.value) == "desired_sparsity must be in [0, 1], got 1.1"
