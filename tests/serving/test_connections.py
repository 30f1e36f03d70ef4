"""Connections of late, silent or too many clients are closed, and other clients still get answers."""

from __future__ import annotations

import asyncio
import errno
import io
import signal
import socket
import subprocess
import time
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from typing import Any

import httpx
import numpy as np
import pytest
from PIL import Image

from msflow_ext import serving
from msflow_ext.inference.detector import Detector
from msflow_ext.serving import connections

pytestmark = [pytest.mark.usefixtures("one_thread"), pytest.mark.family("service")]

HEALTH = b"GET /health HTTP/1.1\r\nHost: localhost\r\n\r\n"
HEAD = b"POST /predict HTTP/1.1\r\nHost: localhost\r\nContent-Length: %d\r\n\r\n"
PATIENT: dict[str, Any] = {"timeout": 60.0, "head_timeout": 60.0, "idle_timeout": 60.0}
PATIENCE = 20.0  # seconds; an idle machine needs less than one


def connect(url: str) -> socket.socket:
    return socket.create_connection(("127.0.0.1", httpx.URL(url).port or 0), PATIENCE)


def rest(client: socket.socket) -> bytes:
    """Return the rest of the answer; TimeoutError if the service does not close the connection."""
    try:
        return b"".join(iter(lambda: client.recv(1 << 16), b""))
    except ConnectionResetError:
        return b"reset"


def trickle(client: socket.socket, piece: bytes) -> None:
    """Send a piece now and then until the service closes the connection; fail if it does not."""
    client.settimeout(0.05)
    end = time.monotonic() + PATIENCE
    while time.monotonic() < end:
        try:
            client.sendall(piece)
            if client.recv(1 << 16) == b"":
                return
        except TimeoutError:
            pass
        except (ConnectionResetError, BrokenPipeError):
            return
    pytest.fail("the connection is still open")


@pytest.fixture(scope="module")
def hasty(start: Callable[..., str]) -> str:
    """A service that waits 0.3 s for a head or a body."""
    limits = serving.Limits(timeout=0.8, head_timeout=0.3, idle_timeout=0.3)
    return start(serving.application(Detector(None), limits=limits), limits)  # pyright: ignore[reportArgumentType]


@pytest.mark.parametrize(
    "sent",
    [b"", b"GET /health HT", b"GET /health HTTP/1.1\r\nHost: localhost\r\n", b"\r\n", HEALTH],
    ids=["nothing", "line", "head", "blank", "answered"],
)
def test_a_connection_without_a_complete_head_is_closed(hasty, sent):
    with connect(hasty) as client:
        client.sendall(sent)
        answer = rest(client)
    assert (b" 200 " in answer) == (sent == HEALTH)


@pytest.mark.parametrize(
    ("first", "piece"),
    [
        (b"GET /health HTTP/1.1\r\nHost: localhost\r\nX: ", b"a"),
        (b"", b"\r\n"),
        (HEALTH.replace(b"\r\n\r\n", b"\r\nContent-Length: 100000\r\n\r\n"), b"a"),
        (HEALTH.replace(b"\r\n\r\n", b"\r\nTransfer-Encoding: chunked\r\n\r\n"), b"1\r\na\r\n"),
        (HEALTH + b"GET /", b"a"),
        (HEAD % 100000, b"a"),
    ],
    ids=["head", "blank-lines", "body-of-a-get", "chunks-of-a-get", "second-head", "image"],
)
def test_a_connection_of_a_slow_client_is_closed(hasty, first, piece):
    with connect(hasty) as client:
        client.sendall(first)
        trickle(client, piece)


def test_a_connection_of_a_client_that_does_not_read_is_closed(hasty):
    with connect(hasty) as client:
        client.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 4096)
        page = b"GET / HTTP/1.1\r\nHost: localhost\r\n\r\n"
        client.settimeout(0.2)
        end, gone = time.monotonic() + PATIENCE, False
        while not gone and time.monotonic() < end:  # request many answers and read none
            try:
                client.sendall(page * 500)
            except TimeoutError:
                continue
            except (ConnectionResetError, BrokenPipeError):
                gone = True
    assert gone, "the connection is still open"


