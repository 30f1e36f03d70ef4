"""Score images with a trained model: a file, a folder, an array, an archive."""

from msflow_ext.inference.detector import Detector, load
from msflow_ext.inference.result import Result

__all__ = ["Detector", "Result", "load"]
