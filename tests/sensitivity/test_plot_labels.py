import pytest
from hypothesis import given
from hypothesis import strategies as st

from distiller.errors import UnknownNameError, UsageError
from distiller.sensitivity.axes import AXES
from distiller.sensitivity.curves import Score, SensitivityPoint
from distiller.sensitivity.plot_labels import (
    LONGEST_LABEL,
    dense_value,
    find_metric,
    level_scale,
    parameter_labels,
)

SCORE = Score(90.0, 99.0, 0.25)


def labels_of(*names):
    return list(parameter_labels(names).values())


def test_short_names_lose_their_weight():
    assert labels_of("conv1.weight", "layer1.0.conv1.weight") == ["conv1", "layer1.0.conv1"]


def test_names_that_would_be_alike_stay_whole():
    assert labels_of("scale", "scale.weight") == ["scale", "scale.weight"]


def test_long_names_lose_what_they_share_at_both_ends():
    names = [f"backbone.encoder.layers.{index}.attention.projection.weight" for index in range(3)]

    assert labels_of(*names) == ["…0…", "…1…", "…2…"]


def test_long_parts_lose_their_middle_where_that_is_not_enough():
    names = ["stem.conv", "encoder.layer_1.self_attention_of_all_the_heads.query", "encoder.layer_2.query"]

    assert labels_of(*names) == [
        "stem.conv",
        "encoder.layer_1.self_att…e_heads.query",
        "encoder.layer_2.query",
    ]


def test_names_of_a_transformer_keep_the_number_of_the_layer():
    names = [
        f"encoder.layers.encoder_layer_{layer}.{part}"
        for layer in (1, 11)
        for part in ("self_attention.in_proj_weight", "mlp.0.weight")
    ]

    assert labels_of(*names, "heads.head.weight") == [
        "…encode…yer_1.self_a…ntion.in_pro…eight",
        "encoder.layers.encode…yer_1.mlp.0",
        "…encode…er_11.self_a…ntion.in_pro…eight",
        "encoder.layers.encode…er_11.mlp.0",
        "heads.head",
    ]


def test_names_that_stay_too_long_are_numbered():
    names = ["a.b.w" + ".c" * 40, "a.d.w" + ".c" * 41, "e"]

    assert labels_of(*names) == ["1: …" + ".c" * 19, "2: …" + ".c" * 19, "e"]


@given(
    st.lists(
        st.lists(
            st.sampled_from(["conv1", "weight", "attention_of_the_heads", "0", "11"]), min_size=1, max_size=9
        ).map(".".join),
        min_size=1,
        unique=True,
    )
)
def test_labels_differ_and_are_short(names):
    labels = parameter_labels(names)

    assert list(labels) == names
    assert len(set(labels.values())) == len(names)
    assert max(map(len, labels.values())) <= LONGEST_LABEL


@pytest.mark.parametrize(
    "axis, label, shown, text, ordered",
    [
        ("", "Sparsity of the one pruned parameter (%)", 12.5, "12.5 %", [0.0, 0.125, 1.0]),
        ("rank", "Share of the rank taken away (%)", 12.5, "12.5 %", [0.0, 0.125, 1.0]),
        ("Element", "Share of the elements pruned (%)", 12.5, "12.5 %", [0.0, 0.125, 1.0]),
        ("activation-bits", "Bits of the layer's input", 0.125, "0.125 bits", [1.0, 0.125, 0.0]),
    ],
)
def test_fractions_are_shown_in_percent_and_bits_from_many_to_few(axis, label, shown, text, ordered):
    scale = level_scale(axis)

    assert scale.label == label
    assert scale.shown(0.125) == shown
    assert scale.text(0.125) == text
    assert scale.ordered([0.125, 1.0, 0.0, 0.125]) == ordered


def test_the_dense_level_of_bits_lies_off_their_scale():
    assert level_scale("weight-bits").ordered([32.0, 2.0, 8.0]) == [8.0, 2.0]


@pytest.mark.parametrize("axis", AXES)
def test_every_axis_has_a_scale(axis):
    assert level_scale(axis).label.startswith(AXES[axis].label)


def test_an_unknown_axis_has_none():
    with pytest.raises(UnknownNameError, match="did you mean 'rank'"):
        level_scale("rankk")


@pytest.mark.parametrize(
    "name, value, harm", [("top1", 90.0, 1.5), ("top5", 99.0, -7.5), ("loss", 0.25, -91.25)]
)
def test_a_metric_knows_what_is_worse(name, value, harm):
    metric = find_metric(name)

    assert metric.of(SCORE) == value
    assert metric.harm(SCORE, 91.5) == harm


def test_an_unknown_metric_is_refused():
    with pytest.raises(UsageError) as error:
        find_metric("tap1")

    assert str(error.value) == (
        "sensitivity plot: unknown metric 'tap1', not one of top1, top5, loss; did you mean 'top1'?"
    )


def test_the_dense_value_is_that_of_the_dense_level_of_any_axis():
    points = [
        SensitivityPoint("element", "w", 0.5, Score(1, 2, 3)),
        SensitivityPoint("weight-bits", "w", 2.0, Score(1, 2, 3)),
        SensitivityPoint("weight-bits", "w", 32.0, SCORE),
    ]

    assert dense_value(points, find_metric("top5")) == 99.0
    assert dense_value(points[:2], find_metric("top5")) is None
