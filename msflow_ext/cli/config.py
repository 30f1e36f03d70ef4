"""Read flags from a YAML file."""

from __future__ import annotations

import argparse
import os
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from msflow_ext.cli.parser import UsageError, suggestion, truth
from msflow_ext.data import PACKAGED

LARGEST = 2**16  # bytes of a configuration file

#: Keys of ``config.yaml`` in older runs whose flags were removed. Switched off, they change nothing.
RETIRED = ("position_base",)


class Config(argparse.Action):
    """Set the flags that a YAML file names. A flag further right on the command line replaces its value.

    Relative paths in the file start from the folder of the file.
    """

    def __call__(self, parser: Any, namespace: Any, path: Any, option_string: Any = None) -> None:
        known = {each.dest: each for each in parser._actions if _is_key(each)}
        read: dict[str, Any] = {}
        for key, value in read_config(path).items():
            if key in RETIRED and value in (None, "false"):
                continue
            if key not in known:
                raise UsageError(f"{path}: unknown key {key!r}{suggestion(str(key), known)}")
            try:
                read[key] = _value(known[key], value)
            except argparse.ArgumentTypeError as error:
                raise UsageError(f"{path}: {key} {error}") from None
            known[key].required = False
        file = Path(path).absolute()
        folder = file.parent if file.is_file() else Path.cwd()  # a pipe has no folder
        for key, value in with_whole_paths(read, folder).items():
            setattr(namespace, key, value)


def with_whole_paths(settings: Mapping[str, Any], folder: Path) -> dict[str, Any]:
    """Return the settings with absolute paths, where relative ones start from ``folder``.

    If ``data`` is given, ``normal``, ``abnormal`` and ``masks`` are inside it and stay as they are. The name of a data
    set that is a package stays too.
    """
    paths = ["data", "weights", "out"]
    paths += [] if settings.get("data") else ["normal", "abnormal", "masks"]
    given = {name: settings[name] for name in paths if settings.get(name)}
    if given.get("data") in PACKAGED:
        del given["data"]
    return {**settings, **{name: os.path.abspath(folder / path) for name, path in given.items()}}


def read_config(path: str) -> dict[Any, Any]:
    """Read a YAML file whose values are text as on the command line, lists of text, or None for null.

    Raises:
        UsageError: if the file is not YAML, or does not hold keys and values.
        OSError: if the file cannot be read.
    """
    import yaml

    class Loader(yaml.BaseLoader):
        """Read every value except null as text."""

    null = "tag:yaml.org,2002:null"
    Loader.add_implicit_resolver(null, re.compile(r"(~|null|Null|NULL|)$"), ["~", "n", "N", ""])
    Loader.add_constructor(null, lambda loader, node: None)
    return read_yaml(Path(path), Loader)


def read_yaml(path: Path, base: Any) -> dict[Any, Any]:
    """Read a YAML file with a loader of PyYAML, without anchors, aliases and tags.

    Nested aliases are refused because a file of a few lines with them can fill the memory.

    Args:
        path: the file to read.
        base: the class of the loader.

    Raises:
        UsageError: if the file is not YAML, is too large, or does not hold keys and values.
        OSError: if the file cannot be read.
    """
    import yaml
    from yaml.composer import ComposerError

    class Loader(base):
        """Refuse anchors, aliases and tags."""

        def compose_node(self, parent: Any, index: Any) -> Any:
            event = self.peek_event()
            if getattr(event, "anchor", None) or getattr(event, "tag", None):
                reason = "anchors, aliases and tags must not be used here"
                raise ComposerError(None, None, reason, event.start_mark)
            return super().compose_node(parent, index)

    with open(path, "rb") as file:
        content = file.read(LARGEST + 1)
    if len(content) > LARGEST:
        raise UsageError(f"{path} must have at most {LARGEST} bytes, got more")
    try:
        found = yaml.load(content.decode(), Loader)
    except yaml.MarkedYAMLError as error:
        mark: Any = error.problem_mark
        where = f"line {mark.line + 1}, column {mark.column + 1}"
        raise UsageError(f"{path}, {where}: {error.problem}") from None
    except RecursionError:
        raise UsageError(f"{path} is nested too deeply") from None
    except (yaml.YAMLError, ValueError) as error:  # such as a date that does not exist
        raise UsageError(f"{path}: {error}") from None
    if not isinstance(found, dict | None):
        raise UsageError(f"{path} must hold keys and values, got a {type(found).__name__}")
    return found or {}


def _is_key(action: argparse.Action) -> bool:
    return bool(action.option_strings) and action.dest not in ("help", "config", "print_config")


def _value(action: argparse.Action, value: Any) -> Any:
    """Return the value that the flag reads from text."""
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
