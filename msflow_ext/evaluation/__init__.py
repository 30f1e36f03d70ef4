"""Test a model on labeled images, and choose thresholds from normal images."""

from msflow_ext.evaluation.calibration import Calibration
from msflow_ext.evaluation.evaluator import Evaluation, Truth, evaluate, measure

__all__ = ["Calibration", "Evaluation", "Truth", "evaluate", "measure"]
