"""A block run by the engine says what the plain loop says."""

from __future__ import annotations

import dataclasses

import pytest
import torch
from torch import nn

from distiller.names import named_modules, named_parameters
from distiller.replay import Variant, applied
from distiller.sensitivity import block_engine
from distiller.sensitivity.axes import AXES, AxisContext, input_ranges
from distiller.sensitivity.block_engine import BlockEngine, EngineSettings
from distiller.sensitivity.decisions import Tally, right_answers
from distiller.sensitivity.lane import Lane, LanePart
from distiller.sensitivity.units import Unit
from tests.replay.networks import images, make, program_of

X = images(23)
Y = torch.randint(10, (23,), generator=torch.Generator().manual_seed(3))
SETTINGS = [EngineSettings(chunk, channels_last) for chunk in (4, 32) for channels_last in (False, True)]


def plain(model, units):
    """The plain loop, in so many words."""
    points = {}
    with torch.no_grad():
        dense = right_answers(model(X), Y)
        for place, unit in enumerate(units):
            for level, value in enumerate(unit.levels):
                with applied(model, unit.make(value)):
                    logits = model(X)
                right = right_answers(logits, Y)
                loss = float(nn.functional.cross_entropy(logits, Y)) * len(Y)
                top5 = sum(int(y in row.topk(5).indices) for row, y in zip(logits, Y, strict=True))
                points[place, level] = Tally(
                    len(Y), int((logits.argmax(1) == Y).sum()), top5, loss,
                    int((dense & ~right).sum()), int((~dense & right).sum()),
                )  # fmt: skip
    return points


def units_of(model, axis, levels=None):
    context = AxisContext(dummy_input=X[:1], activation_ranges=input_ranges(model, [X]))
    return AXES[axis].units(model, ["*"], levels or AXES[axis].default_levels(context), context)


def assert_same(found, expected):
    assert found.keys() == expected.keys()
    for place, tally in found.items():
        assert dataclasses.replace(tally, loss=0.0) == dataclasses.replace(expected[place], loss=0.0), place
        assert tally.loss == pytest.approx(expected[place].loss, abs=1e-5 * len(Y), rel=1e-5)


@pytest.mark.parametrize("settings", SETTINGS)
@pytest.mark.parametrize("axis", AXES)
@pytest.mark.parametrize("name", ["Plain", "Residual"])
def test_every_point_of_every_axis_is_that_of_the_plain_loop(name, axis, settings):
    model = make(name)
    units = units_of(model, axis)
    engine = BlockEngine(model, program_of(name), units, settings)
    scores = engine.run(X, Y)
    assert_same(scores.points, plain(model, units))
    assert scores.dense == Tally.of(model(X).detach(), Y)
    assert scores.flipped == 0


@pytest.mark.parametrize("axis", ["element", "weight-bits"])
@pytest.mark.parametrize("name", ["Branches", "Tied", "Attention", "Counting"])
def test_networks_of_any_shape(name, axis):
    model = make(name)
    units = units_of(model, axis)
    engine = BlockEngine(model, program_of(name), units, EngineSettings(5))
    assert_same(engine.run(X, Y).points, plain(model, units))


@pytest.mark.parametrize("axis", AXES)
@pytest.mark.parametrize("name", ["Signs", "FourBits", "LastBits"])
def test_networks_that_round_are_cut_and_give_the_same_bits(name, axis, monkeypatch):
    model = make(name)
    units = units_of(model, axis)
    engine = BlockEngine(model, program_of(name), units, EngineSettings(4, channels_last=True))
    monkeypatch.setattr(engine, "_plain", None)  # not one of them is run as a whole
    found = engine.run(X, Y).points
    assert_same(found, plain(model, units))
    with torch.no_grad():
        for (place, level), tally in found.items():
            with applied(model, units[place].make(units[place].levels[level])):
                assert tally.loss == Tally.of(model(X), Y).loss


def test_one_image_is_no_part_of_a_block_where_values_are_rounded(monkeypatch):
    """With another one beside it, which cutting a network takes, sums are taken in another order."""
    model = make("LastBits")
    units = units_of(model, "element")
    engine = BlockEngine(model, program_of("LastBits"), units, EngineSettings(32))
    monkeypatch.setattr(Lane, "run", None)
    with torch.no_grad():
        for (place, level), tally in engine.run(X[:1], Y[:1]).points.items():
            with applied(model, units[place].make(units[place].levels[level])):
                assert tally.loss == Tally.of(model(X[:1]), Y[:1]).loss


