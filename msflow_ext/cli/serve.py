"""The command ``serve``."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from msflow_ext.cli.flags import (
    add_device,
    add_false_alarms,
    add_precision,
    add_run,
)

if TYPE_CHECKING:
    from jsonargparse import ArgumentParser


def serve_flags(part: ArgumentParser) -> None:
    add_run(part)
    part.add_argument("--host", default="127.0.0.1", help="to listen at; others need a token")
    part.add_argument("--port", type=int, default=8000, help="0 for any that is free")
    part.add_argument(
        "--token",
        default="",
        help="that requests must bring (default: MSFLOW_TOKEN of the environment, which ps does not show)",
    )
    part.add_argument("--ssl-certfile", type=str | None, help="PEM certificate, for HTTPS")
    part.add_argument("--ssl-keyfile", type=str | None, help="its key, if not in the same file")
    part.add_argument("--max-bytes", type=int, default=32 * 2**20, help="of an image file")
    part.add_argument("--max-pixels", type=int, default=64_000_000, help="of an image")
    part.add_argument("--concurrency", type=int, default=16, help="images at once, waiting or not")
    part.add_argument("--timeout", type=float, default=30.0, help="seconds for an image")
    add_false_alarms(part)
    add_precision(part)
    add_device(part)


def serve(options: Any) -> int:
    """Answer images over HTTP, with a page to drop them on: score, label, mask and heat map."""
    from msflow_ext import serving

    names = ("max_bytes", "max_pixels", "concurrency", "timeout")
    serving.serve(
        options.run,
        host=options.host,
        port=options.port,
        token=options.token,
        limits=serving.Limits(**{name: options[name] for name in names}),
        device=options.device,
        false_alarms=options.false_alarms,
        precision=options.precision,
        ssl_certfile=options.ssl_certfile,
        ssl_keyfile=options.ssl_keyfile,
    )
    return 0
