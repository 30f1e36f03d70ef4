"""The paths of the service, its pages and its metrics."""

from __future__ import annotations

import asyncio
import time
from collections.abc import AsyncIterator, Iterable
from contextlib import asynccontextmanager, suppress
from typing import Any

from fastapi import Depends, FastAPI, HTTPException, Request, Security
from fastapi.exceptions import RequestValidationError
from fastapi.responses import HTMLResponse, JSONResponse, Response
from fastapi.security import HTTPBearer
from prometheus_client import CollectorRegistry, Counter, Gauge, Histogram, ProcessCollector
from prometheus_client.exposition import CONTENT_TYPE_LATEST, generate_latest
from starlette.exceptions import HTTPException as AnyHTTPException
from starlette.requests import ClientDisconnect
from starlette.types import Receive, Scope, Send

from msflow_ext.inference.detector import Detector
from msflow_ext.reports.html import render_page
from msflow_ext.serving.access_log import AccessLog
from msflow_ext.serving.answers import IMAGE, Answer, Health, refusals, text
from msflow_ext.serving.hosts import Hosts
from msflow_ext.serving.service import LINGER, Limits, Service
from msflow_ext.version import __version__


class Refusal(JSONResponse):
    """Answers at once, and ends the connection when the body is in, or too long or late.

    A connection that is closed with something unread is reset, and a client that still sends may lose the answer.
    """

    def __init__(self, error: AnyHTTPException, text: str, request: Request, most: int) -> None:
        headers = {**(error.headers or {}), "Connection": "close"}
        super().__init__({"error": text}, error.status_code, headers)
        self._request, self._most = request, most

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        head = {"status": self.status_code, "headers": self.raw_headers}
        await send({"type": "http.response.start", **head})
        await send({"type": "http.response.body", "body": self.body, "more_body": True})
        with suppress(asyncio.TimeoutError, ClientDisconnect, RuntimeError):  # the last: was read
            await asyncio.wait_for(self._drop(), LINGER)
        await send({"type": "http.response.body", "body": b""})

    async def _drop(self) -> None:
        size = 0
        async for part in self._request.stream():
            size += len(part)
            if size > self._most:
                return


def application(
    detector: Detector,
    token: str | None = None,
    limits: Limits | None = None,
    *,
    name: str = "run",
    hosts: Iterable[str] = (),
    allow_hosts: Iterable[str] = (),
) -> FastAPI:
    """The service as an ASGI application, to be mounted in or served by others too.

    Limits of connections are those of the server, see :class:`msflow_ext.serving.Server`.

    Args:
        detector: what scores the images.
        token: that requests must bring; None for none.
        limits: of bodies, images and time.
        name: what the run is called.
        hosts, allow_hosts: names besides those of loopback that requests may carry in ``Host``; those of
            ``allow_hosts`` also in ``Origin``. ``"*"`` allows any.

    Raises:
        ValueError: a token that is not of ASCII letters, digits and signs; something else than names of hosts.
    """
    limits = limits or Limits()
    service = Service(detector, token, limits)

    @asynccontextmanager
    async def lifespan(_: FastAPI) -> AsyncIterator[None]:
        yield
        service.close()

    app = FastAPI(
        title=f"msflow_ext: {name}",
        version=__version__,
        description="A trained run: an image in, its score, label, mask and heat map out.",
        lifespan=lifespan,
        openapi_url=None,  # ours are below: FastAPI's pages load scripts from a network,
        docs_url=None,  # and its document has no dependencies
        redoc_url=None,
        redirect_slashes=False,  # to an address made of Host
        dependencies=[Depends(Hosts(hosts, allow_hosts).check)],
    )
    app.state.service = service
    app.add_middleware(AccessLog)
    _add_refusals(app, limits)
    about = {"run": name, "version": __version__}
    seen = _add_predict(app, service, about, bool(token))
    _add_metrics(app, service, seen, bool(token))
    _add_pages(app, detector, about, bool(token))
    return app


