"""Files from elsewhere, read without running anything in them.

A checkpoint is a pickle, and a pickle is a program. Here every global that it asks for
is looked up in a list first: rebuilding tensors is allowed; Distiller's and PyTorch's
classes become inert stand-ins that only remember how they were called; the rest is
refused by name. What is left goes through `torch.load(weights_only=True)`, whose own
unpickler is the second wall. Also maps Distiller's `.pth.tar` to the fields of a
`Checkpoint`. Knows nothing about models.
"""

from __future__ import annotations

import errno
import io
import pickle
import pickletools
import re
import struct
import zipfile
from collections import OrderedDict
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, BinaryIO

import numpy as np
import torch
from torch import Tensor, nn

from distiller.apputils.checkpoint_schema import check_legacy
from distiller.errors import CheckpointError, did_you_mean
from distiller.names import strip_wrappers
from distiller.thinning import ThinningRecipe

_ZIP_HEAD = b"PK\x03\x04"
_LEGACY_HEAD = pickle.dumps(torch.serialization.MAGIC_NUMBER, protocol=2)
_LEGACY_PICKLES = 5  # magic number, protocol, system, the object, the storages' keys

_DTYPES = {name for name, value in vars(torch).items() if isinstance(value, torch.dtype)}
_STORAGES = {
    f"{name}Storage" for name in ("Untyped", "Typed", "Double", "Float", "Half", "BFloat16", "Bool")
} | {f"{name}Storage" for name in ("Long", "Int", "Short", "Char", "Byte", "ComplexFloat", "ComplexDouble")}
_REBUILT_BY_TORCH = (
    {f"torch.{name}" for name in _DTYPES | _STORAGES | {"Size", "device"}}
    | {f"torch.storage.{name}" for name in _STORAGES}
    | {f"torch._utils._rebuild_{name}" for name in ("tensor", "tensor_v2", "tensor_v3", "parameter")}
    | {"collections.OrderedDict", "_codecs.encode", "builtins.set", "builtins.bytearray"}
)
_STOOD_IN_FOR = re.compile(r"distiller\.|torch\.optim\.|numpy\.dtype$|numpy\._?core\.multiarray\.scalar$")

_ATOMS = (str, int, float, bool, bytes, type(None))
_NUMPY_SCALAR = re.compile(r"numpy\._?core\.multiarray\.scalar$")
_NUMPY_CODE = re.compile(r"[fiub][1248]$")
_RECIPE = "distiller.thinning.ThinningRecipe"
_WEIGHTS_ALONE = "where it came from, save the weights alone: torch.save(model.state_dict(), file)"


def load_plain(path: Path) -> Any:
    """What a file written by `torch.save` holds, as plain data; nothing in it is run.

    Both of torch's formats are read: zip archives, and the one before PyTorch 1.6.

    Args:
        path: the file.

    Returns:
        Numbers, strings, bytes, tensors (on the CPU), lists, tuples and dicts of them.
        A class is its dotted name; an object of a class that is only stood in for is a
        dict of `class` (dotted name), `args` (tuple) and, when it has one, `state`.

    Raises:
        CheckpointError: the file is missing, empty, cut off, no checkpoint, or its pickle
            asks for something that is neither tensor nor plain data.
    """
    try:
        _refuse_what_is_no_file(path)
        with path.open("rb") as file:
            stand_ins = _stand_ins(file, path)
            file.seek(0)
            with torch.serialization.safe_globals(stand_ins):
                document = torch.load(file, map_location="cpu", weights_only=True, mmap=False)
        return _to_plain(document, path)
    except CheckpointError:
        raise
    except OSError as error:
        if error.errno == errno.EINVAL:  # a damaged archive led to a place outside of the file
            raise _damaged(path) from error
        raise CheckpointError(f"{path}: cannot be read: {error.strerror or error}") from error
    except pickle.UnpicklingError as error:
        raise CheckpointError(
            f"{path}: refused, nothing in it was run: its pickle does what weights and plain data never need"
        ) from error
    except Exception as error:  # a damaged pickle can raise anything
        raise _damaged(path) from error


