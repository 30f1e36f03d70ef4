"""Fast normalizing-flow anomaly detection: MSFlow, FastFlow and the fused kernels beneath them."""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

from msflow_ext.version import __version__ as __version__

# Names are resolved on first use, so that `import msflow_ext` costs nothing beyond torch.
_HOME = {
    "Detector": "msflow_ext.inference",
    "FastFlow": "msflow_ext.models.fastflow",
    "FastFlowHead": "msflow_ext.models.fastflow",
    "FlowOutput": "msflow_ext.flows",
    "MSFlow": "msflow_ext.models.msflow",
    "MSFlowHead": "msflow_ext.models.msflow_head",
    "Prediction": "msflow_ext.models.base",
    "Recipe": "msflow_ext.training",
    "Result": "msflow_ext.inference",
    "accelerate": "msflow_ext.compat.accelerate",
    "graphed": "msflow_ext.inference.cuda_graphs",
    "info": "msflow_ext.testing",
    "load": "msflow_ext.inference",
    "open_dataset": "msflow_ext.data",
    "restore": "msflow_ext.compat.accelerate",
    "train": "msflow_ext.training",
}
_MODULES = (
    "compat",
    "data",
    "export",
    "flows",
    "inference",
    "metrics",
    "models",
    "ops",
    "testing",
    "training",
)

if TYPE_CHECKING:
    from msflow_ext import (
        compat,
        data,
        export,
        flows,
        inference,
        metrics,
        models,
        ops,
        testing,
        training,
    )
    from msflow_ext.compat.accelerate import accelerate, restore
    from msflow_ext.data import open_dataset
    from msflow_ext.flows import FlowOutput
    from msflow_ext.inference import Detector, Result, load
    from msflow_ext.inference.cuda_graphs import graphed
    from msflow_ext.models.base import Prediction
    from msflow_ext.models.fastflow import FastFlow, FastFlowHead
    from msflow_ext.models.msflow import MSFlow
    from msflow_ext.models.msflow_head import MSFlowHead
    from msflow_ext.testing import info
    from msflow_ext.training import Recipe, train

__all__ = [
    "Detector",
    "FastFlow",
    "FastFlowHead",
    "FlowOutput",
    "MSFlow",
    "MSFlowHead",
    "Prediction",
    "Recipe",
    "Result",
    "accelerate",
    "compat",
    "data",
    "export",
    "flows",
    "graphed",
    "inference",
    "info",
    "load",
    "metrics",
    "models",
    "open_dataset",
    "ops",
    "restore",
    "testing",
    "train",
    "training",
]


def __getattr__(name: str) -> Any:
    if name in _HOME:
        return getattr(importlib.import_module(_HOME[name]), name)
    if name in _MODULES:
        return importlib.import_module(f"msflow_ext.{name}")
    raise AttributeError(f"module 'msflow_ext' has no attribute {name!r}")


def __dir__() -> list[str]:
    return sorted([*globals(), *__all__])
