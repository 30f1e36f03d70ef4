"""Models and checkpoints of other packages."""

from msflow_ext.compat.msflow import load_msflow_checkpoint

__all__ = ["load_msflow_checkpoint"]