def legacy_fields(document: Any, path: Path) -> dict[str, Any]:
    """The fields of a `Checkpoint` from Distiller's `.pth.tar` or a bare `state_dict`.

    Args:
        document: what `load_plain` returned.
        path: where it came from, for the errors.

    Raises:
        CheckpointError: there are no weights in it, or something in it is not what it must be.
    """
    if not isinstance(document, dict):
        raise CheckpointError(
            f"{path}: is not a checkpoint: holds a {type(document).__name__}, not a dict of weights; "
            "save one with torch.save(model.state_dict(), file)"
        )
    if "state_dict" not in document:
        if not document or not all(isinstance(value, Tensor) for value in document.values()):
            keys = ", ".join(repr(key) for key in list(document)[:5]) or "nothing"
            raise CheckpointError(
                f"{path}: is not a checkpoint: has no 'state_dict', got {keys}; "
                "give a checkpoint, or a file of weights only"
            )
        return {"state_dict": _canonical_keys(document, "state_dict", path)}

    schedule = _dict(document, "compression_sched", path)
    masks = {name: mask for name, mask in _dict(schedule, "masks_dict", path).items() if mask is not None}
    for name in masks:
        _typed(masks, name, Tensor, path)
    extras = dict(_dict(document, "extras", path))
    if "best_top1" in document:
        extras["best_top1"] = document["best_top1"]
    notes = []
    if not {"optimizer", "optimizer_state_dict"}.isdisjoint(document):
        notes.append("the optimizer state of a Distiller checkpoint is left aside; use a fresh optimizer")
    fields = {
        "state_dict": _canonical_keys(_dict(document, "state_dict", path), "state_dict", path),
        "epoch": _typed(document, "epoch", int, path),
        "arch": _typed(document, "arch", str, path),
        "dataset": _typed(document, "dataset", str, path),
        "masks": _canonical_keys(masks, "compression_sched", path),
        "quantizer": _quantizer(_dict(document, "quantizer_metadata", path)),
        "thinning_recipes": tuple(
            _recipe(recipe, path, index)
            for index, recipe in enumerate(_typed(document, "thinning_recipes", list, path) or ())
        ),
        "extras": extras,
        "notes": tuple(notes),
    }
    check_legacy(fields, str(path))
    return fields


class _StandIn:
    """Takes the place of a class or function that a pickle names, and only remembers the call."""

    dotted = ""
    args: tuple[Any, ...]
    state: Any

    def __new__(cls, *args: Any) -> _StandIn:
        stand_in = super().__new__(cls)
        stand_in.args = args
        stand_in.state = None
        return stand_in

    def __setstate__(self, state: Any) -> None:
        self.state = state


def _refuse_what_is_no_file(path: Path) -> None:
    if path.is_symlink() and not path.exists():
        raise CheckpointError(f"{path}: is a link to {path.readlink()}, which does not exist; check the path")
    if not path.exists():
        siblings = [sibling.name for sibling in path.parent.iterdir()] if path.parent.is_dir() else []
        raise CheckpointError(
            f"{path}: no such file{did_you_mean(path.name, siblings) or '; check the path'}"
        )
    if path.is_dir():
        raise CheckpointError(f"{path}: is a folder; name the checkpoint file in it")
    if path.stat().st_size == 0:
        raise CheckpointError(f"{path}: is empty; use another checkpoint")