@pytest.mark.parametrize("head", [HEAD % 9, HEAD % 0], ids=["length", "chunked"])
def test_a_body_that_stops_arriving_is_refused(hasty, head):
    if b" 0\r\n" in head:
        head = head.replace(b"Content-Length: 0", b"Transfer-Encoding: chunked") + b"9\r\n"
    with connect(hasty) as client:
        client.sendall(head + b"ab")
        answer = rest(client)
    assert b" 408 " in answer and b"no data of the image arrived for 0.3 s" in answer


@contextmanager
def held(url: str, count: int, sent: bytes = b"") -> Iterator[list[socket.socket]]:
    """Yield ``count`` connections that have sent ``sent`` and then stay silent."""
    with ExitStack() as stack:
        clients = [stack.enter_context(connect(url)) for _ in range(count)]
        for client in clients:
            client.sendall(sent)
        yield clients


def is_open(client: socket.socket) -> bool:
    client.setblocking(False)
    try:
        return client.recv(1) != b""
    except BlockingIOError:
        return True
    except ConnectionResetError:
        return False


@pytest.mark.parametrize(
    "sent", [b"", HEALTH[:20], HEAD % 1000 + b"ab"], ids=["nothing", "head", "body"]
)
def test_silent_clients_on_all_connections_do_not_block_others(start, sent):
    limits = serving.Limits(concurrency=2, connections=4, **PATIENT)
    url = start(serving.application(Detector(None), limits=limits), limits)  # pyright: ignore[reportArgumentType]
    with held(url, 12, sent) as clients:
        for path in ("health", "metrics"):
            assert httpx.get(f"{url}{path}", timeout=PATIENCE).status_code == 200
        until = time.monotonic() + PATIENCE
        # The oldest were cut, and one more for the last request.
        while sum(map(is_open, clients)) > 3:
            assert time.monotonic() < until, "more connections are open than the limit allows"
            time.sleep(0.02)
        assert not is_open(clients[0])


def test_stalled_bodies_take_no_places(start):
    limits = serving.Limits(concurrency=1, **PATIENT)
    url = start(serving.application(Detector(None), limits=limits), limits)  # pyright: ignore[reportArgumentType]
    with held(url, 20, HEAD % 1000 + b"ab"):
        answer = httpx.post(f"{url}predict", content=b"no image", timeout=PATIENCE)
    assert answer.status_code == 400  # not 503


def test_arriving_bodies_have_limited_memory(start):
    limits = serving.Limits(concurrency=2, max_bytes=1000, **PATIENT)
    url = start(serving.application(Detector(None), limits=limits), limits)  # pyright: ignore[reportArgumentType]
    with held(url, 2, HEAD % 1000 + bytes(999)) as clients:
        until = time.monotonic() + PATIENCE
        while (answer := httpx.post(f"{url}predict", content=b"no image")).status_code != 503:
            assert time.monotonic() < until, "the two bodies are not counted"
        assert "too many large images" in answer.json()["error"]
        for client in clients:
            client.sendall(b"\0")
            assert b" 400 " in client.recv(1 << 16)  # accepted, but not images
    assert httpx.post(f"{url}predict", content=b"no image").status_code == 400


class Scarce:
    """An event loop's accept that fails as in a process at its limit of open files."""

    def __init__(self, accept: Callable[..., object], times: int) -> None:
        self._accept, self.left = accept, times

    async def __call__(self, listening: socket.socket) -> object:
        if self.left:
            self.left -= 1
            raise OSError(errno.EMFILE, "Too many open files")
        return await self._accept(listening)  # pyright: ignore[reportGeneralTypeIssues]


