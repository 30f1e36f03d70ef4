"""Train a model's head on normal images: recipe, loop, resumption, series of runs."""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING, Any

from msflow_ext.training.recipe import PRESETS, Preset, Recipe

if TYPE_CHECKING:
    from msflow_ext.training.loop import train
    from msflow_ext.training.step import TrainingDiverged, make_optimizer, train_epoch

__all__ = [
    "PRESETS",
    "Preset",
    "Recipe",
    "TrainingDiverged",
    "make_optimizer",
    "train",
    "train_epoch",
]

# Names are imported on first use, because the command line needs the recipe without torch.
_HOME = {
    "TrainingDiverged": "step",
    "make_optimizer": "step",
    "train": "loop",
    "train_epoch": "step",
}


def __getattr__(name: str) -> Any:
    if name in _HOME:
        return getattr(import_module(f"{__name__}.{_HOME[name]}"), name)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
