from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path

import pytest

from distiller.errors import SensitivityError
from distiller.layerwise.source_files import read_source_files, write_source_files
from tests.layerwise.test_points import POINT

SOURCE = Path(__file__).resolve().parents[2] / "../shared/compat/layerwise"
needs_source = pytest.mark.skipif(not SOURCE.is_dir(), reason=f"{SOURCE} is not there")


def points(technique: str, latency: float | None = 0.25):
    for value, correct in ((0.0, 62), (0.5, 31)):
        yield replace(POINT, technique=technique, value=value, top1_correct=correct, latency_s=latency)


def test_files_have_the_keys_of_the_source(tmp_path):
    bits = replace(POINT, technique="quant", axis="bits", value=4.0)
    written = write_source_files([*points("quant"), bits, *points("svd", None)], tmp_path)
    assert [path.name for path in written] == [
        "accuracy-quant.json",
        "latency-quant.json",
        "accuracy-svd.json",
    ]
    assert json.loads(written[0].read_text()) == {"fraction": [0.0, 0.5], "accuracy": [0.62, 0.31]}
    assert json.loads(written[1].read_text()) == {"fraction": [0.0, 0.5], "latency": [0.25, 0.25]}
    assert read_source_files(tmp_path) == {
        "accuracy": {"quant": ([0.0, 0.5], [0.62, 0.31]), "svd": ([0.0, 0.5], [0.62, 0.31])},
        "latency": {"quant": ([0.0, 0.5], [0.25, 0.25])},
    }


@needs_source
def test_the_sources_own_files_are_of_the_form_that_is_written_here(tmp_path):
    theirs = sorted(SOURCE.glob("*.json"))
    assert len(theirs) == 6
    write_source_files([p for name in ("prune", "quant", "svd") for p in points(name)], tmp_path)
    for path in theirs:
        content, ours = (json.loads((folder / path.name).read_text()) for folder in (SOURCE, tmp_path))
        assert list(content) == list(ours)
        assert {key: {type(v) for v in values} for key, values in content.items()} == {
            key: {type(v) for v in values} for key, values in ours.items()
        }
    found = read_source_files(SOURCE)
    assert found["accuracy"]["svd"][1][-1] == pytest.approx(0.1667)  # M 2.3
    assert found["latency"]["prune"][1][0] == pytest.approx(0.6368, abs=1e-4)


FORM = "must hold two lists of numbers, 'fraction' and 'accuracy', equally long and not empty"


@pytest.mark.parametrize(
    "content, told",
    [
        ("[]", FORM),
        ("{}", FORM),
        ('{"fraction": [], "accuracy": []}', FORM),
        ('{"fraction": [0.1], "accuracy": [0.1, 0.2]}', FORM),
        ('{"fraction": [0.1], "accuracy": ["x"]}', FORM),
        ('{"fraction": [0.1], "accuracy": [true]}', FORM),
        ('{"fraction": [0.1], "accuracy": [NaN]}', FORM),
        ('{"fraction": [0.1], "latency": [0.1]}', FORM),
        ("{", "not JSON, Expecting property name enclosed in double quotes: line 1 column 2 (char 1)"),
    ],
)
def test_a_file_of_another_form_is_refused(tmp_path, content, told):
    path = tmp_path / "accuracy-prune.json"
    path.write_text(content)
    with pytest.raises(SensitivityError) as error:
        read_source_files(tmp_path)
    assert str(error.value) == f"{path}: {told}"


def test_a_folder_without_such_files_is_refused(tmp_path):
    with pytest.raises(SensitivityError) as error:
        read_source_files(tmp_path / "none")
    assert str(error.value) == (
        f"{tmp_path / 'none'}: no files accuracy-TECHNIQUE.json or latency-TECHNIQUE.json there; give the folder of a "
        "layer-wise sweep"
    )