def test_a_network_of_a_fixed_batch_is_filled_up():
    model = make("FixedBatch")
    program = program_of("FixedBatch")
    units = units_of(model, "element")
    engine = BlockEngine(model, program, units, EngineSettings(chunk=3))  # 23 = 7 * 3 + 2
    logits = torch.cat([Lane(model, program, units, ()).dense(chunk) for chunk in X.split(3)])
    assert logits.shape == (23, 10)
    model.forward = lambda x: model.fc(model.conv(x).relu().mean((2, 3)))  # as a whole it takes any batch
    assert_same(engine.run(X, Y).points, plain(model, units))


def test_without_a_program_and_for_units_that_cannot_be_cut_the_plain_loop_is_run():
    model = make("Residual")
    units = units_of(model, "element")
    program = program_of("Residual")
    expected = plain(model, units)
    for given, settings in ((None, EngineSettings(8)), (program, EngineSettings(8, whole={0: "", 3: ""}))):
        assert_same(BlockEngine(model, given, units, settings).run(X, Y).points, expected)


def test_only_the_points_that_are_wanted_are_run():
    model = make("Residual")
    units = units_of(model, "element")
    engine = BlockEngine(model, program_of("Residual"), units, EngineSettings(8))
    wanted = {(0, 3), (4, 18), (4, 2)}
    found = engine.run(X, Y, wanted).points
    assert_same(found, {place: tally for place, tally in plain(model, units).items() if place in wanted})
    assert engine.run(X, Y, set()).points == {}


def test_levels_that_are_the_same_are_run_once(monkeypatch):
    model = make("Residual")
    units = units_of(model, "filter", (0.01, 0.1, 0.13, 0.14, 0.5))  # of 8 filters: 0, 0, 1, 1 and 4
    runs = []
    original = LanePart.logits
    monkeypatch.setattr(LanePart, "logits", _noted(original, runs))
    engine = BlockEngine(model, program_of("Residual"), units[:1], EngineSettings(32))
    points = engine.run(X, Y).points
    assert runs == [2]
    assert (
        points[0, 0]
        == points[0, 1]
        == BlockEngine(model, None, units[:1], EngineSettings(32)).run(X, Y).dense
    )
    assert points[0, 2] == points[0, 3]


def _noted(logits, runs):
    def noting(self, variants):
        runs.append(len(variants))
        return logits(self, variants)

    return noting


def test_a_decision_too_close_to_call_is_made_by_the_plain_loop(monkeypatch):
    """Two equal logits: the part that is run says what its order of summation says, the plain loop decides."""
    model = make("Plain")
    units = units_of(model, "element", (0.5,))
    engine = BlockEngine(model, program_of("Plain"), units, EngineSettings(32))
    tie = torch.zeros(len(X), 10)
    monkeypatch.setattr(LanePart, "logits", lambda self, variants: [tie])
    assert_same(engine.run(X, Y).points, plain(model, units))


def test_a_block_on_which_the_dense_network_answers_otherwise_in_parts_is_run_as_a_whole(monkeypatch):
    """What was tried on the first images need not hold of later ones."""
    model = make("Residual")
    units = units_of(model, "element", (0.3, 0.6))
    engine = BlockEngine(model, program_of("Residual"), units, EngineSettings(8))
    real = Lane.run

    def off(self, images, places, on_dense=None):
        return real(self, images, places, lambda logits: on_dense(logits * 1.01))

    monkeypatch.setattr(Lane, "run", off)
    monkeypatch.setattr(
        LanePart, "logits", lambda self, variants: [torch.eye(10)[:1].expand(self.images, 10)] * len(variants)
    )
    assert_same(engine.run(X, Y).points, plain(model, units))


