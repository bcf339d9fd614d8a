"""What is wrong with the shape of a schedule, before any class is looked at.

Sections of named components, and a list of policies, each of one component and its epochs.
Knows nothing about torch, classes or models.
"""

from __future__ import annotations

from typing import Any

from distiller.errors import Fault, did_you_mean
from distiller.schedule_yaml import SECTIONS, Document, Path_, shown

SECTION_OF = {
    "quantizer": "quantizers",
    "pruner": "pruners",
    "regularizer": "regularizers",
    "lr_scheduler": "lr_schedulers",
    "extension": "extensions",
}
"""The section in which a policy's component stands, by the policy's word for it."""
WINDOW_KEYS = ("epochs", "starting_epoch", "ending_epoch", "frequency")
CYCLIC = ("OneCycleLR", "CyclicLR")
"""LR schedulers that keep their rates in the optimizer, over the base rates of those made later."""


STEPS = "post_training_steps"
"""The section of a file that is given with --qe-config-file: what is done beside the quantizer's settings."""


def shape_faults(document: Document, needs_policies: bool = True) -> list[Fault]:
    """What is wrong with the shape of a schedule, before any class is looked at.

    Args:
        document: the file.
        needs_policies: whether it is to be trained under; otherwise it has the settings of a quantizer, and
            may have steps of quantization after training.
    """
    data = document.data
    if not isinstance(data, dict):
        return [document.fault((), f"a schedule is a mapping of sections, got {type(data).__name__}")]
    faults: list[Fault] = []
    known = ("version", "policies", *SECTIONS, STEPS)
    for key, section in data.items():
        if key not in known:
            hint = did_you_mean(str(key), known) or f"; a schedule has {', '.join(known[:-1])}"
            faults.append(document.fault((key,), f"unknown section{hint}"))
        elif key == "version" and not (type(section) in (int, float) and section == 1):
            faults.append(document.fault((key,), f"must be 1 or left out, got {shown(section)}"))
        elif key == STEPS and (needs_policies or data.get("policies") is not None):
            text = "is of quantization after training, which has no policies; give such a file with"
            faults.append(document.fault((key,), f"{text} --evaluate --quantize-eval --qe-config-file"))
        elif key in SECTIONS and section is not None:
            faults += _section_faults(document, key, section)
    policies = data.get("policies")
    if policies is None and needs_policies:
        faults.append(document.fault((), "missing section 'policies': nothing says when anything happens"))
    elif policies is not None and not isinstance(policies, list):
        faults.append(
            document.fault(
                ("policies",), f"must be a list (lines that begin with '-'), got {shown(policies)}"
            )
        )
    else:
        for index, policy in enumerate(policies or []):
            faults += policy_faults(document, ("policies", index), policy)
    return faults


def _section_faults(document: Document, name: str, section: Any) -> list[Fault]:
    if not isinstance(section, dict):
        return [document.fault((name,), f"must be a mapping of names to components, got {shown(section)}")]
    faults = []
    names: set[str] = set()
    for instance, component in section.items():
        path: Path_ = (name, instance)
        if not _is_name(instance):
            faults.append(document.fault(path, _not_a_name(instance)))
        elif str(instance) in names:
            faults.append(document.fault(path, f"'{instance}' is given as text and as a number; keep one"))
        names.add(str(instance))
        if not isinstance(component, dict):
            faults.append(
                document.fault(path, f"must be a mapping with 'class' and settings, got {shown(component)}")
            )
        elif component.get("class") is None:
            faults.append(document.fault(path, "missing key 'class': the name of what it is"))
        elif not isinstance(component["class"], str):
            faults.append(
                document.fault((*path, "class"), f"must be a name, got {shown(component['class'])}")
            )
    cyclic = [instance for instance, component in section.items()
              if isinstance(component, dict) and component.get("class") in CYCLIC]  # fmt: skip
    if len(cyclic) > 1:
        faults.append(
            document.fault(
                (name, cyclic[1]), f"only one of {' and '.join(CYCLIC)} can set the rates of an optimizer"
            )
        )
    if name == "quantizers" and len(section) > 1:
        faults.append(document.fault((name,), f"only one quantizer can act on a model, got {len(section)}"))
    return faults


def policy_faults(document: Document, path: Path_, policy: Any) -> list[Fault]:
    """What is wrong with the shape of one policy."""
    words = list(SECTION_OF)
    if not isinstance(policy, dict):
        return [
            document.fault(path, f"must be a mapping with one of {', '.join(words)}, got {shown(policy)}")
        ]
    faults = []
    for key, value in policy.items():
        if key not in words and key not in WINDOW_KEYS:
            faults.append(
                document.fault((*path, key), f"unknown{did_you_mean(str(key), [*words, *WINDOW_KEYS])}")
            )
        elif key in WINDOW_KEYS and value is not None and not _is_window_value(key, value):
            wanted = "a list of whole numbers" if key == "epochs" else "a whole number"
            faults.append(document.fault((*path, key), f"must be {wanted}, got {shown(value)}"))
    if policy.get("epochs") is not None and policy.get("frequency") is not None:
        text = "is for 'starting_epoch' and 'ending_epoch'; the list of 'epochs' says it all"
        faults.append(document.fault((*path, "frequency"), text))
    given = [word for word in words if word in policy]
    if len(given) != 1:
        faults.append(document.fault(path, f"needs exactly one of {', '.join(words)}, got {given or 'none'}"))
        return faults
    spec = policy[given[0]]
    spec_path = (*path, given[0])
    if not isinstance(spec, dict) or spec.get("instance_name") is None:
        faults.append(document.fault(spec_path, f"missing key 'instance_name': the name of a {given[0]}"))
        return faults
    if not _is_name(spec["instance_name"]):
        text = _not_a_name(spec["instance_name"])
        faults.append(document.fault((*spec_path, "instance_name"), text))
    for key in spec:
        if key in WINDOW_KEYS:
            faults.append(document.fault((*spec_path, key), f"belongs beside '{given[0]}', not inside it"))
        elif key not in ("instance_name", "args"):
            hint = did_you_mean(str(key), ["instance_name", "args"])
            faults.append(document.fault((*spec_path, key), f"unknown{hint}"))
    if not isinstance(spec.get("args", {}), (dict, type(None))):
        faults.append(document.fault((*spec_path, "args"), f"must be a mapping, got {shown(spec['args'])}"))
    return faults


def _is_name(value: Any) -> bool:
    """Whether a component may be called so; a number is taken for its digits."""
    return isinstance(value, str) or type(value) is int


def _not_a_name(value: Any) -> str:
    hint = " (YAML reads on, off, yes and no as true and false)" if isinstance(value, bool) else ""
    return f"a name must be text, got {shown(value)}; put it in quotes{hint}"


def _is_window_value(key: str, value: Any) -> bool:
    if key == "epochs":
        return isinstance(value, list) and all(type(item) is int for item in value)
    return type(value) is int
