"""A JSON Schema (draft 2020-12) of schedules, for editors: `python -m distiller.schedule_schema [-o FILE]`.

An editor with a YAML language server completes and checks a schedule by it. Such a file names the schema
in its first line:

    # yaml-language-server: $schema=../schedule.schema.json

The schema is made of what the loader checks by: the registries, the constructors' signatures with the ranges
that their annotations give (`signatures.Checked`), the shape of a policy. What it refuses, the loader
refuses. What the loader refuses beyond that takes the model, or is left to it:

- the relation of two values: epochs that ascend, `frequency` within them, low and high, n and m, an initial
  sparsity that equals the final one, policies that conflict, `args` that need or exclude each other, or
  that do not suit the component (`levels` are of the component's kind, but any to the schema);
- names: a policy's `instance_name` that no component has, two names that are one, several schedulers of
  `schedule_shape.CYCLIC`, classes of one's own;
- values of learning-rate schedulers and quantizers, beyond their types;
- 2.0 where a whole number is wanted, which JSON does not tell from 2.

Knows nothing about models.
"""

from __future__ import annotations

import json
import sys
from collections.abc import Callable, Mapping, Sequence
from enum import Enum
from typing import Any

from pydantic.json_schema import GenerateJsonSchema
from pydantic_core import PydanticOmit

from distiller.atomic_file import write_whole
from distiller.component_kinds import KINDS, Kind
from distiller.docstrings import read_arguments, read_docstring
from distiller.pruning.settings import LONGEST
from distiller.schedule_shape import STEPS
from distiller.signatures import settings_model

__all__ = ["schedule_schema", "schema_text", "settings_schema"]

Schema = dict[str, Any]


def schedule_schema() -> Schema:
    """The JSON Schema of a schedule file, as plain data."""
    sections = {kind.section: _section(kind) for kind in KINDS}
    return {
        "$schema": "https://json-schema.org/draft/2020-12/schema",
        "title": "Compression schedule",
        "description": "What is done to a network while it trains, and in which epochs.",
        "type": "object",
        "properties": {
            "version": {"description": "Of the format of schedules; may be left out.", "const": 1},
            **sections,
            "policies": {
                "description": "When each component acts.",
                "type": "array",
                "items": _policy(),
            },
            STEPS: _STEPS,
        },
        "oneOf": [
            {"required": ["policies"], "properties": {STEPS: False}},
            {"required": [STEPS], "properties": {"policies": {"type": "null"}}},
        ],
        "additionalProperties": False,
        "$defs": {
            _definition(kind, name): _beside_class(settings_schema(factory))
            for kind in KINDS
            for name, factory in kind.registry.items()
        },
    }


def settings_schema(factory: Callable[..., Any]) -> Schema:
    """The JSON Schema of the settings that a schedule may give a class, described as in its docstring.

    Args:
        factory: a registered class, or one of those that a policy's `args` are for.
    """
    schema = settings_model(factory).model_json_schema(schema_generator=_Settings)
    enumerations = schema.pop("$defs", {})
    del schema["title"]
    schema["description"] = _description(factory)
    meanings = read_arguments(
        factory, {name: found for kind in KINDS for name, found in kind.registry.items()}
    )
    for name, setting in schema.setdefault("properties", {}).items():
        if name in meanings:
            schema["properties"][name] = {"description": meanings[name], **setting}
    return _inlined(schema, enumerations)


def schema_text() -> str:
    """`schedule_schema` as the text of a file."""
    return json.dumps(schedule_schema(), indent=1) + "\n"


