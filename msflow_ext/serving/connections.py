"""Limit the number of connections, and the time that each waits for its client."""

from __future__ import annotations

import asyncio
import errno
import logging
import socket
from collections.abc import Callable
from contextlib import suppress
from typing import Any

import uvicorn
from starlette.types import ASGIApp, Receive, Scope, Send
from uvicorn.protocols.http.h11_impl import H11Protocol

from msflow_ext.serving.service import LINGER, Limits

SCARCE = (errno.EMFILE, errno.ENFILE, errno.ENOBUFS, errno.ENOMEM)
RESERVED = 48  # open files for everything other than connections
PAUSE = 0.05  # seconds between a failed accept and the next try
QUIET = 60.0  # seconds between two log lines about too many connections

logger = logging.getLogger(__name__)


class Connection(H11Protocol):
    """A connection that is closed when its client is late.

    uvicorn itself only closes connections that are silent after an answer. It does not limit the time for a head, for
    other bytes after an answer, or for a client that does not read.
    """

    def __init__(
        self, server: Server, limits: Limits, closed: Callable[[Connection], None]
    ) -> None:
        super().__init__(server.config, server.server_state, server.lifespan.state)
        self.opening: asyncio.Task[None] | None = None
        self._closed = closed
        self._phase, self._since, self._heard = "", 0.0, 0.0
        self._timer: asyncio.TimerHandle | None = None
        self._seconds = {
            "head": limits.head_timeout,
            # Later than the application's own limit, so that it can answer that it is late.
            "answer": limits.timeout + LINGER + 1,
            "rest": limits.timeout + limits.idle_timeout,  # until the answer is read
        }
        self._enter("head")

    @property
    def answering(self) -> bool:
        """Return whether a request's head has arrived and its answer is not complete."""
        return self.cycle is not None and not self.cycle.response_complete

    @property
    def waits(self) -> tuple[bool, float] | None:
        """Return a sort key, by which the smallest is cut first; None if the client waits for the service."""
        if not self.answering:
            return False, self._since
        return (True, self._heard) if self.cycle.more_body else None

    def cut(self) -> None:
        """Close the connection at once."""
        if self.transport is not None:
            self.transport.abort()
        elif self.opening is not None:  # during the TLS handshake
            self.opening.cancel()

    def shutdown(self) -> None:
        """Close the connection, after the current answer if there is one."""
        if self.answering:
            self.cycle.keep_alive = False
        elif self.transport is not None:
            self.transport.close()
        else:
            self.cut()

    def data_received(self, data: bytes) -> None:
        self._heard = self.loop.time()
        if not self.answering:
            self._enter("head")
        super().data_received(data)

    def handle_events(self) -> None:
        super().handle_events()
        if self.answering:
            self._enter("answer")

    def on_response_complete(self) -> None:
        self._enter("rest")
        super().on_response_complete()  # which starts the next request if its head has arrived

    def connection_lost(self, exc: Exception | None) -> None:
        super().connection_lost(exc)
        self.end()

    def end(self) -> None:
        """Remove a closed connection from the server's connections."""
        if self._timer is not None:
            self._timer.cancel()
        self._closed(self)

    def _enter(self, phase: str) -> None:
        """Restart the client's time, unless the phase is the same as before."""
        if phase == self._phase:
            return
        self._phase, self._since = phase, self.loop.time()
        if self._timer is not None:
            self._timer.cancel()
        self._timer = self.loop.call_later(self._seconds[phase], self.cut)


