"""The schema says of a schedule's shape what the loader says: every schedule at hand, and its mutations."""

from __future__ import annotations

import copy
import json
import re
import runpy
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import jsonschema
import pytest
import torch

from distiller import schedule_schema
from distiller.component_kinds import KINDS
from distiller.config import dict_config, step_faults
from distiller.errors import DistillerError, ScheduleError
from distiller.models import create_model
from distiller.schedule_schema import schema_text, settings_schema
from distiller.schedule_shape import SECTION_OF, STEPS, WINDOW_KEYS, policy_faults, shape_faults
from distiller.schedule_yaml import SECTIONS, Document, Path_, parse_document, read_document
from distiller.scheduler import make_window
from distiller.signatures import check_settings, settings_model, takes

ROOT = Path(__file__).resolve().parents[1]
COMPAT = ROOT / "../shared/compat/schedules"
SCHEMA = schedule_schema.schedule_schema()
VALIDATOR = jsonschema.Draft202012Validator(SCHEMA)
CLASSES = [(kind, name) for kind in KINDS for name in kind.registry]
ARGS = [kind.args for kind in KINDS if kind.args]
WRONG_VALUES = (
    None,
    True,
    "wrong",
    "mine.Class",
    "mine..Class",
    1.5,
    float("inf"),
    -3,
    [],
    ["x"],
    [2],
    {},
    {"x": 1},
    {"x": [0.5]},
)
RIGHT_VALUES = (
    *(0, 0.5, "Filters", "3D", "Leader", "Max", "AVG", "min", "cos", "triangular", [0.1, 1], [1, "x"], [[1]], ["x", 1]),
    *({"x": 0.5}, {"x": "y"}, {"x": {}}, {"x": [0.5, "3D"]}, {"x": [1, 8, 1, 1]}, {"x": [1, 0.5]}, {"x": 1, "y": "z"}),
)  # fmt: skip


def shipped() -> dict[str, Any]:
    return {
        str(path.relative_to(ROOT)): read_document(path).data for path in (ROOT / "schedules").rglob("*.yaml")
    }


def documented() -> dict[str, Any]:
    return {
        f"{path.name}, example {number}": parse_document(text).data
        for path in sorted((ROOT / "docs").rglob("*.md"))
        for number, text in enumerate(
            re.findall(r"^```yaml\n(.*?)^```", path.read_text(), re.MULTILINE | re.DOTALL)
        )
    }


def distillers() -> dict[str, Any]:
    """Those that are YAML: one has a key twice, which is no matter of the schema."""
    if not COMPAT.is_dir():
        pytest.skip("the folder shared/compat with Distiller's schedules is not beside the project")
    found = {}
    for path in sorted(COMPAT.rglob("*.yaml")):
        try:
            found[path.name] = read_document(path).data
        except ScheduleError as error:
            if "duplicate key" not in str(error):
                raise
    return found


def without_unknown_classes(data: dict[str, Any]) -> dict[str, Any]:
    """What is valid of a schedule, so that each mutation of it is the only fault."""
    kept = dict(data) if STEPS in data else {"policies": [], **data}
    for kind in KINDS:
        if kind.section in kept:
            components = kept[kind.section].items()
            kept[kind.section] = {
                name: entry for name, entry in components if entry["class"] in kind.registry
            }
    return kept