def test_a_decision_that_is_clear_is_not_made_again(monkeypatch):
    model = make("Plain")
    units = units_of(model, "element", (0.5,))
    engine = BlockEngine(model, program_of("Plain"), units, EngineSettings(32))
    clear = nn.functional.one_hot(Y, 10).float()
    monkeypatch.setattr(LanePart, "logits", lambda self, variants: [clear])
    assert all(tally.top1 == len(Y) for tally in engine.run(X, Y).points.values())


def test_the_model_stays_as_it_is():
    model = make("Residual")
    before = {name: value.clone() for name, value in model.state_dict().items()}
    units = units_of(model, "element")
    BlockEngine(model, program_of("Residual"), units, EngineSettings(8, True, whole={1: ""})).run(X, Y)
    for name, value in model.state_dict().items():
        assert torch.equal(value, before[name])
        assert value.is_contiguous()


@pytest.mark.parametrize("late_bytes, times", [(2**20, 1), (0, 6)])
def test_variants_beyond_the_room_for_them_are_made_anew(monkeypatch, late_bytes, times):
    """Once for a block, where what the unit reads is small enough to wait for its end; else for each chunk."""
    monkeypatch.setattr(block_engine, "_CACHED_BYTES", 0)
    monkeypatch.setattr(block_engine, "_LATE_BYTES", late_bytes)
    model = make("Residual")
    units = units_of(model, "element", (0.3, 0.6))
    made = []
    noting = [dataclasses.replace(unit, make=_noting(unit.make, made)) for unit in units]
    engine = BlockEngine(model, program_of("Residual"), noting, EngineSettings(4))
    made.clear()
    assert_same(engine.run(X, Y).points, plain(model, units))
    assert len(made) == 2 * times * len(units)


def test_no_more_variants_are_there_at_once_than_there_is_room_for(monkeypatch):
    monkeypatch.setattr(block_engine, "_CACHED_BYTES", 0)
    model = make("Plain")
    units = units_of(model, "element", (0.1, 0.3, 0.5, 0.7, 0.9))
    largest = 4 * model.fc1.weight.numel()
    monkeypatch.setattr(block_engine, "_BYTES_TOGETHER", 2 * largest)
    runs = []
    monkeypatch.setattr(LanePart, "logits", _noted(LanePart.logits, runs))
    engine = BlockEngine(model, program_of("Plain"), units, EngineSettings(32))
    assert_same(engine.run(X, Y).points, plain(model, units))
    assert runs == [5, 1, 1, 1, 1, 1, 2, 2, 1, 5]  # conv1, conv2, fc1, fc2


def _noting(make_variant, made):
    def noting(level):
        made.append(level)
        return make_variant(level)

    return noting


def test_bfloat16_is_close_and_says_what_it_flipped():
    model = make("Residual")
    units = units_of(model, "element", (0.3,))
    engine = BlockEngine(model, program_of("Residual"), units, EngineSettings(8, True, bfloat16=True))
    scores = engine.run(X, Y)
    lane = Lane(model, program_of("Residual"), units, (), True, torch.bfloat16)
    with torch.no_grad():
        assert scores.flipped == int((lane.dense(X).argmax(1) != model(X).argmax(1)).sum())
    for place, tally in plain(model, units).items():
        assert abs(scores.points[place].loss - tally.loss) / len(Y) < 0.1
    assert scores.dense == Tally.of(model(X).detach(), Y)


def test_quantized_inputs_are_run_in_the_networks_own_layout():
    """A last bit more or less, as another layout makes it, can be a whole step of the grid."""
    model = make("Residual")
    step = Unit("x", "conv2.weight", (1.0,), _Steps(), inputs=("conv2",))
    engine = BlockEngine(model, program_of("Residual"), [step], EngineSettings(8, channels_last=True))
    assert_same(engine.run(X, Y).points, plain(model, [step]))
    assert [(lane._channels_last, lane.is_bitwise) for lane in engine._lanes] == [(False, True)]


class _Steps:
    def __call__(self, level):
        return Variant({}, {"conv2": lambda value: torch.round(value * 2) / 2})


def test_names_of_wrapped_networks_are_the_canonical_ones():
    model = make("Residual")
    names = [unit.parameter for unit in units_of(nn.DataParallel(model), "element")]
    assert names == [name for name, p in named_parameters(model) if p.dim() > 1]
    assert all(name.rpartition(".")[0] in dict(named_modules(model)) for name in names)
