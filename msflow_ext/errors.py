"""The errors that end a command with one sentence."""

from __future__ import annotations

#: What ends a command, or one run of a series, with one sentence.
FAILURES = (ArithmeticError, ImportError, MemoryError, OSError, RuntimeError, ValueError)


class ProcessFailed(RuntimeError):  # noqa: N818  (it says what happened)
    """Another process of this training failed, and all of them know; ``here``: it runs on this machine."""

    def __init__(self, what: str, here: bool = True) -> None:
        super().__init__(what)
        self.here = here


def sentence(error: Exception) -> str:
    """An error on one line, with files as the user knows them."""
    text = str(error)
    if isinstance(error, OSError) and error.errno is not None and error.filename is not None:
        text = f"{error.filename}: {error.strerror}"
    return " ".join(text.split()) or type(error).__name__