def faults_of_shape(data: Any) -> list[Any]:
    """What the loader finds without the model, but for what the schema's docstring leaves to it."""
    document = Document("<data>", data, {})
    has_steps = isinstance(data, dict) and STEPS in data
    faults: list[Any] = [
        fault for fault in shape_faults(document, not has_steps) if not fault.text.startswith("only one of")
    ]
    if not isinstance(data, dict):
        return faults
    faults += step_faults(document)
    for kind in KINDS:
        section = data.get(kind.section)
        for component in section.values() if isinstance(section, dict) else ():
            if not isinstance(component, dict) or not isinstance(component.get("class"), str):
                continue  # a fault already
            settings = dict(component)
            name = settings.pop("class")
            if name in kind.registry:
                faults += check_settings(kind.registry[name], settings) or blocks_faults(
                    kind.registry[name], settings
                )
            elif not ("." in name and all(name.split("."))):
                faults.append(f"unknown class {name}")
    policies = data.get("policies")
    for index, policy in enumerate(policies if isinstance(policies, list) else ()):
        if policy_faults(document, ("policies", index), policy):
            continue
        kind = next(kind for kind in KINDS if kind.word in policy)
        args = policy[kind.word].get("args") or {}
        faults += check_settings(kind.args, args) if kind.args else list(args)
        window = {key: policy[key] for key in WINDOW_KEYS if policy.get(key) is not None}
        try:
            make_window(**window)
        except DistillerError as error:
            if not is_of_the_relation_of_epochs(**window):
                faults.append(error)
    return faults


def blocks_faults(factory: Callable[..., Any], settings: dict[str, Any]) -> list[DistillerError]:
    """What the constructor says of `kwargs`."""
    if "kwargs" in takes(factory):
        try:
            factory(name="x", **settings)
        except DistillerError as error:
            return [error] if str(error).startswith(("kwargs", "group_type 'Blocks'")) else []
    return []


def is_of_the_relation_of_epochs(
    epochs: list[int] | None = None,
    starting_epoch: int | None = None,
    ending_epoch: int | None = None,
    frequency: int = 1,
) -> bool:
    """Whether each number by itself could be right, and only their order is wrong."""
    if epochs is not None:
        return (
            (starting_epoch, ending_epoch) == (None, None) and epochs != sorted(epochs) and min(epochs) >= 0
        )
    if starting_epoch is None or ending_epoch is None:
        return False
    return starting_epoch >= 0 and ending_epoch >= 1 and frequency >= 1


def places(value: Any, path: Path_ = ()) -> Iterator[Path_]:
    yield path
    items = value.items() if isinstance(value, dict) else enumerate(value) if isinstance(value, list) else ()
    for key, item in items:
        yield from places(item, (*path, key))


def kind_of_place(data: Any, path: Path_) -> tuple[Any, ...]:
    """Equal for places that the schema treats alike: names and positions are left out."""
    kind: list[Any] = ["[]" if isinstance(part, int) else part for part in path]
    if len(path) > 1 and path[0] in SECTIONS:
        kind[1] = data[path[0]][path[1]].get("class")
        kind[3:] = ["{}" if part != "[]" else part for part in kind[3:]]
    elif len(path) > 1 and path[0] == "policies":
        kind.append(tuple(sorted(data["policies"][path[1]])))
    return tuple(kind)


def around(data: Any, path: Path_) -> tuple[Any, Path_]:
    """The component or policy that a place is in, as a schedule; and the place in that. It saves time."""
    if len(path) < 2:
        return data, path
    if path[0] == STEPS:
        return data, path
    inner = data[path[0]][path[1]]
    if path[0] == "policies":
        return {"policies": [inner]}, ("policies", 0, *path[2:])
    return {path[0]: {path[1]: inner}, "policies": []}, path


def mutations(data: Any, path: Path_) -> Iterator[tuple[str, Any]]:
    """The data with one thing changed at `path`."""
    if not path:
        yield from ((f"all replaced by {value!r}", value) for value in WRONG_VALUES)
        yield "surplus key", {**data, "surplus": 1}
        return

    def changed(change: Callable[[Any, Any], Any]) -> Any:
        other = copy.deepcopy(data)
        parent = other
        for part in path[:-1]:
            parent = parent[part]
        change(parent, path[-1])
        return other

    def given(key: str, value: Any) -> Any:
        return changed(lambda parent, last: parent[last].__setitem__(key, value))

    value_here = data
    for part in path:
        value_here = value_here[part]
    for value in WRONG_VALUES:
        yield (
            f"replaced by {value!r}",
            changed(lambda parent, last, value=value: parent.__setitem__(last, value)),
        )
    yield "dropped", changed(lambda parent, last: parent.__delitem__(last))
    if isinstance(path[-1], str):
        yield "misspelt", changed(lambda parent, last: parent.__setitem__(f"{last}x", parent.pop(last)))
    if isinstance(value_here, dict):
        yield "surplus key", given("surplus", 1)
        if path[0] in SECTIONS and len(path) == 2:
            yield "second component", changed(lambda parent, last: parent.__setitem__("second", parent[last]))
        if path[0] == "policies":
            more = [("args", value) for value in ({}, {"surplus": 1}, {"keep_mask": True}, None, [])]
            if len(path) == 2:
                more = [(key, value) for key in (*SECTION_OF, *WINDOW_KEYS) for value in (None, 2, [2])]
            for key, value in more:
                yield f"{key}: {value}", given(key, value)


