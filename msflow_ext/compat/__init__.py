"""Models and checkpoints of other packages."""

from msflow_ext.compat.fastflow import load_fastflow_checkpoint
from msflow_ext.compat.freia import AllInOneBlock
from msflow_ext.compat.msflow import load_msflow_checkpoint

__all__ = ["AllInOneBlock", "load_fastflow_checkpoint", "load_msflow_checkpoint"]
