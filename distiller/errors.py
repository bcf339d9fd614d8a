"""What can go wrong, in words a user can act on.

Every error the library raises on purpose is a `DistillerError`; the program turns
it into one message and exit status 2. The form of a message is
*where: what is wrong, got what; nearest name or remedy*.
Knows nothing about torch.
"""

from __future__ import annotations

import difflib
import traceback
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass


class DistillerError(ValueError):
    """The user's input cannot be carried out as given."""


class UsageError(DistillerError):
    """A flag or argument that is wrong by itself or together with another."""


class UnknownNameError(DistillerError):
    """Names or patterns that match nothing.

    Attributes:
        faults: message by the name as it was asked for; lets a schedule's reader find its line.
    """

    def __init__(
        self, message: str, name: str | None = None, faults: Mapping[str, str] | None = None
    ) -> None:
        super().__init__(message)
        self.faults = dict(faults) if faults else {name: message} if name is not None else {}


class PolicyConflictError(DistillerError):
    """Two policies that cannot act on the same thing in the same epochs."""


class QuantizationError(DistillerError):
    """A model or setting that cannot be quantized as asked."""


class StatsError(DistillerError):
    """Activation statistics that are missing, malformed or of another model."""


class SensitivityError(DistillerError):
    """The files of a sweep that are malformed, unwritable, or of another sweep."""


class GraphTraceError(DistillerError):
    """A model that `torch.export` cannot trace; says who asked and how to go without."""


class CheckpointError(DistillerError):
    """A checkpoint that is missing, damaged, unsafe or of another model."""


class DatasetError(DistillerError):
    """Data that are not where they were looked for, or not what they should be."""


class DivergenceError(DistillerError):
    """The training loss became NaN or infinite."""


@contextmanager
def users_code(where: str, remedy: str = "", kind: type[DistillerError] = UsageError) -> Iterator[None]:
    """Within the block code of the user's own runs: whatever it raises becomes a message that says where."""
    try:
        yield
    except DistillerError:
        raise
    except (Exception, SystemExit) as error:
        _, _, *inside = traceback.extract_tb(error.__traceback__)  # this generator, the call, what it led to
        theirs = [frame for frame in inside if "site-packages" not in frame.filename]
        place = f" ({theirs[-1].filename}:{theirs[-1].lineno})" if theirs else ""
        reason = (str(error).splitlines() or [""])[0]
        raise kind(f"{where}: failed with {type(error).__name__}: {reason}{place}{remedy}") from error


def require(value: object, kinds: type | tuple[type, ...], where: str, wanted: str) -> None:
    """Refuse an argument that is of none of `kinds`.

    Args:
        where: function and argument.
        wanted: what `kinds` are, in words.

    Raises:
        UsageError: naming the type that was got.
    """
    if not isinstance(value, kinds):
        raise UsageError(f"{where}: must be {wanted}, got {type(value).__name__}")


@dataclass(frozen=True, slots=True, order=True)
class Location:
    """A line of a file; lines count from 1."""

    file: str
    line: int

    def __str__(self) -> str:
        return f"{self.file}:{self.line}"


@dataclass(frozen=True, slots=True, order=True)
class Fault:
    """One thing that is wrong in a schedule: its line, its path there, and what."""

    line: int
    path: str
    text: str

    def __str__(self) -> str:
        return f":{self.line:<4} {self.path + ': ' if self.path else ''}{self.text}"


class ScheduleError(DistillerError):
    """All the faults of one schedule file, in the order of its lines."""

    def __init__(self, file: str, faults: Sequence[Fault]) -> None:
        self.file = file
        self.faults = tuple(sorted(faults))
        count = "1 error" if len(self.faults) == 1 else f"{len(self.faults)} errors"
        lines = "\n".join(f"  {fault}" for fault in self.faults)
        super().__init__(f"{file} has {count}\n{lines}")


def first_line(error: BaseException) -> str:
    """The first line of its message that says something."""
    return next((line.strip() for line in str(error).splitlines() if line.strip()), "no reason given")


def nearest(name: str, candidates: Iterable[str]) -> str | None:
    """The candidate most like `name`, or None when none is alike."""
    found = difflib.get_close_matches(str(name), list(candidates), n=1, cutoff=0.6)
    return found[0] if found else None


def did_you_mean(name: str, candidates: Iterable[str]) -> str:
    """`; did you mean 'x'?` for the candidate most like `name`, or the empty string."""
    found = nearest(name, candidates)
    return f"; did you mean '{found}'?" if found else ""
