"""A trained run as an HTTP service: an image in, its score, label, mask and heat map out.

``POST /predict`` takes one image file, as its body or in a form (``multipart/form-data``), and answers JSON::

    {"score": 1.7, "label": 1, "threshold": 1.5, "mask": "iVBORw...", "heat_map": "iVBORw...", ...}

The meaning is that of :class:`msflow_ext.inference.Result`; ``GET /openapi.json`` and ``GET /docs`` say what each field
holds. ``GET /`` is a page to drop images on, ``GET /health`` tells that the service answers, ``GET /metrics`` is for
Prometheus. A refusal is ``{"error": "one sentence"}``. With a token, ``/predict`` and ``/metrics`` want the header
``Authorization: Bearer TOKEN``. Requests that name another host than the service's are refused.
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
