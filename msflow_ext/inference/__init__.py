"""Score images with a trained model: files, folders, arrays and archives."""

from msflow_ext.inference.detector import Detector, Result, load

__all__ = ["Detector", "Result", "load"]
