from __future__ import annotations

import pytest
from torch import nn

from distiller.replay import Program
from distiller.sensitivity.axes import AXES, AxisContext, input_ranges
from distiller.sensitivity.block_engine import EngineSettings
from distiller.sensitivity.lane import Lane, LanePart
from distiller.sensitivity.tuning import choose_settings, image_bytes, traced_program
from tests.replay.networks import images, make, program_of

X = images(40)


def chosen(name, axis="element", fast=False):
    model = make(name)
    context = AxisContext(dummy_input=X[:1], activation_ranges=input_ranges(model, [X]))
    units = AXES[axis].units(model, ["*"], AXES[axis].default_levels(context), context)
    return choose_settings(model, program_of(name), units, X, fast=fast), units


@pytest.mark.parametrize("axis", AXES)
@pytest.mark.parametrize("name", ["Plain", "Residual"])
def test_a_chunk_is_chosen_and_every_unit_can_be_cut(name, axis):
    settings, _ = chosen(name, axis)
    assert 2 <= settings.chunk <= len(X)
    assert not settings.bfloat16
    assert settings.whole == {}


def test_convolutions_of_images_are_run_channels_last():
    assert chosen("Residual")[0].channels_last
    assert not chosen("Tied")[0].channels_last


@pytest.mark.parametrize("name, image_bytes_of", [("Residual", 8 * 8 * 8 * 4), ("Tied", 64 * 4)])
def test_the_largest_result_of_a_chunk_stays_in_a_cache(name, image_bytes_of, monkeypatch):
    program = program_of(name)
    assert image_bytes(program) == image_bytes_of
    # Of 40 images, in parts as equal as can be.
    for cache, memory, chunk in (
        (39, 40, 20),
        (40, 40, 40),
        (20, 24, 20),
        (2, 18, 14),
        (2, 4, 14),
        (2, 90, 20),
    ):
        monkeypatch.setattr("distiller.sensitivity.tuning._CHUNK_BYTES", cache * image_bytes_of)
        monkeypatch.setattr("distiller.sensitivity.tuning._LARGEST_CHUNK_BYTES", memory * image_bytes_of)
        monkeypatch.setattr("distiller.sensitivity.tuning._GOOD_CHUNK", 32)
        assert chosen(name)[0].chunk == chunk


@pytest.mark.parametrize("is_faster", [False, True])
def test_bfloat16_is_taken_only_where_it_is_allowed_and_faster(monkeypatch, is_faster):
    monkeypatch.setattr("distiller.sensitivity.tuning._is_faster", lambda *args: is_faster)
    assert not chosen("Residual")[0].bfloat16
    assert chosen("Residual", fast=True)[0].bfloat16 == is_faster


def test_bfloat16_that_an_operation_does_not_take_is_not_chosen(monkeypatch):
    real = Lane.dense

    def dense(self, x):
        if self.is_coarse:
            raise RuntimeError("not implemented for 'BFloat16'")
        return real(self, x)

    monkeypatch.setattr(Lane, "dense", dense)
    assert not chosen("Residual", fast=True)[0].bfloat16


def test_a_network_of_a_fixed_batch_is_run_in_it():
    assert chosen("FixedBatch")[0].chunk == 3
    program, _ = traced_program(make("FixedBatch"), images(100))
    assert program is not None
    assert program.batch == 64


def test_a_layout_that_changes_the_answers_is_not_chosen(monkeypatch):
    real = Lane.dense
    monkeypatch.setattr(Lane, "dense", lambda self, x: real(self, x) + self._channels_last)
    settings, _ = chosen("Residual")
    assert (settings.channels_last, settings.whole) == (False, {})
    monkeypatch.setattr(Lane, "dense", lambda self, x: real(self, x) + 1)
    settings, units = chosen("Residual")
    assert set(settings.whole) == set(range(len(units)))
    assert settings.whole[0].startswith("step by step its logits differ by ")


