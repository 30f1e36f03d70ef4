"""A trained run as an HTTP service: an image in, its score, label, mask and heat map out.

``POST /predict`` takes the bytes of one image file as its body and answers JSON::

    {"score": 1.7, "label": 1, "p_value": 0.02, "mask": "iVBORw...", "heat_map": "iVBORw..."}

The meaning is that of :class:`msflow_ext.inference.Result`; ``mask`` (white where anomalous; null
without a threshold) and ``heat_map`` (colour over the image, the mask outlined) are PNG in base64,
of the size that the model sees. ``GET /`` is a page to drop images on, ``GET /health`` tells that
the service answers, ``GET /metrics`` is for Prometheus. A refusal is ``{"error": "one sentence"}``.
With a token, ``/predict`` and ``/metrics`` want the header ``Authorization: Bearer TOKEN``.
"""

from __future__ import annotations

import asyncio
import base64
import hmac
import io
import ipaddress
import logging
import math
import os
import re
import signal
import socket
import threading
import time
from collections.abc import AsyncIterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import asynccontextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from msflow_ext._heat_maps import colour_range, heat_map
from msflow_ext._pages import render_page
from msflow_ext.data.decoding import load_bytes
from msflow_ext.inference import Detector, Result, load

try:
    import uvicorn
    from fastapi import FastAPI, HTTPException, Request
    from fastapi.responses import HTMLResponse, JSONResponse, Response
    from prometheus_client import CollectorRegistry, Counter, Gauge, Histogram, ProcessCollector
    from prometheus_client.exposition import CONTENT_TYPE_LATEST, generate_latest
    from starlette.exceptions import HTTPException as AnyHTTPException
    from starlette.requests import ClientDisconnect
except ModuleNotFoundError as error:
    raise ModuleNotFoundError(
        f"serving needs the package {error.name}: pip install 'msflow-ext[serve]'"
    ) from error

if TYPE_CHECKING:
    from PIL.Image import Image

THREADS = 4  # that decode images and encode answers; the model has one of its own
SMALLEST = 8  # pixels a side: below, there is nothing to see

logger = logging.getLogger(__name__)


@dataclass(frozen=True)
class Limits:
    """What the service grants; ValueError where it would grant nothing.

    Attributes:
        max_bytes: of a body; more is refused with 413 as soon as it is known, unread.
        max_pixels: of an image; more is refused before it is decoded.
        concurrency: images received, waiting and in work at once; more are refused with 503.
        timeout: seconds from a request's head to its answer, else 504 (408 while its body is awaited).
    """

    max_bytes: int = 32 * 2**20
    max_pixels: int = 64_000_000
    concurrency: int = 16
    timeout: float = 30.0

    def __post_init__(self) -> None:
        for name, value in vars(self).items():
            if not (value > 0 and math.isfinite(value)):
                raise ValueError(f"{name} must be above 0 and finite, got {value}")


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
    app = application(load(run, device, false_alarms=false_alarms), token, limits, name=str(run))
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


def application(
    detector: Detector, token: str | None = None, limits: Limits | None = None, *, name: str = "run"
) -> FastAPI:
    """The service as an ASGI application, to be mounted in or served by others too.

    ``name`` is what the page calls the run.
    """
    service = _Service(detector, token, limits or Limits())
    page = render_page("serve.html", name=name, token=bool(token))
    seen = CollectorRegistry()
    ProcessCollector(registry=seen)
    requests = Counter("msflow_requests", "Images answered, by status", ["status"], registry=seen)
    seconds = Histogram("msflow_request_seconds", "From head to answer", registry=seen)
    in_flight = Gauge("msflow_requests_in_flight", "Not answered yet", registry=seen)

    @asynccontextmanager
    async def lifespan(_: FastAPI) -> AsyncIterator[None]:
        yield
        service.close()

    app = FastAPI(lifespan=lifespan, openapi_url=None)

    @app.exception_handler(AnyHTTPException)
    async def refuse(request: Request, error: AnyHTTPException) -> JSONResponse:
        text = error.detail
        if not isinstance(error, HTTPException):  # not ours: no such path or method
            text = f"{request.method} {request.url.path}: {text}; images go to POST /predict"
        # What is left of the body is not read: the connection ends.
        headers = {**(error.headers or {}), "Connection": "close"}
        return JSONResponse({"error": text}, error.status_code, headers)

    @app.post("/predict")
    async def predict(request: Request) -> JSONResponse:
        start, status = time.perf_counter(), 500
        try:
            with in_flight.track_inprogress():
                answer = await service.answer(request)
            status = 200
            return JSONResponse(answer)
        except HTTPException as error:
            status = error.status_code
            raise
        finally:
            requests.labels(status).inc()
            seconds.observe(time.perf_counter() - start)

    @app.get("/metrics")
    async def metrics(request: Request) -> Response:
        service.check_token(request)
        return Response(generate_latest(seen), media_type=CONTENT_TYPE_LATEST)

    @app.get("/health")
    async def health() -> dict[str, str]:
        return {"status": "ok"}

    @app.get("/")
    async def root() -> HTMLResponse:
        return HTMLResponse(page)

    return app


