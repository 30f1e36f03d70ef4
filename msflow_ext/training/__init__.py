"""Train a model's head on normal images: recipe, loop, checkpoints, series of trainings."""

from msflow_ext.training.loop import train
from msflow_ext.training.recipe import PRESETS, Preset, Recipe
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
