"""Serve a trained run over HTTP: it scores images, and returns label, mask and heat map.

``POST /predict`` accepts one image file, as its body or in a form (``multipart/form-data``), and returns JSON::

    {"score": 1.7, "label": 1, "threshold": 1.5, "mask": "iVBORw...", "heat_map": "iVBORw...", ...}

Scores and labels are those of :class:`msflow_ext.inference.Result`. ``GET /openapi.json`` and ``GET /docs`` describe each
field. ``GET /`` is a page to drop images on, ``GET /health`` a health check, ``GET /metrics`` is for Prometheus. A refused
request gets ``{"error": "one sentence"}``. With a token, ``/predict`` and ``/metrics`` require the header
``Authorization: Bearer TOKEN``. Requests whose ``Host`` is not a name of the service are refused.
"""

from __future__ import annotations

from msflow_ext.serving.application import application
from msflow_ext.serving.connections import Server
from msflow_ext.serving.server import serve
from msflow_ext.serving.service import Limits

try:
    import fastapi  # noqa: F401
    import prometheus_client  # noqa: F401
    import python_multipart  # noqa: F401
    import uvicorn  # noqa: F401
except ModuleNotFoundError as error:
    raise ModuleNotFoundError(
        f"serving needs the package {error.name}: pip install 'msflow-ext[serve]'"
    ) from error


__all__ = ["Limits", "Server", "application", "serve"]