def test_a_failed_accept_cuts_a_connection_and_is_retried_without_a_traceback(caplog):
    limits = serving.Limits(**PATIENT)

    async def attempts() -> None:
        loop = asyncio.get_running_loop()
        with socket.create_server(("127.0.0.1", 0)) as listening:
            server = connections.Server(serving.application(Detector(None)), listening, limits)  # pyright: ignore[reportArgumentType]
            ended = asyncio.create_task(server.serve())
            url = f"http://127.0.0.1:{listening.getsockname()[1]}/health"
            async with httpx.AsyncClient(timeout=PATIENCE) as client:
                assert (await client.get(url)).status_code == 200
            with held(url, 3):
                while len(server.server_state.connections) < 3:
                    await asyncio.sleep(0.01)
                loop.sock_accept = failing = Scarce(loop.sock_accept, 3)  # pyright: ignore
                for _ in range(2):  # the first one is accepted by the call that began before
                    async with httpx.AsyncClient(timeout=PATIENCE) as client:
                        assert (await client.get(url)).status_code == 200
            assert failing.left == 0
            server.should_exit = True
            await ended

    asyncio.run(attempts())
    said = [each for each in caplog.records if "connections are open" in each.getMessage()]
    assert len(said) == 1 and "Too many open files" in said[0].getMessage()
    assert not [each for each in caplog.records if each.exc_info]


# ---- the command, with a low limit of files and with signals ----

LIMITED = """
import resource, sys
resource.setrlimit(resource.RLIMIT_NOFILE, (96, 96))
from msflow_ext.cli import main
sys.exit(main(sys.argv[1:]))
"""


def stop(process: subprocess.Popen[str]) -> tuple[float, str]:
    """Send SIGTERM, and return the seconds until the end and the rest of the log."""
    begin = time.monotonic()
    process.send_signal(signal.SIGTERM)
    assert process.wait(60) == 0
    assert process.stderr
    return time.monotonic() - begin, process.stderr.read()


def test_idle_connections_beyond_the_limit_of_files_do_not_block_others(command):
    with command(script=LIMITED) as (process, url), held(url, 120):
        for _ in range(3):
            assert httpx.get(f"{url}health", timeout=PATIENCE).status_code == 200
        _, log = stop(process)
    assert "at most 48 connections instead of 256: the limit of open files is 96" in log
    assert "Traceback" not in log and len(log.splitlines()) < 10


def test_sigterm_ends_the_service_within_the_grace_period(command):
    Image.fromarray(np.zeros((7999, 8000), np.uint8)).save(large := io.BytesIO(), "PNG")
    body = large.getvalue()  # needs seconds to decode
    with command("--grace", "0.5") as (process, url), ExitStack() as stack:
        for count, sent in ((3, b""), (3, HEAD % 9 + b"ab"), (8, HEAD % len(body) + body)):
            stack.enter_context(held(url, count, sent))
        until = time.monotonic() + PATIENCE
        while "msflow_requests_in_flight 11.0" not in httpx.get(f"{url}metrics").text:
            assert time.monotonic() < until
        seconds, log = stop(process)
    assert "images abandoned at shutdown: 4" in log and "Traceback" not in log
    assert log.count(" cut ") == 8 and log.count(" 499 ") == 3
    assert seconds < 8, "--grace is ignored, or the service waits for a thread"


def test_an_image_in_work_is_finished_after_sigterm(command):
    Image.fromarray(np.zeros((3000, 4000), np.uint8)).save(large := io.BytesIO(), "PNG")
    with command() as (process, url), connect(url) as client:
        client.sendall(HEAD % len(large.getvalue()) + large.getvalue()[:-1])
        until = time.monotonic() + PATIENCE
        while "msflow_requests_in_flight 1.0" not in httpx.get(f"{url}metrics").text:
            assert time.monotonic() < until
        process.send_signal(signal.SIGTERM)
        time.sleep(0.2)
        client.sendall(large.getvalue()[-1:])
        answer = rest(client)
        _, log = stop(process)
    assert b"HTTP/1.1 200 " in answer, log
    assert "Traceback" not in log and "given up" not in log
