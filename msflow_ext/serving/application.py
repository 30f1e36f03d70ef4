"""The paths, pages and metrics of the service."""

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
    """An answer that is sent at once; the connection is closed after the body, or when it is too long or late.

    Closing a connection with unread data would reset it, and a client that is still sending could lose the answer.
    """

    def __init__(self, error: AnyHTTPException, text: str, request: Request, most: int) -> None:
        headers = {**(error.headers or {}), "Connection": "close"}
        super().__init__({"error": text}, error.status_code, headers)
        self._request, self._most = request, most

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        head = {"status": self.status_code, "headers": self.raw_headers}
        await send({"type": "http.response.start", **head})
        await send({"type": "http.response.body", "body": self.body, "more_body": True})
        # RuntimeError: the body was read already.
        with suppress(asyncio.TimeoutError, ClientDisconnect, RuntimeError):
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
    """Return the service as an ASGI application, for any ASGI server or to mount in another application.

    It does not limit connections: :class:`msflow_ext.serving.Server` does.

    Args:
        detector: detector that scores the images.
        token: token that requests must send; None for no token.
        limits: limits of bodies, images and time.
        name: name of the run.
        hosts: names of the service that requests may have in ``Host``, in addition to the local ones.
        allow_hosts: other names that requests may have in ``Host`` and ``Origin``; ``"*"`` for any.

    Raises:
        ValueError: the token has other characters than ASCII letters, digits and punctuation, or one of
            ``allow_hosts`` is not a name.

    Examples:
        >>> from msflow_ext.inference import load
        >>> service = application(load("runs/mine"), token="secret", name="mine")
        >>> service.title
        'msflow_ext: mine'
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
        description="Scores images with a trained run, and returns label, mask and heat map.",
        lifespan=lifespan,
        openapi_url=None,  # replaced below: FastAPI's pages load scripts from the network,
        docs_url=None,  # and its document would skip the check of hosts
        redoc_url=None,
        redirect_slashes=False,  # the redirect would use the client's Host
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
        if not isinstance(error, HTTPException):  # raised by Starlette: no such path or method
            text = f"{request.method} {request.url.path}: {text}; images go to POST /predict"
        return Refusal(error, text, request, limits.max_bytes)

    @app.exception_handler(RequestValidationError)
    async def refuse_parameter(request: Request, error: RequestValidationError) -> Refusal:
        first = error.errors()[0]
        text = f"{first['loc'][-1]} must be true or false, got {first['input']!r}"
        return Refusal(HTTPException(422), text, request, limits.max_bytes)


def _secured(token: bool) -> dict[str, Any]:
    """Return the options that mark a path as requiring a token; the service itself checks the token."""
    return {"dependencies": [Security(HTTPBearer(auto_error=False))]} if token else {}


def _add_predict(
    app: FastAPI, service: Service, about: dict[str, str], token: bool
) -> CollectorRegistry:
    """Add ``/predict``, and return the metrics of its requests."""
    seen = CollectorRegistry()
    ProcessCollector(registry=seen)
    requests = Counter("msflow_requests", "Answered images, by status", ["status"], registry=seen)
    seconds = Histogram("msflow_request_seconds", "Seconds from head to answer", registry=seen)
    in_flight = Gauge("msflow_requests_in_flight", "Requests without an answer yet", registry=seen)
    refused = refusals(400, 403, 408, 413, 422, 500, 503, 504, *[401] * token)

    @app.post(
        "/predict",
        summary="Score an image",
        responses=refused,
        openapi_extra={"requestBody": IMAGE},
        **_secured(token),
    )
    async def predict(request: Request, image: bool = False) -> Answer:
        """The body is an image file, or a form with one file. With ``image=true``, the answer has the model's input."""
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
        """Requests by status, seconds per answer, requests in flight, and the process's memory and open files."""
        service.check_token(request)
        return Response(generate_latest(seen), media_type=CONTENT_TYPE_LATEST)

    @app.get("/health", summary="Check the health of the service", responses=refusals(403))
    async def health() -> Health:
        """It answers even while as many images as allowed are waiting."""
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

    @app.get("/", summary="Page to drop images on", **html)
    async def root() -> HTMLResponse:
        """An HTML page that needs no other network than this service."""
        return HTMLResponse(page)

    @app.get("/docs", summary="API documentation for people", **html)
    async def docs() -> HTMLResponse:
        """An HTML page that lists the paths, their input and their answers."""
        return HTMLResponse(render_page("serve_docs.html", api=app.openapi()))

    @app.get("/openapi.json", summary="API documentation for programs", responses=refusals(403))
    async def openapi() -> dict[str, Any]:
        """The OpenAPI document."""
        return app.openapi()
