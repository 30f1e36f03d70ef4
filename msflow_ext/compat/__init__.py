"""Layers, models, metrics and checkpoints of other packages."""

from __future__ import annotations

from msflow_ext.compat.checkpoints.fastflow import load_fastflow_checkpoint
from msflow_ext.compat.checkpoints.msflow import load_msflow_checkpoint
from msflow_ext.compat.freia import AllInOneBlock

__all__ = ["AllInOneBlock", "load_fastflow_checkpoint", "load_msflow_checkpoint"]
