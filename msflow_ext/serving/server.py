"""The service on a socket, from its start to a signal that ends it."""

from __future__ import annotations

import ipaddress
import logging
import os
import signal
import socket
import ssl
from collections.abc import Iterable
from pathlib import Path
from typing import Any

from msflow_ext.choices import Precision
from msflow_ext.inference.detector import load
from msflow_ext.serving.application import application
from msflow_ext.serving.connections import Server
from msflow_ext.serving.service import Limits

logger = logging.getLogger(__name__)


def serve(
    run: str | Path,
    *,
    host: str = "127.0.0.1",
    port: int = 8000,
    token: str | None = None,
    allow_hosts: Iterable[str] = (),
    limits: Limits | None = None,
    device: str | None = None,
    false_alarms: float | None = None,
    precision: Precision | None = None,
    ssl_certfile: str | Path | None = None,
    ssl_keyfile: str | Path | None = None,
) -> int:
    """Serve a run until SIGINT or SIGTERM; answers that are in work are finished while the grace lasts.

    Args:
        run, device, false_alarms, precision: see :func:`msflow_ext.inference.load`.
        host: name or address to listen at.
        port: 0 for any free one; the log says which.
        token: that requests must bring; by default the environment's ``MSFLOW_TOKEN``, if any.
        allow_hosts: names besides ``host``, loopback's and this machine's that requests may carry in ``Host`` and
            ``Origin``, such as the name that a proxy is asked by; ``"*"`` for any.
        limits: of images, connections and time.
        ssl_certfile, ssl_keyfile: PEM files of a certificate and its key, without a passphrase, for HTTPS; the key
            may lie in the first.

    Returns:
        How many images are still in work, on threads that end by themselves.

    Raises:
        ValueError: a host that others can reach, without a token; a token that is not of ASCII
            letters, digits and signs; files that are no certificate and its key; as :func:`load`.
        FileNotFoundError: no such certificate or key.
        OSError: no such host, or the port is taken.
    """
    limits = limits or Limits()
    token = token or os.environ.get("MSFLOW_TOKEN") or None
    found = socket.getaddrinfo(host, port, type=socket.SOCK_STREAM)
    family, *_, address = found[0]
    if not token and not all(ipaddress.ip_address(each[4][0]).is_loopback for each in found):
        raise ValueError(f"others can reach host {host}: give --token, or set MSFLOW_TOKEN")
    secured = _certificate(ssl_certfile, ssl_keyfile)
    detector = load(run, device, false_alarms=false_alarms, precision=precision)
    name, hosts = Path(run).resolve().name, (host, socket.gethostname())
    app = application(detector, token, limits, name=name, hosts=hosts, allow_hosts=allow_hosts)
    with socket.create_server(address[:2], family=family) as listening:
        shown = f"[{address[0]}]" if family == socket.AF_INET6 else address[0]
        scheme, port = "https" if secured else "http", listening.getsockname()[1]
        logger.info("serving %s at %s://%s:%d/", run, scheme, shown, port)
        server = Server(app, listening, limits, **secured)

        def stop(*_: Any) -> None:
            server.should_exit = True

        for number in (signal.SIGINT, signal.SIGTERM):  # uvicorn raises them again at its end
            signal.signal(number, stop)
        server.run()
    return app.state.service.in_work


def _certificate(certfile: str | Path | None, keyfile: str | Path | None) -> dict[str, Any]:
    """What uvicorn is to be told of them, once they are known to fit; nothing without them."""
    if certfile is None:
        if keyfile is not None:
            raise ValueError("ssl_keyfile is of no use without ssl_certfile")
        return {}
    for path in filter(None, (certfile, keyfile)):
        if not Path(path).is_file():
            raise FileNotFoundError(f"{path}: no such certificate or key")
    try:  # an empty passphrase, or a terminal would be asked for one
        ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER).load_cert_chain(certfile, keyfile, password="")
    except ssl.SSLError as error:
        files = " and ".join(str(path) for path in (certfile, keyfile) if path)
        raise ValueError(
            f"{files}: not a PEM certificate with its key, which has no passphrase: {error.reason}"
        ) from None
    return {"ssl_certfile": str(certfile), "ssl_keyfile": keyfile and str(keyfile)}
