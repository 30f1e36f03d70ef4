"""The flags of every command; those of train may also stand in a YAML file that ``--config`` names."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

from msflow_ext.options import training, using
from msflow_ext.options.shared import DATA_HELP, add_layout, add_threads
from msflow_ext.options.training import DATA

if TYPE_CHECKING:
    from jsonargparse import ArgumentParser

    from msflow_ext.data import DataSet


def parser(commands: Mapping[str, Callable[[Any], int]]) -> ArgumentParser:
    """The parser of ``msflow``; a command's docstring is its help."""
    import jsonargparse

    whole = jsonargparse.ArgumentParser(
        prog="msflow",
        exit_on_error=False,
        description="Anomaly detection with normalizing flows. --debug shows where an error arose.",
    )
    subcommands = whole.add_subcommands(dest="command")
    for name, command in commands.items():
        part = jsonargparse.ArgumentParser(exit_on_error=False, description=command.__doc__)
        subcommands.add_subcommand(name, part, help=command.__doc__)
        _FLAGS[name](part)
    return whole


def open_data(options: Mapping[str, Any], *, strict: bool = True) -> DataSet:
    """The data set that the options name; ``strict`` as :func:`msflow_ext.data.open_dataset` has it."""
    from msflow_ext.data import open_dataset

    given = {name: options[name] for name in DATA if name in options}
    return open_dataset(**given, strict=strict)


def run_settings(run: Path) -> dict[str, Any]:
    """The options in ``config.yaml`` of a run; ValueError if it is damaged or names no data."""
    import yaml

    path = run / "config.yaml"
    if not path.is_file():
        raise FileNotFoundError(f"{path} is not there to name the run's data: give --data")
    try:
        settings = yaml.safe_load(path.read_text(encoding="utf-8"))
    except (yaml.YAMLError, UnicodeDecodeError) as error:
        raise ValueError(f"{path} is damaged: {error}") from None
    if not isinstance(settings, dict) or "data" not in settings:
        raise ValueError(f"{path} does not name the run's data: give --data")
    for name in DATA:
        kind = int if name == "split_seed" else str
        if not isinstance(settings.get(name), kind | None):
            raise ValueError(f"{path}: {name} must be {kind.__name__}, got {settings[name]!r}")
    return settings


def _info(part: ArgumentParser) -> None:
    part.add_argument("--check", action="store_true", help="run every kernel against its reference")


def _data(part: ArgumentParser) -> None:
    import jsonargparse

    text = "report what a data set holds and what is wrong with it"
    check = jsonargparse.ArgumentParser(exit_on_error=False, description=text)
    check.add_argument("data", type=str | None, nargs="?", help=DATA_HELP)
    add_layout(check)
    part.add_subcommands(dest="action").add_subcommand("check", check, help=text)


def _bench(part: ArgumentParser) -> None:
    add_threads(part)
    part.add_argument("--seconds", type=float, default=20.0, help="of timing each comparison")
    part.add_argument("--tiny", action="store_true", help="toy sizes, to see that it works")


_FLAGS: dict[str, Callable[[ArgumentParser], None]] = {
    "info": _info,
    "data": _data,
    "demo": training.demo,
    "train": training.train,
    "evaluate": using.evaluate,
    "predict": using.predict,
    "serve": using.serve,
    "export": using.export,
    "compare": using.compare,
    "convert": using.convert,
    "bench": _bench,
}