class _Service:
    """A detector behind a door that only so many pass at once."""

    def __init__(self, detector: Detector, token: str | None, limits: Limits) -> None:
        if token is not None and not re.fullmatch(r"[!-~]+", token):  # what all clients can send
            raise ValueError("token must be of ASCII letters, digits and signs, without spaces")
        self._detector, self._token, self._limits = detector, token, limits
        self._free = threading.BoundedSemaphore(limits.concurrency)
        self._threads = ThreadPoolExecutor(THREADS, "msflow-images")
        self._model = ThreadPoolExecutor(1, "msflow-model")

    def close(self) -> None:
        self._threads.shutdown(cancel_futures=True)
        self._model.shutdown()

    def check_token(self, request: Request) -> None:
        if self._token is None:
            return
        given = request.headers.get("authorization", "").encode("latin-1")
        if not hmac.compare_digest(given, f"Bearer {self._token}".encode()):
            wanted = {"WWW-Authenticate": "Bearer"}
            raise HTTPException(401, "the header 'Authorization: Bearer TOKEN' is wanted", wanted)

    async def answer(self, request: Request) -> dict[str, Any]:
        """What is said of the image in the body; every refusal is an HTTPException."""
        end = time.monotonic() + self._limits.timeout
        self.check_token(request)
        self._check_size(int(request.headers.get("content-length", 0)))
        if not self._free.acquire(blocking=False):
            raise HTTPException(503, "too many images at once, try again", {"Retry-After": "1"})
        try:
            work = self._threads.submit(self._predict, await self._body(request))
        except BaseException:
            self._free.release()
            raise
        # Whoever waits no longer, the place is taken until the work has ended or will not begin.
        work.add_done_callback(lambda _: self._free.release())
        try:
            waiting = asyncio.shield(asyncio.wrap_future(work))
            return await asyncio.wait_for(waiting, end - time.monotonic())
        except asyncio.TimeoutError:
            work.cancel()
            raise HTTPException(504, self._too_late("was not scored")) from None

    async def _body(self, request: Request) -> bytes:
        try:
            body = await asyncio.wait_for(self._received(request), self._limits.timeout)
        except asyncio.TimeoutError:
            raise HTTPException(408, self._too_late("did not arrive")) from None
        except ClientDisconnect:
            raise HTTPException(499, "the client hung up") from None
        if not body:
            raise HTTPException(400, "the body is empty, the bytes of an image file are wanted")
        return body

    async def _received(self, request: Request) -> bytes:
        parts, size = [], 0
        async for part in request.stream():
            size += len(part)
            self._check_size(size)
            parts.append(part)
        return b"".join(parts)

    def _check_size(self, size: int) -> None:
        if size > self._limits.max_bytes:
            most = self._limits.max_bytes
            raise HTTPException(413, f"the body is too large, at most {most} bytes are accepted")

    def _too_late(self, what: str) -> str:
        return f"the image {what} within {self._limits.timeout:g} s"

    def _predict(self, body: bytes) -> dict[str, Any]:
        """Decode, score and encode, on a thread; the model on its own, one image at a time."""
        try:
            image = load_bytes(body, self._limits.max_pixels)
        except ValueError as error:
            raise HTTPException(400, str(error)) from None
        if min(image.size) < SMALLEST:
            got = f"{image.width}x{image.height}"
            wanted = f"{SMALLEST}x{SMALLEST} or more are wanted"
            raise HTTPException(400, f"the image has {got} pixels, {wanted}")
        try:
            (result,) = self._model.submit(self._detector.predict, image, workers=1).result()
            return self._document(result)
        except Exception:
            logger.exception("an image of %d bytes could not be scored", len(body))
            raise HTTPException(500, "the image could not be scored, the log says why") from None

    def _document(self, result: Result) -> dict[str, Any]:
        from PIL import Image

        low, high = self._detector.colours or colour_range([result.map])
        heat = heat_map(result.image, result.map, low=low, high=high, mask=result.mask)
        return {
            "score": result.score,
            "label": result.label,
            "p_value": result.p_value,
            "mask": None if result.mask is None else _png(Image.fromarray(result.mask)),
            "heat_map": _png(heat),
        }


def _png(image: Image) -> str:
    written = io.BytesIO()
    image.save(written, "PNG")
    return base64.b64encode(written.getvalue()).decode()
