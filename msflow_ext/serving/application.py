"""The paths of the service, its page and its metrics."""

from __future__ import annotations

import asyncio
import time
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager, suppress

from fastapi import FastAPI, HTTPException, Request
from fastapi.responses import HTMLResponse, JSONResponse, Response
from prometheus_client import CollectorRegistry, Counter, Gauge, Histogram, ProcessCollector
from prometheus_client.exposition import CONTENT_TYPE_LATEST, generate_latest
from starlette.exceptions import HTTPException as AnyHTTPException
from starlette.requests import ClientDisconnect
from starlette.types import Receive, Scope, Send

from msflow_ext.inference.detector import Detector
from msflow_ext.reports.html import render_page
from msflow_ext.serving.service import Limits, Service

LINGER = 2.0  # seconds for which the rest of a refused body is read and dropped


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
    detector: Detector, token: str | None = None, limits: Limits | None = None, *, name: str = "run"
) -> FastAPI:
    """The service as an ASGI application, to be mounted in or served by others too.

    ``name`` is what the page calls the run.
    """
    limits = limits or Limits()
    service = Service(detector, token, limits)
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
    async def refuse(request: Request, error: AnyHTTPException) -> Refusal:
        text = error.detail
        if not isinstance(error, HTTPException):  # not ours: no such path or method
            text = f"{request.method} {request.url.path}: {text}; images go to POST /predict"
        return Refusal(error, text, request, limits.max_bytes)

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
