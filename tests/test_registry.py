from __future__ import annotations

import sys
import types

import pytest

from distiller.errors import UnknownNameError
from distiller.registry import Registry, load_dotted


@pytest.fixture
def plugged(monkeypatch):
    package = types.ModuleType("plugged")
    package.Kept, package.number = dict, 3  # type: ignore[attr-defined]
    monkeypatch.setitem(sys.modules, "plugged", package)


@pytest.mark.parametrize(
    ("path", "text"),
    [
        ("plugged..Kept", "is no dotted path; it is written package.module.Name"),
        ("other.Kept", "lies in package 'other', which may not run; allow it with --plugin other"),
        ("plugged.Gone", "cannot be imported: module 'plugged' has no attribute 'Gone'"),
        ("plugged.number", "is of type int; a class or function is wanted"),
    ],
)
def test_a_path_that_leads_to_no_class_is_refused(plugged, path, text):
    with pytest.raises(UnknownNameError) as caught:
        load_dotted(path, ["plugged"], "pruner class")
    assert str(caught.value) == f"pruner class '{path}' {text}"


def test_a_plugin_that_ends_the_program_when_it_is_imported_is_told(tmp_path, monkeypatch):
    (tmp_path / "quitting.py").write_text("import sys\n\nsys.exit(3)\n")
    monkeypatch.syspath_prepend(tmp_path)
    with pytest.raises(UnknownNameError) as caught:
        Registry("pruner").look_up("quitting.Pruner", ["quitting"])
    assert str(caught.value) == (
        "pruner class 'quitting.Pruner': failed with SystemExit: 3 "
        f"({tmp_path / 'quitting.py'}:3); its module is imported"
    )


def test_a_path_into_a_plugin_is_followed(plugged):
    assert Registry("pruner").look_up("plugged.Kept", ["plugged"]) is dict


def test_a_name_is_registered_once():
    registry = Registry("pruner")
    registry.register(dict, "Kept")
    with pytest.raises(ValueError, match="pruner 'Kept' is registered already, by <class 'dict'>"):
        registry.register(list, "Kept")


def test_a_class_of_distiller_that_is_not_here_is_told_as_such():
    with pytest.raises(UnknownNameError) as caught:
        Registry("lr_scheduler").look_up("LambdaLR")
    assert str(caught.value) == (
        "class 'LambdaLR' of Distiller is not in this version; see docs/migrating.md"
    )
