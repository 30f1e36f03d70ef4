"""Parse the command line. An error is one sentence, with a suggestion after a typo."""

from __future__ import annotations

import argparse
import math
import re
from collections.abc import Iterable, Sequence
from difflib import get_close_matches
from typing import Any, NoReturn

#: Messages of argparse, and their replacements. The name of the flag is put before them.
_REWORDED = (
    (r"expected one argument", "must be given a value"),
    (r"expected at least one argument", "must be given one value or more"),
    (r"ignored explicit argument (.*)", r"must be given without a value, got \1"),
    (r".*arguments are required: (.*)", r"required but not given: \1"),
)


class UsageError(ValueError):
    """A wrong command line or configuration file."""


class Formatter(argparse.HelpFormatter):
    """Formatter that shows the default of a flag after its help, unless there is none or it is off."""

    def __init__(self, prog: str) -> None:
        super().__init__(prog, max_help_position=32)

    def _get_help_string(self, action: argparse.Action) -> str | None:
        default = action.default
        if default is None or isinstance(default, bool) or default in ("", argparse.SUPPRESS):
            return action.help
        return f"{action.help} (default: %(default)s)"


class Parser(argparse.ArgumentParser):
    """Parser of flags, or of commands with their flags."""

    def __init__(self, prog: str, description: str | None = None, **more: Any) -> None:
        super().__init__(
            prog,
            description=description,
            **more,
            formatter_class=Formatter,
            add_help=False,
            allow_abbrev=False,
            exit_on_error=False,
        )
        self.commands: dict[str, Parser] = {}
        self.add_argument("-h", "--help", action="help", help="Show this help and exit.")

    def add_commands(self, dest: str, phrases: dict[str, str]) -> dict[str, Parser]:
        """Add a parser for each command, described by its phrase."""
        added = self.add_subparsers(
            dest=dest, title="commands", metavar=dest.upper(), required=True, parser_class=Parser
        )
        for name, phrase in phrases.items():
            prog = f"{self.prog} {name}"
            self.commands[name] = added.add_parser(name, prog=prog, description=phrase, help=phrase)
        return self.commands

    def parse(self, words: Sequence[str]) -> argparse.Namespace:
        """Return the options that the words give.

        Raises:
            UsageError: if the words are wrong.
        """
        self._refuse_unknown(words)
        try:
            options, unknown = self.parse_known_args(words)
        except argparse.ArgumentError as error:
            _fail(error.argument_name, error.message)
        if unknown:
            raise UsageError(f"unexpected argument {unknown[0]!r}")
        return options

    def error(self, message: str) -> NoReturn:
        _fail(None, message)

    def _refuse_unknown(self, words: Sequence[str]) -> None:
        """Raise UsageError for a misspelt command or flag, before argparse reports a missing one instead."""
        for i, word in enumerate(words):
            if word == "--":
                return
            flag, equals, value = word.partition("=")
            if not word or (
                flag.startswith("--") and equals and not value
            ):  # an unset shell variable
                named = flag or words[max(i - 1, 0)]
                shown = named if named.startswith("--") else "an argument"
                raise UsageError(f"{shown} must not be empty")
            if word.startswith("--") and flag not in self._option_string_actions:
                raise UsageError(
                    f"unknown flag {flag}{suggestion(flag, self._option_string_actions)}"
                )
            if self.commands and not word.startswith("-"):
                if word not in self.commands:
                    hint = suggestion(word, self.commands)
                    known = ", ".join(self.commands)
                    raise UsageError(f"unknown command {word!r}{hint or f'; known are {known}'}")
                self.commands[word]._refuse_unknown(words[i + 1 :])
                return


def suggestion(word: str, known: Iterable[str]) -> str:
    """Return ``", did you mean X?"`` if a known word is close, else an empty text."""
    bare = {each.lstrip("-"): each for each in known}
    close = get_close_matches(word.lstrip("-"), bare, n=1)
    return f", did you mean {bare[close[0]]}?" if close else ""


def _fail(name: str | None, message: str) -> NoReturn:
    for pattern, words in _REWORDED:
        message = re.sub(f"^{pattern}$", words, message)
    raise UsageError(f"{name} {message}" if name else message) from None


# ---- values, read alike on the command line and in a configuration file ----


def whole(text: str) -> int:
    """Read a whole number."""
    return _read(int, text, "a whole number")


def count(text: str) -> int:
    """Read a whole number of 1 or more that fits into 32 bits, as libraries require."""
    _read(_at_least_one, text, "a whole number of 1 or more")
    return _read(_below_limit, text, "at most 2**31 - 1")


def number(text: str) -> float:
    """Read a finite number."""
    return _read(_finite, text, "a finite number")


def truth(text: str) -> bool:
    """Read true or false."""
    words = {"true": True, "yes": True, "false": False, "no": False}
    return _read(lambda word: words[word.lower()], text, "true or false")


def _below_limit(text: str) -> int:
    if int(text) >= 2**31:
        raise ValueError
    return int(text)


def _at_least_one(text: str) -> int:
    if int(text) < 1:
        raise ValueError
    return int(text)


def _finite(text: str) -> float:
    if not math.isfinite(float(text)):
        raise ValueError
    return float(text)


def _read(kind: Any, text: str, expectation: str) -> Any:
    try:
        return kind(text)
    except (ValueError, KeyError):
        raise argparse.ArgumentTypeError(f"must be {expectation}, got {text!r}") from None


class OneOf(tuple[str, ...]):
    """Reader of one of several words."""

    def __call__(self, text: str) -> str:
        if text in self:
            return text
        hint = suggestion(text, self)
        raise argparse.ArgumentTypeError(f"must be one of {', '.join(self)}, got {text!r}{hint}")


class OrNone:
    """Reader of a value or the word none, which is kept because None means that the option was not given."""

    def __init__(self, kind: Any) -> None:
        self.kind = kind

    def __call__(self, text: str) -> Any:
        return NONE if text.lower() == NONE else self.kind(text)


NONE = "none"
