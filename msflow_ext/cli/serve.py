"""The command ``serve``."""

from __future__ import annotations

import logging
import os
import sys
from typing import Any

from msflow_ext.cli.flags import add_device, add_false_alarms, add_precision, add_run
from msflow_ext.cli.parser import count, number, whole


def serve(options: Any) -> int:
    """Answer images over HTTP, with a page to drop them on: score, label, mask and heat map."""
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
    if left:  # a thread cannot be ended, and the end of the interpreter would wait for it
        logging.getLogger(__name__).warning("images given up in work: %d", left)
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
        help="Address to bind to; another one than this machine's own requires a token.",
    )
    server.add_argument(
        "--port", type=whole, default=8000, metavar="PORT", help="Port; 0 for any that is free."
    )
    server.add_argument(
        "--token",
        default="",
        metavar="TOKEN",
        help="Token that requests must bring; by default MSFLOW_TOKEN of the environment, which a "
        "list of processes does not show.",
    )
    server.add_argument(
        "--allow-host",
        action="append",
        metavar="NAME",
        help="Name or address besides --host and this machine's own that requests and web pages may name the service "
        "by; may be given several times; * for any.",
    )
    server.add_argument("--ssl-certfile", metavar="FILE", help="PEM certificate, for HTTPS.")
    server.add_argument(
        "--ssl-keyfile", metavar="FILE", help="Key of the certificate, if it is in another file."
    )
    limits = part.add_argument_group("limits")
    for flag, unit, default, text in (
        ("--max-bytes", "BYTES", 32 * 2**20, "Largest size of an image file."),
        ("--max-pixels", "PIXELS", 64_000_000, "Largest number of pixels of an image."),
        ("--concurrency", "IMAGES", 16, "Images at once, those that wait included."),
        ("--connections", "CONNECTIONS", 256, "Connections at once."),
    ):
        limits.add_argument(flag, type=count, default=default, metavar=unit, help=text)
    for flag, default, text in (
        ("--timeout", 30.0, "Seconds for an image."),
        ("--head-timeout", 10.0, "Seconds in which the head of a request must arrive."),
        (
            "--idle-timeout",
            5.0,
            "Seconds in which nothing may arrive, within an image or between requests.",
        ),
        ("--grace", 8.0, "Seconds that images in work are given after SIGINT or SIGTERM."),
    ):
        limits.add_argument(flag, type=number, default=default, metavar="SECONDS", help=text)
    hardware = part.add_argument_group("hardware")
    add_precision(hardware)
    add_device(hardware)
