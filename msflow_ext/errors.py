"""Errors that a command prints as one sentence."""

from __future__ import annotations

#: Types of errors that end a command, or one run of a series, with one sentence.
FAILURES = (ArithmeticError, ImportError, MemoryError, OSError, RuntimeError, ValueError)


class ProcessFailed(RuntimeError):  # noqa: N818  (the name says what happened)
    """Raised when another process of this training failed.

    Attributes:
        here: whether that process runs on this machine.
    """

    def __init__(self, what: str, here: bool = True) -> None:
        super().__init__(what)
        self.here = here


def sentence(error: Exception) -> str:
    """Return an error on one line, with the name of the file that it concerns."""
    text = str(error)
    if isinstance(error, OSError) and error.errno is not None and error.filename is not None:
        text = f"{error.filename}: {error.strerror}"
    return " ".join(text.split()) or type(error).__name__
