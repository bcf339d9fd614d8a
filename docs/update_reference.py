"""Write the generated parts of docs/reference/ from the registries and the docstrings: `make reference`.

A page is the generated part, which ends at a marker, and below it what is written by hand. A class that
is new gets a page with headings to fill in; `tests/test_reference.py` fails until they are.
"""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

from distiller.component_kinds import KINDS, Kind
from distiller.docstrings import read_docstring
from distiller.schedule_schema import settings_schema

REFERENCE = Path(__file__).resolve().parent / "reference"
HEADINGS = ("Formula", "Example", "When to use it", "What to watch for")
BEGIN = "<!-- Written by `make reference`, down to the next such line: edit the docstrings instead. -->"
END = "<!-- From here on written by hand. -->"
TITLES = {
    "pruners": "Pruners",
    "regularizers": "Regularizers",
    "extensions": "Extensions",
    "lr_schedulers": "Learning-rate schedulers",
    "quantizers": "Quantizers",
}
INTRODUCTION = f"""\
{BEGIN}
# Reference: every class that a schedule may name

How a schedule is written is in [schedules.md](../schedules.md). Each page here has a method's settings,
formula and source, an example that loads as it stands, and advice on when to use it.

## Help from the editor

An editor with a YAML language server (VS Code with the extension "YAML", Neovim, Emacs and others) completes
class names, settings and the keys of policies, shows what they mean, and underlines what the loader would
refuse. It does so in a file that begins with this line:

    # yaml-language-server: $schema=../schedule.schema.json

The path is that of [schedules/schedule.schema.json](../../schedules/schedule.schema.json), from the folder of
the schedule. It is for files that are given with `--compress`. `python -m distiller.schedule_schema -o FILE`
writes the schema elsewhere. It does not know the model: names of parameters, and values out of range, are
found by `--dry-run`.
"""


def pages() -> dict[str, list[tuple[Kind, str, Callable[..., Any]]]]:
    """The classes of each page, by its name: a gradual form (`_AGP`) is on the page of the constant one."""
    found: dict[str, list[tuple[Kind, str, Callable[..., Any]]]] = {}
    for section in TITLES:
        kind = next(kind for kind in KINDS if kind.section == section)
        for name, factory in kind.registry.items():
            if not is_pytorchs(factory):
                found.setdefault(page_of(kind, name), []).append((kind, name, factory))
    return {page: sorted(classes, key=lambda entry: entry[1]) for page, classes in found.items()}


def page_of(kind: Kind, name: str) -> str:
    """The name of the page on which a class is."""
    constant = name.removesuffix("_AGP")
    return constant if constant in kind.registry else name


def is_pytorchs(factory: Callable[..., Any]) -> bool:
    """Whether a class is PyTorch's, which documents it."""
    return factory.__module__.startswith("torch.")


def updated(page: str, text: str) -> str:
    """A page with its generated part as the docstrings are now."""
    by_hand = text.partition(f"{END}\n")[2] or "".join(f"\n## {heading}\n" for heading in HEADINGS)
    (kind, _, _), *_ = classes = pages()[page]
    described = "\n".join(_described(name, factory, is_first=name == page) for _, name, factory in classes)
    links = f"[All classes](README.md) | [{TITLES[kind.section]}](README.md#{_anchor(TITLES[kind.section])})"
    return f"{BEGIN}\n{described}\n{links}\n{END}\n{by_hand}"


def index() -> str:
    """docs/reference/README.md: one row a class."""
    parts = [INTRODUCTION]
    for section, title in TITLES.items():
        kind = next(kind for kind in KINDS if kind.section == section)
        rows = [
            f"| [`{name}`]({page_of(kind, name)}.md) | {_cell(read_docstring(factory).summary)} |"
            for name, factory in sorted(kind.registry.items())
            if not is_pytorchs(factory)
        ]
        parts.append("\n".join([f"## {title}\n", "| class | what it does |", "|---|---|", *rows, ""]))
        theirs = {name: factory for name, factory in sorted(kind.registry.items()) if is_pytorchs(factory)}
        if theirs:
            parts.append(_pytorchs(theirs))
    return "\n".join(parts)