class Server(uvicorn.Server):
    """A uvicorn server with limits for connections.

    When all connections are in use, a new one replaces the one that has waited longest for its client. So idle clients
    cannot block others. asyncio's own accept would log a traceback per failure, thousands per second.

    Args:
        app: ASGI application.
        listening: listening socket; it is closed at the end.
        limits: limits of connections; the application has its own limits.
        options: other options of ``uvicorn.Config``, such as ``ssl_certfile``.
    """

    def __init__(
        self, app: ASGIApp, listening: socket.socket, limits: Limits, **options: Any
    ) -> None:
        fixed: dict[str, Any] = {"http": "h11", "ws": "none", "lifespan": "on", "log_config": None}
        fixed |= {"access_log": False, "server_header": False, "proxy_headers": False}
        fixed["timeout_keep_alive"] = limits.idle_timeout
        super().__init__(uvicorn.Config(_quiet(app), **fixed, **options))
        self._listening, self._limits = listening, limits
        self._open: set[Connection] = set()
        self._silent_until = 0.0

    async def startup(self, sockets: list[socket.socket] | None = None) -> None:
        await super().startup(sockets=[])
        self._most = _most_connections(self._limits)
        self._listening.setblocking(False)
        self._listening.listen(self.config.backlog)
        self._accepting = asyncio.create_task(self._accept())

    async def shutdown(self, sockets: list[socket.socket] | None = None) -> None:
        """Finish answers within the grace period, then cut the remaining connections."""
        self._accepting.cancel()
        await asyncio.wait([self._accepting])
        self._listening.close()
        for connection in list(self._open):
            connection.shutdown()
        await self._emptied(self._limits.grace)
        for connection in list(self._open):
            connection.cut()
        await self._emptied(0.1)  # requests that wait for a body end by themselves
        for task in list(self.server_state.tasks):
            task.cancel()
        await self._emptied(1.0)
        await super().shutdown()

    async def _emptied(self, seconds: float) -> None:
        """Wait until no connection or task is left, at most ``seconds``; a second SIGINT ends the wait."""
        loop = asyncio.get_running_loop()
        end = loop.time() + seconds
        while (self._open or self.server_state.tasks) and loop.time() < end:
            if self.force_exit:
                return
            await asyncio.sleep(0.02)

    async def _accept(self) -> None:
        loop = asyncio.get_running_loop()
        while True:
            # While clients queue, sock_accept itself never yields to other tasks.
            await asyncio.sleep(0)
            try:
                client, _ = await loop.sock_accept(self._listening)
            except OSError as error:
                if error.errno in SCARCE:
                    self._make_room(str(error.strerror))
                await asyncio.sleep(PAUSE)
                continue
            if len(self._open) >= self._most and not self._make_room("all connections are in use"):
                client.close()
                continue
            connection = Connection(self, self._limits, self._open.discard)
            self._open.add(connection)
            connection.opening = asyncio.create_task(self._begin(connection, client))

    async def _begin(self, connection: Connection, client: socket.socket) -> None:
        loop, secured = asyncio.get_running_loop(), self.config.ssl
        late = self._limits.head_timeout if secured else None
        try:
            with suppress(OSError):  # the handshake failed or was late
                await loop.connect_accepted_socket(
                    lambda: connection, client, ssl=secured, ssl_handshake_timeout=late
                )
        finally:
            if connection.transport is None:
                connection.end()

    def _make_room(self, reason: str) -> bool:
        """Cut the connection that has waited longest for its client; return False if there is none."""
        now = asyncio.get_running_loop().time()
        if now >= self._silent_until:
            self._silent_until = now + QUIET
            logger.warning("%d connections are open: %s", len(self._open), reason)
        waiting = [(since, each) for each in self._open if (since := each.waits) is not None]
        if not waiting:
            return False
        min(waiting, key=lambda pair: pair[0])[1].cut()
        return True


def _most_connections(limits: Limits) -> int:
    """Return the limit of connections, lowered to what the limit of open files allows."""
    try:
        import resource
    except ImportError:  # Windows, which has no such limit
        return limits.connections
    files, _ = resource.getrlimit(resource.RLIMIT_NOFILE)
    if files == resource.RLIM_INFINITY or files - RESERVED >= limits.connections:
        return limits.connections
    most = max(files - RESERVED, 1)
    text = "at most %d connections instead of %d: the limit of open files is %d (ulimit -n)"
    logger.warning(text, most, limits.connections, files)
    return most


def _quiet(app: ASGIApp) -> ASGIApp:
    """Return the application, without a traceback for requests that are canceled after the grace period."""

    async def quiet(scope: Scope, receive: Receive, send: Send) -> None:
        with suppress(asyncio.CancelledError):
            await app(scope, receive, send)

    return quiet
