"""The service on a socket, from its start to a signal that ends it."""

from __future__ import annotations

import ipaddress
import logging
import math
import os
import signal
import socket
from pathlib import Path
from typing import Any

import uvicorn
from fastapi import FastAPI

from msflow_ext.inference import load

from .application import application
from .service import Limits

logger = logging.getLogger(__name__)


def serve(
    run: str | Path,
    *,
    host: str = "127.0.0.1",
    port: int = 8000,
    token: str | None = None,
    limits: Limits | None = None,
    device: str | None = None,
    false_alarms: float | None = None,
) -> None:
    """Serve a run until SIGINT or SIGTERM; answers that are in work are finished.

    Args:
        run, device, false_alarms: see :func:`msflow_ext.inference.load`.
        host: name or address to listen at.
        port: 0 for any free one; the log says which.
        token: that requests must bring; by default the environment's ``MSFLOW_TOKEN``, if any.

    Raises:
        ValueError: a host that others can reach, without a token; a token that is not of ASCII
            letters, digits and signs; as :func:`load`.
        OSError: no such host, or the port is taken.
    """
    limits = limits or Limits()
    token = token or os.environ.get("MSFLOW_TOKEN")
    found = socket.getaddrinfo(host, port, type=socket.SOCK_STREAM)
    family, *_, address = found[0]
    if not token and not all(ipaddress.ip_address(each[4][0]).is_loopback for each in found):
        raise ValueError(f"others can reach host {host}: give --token, or set MSFLOW_TOKEN")
    detector = load(run, device, false_alarms=false_alarms)
    app = application(detector, token, limits, name=Path(run).resolve().name)
    with socket.create_server(address[:2], family=family) as listening:
        name = f"[{address[0]}]" if family == socket.AF_INET6 else address[0]
        logger.info("serving %s at http://%s:%d/", run, name, listening.getsockname()[1])
        grace = math.ceil(limits.timeout)
        server = uvicorn.Server(configuration(app, timeout_graceful_shutdown=grace))

        def stop(*_: Any) -> None:
            server.should_exit = True

        for number in (signal.SIGINT, signal.SIGTERM):  # uvicorn raises them again at its end
            signal.signal(number, stop)
        server.run(sockets=[listening])


def configuration(app: FastAPI, **options: Any) -> uvicorn.Config:
    """How uvicorn serves the application: one protocol, and no log but ours."""
    fixed: dict[str, Any] = {"http": "h11", "ws": "none", "lifespan": "on", "log_config": None}
    return uvicorn.Config(app, access_log=False, server_header=False, **fixed, **options)