def _pytorchs(classes: dict[str, Callable[..., Any]]) -> str:
    rows = []
    for name, factory in classes.items():
        settings = settings_schema(factory)["properties"]
        listed = [
            f"`{key}`" + _default(setting, " = {}", "")
            for key, setting in settings.items()
            if setting.get("type") != "null"  # a function, which a file cannot hold
        ]
        rows.append(f"| `{name}` | {', '.join(listed)} |")
    return "\n".join(
        [
            "These are PyTorch's, of `torch.optim.lr_scheduler`, where its documentation describes them.",
            "They are stepped once an epoch: where it says steps or iterations, read epochs.\n",
            "| class | settings, with defaults |",
            "|---|---|",
            *rows,
            "",
        ]
    )


def _described(name: str, factory: Callable[..., Any], *, is_first: bool) -> str:
    docstring = read_docstring(factory)
    parts = [f"{'#' if is_first else '##'} {name}", docstring.summary]
    if docstring.text:
        parts.append(docstring.text)
    parts.append(_table(settings_schema(factory)))
    if docstring.source:
        parts.append(f"Source: {docstring.source}")
    return "\n\n".join(parts) + "\n"


def _table(schema: dict[str, Any]) -> str:
    rows = [
        f"| `{name}` | {_words(setting)} | {_default(setting, '`{}`', 'needed')} | "
        f"{_cell(setting.get('description', ''))} |"
        for name, setting in schema["properties"].items()
    ]
    return "\n".join(["| setting | value | default | meaning |", "|---|---|---|---|", *rows])


def _default(setting: dict[str, Any], form: str, without: str) -> str:
    if "default" not in setting:
        return without
    default = setting["default"]
    words = {None: "null", True: "true", False: "false"}
    return form.format(words[default] if default is None or isinstance(default, bool) else f"{default:.4g}"
                       if isinstance(default, float) else default)  # fmt: skip


def _words(schema: dict[str, Any], *, plural: bool = False) -> str:
    """What a value of a JSON Schema is, in words."""
    if "anyOf" in schema:
        options = schema["anyOf"]
        if any("enum" in option for option in options):  # texts, all of which are known
            options = [option for option in options if option.get("type") != "string" or "enum" in option]
        words = dict.fromkeys(_words(option, plural=plural) for option in options)
        return " or ".join(
            sorted(words, key=lambda word: (word == "null", word.startswith(("list", "mapping"))))
        )
    if "enum" in schema or "const" in schema:
        return ", ".join(f"`{value}`" for value in schema.get("enum", [schema.get("const")]))
    s = "s" if plural else ""
    match schema.get("type"):
        case "array":
            return f"list{s} of {_words(schema.get('items', {}), plural=True)}"
        case "object" if schema.get("required") == list(schema.get("properties", ())):  # no others
            keys = (f"{key}: {_bounded(schema['properties'][key])}" for key in schema["required"])
            return f"`{{{', '.join(keys)}}}`"
        case "object" if isinstance(schema.get("additionalProperties"), dict):
            return f"mapping{s} of names to {_words(schema['additionalProperties'], plural=True)}"
        case "object":
            return f"mapping{s}"
        case "number":
            return f"number{s}"
        case "integer":
            return f"whole number{s}"
        case "boolean":
            return "true or false"
        case "string":
            return "text"
        case "null":
            return "null"
    return "values" if plural else "any value"


def _bounded(schema: dict[str, Any]) -> str:
    """What a value is, in words, and what it is more than."""
    above = schema.get("exclusiveMinimum")
    return _words(schema) + (f" above {above:g}" if above is not None else "")


def _cell(text: str) -> str:
    return text.replace("|", r"\|")


def _anchor(title: str) -> str:
    return title.lower().replace(" ", "-")


if __name__ == "__main__":
    REFERENCE.mkdir(exist_ok=True)
    for name in pages():
        path = REFERENCE / f"{name}.md"
        path.write_text(
            updated(name, path.read_text(encoding="utf-8") if path.exists() else ""), encoding="utf-8"
        )
    (REFERENCE / "README.md").write_text(index(), encoding="utf-8")