def _stand_ins(file: BinaryIO, path: Path) -> list[Callable[..., Any] | tuple[Callable[..., Any], str]]:
    """Stand-ins for the globals that the file's pickles ask for; refuses those of no list."""
    wanted: dict[str, None] = {}
    head = file.read(len(_LEGACY_HEAD))
    is_torch_file = True
    if head.startswith(_ZIP_HEAD):
        is_complete = all(_scan(io.BytesIO(data), wanted) for data in _zipped_pickles(file, path))
    else:
        is_torch_file = head == _LEGACY_HEAD
        file.seek(0)
        is_complete = all(_scan(file, wanted) for _ in range(_LEGACY_PICKLES if is_torch_file else 1))
    if not is_complete and not is_torch_file:
        wanted = {}  # bytes that merely look like opcodes
    refused = [name for name in wanted if name not in _REBUILT_BY_TORCH and not _STOOD_IN_FOR.match(name)]
    if refused:
        more = f" and {len(refused) - 3} more" if len(refused) > 3 else ""
        names = ", ".join(f"'{name}'" for name in refused[:3])
        raise CheckpointError(
            f"{path}: refused, nothing in it was run: its pickle asks for {names}{more}, which is neither "
            f"tensor nor plain data; {_WEIGHTS_ALONE}"
        )
    if not is_torch_file:
        raise CheckpointError(
            f"{path}: is not a checkpoint: starts with {head!r}; give a file that torch.save wrote"
        )
    if not is_complete:
        raise _damaged(path)
    return [
        (type(name.rpartition(".")[2], (_StandIn,), {"dotted": name}), name)
        for name in wanted
        if _STOOD_IN_FOR.match(name)
    ]


def _zipped_pickles(file: BinaryIO, path: Path) -> list[bytes]:
    try:
        with zipfile.ZipFile(file) as archive:
            names = archive.namelist()
            pickles = [archive.read(name) for name in names if name.endswith("/data.pkl")]
    except (zipfile.BadZipFile, EOFError) as error:
        raise _damaged(path) from error
    if not pickles:
        raise CheckpointError(
            f"{path}: is not a checkpoint: a zip archive without weights, holding {names[:3]}"
        )
    if any(name.endswith("/constants.pkl") for name in names):
        raise CheckpointError(
            f"{path}: refused, nothing in it was run: is a TorchScript program; {_WEIGHTS_ALONE}"
        )
    return pickles


def _scan(stream: BinaryIO, wanted: dict[str, None]) -> bool:
    """Add the globals that one pickle asks for to `wanted`; whether it is whole. Runs nothing."""
    memo: dict[Any, Any] = {}
    pushed: list[Any] = []  # arguments of the opcodes so far: enough to name a global taken from the stack
    try:
        for opcode, argument, _ in pickletools.genops(stream):
            if opcode.name in ("GLOBAL", "INST"):
                module, _, name = str(argument).partition(" ")
                wanted[f"{module.replace('__builtin__', 'builtins')}.{name}"] = None
            elif opcode.name == "STACK_GLOBAL":
                wanted[".".join(str(part) for part in pushed[-2:])] = None
            elif opcode.name.startswith("EXT"):
                wanted[f"copyreg extension {argument}"] = None
            elif opcode.name == "MEMOIZE":
                memo[len(memo)] = pushed[-1] if pushed else None
            elif opcode.name.endswith("PUT"):
                memo[argument] = pushed[-1] if pushed else None
            elif opcode.name.endswith("GET"):
                pushed.append(memo.get(argument))
            elif argument is not None:
                pushed.append(argument)
    except (ValueError, EOFError, OverflowError, struct.error):
        return False
    return True


def _damaged(path: Path) -> CheckpointError:
    return CheckpointError(
        f"{path}: is cut off or damaged: its {path.stat().st_size} bytes do not read back; "
        "use another checkpoint"
    )


