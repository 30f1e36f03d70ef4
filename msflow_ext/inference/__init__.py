"""Score images with a trained model: files, folders, arrays and archives."""

from msflow_ext.inference.detector import Detector, load
from msflow_ext.inference.result import Result

__all__ = ["Detector", "Result", "load"]