_SECTION_MEANINGS = {
    "pruners": "Components that set weights to zero, each under a name of your own.",
    "regularizers": "Components that add a penalty to the loss, each under a name of your own.",
    "quantizers": "The component that replaces layers by quantized ones, under a name of your own.",
    "lr_schedulers": "Components that set the learning rate, each under a name of your own.",
    "extensions": "Components that are called at every step of training, each under a name of your own.",
}
_EPOCHS: Schema = {
    "epochs": {
        "description": "The epochs in which it acts, ascending from 0. Instead of the three keys below.",
        "type": ["array", "null"],
        "items": {"type": "integer", "minimum": 0, "maximum": LONGEST},
        "minItems": 1,
        "uniqueItems": True,
    },
    "starting_epoch": {
        "description": "The first epoch in which it acts; epochs count from 0.",
        "type": ["integer", "null"],
        "minimum": 0,
        "maximum": LONGEST,
    },
    "ending_epoch": {
        "description": "The first epoch in which it no longer acts.",
        "type": ["integer", "null"],
        "minimum": 1,
        "maximum": LONGEST,
    },
    "frequency": {
        "description": "Every how many epochs it acts.",
        "type": ["integer", "null"],
        "minimum": 1,
        "maximum": LONGEST,
        "default": 1,
    },
}
_ONE_WAY_TO_SAY_WHEN: list[Schema] = [
    {
        "properties": {
            "starting_epoch": {"type": "integer"},
            "ending_epoch": {"type": "integer"},
            "epochs": {"type": "null"},
        },
        "required": ["starting_epoch", "ending_epoch"],
    },
    {
        "properties": {
            "epochs": {"type": "array"},
            "starting_epoch": {"type": "null"},
            "ending_epoch": {"type": "null"},
            "frequency": {"type": "null"},
        },
        "required": ["epochs"],
    },
]
_BLOCK_SHAPE: Schema = {
    "type": "object",
    "properties": {
        "block_shape": {
            "type": "array",
            "prefixItems": [*2 * [{"type": "integer", "minimum": 1}], *2 * [{"const": 1}]],
            "minItems": 4,
            "maxItems": 4,
        }
    },
    "required": ["block_shape"],
    "additionalProperties": False,
}
_BLOCKS_HAVE_A_SHAPE: Schema = {
    "if": {"properties": {"group_type": {"const": "Blocks"}}, "required": ["group_type"]},
    "then": {"properties": {"kwargs": _BLOCK_SHAPE}, "required": ["kwargs"]},
    "else": {"properties": {"kwargs": {"maxProperties": 0}}},
}
_WHOLE: Schema = {"type": "integer", "minimum": 1}
_LIMIT: Schema = {"type": ["integer", "null"], "minimum": 1}
_ABOVE_ZERO: Schema = {"type": "number", "exclusiveMinimum": 0}
_WIDTHS: Schema = {"type": "array", "items": {"type": "integer", "minimum": 2, "maximum": 16}}
_YES_OR_NO: Schema = {"type": "boolean"}


def _step(meaning: str, settings: Mapping[str, Schema], **more: Any) -> Schema:
    return {
        "description": meaning,
        "type": ["boolean", "object", "null"],
        "properties": dict(settings),
        "additionalProperties": False,
        **more,
    }


_BUDGETS = ("average_bits", "weight_bytes", "bit_operations")
_STEPS: Schema = {
    "description": "What quantization after training does beside the quantizer's settings, with "
    "--qe-config-file: true, or settings, for each step. They are done in this order.",
    "type": ["object", "null"],
    "properties": {
        "cross_layer_equalization": _step(
            "Ranges of weights made alike between layers.",
            {"replace_relu6": _YES_OR_NO, "absorb_bias": _YES_OR_NO},
        ),
        "mixed_precision": _step(
            "A width for each layer, by measured sensitivity, under one budget.",
            {
                "average_bits": {"type": "number", "minimum": 2, "maximum": 16},
                "weight_bytes": _ABOVE_ZERO,
                "bit_operations": _ABOVE_ZERO,
                "weight_widths": _WIDTHS,
                "activation_widths": _WIDTHS,
                "metric": {"enum": ["loss", "kl"]},
            },
            anyOf=[
                {"enum": [False, None]},
                {"type": "object", "oneOf": [{"required": [budget]} for budget in _BUDGETS]},
            ],
        ),
        "clip_search": _step(
            "The clip mode of each layer in turn, by the loss.",
            {"clip_modes": {"type": "array", "items": {"type": "string"}, "minItems": 1}},
        ),
        "mse_weight_scales": _step("Scales of weights of least squared error.", {}),
        "lapq": _step(
            "LAPQ: the scales of all layers together, by the loss.",
            {
                "method": {"type": "string"},
                "maxiter": _LIMIT,
                "maxfev": _LIMIT,
                "basinhopping": _YES_OR_NO,
                "basinhopping_niter": _WHOLE,
                "init_mode": {"type": ["string", "object"]},
                "init_method": {"type": ["string", "null"]},
                "search_clipping": _YES_OR_NO,
                "minimizer_kwargs": {"type": "object"},
            },
        ),
        "adaround": _step(
            "AdaRound: which weights are rounded up and which down, learned layer by layer.",
            {
                "iterations": _WHOLE,
                "batch_size": _WHOLE,
                "learning_rate": _ABOVE_ZERO,
                "regularization": _ABOVE_ZERO,
                "warm_start": {"type": "number", "minimum": 0, "exclusiveMaximum": 1},
                "beta": {
                    "type": "array",
                    "items": {"type": "number", "minimum": 2},
                    "minItems": 2,
                    "maxItems": 2,
                },
                "samples": _WHOLE,
                "scales": {"enum": ["kept", "weights", "outputs"]},
                "seed": {"type": "integer"},
            },
        ),
        "bias_correction": _step("The mean error of each output channel taken from its bias.", {}),
    },
    "additionalProperties": False,
}
_DOTTED_PATH = r"^[^.]+(\.[^.]+)+$"


