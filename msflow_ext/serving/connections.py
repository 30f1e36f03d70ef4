"""Connections of the service: so many at once, each with a deadline for what its client does next."""

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
RESERVED = 48  # open files that are kept for everything but connections
PAUSE = 0.05  # seconds until the next try after an accept that failed
QUIET = 60.0  # seconds between two lines of the log about too many connections

logger = logging.getLogger(__name__)


class Connection(H11Protocol):
    """A connection that is cut when its client is late.

    uvicorn itself closes a connection that is silent after an answer. It has no limit for a head, for bytes that
    come after an answer and are no head, or for a client that does not read.
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
            "answer": limits.timeout
            + LINGER
            + 1,  # the application is to say itself that it is late
            "rest": limits.timeout + limits.idle_timeout,  # until the answer is read
        }
        self._enter("head")

    @property
    def answering(self) -> bool:
        """Whether a request's head is here and its answer is not complete."""
        return self.cycle is not None and not self.cycle.response_complete

    @property
    def waits(self) -> tuple[bool, float] | None:
        """Which of the connections that wait for their clients is cut first; None if the client waits."""
        if not self.answering:
            return False, self._since
        return (True, self._heard) if self.cycle.more_body else None

    def cut(self) -> None:
        """End the connection at once."""
        if self.transport is not None:
            self.transport.abort()
        elif self.opening is not None:  # in the handshake of TLS
            self.opening.cancel()

    def shutdown(self) -> None:
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
        super().on_response_complete()  # which begins the next request if its head is here

    def connection_lost(self, exc: Exception | None) -> None:
        super().connection_lost(exc)
        self.end()

    def end(self) -> None:
        """Forget the connection, which is closed."""
        if self._timer is not None:
            self._timer.cancel()
        self._closed(self)

    def _enter(self, phase: str) -> None:
        """Give the client its time anew, unless the phase is still the same."""
        if phase == self._phase:
            return
        self._phase, self._since = phase, self.loop.time()
        if self._timer is not None:
            self._timer.cancel()
        self._timer = self.loop.call_later(self._seconds[phase], self.cut)


class Server(uvicorn.Server):
    """uvicorn with limits for connections.

    When all are taken, a new one takes the place of the one whose client has been waited for longest: clients that
    do nothing keep no other client out. asyncio's own accept writes a traceback for each refusal, thousands a second.

    Args:
        app: what answers.
        listening: a socket that listens; it is closed at the end.
        limits: of connections; the application has limits of its own.
        options: more of ``uvicorn.Config``, such as ``ssl_certfile``.
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
        """Finish the answers in work, for as long as the grace lasts, and cut what is left."""
        self._accepting.cancel()
        await asyncio.wait([self._accepting])
        self._listening.close()
        for connection in list(self._open):
            connection.shutdown()
        await self._emptied(self._limits.grace)
        for connection in list(self._open):
            connection.cut()
        await self._emptied(0.1)  # those that wait for a body end by themselves
        for task in list(self.server_state.tasks):
            task.cancel()
        await self._emptied(1.0)
        await super().shutdown()

    async def _emptied(self, seconds: float) -> None:
        """Wait until nothing is open or in work, at most so long; a second SIGINT ends the wait."""
        loop = asyncio.get_running_loop()
        end = loop.time() + seconds
        while (self._open or self.server_state.tasks) and loop.time() < end:
            if self.force_exit:
                return
            await asyncio.sleep(0.02)

    async def _accept(self) -> None:
        loop = asyncio.get_running_loop()
        while True:
            await asyncio.sleep(0)  # sock_accept alone never lets others run while clients queue
            try:
                client, _ = await loop.sock_accept(self._listening)
            except OSError as error:
                if error.errno in SCARCE:
                    self._make_room(str(error.strerror))
                await asyncio.sleep(PAUSE)
                continue
            if len(self._open) >= self._most and not self._make_room("all connections are taken"):
                client.close()
                continue
            connection = Connection(self, self._limits, self._open.discard)
            self._open.add(connection)
            connection.opening = asyncio.create_task(self._begin(connection, client))

    async def _begin(self, connection: Connection, client: socket.socket) -> None:
        loop, secured = asyncio.get_running_loop(), self.config.ssl
        late = self._limits.head_timeout if secured else None
        try:
            with suppress(OSError):  # a handshake that failed or came late
                await loop.connect_accepted_socket(
                    lambda: connection, client, ssl=secured, ssl_handshake_timeout=late
                )
        finally:
            if connection.transport is None:
                connection.end()

    def _make_room(self, reason: str) -> bool:
        """Cut the connection whose client has been waited for longest; False if there is none."""
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
    """The limit that was asked for, or the one that the limit of open files allows."""
    try:
        import resource
    except ImportError:  # Windows, which has no such limit
        return limits.connections
    files, _ = resource.getrlimit(resource.RLIMIT_NOFILE)
    if files == resource.RLIM_INFINITY or files - RESERVED >= limits.connections:
        return limits.connections
    most = max(files - RESERVED, 1)
    text = "at most %d connections at once, not %d: only %d files may be open (ulimit -n)"
    logger.warning(text, most, limits.connections, files)
    return most


def _quiet(app: ASGIApp) -> ASGIApp:
    """The application, given up without a traceback when the grace is over."""

    async def quiet(scope: Scope, receive: Receive, send: Send) -> None:
        with suppress(asyncio.CancelledError):
            await app(scope, receive, send)

    return quiet
