"""The command ``serve``."""

from __future__ import annotations

import logging
import os
import sys
from typing import Any

from msflow_ext.cli.flags import add_device, add_false_alarms, add_precision, add_run
from msflow_ext.cli.parser import count, number, whole


def serve(options: Any) -> int:
    """Score images over HTTP, with a web page that shows score, label, mask and heat map."""
    from msflow_ext import serving

    limits = serving.Limits(**{name: getattr(options, name) for name in vars(serving.Limits())})
    left = serving.serve(
        options.run,
        host=options.host,
        port=options.port,
        token=options.token,
        allow_hosts=options.allow_host or (),
        limits=limits,
        device=options.device,
        false_alarms=options.false_alarms,
        precision=options.precision,
        ssl_certfile=options.ssl_certfile,
        ssl_keyfile=options.ssl_keyfile,
    )
    if left:  # the interpreter would wait for their threads, which cannot be stopped
        logging.getLogger(__name__).warning("images abandoned at shutdown: %d", left)
        sys.stderr.flush()
        os._exit(0)
    return 0


def serve_flags(part: Any) -> None:
    add_run(part)
    add_false_alarms(part)
    server = part.add_argument_group("server")
    server.add_argument(
        "--host",
        default="127.0.0.1",
        metavar="ADDRESS",
        help="Address to bind to; one that other machines can reach requires a token.",
    )
    server.add_argument(
        "--port",
        type=whole,
        default=8000,
        metavar="PORT",
        help="Port to listen on; 0 for any free port.",
    )
    server.add_argument(
        "--token",
        default="",
        metavar="TOKEN",
        help="Token that requests must send; by default the environment variable MSFLOW_TOKEN, "
        "which a list of processes does not show.",
    )
    server.add_argument(
        "--allow-host",
        action="append",
        metavar="NAME",
        help="Further host name or address that requests and web pages may use for the service; "
        "* for any. May be given several times.",
    )
    server.add_argument("--ssl-certfile", metavar="FILE", help="PEM certificate file for HTTPS.")
    server.add_argument(
        "--ssl-keyfile",
        metavar="FILE",
        help="Private key file of the certificate, if the certificate file has no key.",
    )
    limits = part.add_argument_group("limits")
    for flag, unit, default, text in (
        ("--max-bytes", "BYTES", 32 * 2**20, "Largest size of an image file in bytes."),
        ("--max-pixels", "PIXELS", 64_000_000, "Largest number of pixels of an image."),
        ("--concurrency", "IMAGES", 16, "Largest number of images in work or waiting."),
        ("--connections", "CONNECTIONS", 256, "Largest number of open connections."),
    ):
        limits.add_argument(flag, type=count, default=default, metavar=unit, help=text)
    for flag, default, text in (
        ("--timeout", 30.0, "Seconds within which an image must be answered."),
        ("--head-timeout", 10.0, "Seconds within which the head of a request must arrive."),
        (
            "--idle-timeout",
            5.0,
            "Seconds without data after which a connection is closed, within an image or between requests.",
        ),
        ("--grace", 8.0, "Seconds to finish images in work after SIGINT or SIGTERM."),
    ):
        limits.add_argument(flag, type=number, default=default, metavar="SECONDS", help=text)
    hardware = part.add_argument_group("hardware")
    add_precision(hardware)
    add_device(hardware)
