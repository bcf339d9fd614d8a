from __future__ import annotations

import contextlib
import enum
import math
import string

import hypothesis
import hypothesis.strategies as st
import pytest
import torch

from distiller.errors import ScheduleError
from distiller.schedule_yaml import dotted, parse_document, plain, read_document, shown


def test_every_key_and_item_knows_its_line():
    document = parse_document("a:\n  b: [1,\n      2]\nc: x\n")
    assert document.data == {"a": {"b": [1, 2]}, "c": "x"}
    assert document.line(("a", "b", 1)) == 3
    assert document.line(("c",)) == 4
    assert document.line(("a", "nowhere")) == 1


def test_a_value_is_found_as_item_or_as_key():
    document = parse_document("p:\n  weights: [x,\n    y]\n  levels:\n    z: 1\n")
    assert document.find(("p",), "y") == ("p", "weights", 1)
    assert document.find(("p",), "z") == ("p", "levels", "z")
    assert document.find(("p",), "w") == ("p",)


@pytest.mark.parametrize(
    ("message", "path"),
    [
        ("levels['fc'] must be in [0, 1), got 1.5", ("p", "levels", "fc")),
        ("b must differ from a, got 1 for both", ("p", "b")),
        ("A is too large", ("p", "a")),
        ("group 'Rows' wants two dimensions", ("p", "levels", "conv", 1)),
        ("neither bb nor old_levels nor Rows", ("p",)),
    ],
)
def test_the_key_that_a_message_is_about_is_found(message, path):
    document = parse_document("p: {a: 1, b: 1, levels: {conv: [1, Rows], fc: 1.5}}")
    assert document.find_mentioned(("p",), message) == path


@pytest.mark.parametrize(
    ("text", "value"), [("1e-4", 1e-4), ("5E3", 5e3), ("-2e+1", -20.0), ("1.5e-3", 1.5e-3)]
)
def test_numbers_with_an_exponent_are_numbers(text, value):
    assert parse_document(f"x: {text}").data == {"x": value}


def test_words_that_look_like_exponents_stay_words():
    assert parse_document("x: e5\ny: 1e\nz: layer1e3x").data == {"x": "e5", "y": "1e", "z": "layer1e3x"}


def test_a_duplicate_key_is_refused_with_both_lines():
    with pytest.raises(ScheduleError) as caught:
        parse_document("a:\n  k: 1\n  j: 2\n  k: 3\n", "s.yaml")
    assert (
        str(caught.value)
        == "s.yaml has 1 error\n  :4    a: duplicate key 'k', first given in line 2; keep one"
    )


def test_all_duplicate_keys_are_told_at_once():
    with pytest.raises(ScheduleError, match="has 2 errors"):
        parse_document("k: 1\nk: 2\nk: 3\n")


def test_the_duplicate_keys_of_distillers_ssl_schedule_are_refused_with_both_lines(compat):
    path = compat / "schedules/ssl/ssl_channels-removal_training.yaml"
    with pytest.raises(ScheduleError) as caught:
        read_document(path)
    lines = [line.strip() for line in path.read_text().splitlines()]
    expected = []
    for name in ("module.layer2.1.conv2.weight", "module.layer3.1.conv2.weight"):
        first, second = (number for number, line in enumerate(lines, 1) if line.startswith(name))
        expected.append((second, f"duplicate key '{name}', first given in line {first}; keep one"))
    assert [(fault.line, fault.text) for fault in caught.value.faults] == expected


def test_an_anchor_is_read_in_both_places():
    document = parse_document("a: &w [1, 2]\nb: *w\nc:\n  <<: {d: 1}\n  e: 2\n")
    assert document.data == {"a": [1, 2], "b": [1, 2], "c": {"d": 1, "e": 2}}


def test_keys_of_a_merge_have_their_lines_and_give_way_to_own_keys():
    document = parse_document("a: &a {x: 1,\n  y: 2}\nb:\n  x: 3\n  <<: [*a,\n    {y: 4,\n    z: 5}]\n")
    assert document.data["b"] == {"x": 3, "y": 2, "z": 5}
    assert [document.line(("b", key)) for key in "xyz"] == [4, 2, 7]


@pytest.mark.parametrize(
    "text", ["a: &x [*x]", "a: &x [*x, *x]", "a: &x {<<: *x}", "a: " + "[" * 3000, "- " * 3000]
)
def test_a_document_within_itself_or_too_deep_is_refused(text):
    with pytest.raises(ScheduleError, match="nested too deeply, or within itself"):
        parse_document(text)


