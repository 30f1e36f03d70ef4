"""Flags from a YAML file."""

from __future__ import annotations

import argparse
import re
from pathlib import Path
from typing import Any

from msflow_ext.cli.parser import UsageError, suggestion, truth

#: Keys of ``config.yaml`` in older runs, whose flags are gone; off, they change nothing.
RETIRED = ("position_base",)


class Config(argparse.Action):
    """Set the flags that a YAML file names; a flag further right on the command line replaces its value."""

    def __call__(self, parser: Any, namespace: Any, path: Any, option_string: Any = None) -> None:
        known = {each.dest: each for each in parser._actions if _is_key(each)}
        for key, value in read_config(path).items():
            if key in RETIRED and value in (None, "false"):
                continue
            if key not in known:
                raise UsageError(f"{path}: unknown key {key!r}{suggestion(str(key), known)}")
            try:
                setattr(namespace, key, _value(known[key], value))
            except argparse.ArgumentTypeError as error:
                raise UsageError(f"{path}: {key} {error}") from None
            known[key].required = False


def read_config(path: str) -> dict[Any, Any]:
    """Keys and values of a YAML file: values are text as on the command line, lists of it, or None for null.

    Raises:
        UsageError: the file is not YAML, or holds something else than keys and values.
        OSError: it cannot be read.
    """
    import yaml

    class Loader(yaml.BaseLoader):
        """Leave all values but null as they are written."""

    null = "tag:yaml.org,2002:null"
    Loader.add_implicit_resolver(null, re.compile(r"(~|null|Null|NULL|)$"), ["~", "n", "N", ""])
    Loader.add_constructor(null, lambda loader, node: None)
    try:
        found = yaml.load(Path(path).read_text(encoding="utf-8"), Loader)
    except yaml.MarkedYAMLError as error:
        mark: Any = error.problem_mark
        where = f"line {mark.line + 1}, column {mark.column + 1}"
        raise UsageError(f"{path}, {where}: {error.problem}") from None
    except (yaml.YAMLError, UnicodeDecodeError) as error:
        raise UsageError(f"{path}: {error}") from None
    if not isinstance(found, dict | None):
        raise UsageError(f"{path} must hold keys and values, got a {type(found).__name__}")
    return found or {}


def _is_key(action: argparse.Action) -> bool:
    return bool(action.option_strings) and action.dest not in ("help", "config", "print_config")


def _value(action: argparse.Action, value: Any) -> Any:
    """Read a value as the flag reads its words."""
    if value is None:
        return action.default
    many = action.nargs in ("+", "*")
    words = value if many and isinstance(value, list) else [value]
    if not all(isinstance(word, str) for word in words):
        raise argparse.ArgumentTypeError(
            f"must be {'values' if many else 'one value'}, got {value}"
        )
    read: Any = truth if action.nargs == 0 else action.type or str
    values = [read(word) for word in words]
    return values if many else values[0]