def every_mutation(schedules: dict[str, Any]) -> Iterator[tuple[str, Any]]:
    """(what was changed, schedule) of every kind of place and every way to change it."""
    seen = set()
    for name, data in schedules.items():
        sound = without_unknown_classes(data)
        for path in places(sound):
            kind = kind_of_place(sound, path)
            if kind not in seen:
                seen.add(kind)
                for label, mutant in mutations(*around(sound, path)):
                    yield f"{name}: {path} {label}", mutant


def test_the_schema_is_a_schema():
    jsonschema.Draft202012Validator.check_schema(SCHEMA)


@pytest.mark.parametrize("schedules", [shipped, documented, distillers], ids=lambda source: source.__name__)
def test_the_schema_refuses_what_the_loader_refuses(schedules):
    data = schedules()
    assert len(data) >= 3
    refused, disagreements = 0, []
    for label, mutant in [*data.items(), *every_mutation(data)]:
        is_valid, faults = VALIDATOR.is_valid(mutant), faults_of_shape(mutant)
        refused += not is_valid
        if is_valid == bool(faults):
            disagreements.append(f"{label}: {faults or 'no fault'}")
    assert disagreements == []
    assert refused > 100


@pytest.mark.parametrize("schedules", [shipped, documented, distillers], ids=lambda source: source.__name__)
def test_what_is_mutated_is_valid_before(schedules):
    assert [
        name for name, data in schedules().items() if faults_of_shape(without_unknown_classes(data))
    ] == []


def test_the_schedules_that_are_shipped_are_valid():
    assert [name for name, data in shipped().items() if not VALIDATOR.is_valid(data)] == []