@pytest.mark.parametrize("item", ["[{}]", "{{<<: [{}]}}"])
def test_aliases_that_multiply_are_refused(item):
    """Nine lines that stand for 9^9 values."""
    lines = ["a0: &a0 {x: 1}"]
    lines += [f"a{n}: &a{n} " + item.format(", ".join([f"*a{n - 1}"] * 9)) for n in range(1, 9)]
    with pytest.raises(ScheduleError) as caught:
        parse_document("\n".join(lines), "s.yaml")
    (fault,) = caught.value.faults
    assert fault.text == "more than 100,000 values up to here, with every alias (*name) written out"
    assert fault.line > 1


@pytest.mark.parametrize(
    ("value", "text"),
    [
        ("2024-13-45", "'2024-13-45' is no timestamp; put it in quotes if it is text"),
        ("0x_", "'0x_' is no int; put it in quotes if it is text"),
        ("!!bool perhaps", "'perhaps' is no bool; put it in quotes if it is text"),
        ("1" + "0" * 18, "must be a whole number of at most 18 digits"),
        ("0x" + "f" * 5000, "must be a whole number of at most 18 digits"),
    ],
)
def test_a_value_that_is_not_what_it_looks_like_is_refused_in_each_place(value, text):
    with pytest.raises(ScheduleError) as caught:
        parse_document(f"a: &v {value}\nb:\n  c: *v\n")
    assert [(fault.path, fault.text) for fault in caught.value.faults] == [("a", text), ("b.c", text)]


SNIPPETS = ["a: ", "- ", "&x ", "*x", "<<: ", "? ", "{", "}", "[", "]", ", ", ": ", "\n", "  ", "'", '"', "|", ">",
            "!!int ", "!!set ", "!!omap ", "%YAML ", "---\n", "#", "=", "~", "0x", "1e", "2024-01-", "9" * 30]  # fmt: skip


@hypothesis.settings(deadline=None)
@hypothesis.given(st.lists(st.sampled_from([*SNIPPETS, *string.printable]), max_size=40).map("".join))
def test_any_text_is_read_or_refused(text):
    with contextlib.suppress(ScheduleError):
        parse_document(text)


@pytest.mark.parametrize(
    ("content", "text"),
    [
        (b"", "is empty; a schedule has at least a 'policies' list"),
        (b"# only a comment\n", "is empty"),
        (b"\x80\x02\xff", "is not text (byte 0 is not UTF-8); a YAML file is wanted"),
        (b"a: [1, 2\n", "is not YAML: expected ',' or ']'"),
        (b"a: 1\n\tb: 2\n", "is not YAML: found character '\\t' that cannot start any token"),
        (b"a: \x07\n", "is not YAML text: special characters are not allowed"),
        (b"a: !!python/object/apply:os.system ['true']\n", "is not YAML: could not determine a constructor"),
        (b"? [1, 2]\n: x\n", "a key must be a name or a number, got a sequence"),
        (b"2024-01-02: x\n", "a key must be a name or a number, got datetime.date(2024, 1, 2)"),
        (b'a: "\\UFFFFFFFF"\n', "is not YAML: "),
        (b"a: 1\n---\nb: 2\n", "is not YAML: but found another document"),
    ],
)
def test_what_is_no_schedule_is_refused(tmp_path, content, text):
    path = tmp_path / "s.yaml"
    path.write_bytes(content)
    with pytest.raises(ScheduleError) as caught:
        read_document(path)
    assert text in str(caught.value)
    assert str(caught.value).startswith(f"{path} has 1 error\n  :")


def test_a_missing_file_and_a_folder_are_refused(tmp_path):
    with pytest.raises(ScheduleError, match="cannot be read: No such file or directory"):
        read_document(tmp_path / "none.yaml")
    with pytest.raises(ScheduleError, match="cannot be read: Is a directory"):
        read_document(tmp_path)
    with pytest.raises(ScheduleError, match="cannot be read: Could not determine home directory"):
        read_document("~nobody-of-this-name/s.yaml")


def test_paths_are_shown_with_dots_and_brackets():
    assert dotted(("pruners", "a", "weights", 1)) == "pruners.a.weights[1]"


def test_long_values_are_shown_cut_short():
    assert shown({"a": [1, "x"], "b": None}) == "{'a': [1, 'x'], 'b': None}"
    assert len(shown([["x" * 1000] * 1000] * 1000)) < 12_000


def test_plain_data_stay_and_all_else_becomes_text_that_is_the_same_in_every_process():
    class Kind(enum.Enum):
        GOOD = 1

    stays = {"a": [1, 0.5, "x", None, True]}
    assert plain(stays) == stays
    assert plain({1: (Kind.GOOD, math.floor, object(), torch.float32)}) == {
        "1": ["Kind.GOOD", "<built-in function floor>", "<object object>", "torch.float32"]
    }
