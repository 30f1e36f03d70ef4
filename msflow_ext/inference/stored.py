"""Read a detector from a checkpoint, and check every value before it is used."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from msflow_ext.choices import FITS, Fit
from msflow_ext.evaluation.calibration import Calibration
from msflow_ext.models.fastflow import FastFlow
from msflow_ext.models.msflow import MSFlow
from msflow_ext.runs.checkpoint import check_tensors, is_number, read_checkpoint, restore

#: The models that checkpoints name.
MODELS: dict[str, type[MSFlow] | type[FastFlow]] = {"MSFlow": MSFlow, "FastFlow": FastFlow}


@dataclass(frozen=True)
class Stored:
    """A trained model with its calibration and display settings, as a checkpoint stores them.

    Attributes:
        model: the trained model, on the CPU.
        calibration: scores of held-out images; None if training held out none.
        false_alarms: the recipe's share of normal images above the thresholds; None without a calibration.
        colours: range of map values that heat maps show; None if unknown.
        fit: how images become square.
    """

    model: MSFlow | FastFlow
    calibration: Calibration | None
    false_alarms: float | None
    colours: list[float] | None
    fit: Fit


def read_stored(path: Path) -> Stored:
    """Read the detector in a checkpoint, on the CPU.

    The model is first built without storage and compared with the tensors. So a crafted file cannot
    make it allocate more memory than the file's own size.

    Raises:
        FileNotFoundError: the file does not exist.
        ValueError: the file is not a checkpoint of a model, or is damaged.
    """
    header, tensors = read_checkpoint(path)
    config = header.get("config")
    kind = MODELS.get(str(header.get("model")))
    if kind is None:
        raise ValueError(
            f"{path} must hold a model {' or '.join(MODELS)}, got {header.get('model')!r}. "
            "A later version of msflow_ext may have written it"
        )
    if not isinstance(config, dict):
        raise ValueError(f"{path} is damaged: its configuration must be an object, got {config!r}")
    try:
        _check_steps(config, len(tensors))
        with torch.device("meta"):
            blank = kind(**config, pretrained=False)
        _check_config(config, blank.config)
    except Exception as error:  # the model or timm may raise anything for a wrong value
        raise ValueError(
            f"{path} is damaged: its configuration does not build {kind.__name__}: {error}"
        ) from error
    check_tensors(path, tensors, blank)
    recipe, damaged = header.get("recipe", {}), f"{path} is damaged: "
    if not isinstance(recipe, dict):
        raise ValueError(f"{damaged}recipe must be an object, got {recipe!r}")
    if (fit := recipe.get("fit", "resize")) not in FITS:
        raise ValueError(f"{damaged}fit must be one of {', '.join(FITS)}, got {fit!r}")
    calibration = _calibration(header.get("calibration"), damaged)
    rate: Any = recipe.get("false_alarms") if calibration else None
    if calibration and not (is_number(rate) and 0 < rate < 1):
        raise ValueError(f"{damaged}false_alarms must be above 0 and below 1, got {rate!r}")
    colours = _colours(header.get("colours"), damaged)
    model = kind(**config, pretrained=False)
    restore(path, tensors, model)
    return Stored(model, calibration, rate, colours, fit)


def _check_steps(config: Mapping[str, Any], most: int) -> None:
    """Raise ValueError if there are more steps than tensors: each step has at least one."""
    expected = config.get("blocks", config.get("steps", 0))
    count = sum(map(int, expected)) if isinstance(expected, list) else int(expected)
    if count > most:
        raise ValueError(f"it has {count} steps, but the file holds {most} tensors")


def _check_config(config: Mapping[str, Any], built: Mapping[str, Any]) -> None:
    """Raise ValueError if a value differs from the model's own, such as a number in quotes."""
    for name, value in config.items():
        if name in built and value != built[name]:
            raise ValueError(f"{name} must be {built[name]!r}, got {value!r}")


def _calibration(value: Any, damaged: str) -> Calibration | None:
    if value is None:
        return None
    parts = ("scores", "peaks")
    if not isinstance(value, dict) or sorted(value) != sorted(parts):
        raise ValueError(f"{damaged}calibration must hold scores and peaks")
    for name in parts:
        numbers = value[name]
        if not isinstance(numbers, list) or not all(map(is_number, numbers)):
            raise ValueError(f"{damaged}{name} of the calibration must be finite numbers")
        if numbers != sorted(numbers) or len(numbers) != len(value["scores"]) or not numbers:
            raise ValueError(
                f"{damaged}{name} of the calibration must be sorted, one per held-out image"
            )
    return Calibration(**value)


def _colours(value: Any, damaged: str) -> list[float] | None:
    if value is None:
        return None
    if not isinstance(value, list) or len(value) != 2 or not all(map(is_number, value)):
        raise ValueError(f"{damaged}colours must be two finite numbers, got {value!r}")
    if not value[0] < value[1]:
        raise ValueError(f"{damaged}colours must be increasing, got {value!r}")
    return value
