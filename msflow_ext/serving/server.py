"""Run the service on a socket, until a signal ends it."""

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
    """Serve a run until SIGINT or SIGTERM, then finish the images in work within ``limits.grace`` seconds.

    Args:
        run, device, false_alarms, precision: see :func:`msflow_ext.inference.load`.
        host: name or address to bind to.
        port: port to bind to; 0 for any free port, which the log names.
        token: token that requests must send. Default: ``MSFLOW_TOKEN`` of the environment, if it is set.
        allow_hosts: other names that requests may have in ``Host`` and ``Origin``, such as the public name of a proxy;
            ``"*"`` for any. Always accepted are ``host``, the local addresses and this machine's name.
        limits: limits of images, connections and time.
        ssl_certfile, ssl_keyfile: PEM files of a certificate and its key without a passphrase, for HTTPS. The first
            file may hold both.

    Returns:
        The number of images still in work, on threads that end by themselves.

    Raises:
        ValueError: other machines can reach ``host`` and there is no token; the token has other characters than ASCII
            letters, digits and punctuation; the files are not a certificate and its key; or :func:`load` raises it.
        FileNotFoundError: the run, certificate or key does not exist.
        OSError: the host does not exist, or the port is in use.
    """
    limits = limits or Limits()
    token = token or os.environ.get("MSFLOW_TOKEN") or None
    found = socket.getaddrinfo(host, port, type=socket.SOCK_STREAM)
    family, *_, address = found[0]
    if not token and not all(ipaddress.ip_address(each[4][0]).is_loopback for each in found):
        raise ValueError(
            f"token must be set for host {host}, which other machines can reach. Give --token, or set MSFLOW_TOKEN"
        )
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

        for number in (signal.SIGINT, signal.SIGTERM):  # uvicorn raises them again when it ends
            signal.signal(number, stop)
        server.run()
    return app.state.service.in_work


def _certificate(certfile: str | Path | None, keyfile: str | Path | None) -> dict[str, Any]:
    """Return uvicorn's options for a checked certificate and its key; empty without a certificate."""
    if certfile is None:
        if keyfile is not None:
            raise ValueError("ssl_keyfile requires ssl_certfile")
        return {}
    for path in filter(None, (certfile, keyfile)):
        if not Path(path).is_file():
            raise FileNotFoundError(f"{path} cannot be read: no such certificate or key")
    try:  # with an empty passphrase, so that OpenSSL does not ask for one
        ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER).load_cert_chain(certfile, keyfile, password="")
    except ssl.SSLError as error:
        files = " and ".join(str(path) for path in (certfile, keyfile) if path)
        raise ValueError(
            f"{files} must hold a PEM certificate and its key without a passphrase: {error.reason}"
        ) from None
    return {"ssl_certfile": str(certfile), "ssl_keyfile": keyfile and str(keyfile)}