def _to_plain(value: Any, path: Path) -> Any:
    if type(value) in _ATOMS or type(value) is Tensor:
        return value
    if isinstance(value, nn.Parameter):
        return value.detach()
    if type(value) in (dict, OrderedDict):
        return {_plain_key(key, path): _to_plain(item, path) for key, item in value.items()}
    if type(value) in (list, set):
        return [_to_plain(item, path) for item in value]
    if type(value) in (tuple, torch.Size):
        return tuple(_to_plain(item, path) for item in value)
    if isinstance(value, (torch.dtype, torch.device)):
        return str(value)
    if isinstance(value, bytearray):
        return bytes(value)
    if isinstance(value, type) and issubclass(value, _StandIn):
        return value.dotted
    if isinstance(value, _StandIn):
        return _plain_stand_in(value, path)
    raise CheckpointError(
        f"{path}: refused: holds a {type(value).__name__}, which is neither tensor nor plain data"
    )


def _plain_key(key: Any, path: Path) -> Any:
    plain = _to_plain(key, path)
    if type(plain) not in _ATOMS:
        raise CheckpointError(f"{path}: refused: a dict in it has a {type(plain).__name__} for a key")
    return plain


def _plain_stand_in(value: _StandIn, path: Path) -> Any:
    if _NUMPY_SCALAR.match(value.dotted):
        return _numpy_scalar(value, path)
    plain = {"class": value.dotted, "args": _to_plain(value.args, path)}
    if value.state is not None:
        plain["state"] = _to_plain(value.state, path)
    return plain


def _numpy_scalar(value: _StandIn, path: Path) -> int | float | bool:
    """The number in `scalar(dtype('f8'), bytes)`, decoded here: numpy's own rebuilding is not called."""
    dtype, raw = value.args
    code = dtype.args[0]
    if not (isinstance(code, str) and _NUMPY_CODE.match(code) and isinstance(raw, bytes)):
        raise CheckpointError(
            f"{path}: refused: holds a numpy object of type {code!r}, which is not a number"
        )
    order = dtype.state[1] if dtype.state and dtype.state[1] in ("<", ">") else "="
    return np.frombuffer(raw, dtype=np.dtype(code).newbyteorder(order), count=1)[0].item()


def _dict(document: Mapping[str, Any], key: str, path: Path) -> dict[str, Any]:
    return _typed(document, key, dict, path) or {}


def _typed(document: Mapping[str, Any], key: str, kind: type, path: Path) -> Any:
    value = document.get(key)
    if value is not None and not isinstance(value, kind):
        raise CheckpointError(
            f"{path}: is not a checkpoint: '{key}' must be {kind.__name__}, got {type(value).__name__}"
        )
    return value


def _canonical_keys(tensors: Mapping[str, Any], what: str, path: Path) -> dict[str, Any]:
    canonical = {strip_wrappers(str(name)): value for name, value in tensors.items()}
    if len(canonical) < len(tensors):
        raise CheckpointError(
            f"{path}: two names in its '{what}' differ only in wrapper parts such as 'module.'"
        )
    return canonical


def _quantizer(metadata: dict[str, Any]) -> dict[str, Any] | None:
    """`{type: class, params, dummy_input, ...}` with the class by its own name."""
    if not metadata:
        return None
    rest = {key: value for key, value in metadata.items() if key != "type"}
    return {"class": str(metadata.get("type", "")).rpartition(".")[2], **rest}


def _recipe(recipe: Any, path: Path, index: int) -> ThinningRecipe:
    """A ThinningRecipe's two dicts, by canonical names.

    What Distiller told the modules is left aside, it follows from their tensors: linear layers were told of
    another number than theirs.
    """
    parts: Any = recipe.get("args") if isinstance(recipe, dict) and recipe.get("class") == _RECIPE else None
    if not isinstance(parts, tuple) or [type(part) for part in parts] != [dict, dict]:
        raise CheckpointError(f"{path}: one of its 'thinning_recipes' is not a ThinningRecipe of two dicts")
    modules, parameters = parts
    plain = {
        "modules": _canonical_keys(modules, "thinning_recipes", path),
        "parameters": _canonical_keys(parameters, "thinning_recipes", path),
    }
    read = ThinningRecipe.from_plain(plain, f"{path}: thinning_recipes[{index}]")
    return ThinningRecipe(read.tensors)
