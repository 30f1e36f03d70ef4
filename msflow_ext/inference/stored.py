"""What a checkpoint says of a detector, each value checked before it is used."""

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
    """A trained model and what its training left for decisions.

    Attributes:
        calibration: the scores of held-out images; None if there were none.
        false_alarms: the recipe's share of normal images over the thresholds; None without a calibration.
        colours: the range of map values that heat maps show; None if not known.
        fit: how images become square.
    """

    model: MSFlow | FastFlow
    calibration: Calibration | None
    false_alarms: float | None
    colours: list[float] | None
    fit: Fit


def read_stored(path: Path) -> Stored:
    """Read the detector in a checkpoint, on the CPU.

    Nothing larger than the file is allocated: the model is built without storage first, and compared with the tensors.

    Raises:
        FileNotFoundError: no such file. ValueError: it is no checkpoint of a model, or damaged; what is wrong is named.
    """
    header, tensors = read_checkpoint(path)
    config = header.get("config")
    kind = MODELS.get(str(header.get("model")))
    if kind is None:
        raise ValueError(f"{path} holds a model {header.get('model')!r}, unknown to this version")
    if not isinstance(config, dict):
        raise ValueError(f"{path}: its configuration builds no {kind.__name__}: it is {config!r}")
    try:
        _check_steps(config, len(tensors))
        with torch.device("meta"):
            blank = kind(**config, pretrained=False)
        _check_config(config, blank.config)
    except Exception as error:  # what is wrong with a value shows anywhere in the model, or in timm
        raise ValueError(f"{path}: its configuration builds no {kind.__name__}: {error}") from error
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
    """ValueError if there are more steps than tensors: each has one at least."""
    wanted = config.get("blocks", config.get("steps", 0))
    count = sum(map(int, wanted)) if isinstance(wanted, list) else int(wanted)
    if count > most:
        raise ValueError(f"it wants {count} steps, the file holds {most} tensors")


def _check_config(config: Mapping[str, Any], built: Mapping[str, Any]) -> None:
    """ValueError if a value is not as models write it, such as a number in quotes."""
    for name, value in config.items():
        if name in built and value != built[name]:
            raise ValueError(f"{name} {value!r} is read as {built[name]!r}")


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
                f"{damaged}{name} of the calibration must rise, one for each held-out image"
            )
    return Calibration(**value)


def _colours(value: Any, damaged: str) -> list[float] | None:
    if value is None:
        return None
    if not isinstance(value, list) or len(value) != 2 or not all(map(is_number, value)):
        raise ValueError(f"{damaged}colours must be two finite numbers, got {value!r}")
    if not value[0] < value[1]:
        raise ValueError(f"{damaged}colours must rise, got {value!r}")
    return value