def _add_refusals(app: FastAPI, limits: Limits) -> None:
    @app.exception_handler(AnyHTTPException)
    async def refuse(request: Request, error: AnyHTTPException) -> Refusal:
        text = error.detail
        if not isinstance(error, HTTPException):  # not ours: no such path or method
            text = f"{request.method} {request.url.path}: {text}; images go to POST /predict"
        return Refusal(error, text, request, limits.max_bytes)

    @app.exception_handler(RequestValidationError)
    async def refuse_parameter(request: Request, error: RequestValidationError) -> Refusal:
        first = error.errors()[0]
        text = f"{first['loc'][-1]} must be true or false, got {first['input']!r}"
        return Refusal(HTTPException(422), text, request, limits.max_bytes)


def _secured(token: bool) -> dict[str, Any]:
    """What says in the document that a path wants a token; the service itself checks it."""
    return {"dependencies": [Security(HTTPBearer(auto_error=False))]} if token else {}


def _add_predict(
    app: FastAPI, service: Service, about: dict[str, str], token: bool
) -> CollectorRegistry:
    """Add ``/predict``, and return the metrics of its requests."""
    seen = CollectorRegistry()
    ProcessCollector(registry=seen)
    requests = Counter("msflow_requests", "Images answered, by status", ["status"], registry=seen)
    seconds = Histogram("msflow_request_seconds", "From head to answer", registry=seen)
    in_flight = Gauge("msflow_requests_in_flight", "Not answered yet", registry=seen)
    refused = refusals(400, 403, 408, 413, 422, 500, 503, 504, *[401] * token)

    @app.post(
        "/predict",
        summary="Score an image",
        responses=refused,
        openapi_extra={"requestBody": IMAGE},
        **_secured(token),
    )
    async def predict(request: Request, image: bool = False) -> Answer:
        """The body is an image file, or a form with one file. With ``image=true`` the answer holds what the model saw."""
        start, status = time.perf_counter(), 500
        try:
            with in_flight.track_inprogress():
                answer = await service.answer(request, image)
            status = 200
            return Answer(**about, **answer)
        except HTTPException as error:
            status = error.status_code
            raise
        finally:
            requests.labels(status).inc()
            seconds.observe(time.perf_counter() - start)

    return seen


def _add_metrics(app: FastAPI, service: Service, seen: CollectorRegistry, token: bool) -> None:
    @app.get(
        "/metrics",
        summary="Counters for Prometheus",
        response_class=Response,
        responses=text("plain") | refusals(403, *[401] * token),
        **_secured(token),
    )
    async def metrics(request: Request) -> Response:
        """Requests by status, seconds until the answer, requests in flight, and the process's memory and files."""
        service.check_token(request)
        return Response(generate_latest(seen), media_type=CONTENT_TYPE_LATEST)

    @app.get("/health", summary="Tell that the service answers", responses=refusals(403))
    async def health() -> Health:
        """It answers while all places for images are taken, too."""
        return Health(status="ok")


def _add_pages(app: FastAPI, detector: Detector, about: dict[str, str], token: bool) -> None:
    html: dict[str, Any] = {"response_class": Response, "responses": text("html") | refusals(403)}
    page = render_page(
        "serve.html",
        **about,
        token=token,
        threshold=detector.threshold,
        pixel_threshold=detector.pixel_threshold,
        colours=detector.colours,
    )

    @app.get("/", summary="The page to drop images on", **html)
    async def root() -> HTMLResponse:
        """An HTML page that needs no network but this service."""
        return HTMLResponse(page)

    @app.get("/docs", summary="What the service answers, for people", **html)
    async def docs() -> HTMLResponse:
        """An HTML page that lists the paths, what they take and what they answer."""
        return HTMLResponse(render_page("serve_docs.html", api=app.openapi()))

    @app.get(
        "/openapi.json", summary="What the service answers, for programs", responses=refusals(403)
    )
    async def openapi() -> dict[str, Any]:
        """The OpenAPI document."""
        return app.openapi()
