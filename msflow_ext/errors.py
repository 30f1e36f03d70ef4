"""The errors that end a command with one sentence."""

from __future__ import annotations

import re
from argparse import ArgumentError

#: What ends a command, or one run of a series, with one sentence.
FAILURES = (
    ArgumentError,
    ArithmeticError,
    ImportError,
    MemoryError,
    OSError,
    RuntimeError,
    ValueError,
)


POSITIONAL = ("paths", "runs", "source")


REQUIRED = re.compile(  # as jsonargparse 4.53 says it, and as 4.46 did
    r"arguments are required: (.+)$|^Option '(.+)' is required but not provided"
)


def sentence(error: Exception) -> str:
    """An error on one line, with flags and files as the user knows them."""
    text = str(error)
    if isinstance(error, OSError) and error.errno is not None and error.filename is not None:
        text = f"{error.filename}: {error.strerror}"
    if isinstance(error, ArgumentError) and (missing := REQUIRED.search(text)):
        names = (name.split(".")[-1] for name in (missing[1] or missing[2]).split(", "))
        flags = (n if n in POSITIONAL else f"--{n.replace('_', '-')}" for n in names)
        text = f"required but not given: {', '.join(flags)}"
    return " ".join(text.split()) or type(error).__name__
