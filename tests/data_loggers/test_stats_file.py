"""Files of statistics: real ones of Distiller, and every kind of wrong one beside its message."""

import copy

import pytest
import yaml

from distiller.data_loggers.stats_file import check_stats, load_stats
from distiller.errors import StatsError

RECORD = {"min": -1.0, "max": 2, "avg_min": -0.5, "avg_max": 1.5, "mean": 0.25, "std": 0.5, "b": 0.4}


def stats_of(*layers: str) -> dict:
    return {layer: {"inputs": {0: dict(RECORD)}, "output": dict(RECORD)} for layer in layers}


def test_distillers_own_file_is_read(compat):
    stats = load_stats(compat / "stats" / "resnet18_quant_stats.yaml")
    assert list(stats)[:3] == ["conv1", "bn1", "relu"]
    assert stats["bn1"]["output"]["max"] == 7.357358932495117
    assert stats["conv1"]["inputs"][0]["shape"] == "(256, 3, 224, 224)"
    assert stats["bn1"]["inputs"][0] == stats["conv1"]["output"]


def test_older_files_lack_b(tmp_path):
    content = stats_of("conv1")
    del content["conv1"]["output"]["b"]
    path = tmp_path / "old.yaml"
    path.write_text(yaml.safe_dump(content))
    assert "b" not in load_stats(path)["conv1"]["output"]


def test_names_with_module_are_canonical_afterwards():
    assert list(load_stats(stats_of("module.layer.conv1", "fc"))) == ["layer.conv1", "fc"]


def test_layers_without_inputs_have_none():
    content = stats_of("embed", "other")
    del content["embed"]["inputs"]
    content["other"]["inputs"] = None
    assert [entry["inputs"] for entry in load_stats(content).values()] == [{}, {}]


def test_numbers_that_yaml_takes_for_text_are_numbers(tmp_path):
    path = tmp_path / "stats.yaml"
    path.write_text(yaml.safe_dump(stats_of("fc")).replace("b: 0.4", "b: 4e-1"))
    assert load_stats(path)["fc"]["output"]["b"] == 0.4


def test_a_dictionary_is_copied():
    content = stats_of("fc")
    load_stats(content)["fc"]["output"]["min"] = -7
    assert content == stats_of("fc")


def changed(path: tuple, value: object) -> dict:
    content = copy.deepcopy(stats_of("fc"))
    *parents, last = path
    place = content
    for key in parents:
        place = place[key]
    if value is None:
        del place[last]
    else:
        place[last] = value
    return content


@pytest.mark.parametrize(
    "content, message",
    [
        ({}, "is empty; activation statistics wanted"),
        (changed(("fc",), 3), "fc: 'inputs' and 'output' wanted, got 3"),
        (changed(("fc", "output"), None), "fc: 'inputs' and 'output' wanted, got {'inputs': "),
        (changed(("fc", "inputs"), [1]), "fc.inputs: records by index wanted, got [1]"),
        (changed(("fc", "inputs", "x"), {}), "fc.inputs: an index (0, 1, ...) wanted, got 'x'"),
        (
            changed(("fc", "inputs", 0), 1),
            "fc.inputs[0]: min, max, avg_min, avg_max, mean, std wanted, got 1",
        ),
        (changed(("fc", "output", "std"), None), "fc.output.std: is missing; collect the statistics again"),
        (changed(("fc", "output", "b"), "wide"), "fc.output.b: a finite number wanted, got 'wide'"),
        (changed(("fc", "output", "b"), True), "fc.output.b: a finite number wanted, got True"),
        (changed(("fc", "output", "mean"), float("nan")), "fc.output.mean: a finite number wanted, got nan"),
        (
            changed(("fc", "output", "max"), 1e300),
            "fc.output.max: a number of at most 1e+36 wanted, got 1e+300",
        ),
        (changed(("fc", "inputs", 0, "min"), 3.0), "fc.inputs[0].min: larger than max, got 3.0 and 2"),
        (changed(("fc", "output", "std"), -1.0), "fc.output.std: is negative, got -1.0"),
        (
            {**stats_of("fc"), **stats_of("module.fc")},
            "'module.fc': is there twice, with and without 'module.'; remove one",
        ),
    ],
)
def test_malformed_statistics_are_refused_naming_layer_and_key(content, message):
    with pytest.raises(StatsError) as caught:
        load_stats(content)
    assert str(caught.value).startswith(f"activation statistics: {message}")


@pytest.mark.parametrize(
    "data, message",
    [
        (b"", ":1: is empty; activation statistics wanted"),
        (b"# only a comment\n", ":1: is empty; activation statistics wanted"),
        (b"\x80\x02}q\x00.", ": is no text file; activation statistics in YAML wanted"),
        (b"a\x00b", ":1: is not YAML text: special characters are not allowed"),
        (b"conv1: {min: 1\nfc: 2]", ":2: is not YAML: expected ',' or '}', but got ':'"),
        (b"just words", ": layers by name wanted, got 'just words'"),
        (b"version: 1\n", ": version: 'inputs' and 'output' wanted, got 1"),
        (b"a: !!python/object/apply:os.getcwd []\n", ":1: is not YAML: could not determine a constructor"),
        (b"fc: 1\nfc: 2\n", ":2: duplicate key 'fc', first given in line 1; keep one"),
        (b"fc: " + b"[" * 20_000, ":1: is not YAML: nested too deeply, or within itself"),
        (
            b"a0: &a0 [1, 1, 1, 1, 1, 1, 1, 1, 1, 1]\n"
            + b"".join(
                b"a%d: &a%d [%s]\n" % (i, i, b", ".join([b"*a%d" % (i - 1)] * 10)) for i in range(1, 10)
            ),
            ":5: a4: more than 100,000 values up to here, with every alias (*name) written out",
        ),
    ],
)
def test_files_that_hold_something_else_are_refused_naming_the_file(tmp_path, data, message):
    path = tmp_path / "stats.yaml"
    path.write_bytes(data)
    with pytest.raises(StatsError) as caught:
        load_stats(path)
    assert str(caught.value).startswith(f"{path}{message}")


def test_a_missing_file_is_refused(tmp_path):
    with pytest.raises(StatsError) as caught:
        load_stats(tmp_path / "none.yaml")
    assert str(caught.value) == f"{tmp_path / 'none.yaml'}: cannot be read, No such file or directory"


def test_statistics_of_another_model_are_refused_naming_the_first_layers():
    with pytest.raises(StatsError) as caught:
        check_stats(stats_of("fc", "a", "b", "c", "d"), {"fc": None}, source="stats.yaml")
    assert str(caught.value) == (
        "stats.yaml: 4 of 5 layers are not in the model ('a', 'b', 'c', ...); "
        "the statistics are of another model, collect them from this one"
    )


def test_statistics_of_some_of_the_layers_are_accepted():
    check_stats(stats_of("fc"), ["conv1", "fc"])
