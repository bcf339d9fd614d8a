"""The rules of docs/architecture.md that a machine can check."""

from __future__ import annotations

import ast
from graphlib import CycleError, TopologicalSorter
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[1]
LIBRARY = ROOT / "distiller"
FILES = sorted(LIBRARY.rglob("*.py"))

# Lower layers first; a file may import from its own layer and those before it.
LAYERS = (
    ("errors", "registry", "atomic_file", "tensor_cuts", "thinned_layers", "epoch_window", "interfaces", "layer_replacement", "names", "masks", "norms", "tensor_stats", "branch_points", "auxiliary_outputs", "modules",
     "dataset_facts", "dummy_input", "evaluation_mode", "label_ranks", "legacy_names", "observation", "docstrings"),
    ("macs", "graph_facts", "graph_trace", "graph_ops", "graph", "graph_picture", "replay", "channel_groups", "thinning", "functional_modules", "model_transforms", "schedule_yaml", "schedule_shape", "signatures", "models"),
    ("pruning", "regularization", "data_loggers", "quantization", "learning_rate", "factorization", "distillation", "weight_sharing", "early_exit", "packing"),
    ("policy_args", "policy", "policy_conflicts", "structure_outlook", "scheduler", "component_kinds", "schedule_reader", "config", "schedule_schema", "model_summaries"),
    ("sensitivity", "export", "layerwise", "greedy"),
    ("apputils",),
)  # fmt: skip
LAYER_OF = {name: level for level, names in enumerate(LAYERS) for name in names}


def module_name(path: Path) -> str:
    parts = path.relative_to(ROOT).with_suffix("").parts
    return ".".join(parts[:-1] if parts[-1] == "__init__" else parts)


TREES = {module_name(path): ast.parse(path.read_text(encoding="utf-8")) for path in FILES}


def imports(tree: ast.AST, at_run_time_only: bool = False) -> set[str]:
    """The modules of the library that a file imports, `from package import module` resolved to the module."""
    skipped = set()
    if at_run_time_only:
        for node in ast.walk(tree):
            if (
                isinstance(node, ast.If)
                and isinstance(node.test, ast.Name)
                and node.test.id == "TYPE_CHECKING"
            ):
                skipped.update(id(inner) for inner in ast.walk(node))
    found = set()
    for node in ast.walk(tree):
        if id(node) in skipped:
            continue
        if isinstance(node, ast.Import):
            found.update(alias.name for alias in node.names if alias.name.split(".")[0] == "distiller")
        elif isinstance(node, ast.ImportFrom) and (node.module or "").split(".")[0] == "distiller":
            for alias in node.names:
                full = f"{node.module}.{alias.name}"
                found.add(full if full in TREES else str(node.module))
    return found


def layer(name: str) -> int:
    return LAYER_OF[name.split(".")[1]]


def inner_modules():
    return [name for name in TREES if name != "distiller"]


def test_every_file_has_its_layer():
    assert {name.split(".")[1] for name in inner_modules()} == set(LAYER_OF)


def test_imports_point_downwards():
    upwards = [
        (name, other)
        for name in inner_modules()
        for other in imports(TREES[name], at_run_time_only=True)
        if layer(other) > layer(name)
    ]
    assert upwards == []


def test_there_is_no_import_cycle():
    graph = {name: imports(TREES[name], at_run_time_only=True) - {name} for name in inner_modules()}
    # A package's __init__ re-exports its files; importing a file of one's own package is no cycle through it.
    graph = {
        name: {other for other in others if not name.startswith(f"{other}.")}
        for name, others in graph.items()
    }
    try:
        TopologicalSorter(graph).prepare()
    except CycleError as error:
        pytest.fail(f"import cycle: {' -> '.join(error.args[1])}")


def test_the_library_never_imports_itself_as_a_whole():
    assert [name for name in inner_modules() if "distiller" in imports(TREES[name])] == []


def nodes(kind):
    """(name of the file, node) of every node of a kind."""
    return [(name, node) for name, tree in TREES.items() for node in ast.walk(tree) if isinstance(node, kind)]


def test_the_library_neither_prints_nor_parses_nor_configures_logging():
    called = {"print", "logging.basicConfig", "logging.config.dictConfig", "sys.exit", "exit"}
    imported = {"argparse", "logging.config"}
    assert [(name, node.lineno) for name, node in nodes(ast.Call) if ast.unparse(node.func) in called] == []
    assert [
        (name, node.lineno)
        for name, node in nodes(ast.Import)
        if imported.intersection(alias.name for alias in node.names)
    ] == []


def test_no_star_imports():
    stars = [
        (name, node.lineno)
        for name, node in nodes(ast.ImportFrom)
        if any(alias.name == "*" for alias in node.names)
    ]
    assert stars == []


def test_no_exception_is_swallowed():
    """No bare `except`, and no handler that only passes."""
    swallowed = [
        (name, node.lineno)
        for name, node in nodes(ast.ExceptHandler)
        if node.type is None or (len(node.body) == 1 and isinstance(node.body[0], ast.Pass))
    ]
    assert swallowed == []


def test_every_module_says_what_it_does():
    assert [name for name, tree in TREES.items() if len(ast.get_docstring(tree) or "") <= 20] == []


def test_a_file_stays_readable_in_one_sitting():
    lines = {path.relative_to(ROOT): len(path.read_text(encoding="utf-8").splitlines()) for path in FILES}
    assert {path: count for path, count in lines.items() if count > 400} == {}


def test_there_is_no_drawer():
    assert not [path.name for path in FILES if path.stem in ("utils", "common", "helpers", "misc")]


def test_names_of_wrappers_are_known_to_names_only():
    documented = {
        (name, ast.get_docstring(node, clean=False))
        for name, node in nodes((ast.Module, ast.ClassDef, ast.FunctionDef))
    }
    named = [
        (name, node.value)
        for name, node in nodes(ast.Constant)
        if name not in ("distiller", "distiller.names")
        and isinstance(node.value, str)
        and (name, node.value) not in documented
        and (node.value.startswith(("module.", "_orig_mod")) or "parametrizations." in node.value)
    ]
    assert named == []


def test_no_path_of_a_developers_machine_is_committed():
    import re
    import subprocess

    listed = subprocess.run(["git", "ls-files"], cwd=ROOT, capture_output=True, text=True, check=False)
    if listed.returncode != 0:
        pytest.skip("not a git work tree: the list of committed files is not at hand")
    pattern = re.compile(rb"/(work|root|farm)/|/tmp/[a-z]/")
    me = Path(__file__).name
    found = [
        name
        for name in listed.stdout.splitlines()
        if Path(name).name != me and (ROOT / name).is_file() and pattern.search((ROOT / name).read_bytes())
    ]
    assert found == []
