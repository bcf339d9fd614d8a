"""Which flags were given, at whatever value: what a command line says is not what it leaves as it is.

The program's parser keeps their names beside their values, as `args.given`. Settings that were put together
in Python have no command line: of these no flag was given, unless they say so in `given` themselves.
Knows nothing about how flags are parsed.
"""

from __future__ import annotations

from argparse import Namespace

__all__ = ["given_flags"]


def given_flags(args: Namespace) -> frozenset[str]:
    """The names of the flags that were given, as their values are called in `args`.

    Args:
        args: the flags by name. Without `given` among them: none was.
    """
    return frozenset(getattr(args, "given", ()))
