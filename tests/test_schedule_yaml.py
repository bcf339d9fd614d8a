from __future__ import annotations

import pytest

from distiller.errors import ScheduleError
from distiller.schedule_yaml import dotted, parse_document, read_document


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


def test_a_document_within_itself_is_refused():
    with pytest.raises(ScheduleError, match="nested too deeply, or within itself"):
        parse_document("a: &x [*x]")


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
        (b"? [1, 2]\n: x\n", "a key must be a name or a number"),
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


def test_paths_are_shown_with_dots_and_brackets():
    assert dotted(("pruners", "a", "weights", 1)) == "pruners.a.weights[1]"
