"""The data flags, and the command ``data check``."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

from msflow_ext.choices import FITS
from msflow_ext.cli.config import read_yaml
from msflow_ext.cli.flags import DATA_HELP, add_choice, add_data
from msflow_ext.cli.parser import count

if TYPE_CHECKING:
    from msflow_ext.data import DataSet

DATA = ("data", "layout", "category", "split_seed", "normal", "abnormal", "masks", "csv")


def data(options: Any) -> int:
    """Report the contents and the faults of a data set: data check."""
    from msflow_ext.data import check_dataset

    chosen, faults = dict(vars(options)), 0
    if None not in (options.folder, options.data):
        raise ValueError(f"--data must be given once, got {options.folder!r} and {options.data!r}")
    chosen["data"] = options.data if options.folder is None else options.folder
    every = chosen["data"] and chosen["category"] is None
    for name in categories({**chosen, "category": "all"} if every else chosen):
        dataset = open_data({**chosen, "category": name}, strict=False)
        report = check_dataset(dataset, size=options.image_size, fit=options.fit)
        print(report)
        faults += len(report.faults)
    return 2 if faults else 0


def categories(options: Mapping[str, Any]) -> list[str | None]:
    """Return the categories that ``--category`` names: all, several separated by commas, one, or None."""
    from msflow_ext.data import list_categories

    category = options["category"]
    if category == "all":
        return [*list_categories(options["data"], options["layout"])] or [None]
    return [*category.split(",")] if category else [None]


def open_data(options: Mapping[str, Any], *, strict: bool = True) -> DataSet:
    """Return the data set that the options name; ``strict`` as in :func:`msflow_ext.data.open_dataset`."""
    from msflow_ext.data import open_dataset

    given = {name: options[name] for name in DATA if name in options}
    return open_dataset(**given, strict=strict)


def run_settings(run: Path) -> dict[str, Any]:
    """Read the options in ``config.yaml`` of a run.

    Raises:
        FileNotFoundError: if there is no such file.
        ValueError: if the file is damaged or does not name the data.
    """
    import yaml

    path = run / "config.yaml"
    if not path.is_file():
        raise FileNotFoundError(f"{path} does not exist; name the data with --data")
    settings = read_yaml(path, yaml.SafeLoader)
    if "data" not in settings:
        raise ValueError(f"{path} must name the run's data; name the data with --data")
    for name in DATA:
        kind = int if name == "split_seed" else str
        if not isinstance(settings.get(name), kind | None):
            raise ValueError(f"{path}: {name} must be {kind.__name__}, got {settings[name]!r}")
    return settings


def data_flags(part: Any) -> None:
    phrase = "Report the contents and the faults of a data set."
    check = part.add_commands("action", {"check": phrase})["check"]
    check.add_argument("folder", nargs="?", metavar="DIR", help=f"{DATA_HELP} Same as --data.")
    add_data(check)
    text = "Side of the model's square input in pixels; defects smaller than one of its pixels are reported."
    check.add_argument("--image-size", type=count, metavar="PIXELS", help=text)
    add_choice(
        check, "--fit", FITS, "How images are made square for --image-size.", default="resize"
    )
