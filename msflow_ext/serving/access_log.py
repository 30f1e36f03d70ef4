"""Log one line per answer: time, client, request, status, size and duration."""

from __future__ import annotations

import asyncio
import logging
import time
from urllib.parse import quote

from starlette.types import ASGIApp, Message, Receive, Scope, Send

logger = logging.getLogger(__name__)


class AccessLog:
    """Middleware that logs a line per answer; text from the client is percent-encoded."""

    def __init__(self, app: ASGIApp) -> None:
        self._app = app

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http":
            return await self._app(scope, receive, send)
        start, status, size = time.perf_counter(), "-", 0

        async def seen(message: Message) -> None:
            nonlocal status, size
            status = message.get("status", status)
            size += len(message.get("body", b""))
            await send(message)

        try:
            await self._app(scope, receive, seen)
        except asyncio.CancelledError:
            status = "cut"
            raise
        finally:
            when = time.strftime("%Y-%m-%dT%H:%M:%SZ", time.gmtime())
            client = (scope.get("client") or ("-",))[0]
            asked = f"{quote(scope['method'])} {quote(scope['path'])}"
            took = (time.perf_counter() - start) * 1e3
            text = '%s %s "%s" %s %d bytes %.0f ms'
            logger.info(text, when, client, asked, status, size, took)