def test_the_loader_as_a_whole_raises_too():
    """The faults above are taken from parts of the loader."""
    data = read_document(ROOT / "schedules/agp/lenet5_digits.yaml").data
    model = create_model(False, "digits", "lenet5", parallel=False)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    refused = [mutant for _, mutant in every_mutation({"": data}) if not VALIDATOR.is_valid(mutant)]
    for mutant in refused[:: max(1, len(refused) // 60)]:
        if isinstance(mutant, dict):
            with pytest.raises(ScheduleError):
                dict_config(model, optimizer, mutant)


@pytest.mark.parametrize(("kind", "name"), CLASSES, ids=[name for _, name in CLASSES])
def test_a_class_needs_and_takes_what_the_loader_says(kind, name):
    base: dict[str, Any] = {"policies": []}
    needed = settings_schema(kind.registry[name]).get("required", [])
    bare = {**base, kind.section: {"a": {"class": name}}}
    assert VALIDATOR.is_valid(bare) == (needed == [])
    assert bool(faults_of_shape(bare)) == (needed != [])
    surplus = {**base, kind.section: {"a": {"class": name, "surplus": 1}}}
    assert not VALIDATOR.is_valid(surplus)
    other = next(section for section in SECTIONS if section != kind.section)
    assert not VALIDATOR.is_valid({**base, other: {"a": {"class": name}}})


@pytest.mark.parametrize("factory", [*(kind.registry[name] for kind, name in CLASSES), *ARGS])
def test_each_setting_takes_the_values_that_the_loader_takes(factory):
    schema = {key: value for key, value in settings_schema(factory).items() if key != "required"}
    validator = jsonschema.Draft202012Validator(schema)
    for field in settings_model(factory).model_fields.values():
        for value in (*WRONG_VALUES, *RIGHT_VALUES):
            given: dict[str, Any] = {str(field.alias): value}
            faults = [text for _, text in check_settings(factory, given) if not text.startswith("missing;")]
            assert validator.is_valid(given) == (faults == []), given


@pytest.mark.parametrize(("kind", "name"), CLASSES, ids=[name for _, name in CLASSES])
def test_an_editor_can_explain_every_class_and_each_of_our_settings(kind, name):
    schema = SCHEMA["$defs"][f"{kind.section}.{name}"]
    assert len(schema["description"]) > 20
    if not kind.registry[name].__module__.startswith("torch."):
        unexplained = [key for key, setting in schema["properties"].items() if "description" not in setting]
        assert unexplained == ["class"]


def test_an_editor_can_explain_every_key_of_a_policy():
    policy = SCHEMA["properties"]["policies"]["items"]
    assert set(policy["properties"]) == {*SECTION_OF, *WINDOW_KEYS}
    assert all("description" in key for key in policy["properties"].values())
    args = policy["properties"]["pruner"]["properties"]["args"]
    assert all("description" in key for key in args["properties"].values())


def test_names_of_an_enumeration_are_offered():
    settings = SCHEMA["$defs"]["quantizers.PostTrainLinearQuantizer"]["properties"]
    assert {"enum": ["NONE", "AVG", "N_STD", "GAUSS", "LAPLACE"]} in settings["clip_acts"]["anyOf"]
    assert settings["clip_acts"]["default"] == "NONE"


def test_a_setting_that_is_a_function_is_not_offered():
    assert "rounding_fn" not in SCHEMA["$defs"]["pruners.L1RankedStructureParameterPruner"]["properties"]


def test_texts_of_pytorchs_documentation_are_not_taken_over():
    settings = SCHEMA["$defs"]["lr_schedulers.StepLR"]
    assert settings["description"] == "PyTorch's torch.optim.lr_scheduler.StepLR, stepped once an epoch."
    assert not any("description" in setting for setting in settings["properties"].values())


def test_the_committed_schema_is_current():
    committed = (ROOT / "schedules/schedule.schema.json").read_text(encoding="utf-8")
    assert committed == schema_text(), "run `make reference`"


def test_the_command_writes_the_schema_to_standard_output_or_a_file(tmp_path, capsys, monkeypatch):
    monkeypatch.delitem(sys.modules, "distiller.schedule_schema")
    monkeypatch.setattr(sys, "argv", ["schedule_schema.py"])
    with pytest.raises(SystemExit) as caught:
        runpy.run_module("distiller.schedule_schema", run_name="__main__")
    assert caught.value.code == 0
    assert json.loads(capsys.readouterr().out) == SCHEMA
    schedule_schema._main(["-o", str(tmp_path / "s.json")])
    assert json.loads((tmp_path / "s.json").read_text()) == SCHEMA
    assert capsys.readouterr().out == ""


@pytest.mark.parametrize(
    "arguments, status, message",
    [
        (["-o", "nowhere/x.json"], 2, "nowhere/x.json: cannot be written: No such file or directory\n"),
        (["-o", "."], 2, ".: cannot be written: Is a directory\n"),
        (["-o", ""], 2, "usage: python -m distiller.schedule_schema [-o FILE]\n"),
        (["-o"], 2, "usage: python -m distiller.schedule_schema [-o FILE]\n"),
        (["--help"], 0, "usage: python -m distiller.schedule_schema [-o FILE]\n"),
    ],
)
def test_a_command_that_cannot_be_done_is_told_in_one_line(
    tmp_path, monkeypatch, capsys, arguments, status, message
):
    monkeypatch.chdir(tmp_path)
    assert schedule_schema._main(arguments) == status
    assert capsys.readouterr().err == message
    assert list(tmp_path.iterdir()) == []