def test_a_network_whose_images_influence_each_other_is_run_on_whole_blocks():
    settings, units = chosen("Mixing")
    assert set(settings.whole) == set(range(len(units)))
    assert settings.whole[0].startswith("images of a block influence each other: in parts, logits differ by ")


def test_units_that_say_something_else_in_part_are_run_as_a_whole(monkeypatch):
    real = LanePart.logits

    def logits(self, variants, at_once=None):
        return [own + (self.lane.places == (2,)) for own in real(self, variants, at_once)]

    monkeypatch.setattr(LanePart, "logits", logits)
    settings, _ = chosen("Residual")
    assert list(settings.whole) == [2]
    assert settings.whole[2].startswith("run in part, its logits differ by ")


@pytest.mark.parametrize("name", ["Signs", "FourBits", "LastBits"])
def test_networks_that_round_are_cut_in_their_own_layout(name):
    settings, _ = chosen(name, fast=True)
    assert settings == EngineSettings(len(X))


@pytest.mark.parametrize("name, axis", [("RoundedFixedBatch", "element"), ("FixedBatch", "activation-bits")])
def test_what_rounds_and_takes_another_number_of_images_than_a_block_is_run_as_a_whole(name, axis):
    settings, units = chosen(name, axis)
    why = "values are rounded in it, and it takes 3 images at a time, not 40"
    assert settings.whole == dict.fromkeys(range(len(units)), why)


def test_a_unit_that_rounds_must_give_the_same_bits_on_a_whole_block(monkeypatch):
    real = LanePart.logits

    def logits(self, variants, at_once=None):
        off = 1e-6 if self.lane.places == (1,) and self.images == len(X) else 0
        return [own + off for own in real(self, variants, at_once)]

    monkeypatch.setattr(LanePart, "logits", logits)
    settings, _ = chosen("FourBits")
    assert list(settings.whole) == [1]
    assert settings.whole[1].startswith("run in part, its logits differ by ")


def test_units_are_tried_with_several_variants_together(monkeypatch):
    """A network that counts its images, by a part that takes no notice of that."""
    assert not chosen("Counting")[0].whole
    monkeypatch.setattr(Program, "without_images", lambda self: frozenset())
    settings, _ = chosen("Counting")
    assert list(settings.whole) == [0]  # no layer comes after the other one
    assert settings.whole[0].startswith("run in part, its logits differ by ")


@pytest.mark.parametrize("failing, count", [("logits", 1), ("dense", 2)])
def test_what_torch_does_not_run_in_part_is_run_as_a_whole(monkeypatch, failing, count):
    """Of a unit; of the network, when it is looked at whether images influence each other."""
    real, calls = {"logits": LanePart.logits, "dense": Lane.dense}[failing], []

    def fail(self, *args):
        calls.append(1)
        if len(calls) == count:
            raise RuntimeError("no kernel for that\nsecond line")
        return real(self, *args)

    monkeypatch.setattr(LanePart if failing == "logits" else Lane, failing, fail)
    settings, units = chosen("Residual")
    places = [0] if failing == "logits" else range(len(units))
    assert settings.whole == dict.fromkeys(places, "no kernel for that")


def test_a_network_that_cannot_be_traced_says_why():
    class Deciding(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.fc = nn.Linear(64, 10)

        def forward(self, x):
            return self.fc(x.flatten(1)) if x.sum() > 0 else -self.fc(x.flatten(1))

    program, reason = traced_program(Deciding().eval(), X)
    assert program is None
    assert reason.startswith("Deciding: torch.export cannot trace it for running it in part: ")
    assert traced_program(make("Residual"), X)[1] == ""


def test_a_network_that_fails_step_by_step_is_run_as_a_whole(monkeypatch):
    def fail(self, x):
        raise RuntimeError("no kernel for that\nsecond line")

    monkeypatch.setattr(Lane, "dense", fail)
    settings, units = chosen("Residual")
    assert settings.whole == dict.fromkeys(range(len(units)), "no kernel for that")
