from __future__ import annotations

import json
import math

import pytest

from distiller.errors import QuantizationError
from distiller.quantization.search.search_log import SearchLog

SETTINGS = {"bits": 4, "clips": ["NONE", "AVG"], "quantizer": {"mode": "SYMMETRIC"}}


def refuse():
    raise AssertionError("a recorded point was evaluated")


def open_log(path, **kwargs):
    return SearchLog(path, "scales", SETTINGS, **kwargs)


def test_a_point_is_evaluated_once():
    log = open_log(None)
    assert log.evaluated({"x": [0.5, 1]}, lambda: 2.0) == 2.0
    assert log.evaluated({"x": [0.5, 1]}, refuse) == 2.0
    assert log.evaluations == 1


def test_the_order_of_a_points_keys_makes_no_other_point():
    log = open_log(None)
    log.evaluated({"a": 1, "b": 2}, lambda: 3.0)
    assert log.has({"b": 2, "a": 1})
    assert not log.has({"b": 2, "a": 2})


def test_every_value_is_in_the_file_before_the_next_is_evaluated(tmp_path):
    path = tmp_path / "log.jsonl"
    log = open_log(path)
    log.evaluated({"x": 0}, lambda: 0.1)

    def second():
        assert json.loads(path.read_text().splitlines()[-1]) == {"point": {"x": 0}, "value": 0.1}
        return 0.2

    log.evaluated({"x": 1}, second)


def test_a_search_resumed_replays_values_to_the_last_bit(tmp_path):
    path = tmp_path / "log.jsonl"
    value = 0.1 + 0.2
    open_log(path).evaluated({"x": 1 / 3}, lambda: value)
    again = open_log(path)
    assert again.evaluated({"x": 1 / 3}, refuse) == value
    assert again.evaluations == 0


@pytest.mark.parametrize("value", [math.nan, math.inf, -math.inf])
def test_values_that_are_not_finite_are_replayed(tmp_path, value):
    path = tmp_path / "log.jsonl"
    open_log(path).evaluated({"x": 0}, lambda: value)
    assert repr(open_log(path).evaluated({"x": 0}, refuse)) == repr(value)
    for line in path.read_text().splitlines():
        json.loads(line, parse_constant=lambda name: pytest.fail(f"{name} is no JSON"))


def test_a_kill_loses_the_point_in_evaluation_only(tmp_path):
    path = tmp_path / "log.jsonl"
    log = open_log(path)
    log.evaluated({"x": 0}, lambda: 0.5)

    def killed():
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        log.evaluated({"x": 1}, killed)
    again = open_log(path)
    assert again.evaluated({"x": 0}, refuse) == 0.5
    assert not again.has({"x": 1})


@pytest.mark.parametrize("cut", [1, 5, 20])
def test_a_last_line_that_was_cut_off_is_written_anew(tmp_path, cut):
    path = tmp_path / "log.jsonl"
    log = open_log(path)
    log.evaluated({"x": 0}, lambda: 0.5)
    log.evaluated({"x": 1}, lambda: 0.25)
    path.write_bytes(path.read_bytes()[:-cut])
    again = open_log(path)
    assert again.has({"x": 0})
    assert not again.has({"x": 1})
    again.evaluated({"x": 1}, lambda: 0.125)
    assert open_log(path).evaluated({"x": 1}, refuse) == 0.125


def test_notes_are_made_once(tmp_path):
    path = tmp_path / "log.jsonl"
    content = {"conv1": [0.5, 1.0]}
    assert open_log(path).remembered({"shares": "L2"}, lambda: content) == content
    assert open_log(path).remembered({"shares": "L2"}, refuse) == content


def test_an_empty_file_is_begun(tmp_path):
    path = tmp_path / "log.jsonl"
    path.touch()
    open_log(path).evaluated({"x": 0}, lambda: 0.5)
    assert open_log(path).has({"x": 0})


def test_progress_tells_point_best_done_and_left(tmp_path):
    path, seen = tmp_path / "log.jsonl", []
    open_log(path).evaluated({"x": 0}, lambda: 0.5)
    log = open_log(path, progress=seen.append)
    log.expect(4)
    for x, value in ((0, 0.5), (1, math.nan), (1, 0.0), (2, 0.25)):
        log.evaluated({"x": x}, lambda value=value: value)
    assert [(p.point["x"], p.best, p.done, p.left, p.is_replayed) for p in seen] == [
        (0, 0.5, 1, 3, True),
        (1, 0.5, 2, 2, False),
        (2, 0.25, 3, 1, False),
    ]
    assert math.isnan(seen[1].value)


def test_progress_knows_no_end_where_none_is_known():
    seen = []
    log = open_log(None, progress=seen.append)
    log.evaluated({"x": 0}, lambda: math.inf)
    assert (seen[0].left, seen[0].best) == (None, math.inf)


def message(path, search="scales", **changes):
    with pytest.raises(QuantizationError) as caught:
        SearchLog(path, search, {**SETTINGS, **changes})
    return str(caught.value).replace(str(path), "FILE")


def test_the_file_of_another_search_is_refused_and_stays(tmp_path):
    path = tmp_path / "log.jsonl"
    open_log(path).evaluated({"x": 0}, lambda: 0.5)
    before = path.read_bytes()
    assert message(path, "widths") == (
        "FILE: is of a search of scales, this one is of widths; give another file, or remove this one to begin anew"
    )
    assert message(path, bits=8) == (
        "FILE: is of another search, 'bits' is 4 there, 8 here; give another file, or remove this one to begin anew"
    )
    assert message(path, quantizer={"mode": "ASYMMETRIC_SIGNED"}) == (
        'FILE: is of another search, \'quantizer.mode\' is "SYMMETRIC" there, "ASYMMETRIC_SIGNED" here; '
        "give another file, or remove this one to begin anew"
    )
    assert message(path, more=None) == (
        "FILE: is of another search, 'more' is not given there, null here; give another file, or remove this one to begin anew"
    )
    assert path.read_bytes() == before


@pytest.mark.parametrize(
    "content", [b"hello", b"hello\n", b"[1]\n", b'{"search": "scales"}\n', b"\xff\xfe\n"]
)
def test_a_file_that_is_no_record_is_refused_and_stays(tmp_path, content):
    path = tmp_path / "model.pth"
    path.write_bytes(content)
    assert message(path).endswith(
        "is no record of a search; give another file, or remove this one to begin anew"
    )
    assert path.read_bytes() == content


@pytest.mark.parametrize("line", ["hello", '{"point": {}', "[]", '{"point": {}}'])
def test_a_damaged_line_is_refused_by_its_number(tmp_path, line):
    path = tmp_path / "log.jsonl"
    open_log(path).evaluated({"x": 0}, lambda: 0.5)
    with path.open("a") as file:
        file.write(f"{line}\n" + '{"point": {"x": 1}, "value": 1.0}\n')
    assert message(path).startswith("FILE:3: is ")


def test_a_folder_in_the_files_place_is_refused(tmp_path):
    assert message(tmp_path) == "FILE: cannot hold the record of a search, Is a directory"
    missing = tmp_path / "missing" / "log.jsonl"
    assert message(missing) == "FILE: cannot hold the record of a search, No such file or directory"