def _section(kind: Kind) -> Schema:
    """A section: a class decides which settings stand beside it."""
    classes: list[Schema] = [
        {"const": name, "description": _description(factory)} for name, factory in kind.registry.items()
    ]
    plugin = {
        "pattern": _DOTTED_PATH,
        "description": "A class of your own, package.module.Class, allowed by --plugin package.",
    }
    settings = [
        {
            "if": {"properties": {"class": {"const": name}}, "required": ["class"]},
            "then": {"$ref": f"#/$defs/{_definition(kind, name)}"},
        }
        for name in kind.registry
    ]
    component: Schema = {
        "type": "object",
        "properties": {"class": {"type": "string", "anyOf": [*classes, plugin]}},
        "required": ["class"],
    }
    if settings:
        component["allOf"] = settings
    section: Schema = {
        "description": _SECTION_MEANINGS[kind.section],
        "type": ["object", "null"],
        "additionalProperties": component,
    }
    return {**section, "maxProperties": 1} if kind.section == "quantizers" else section


def _policy() -> Schema:
    words: Schema = {kind.word: _policy_of(kind) for kind in KINDS}
    return {
        "type": "object",
        "properties": {**words, **_EPOCHS},
        "additionalProperties": False,
        "allOf": [
            {"oneOf": [{"required": [word]} for word in words]},
            {"anyOf": _ONE_WAY_TO_SAY_WHEN},
        ],
    }


def _policy_of(kind: Kind) -> Schema:
    if kind.args is None:
        args: Schema = {"additionalProperties": False}
    else:
        args = settings_schema(kind.args)
    return {
        "description": f"One of '{kind.section}', which acts in the epochs given beside this key.",
        "type": "object",
        "properties": {
            "instance_name": {
                "description": f"Its name in '{kind.section}'.",
                "type": ["string", "integer"],
            },
            "args": {**args, "type": ["object", "null"]},
        },
        "required": ["instance_name"],
        "additionalProperties": False,
    }


def _beside_class(settings: Schema) -> Schema:
    """The settings of a component, where its class stands too, and what they have to do with each other."""
    properties = {"class": {}, **settings["properties"]}
    rules = _BLOCKS_HAVE_A_SHAPE if {"group_type", "kwargs"} <= properties.keys() else {}
    return {**settings, "properties": properties, **rules}


def _definition(kind: Kind, name: str) -> str:
    return f"{kind.section}.{name}"


def _description(factory: Callable[..., Any]) -> str:
    """Its docstring's first paragraph; PyTorch's classes have pages of their own."""
    if factory.__module__.startswith("torch."):
        return f"PyTorch's {factory.__module__}.{factory.__name__}, stepped once an epoch."
    return read_docstring(factory).summary


def _inlined(schema: Any, definitions: Schema) -> Any:
    """`schema` with the values of an enumeration in the place of a reference to it."""
    if isinstance(schema, list):
        return [_inlined(item, definitions) for item in schema]
    if not isinstance(schema, dict):
        return schema
    if "$ref" in schema:
        return {"enum": definitions[schema["$ref"].rpartition("/")[2]]["enum"]}
    return {key: _inlined(value, definitions) for key, value in schema.items()}


class _Settings(GenerateJsonSchema):
    """Pydantic's schemas of what YAML can give: no functions, enumerations by name, no generated titles."""

    def callable_schema(self, schema: Any) -> Schema:
        raise PydanticOmit

    def nullable_schema(self, schema: Any) -> Schema:
        try:
            return super().nullable_schema(schema)
        except PydanticOmit:
            return {"type": "null"}

    def enum_schema(self, schema: Any) -> Schema:
        return {"enum": [member.name for member in schema["members"]]}

    def encode_default(self, dft: Any) -> Any:
        return dft.name if isinstance(dft, Enum) else super().encode_default(dft)

    def field_title_should_be_set(self, schema: Any) -> bool:
        return False


def _main(arguments: Sequence[str]) -> int:
    """The command; returns the exit status."""
    match arguments:
        case []:
            file = None
        case ["-o", file] if file and not file.startswith("-"):
            pass
        case _:
            sys.stderr.write("usage: python -m distiller.schedule_schema [-o FILE]\n")
            return 0 if arguments == ["--help"] else 2
    try:
        if file is None:
            sys.stdout.write(schema_text())
            sys.stdout.flush()
        else:
            write_whole(file, schema_text())
    except OSError as error:
        sys.stderr.write(f"{file or 'standard output'}: cannot be written: {error.strerror}\n")
        return 2
    return 0


if __name__ == "__main__":
    raise SystemExit(_main(sys.argv[1:]))
