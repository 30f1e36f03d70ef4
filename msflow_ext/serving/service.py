"""A detector that answers requests within limits: how many at once, how large, how long."""

from __future__ import annotations

import asyncio
import base64
import hmac
import io
import logging
import math
import re
import time
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from fastapi import HTTPException, Request
from python_multipart import create_form_parser
from python_multipart.exceptions import FormParserError
from python_multipart.multipart import File
from starlette.requests import ClientDisconnect

from msflow_ext.data.decoding import load_bytes
from msflow_ext.inference.detector import Detector
from msflow_ext.inference.result import Result

if TYPE_CHECKING:
    from PIL.Image import Image

LINGER = 2.0  # seconds for which the rest of a refused body is read and dropped
THREADS = 4  # that decode images and encode answers; the model has one of its own
SMALLEST = 8  # pixels a side: below, there is nothing to see

logger = logging.getLogger(__name__)


@dataclass(frozen=True)
class Limits:
    """What the service grants; ValueError where it would grant nothing.

    Attributes:
        max_bytes: of a body; more is refused with 413 as soon as it is known.
        max_pixels: of an image; more is refused before it is decoded.
        concurrency: images waiting and in work at once; more are refused with 503. Bodies that still arrive hold no
            place. Together they are at most ``concurrency * max_bytes`` large.
        timeout: seconds from a request's head to its answer, else 504 (408 while its body is awaited).
        connections: open at once. A new one ends the one whose client has been waited for longest.
        head_timeout: seconds from the first byte of a request (of the first one: from its connection) until its head
            is complete.
        idle_timeout: seconds in which nothing arrives, within a body or between two requests.
        grace: seconds that answers in work are given once the service is told to stop.
    """

    max_bytes: int = 32 * 2**20
    max_pixels: int = 64_000_000
    concurrency: int = 16
    timeout: float = 30.0
    connections: int = 256
    head_timeout: float = 10.0
    idle_timeout: float = 5.0
    grace: float = 8.0

    def __post_init__(self) -> None:
        for name, value in vars(self).items():
            if not (value > 0 and math.isfinite(value)):
                raise ValueError(f"{name} must be above 0 and finite, got {value}")
        if self.connections <= self.concurrency:  # else images keep others from /health
            given = f"{self.connections} and {self.concurrency}"
            raise ValueError(f"connections must be more than concurrency, got {given}")


class Service:
    """A detector behind a door that only so many pass at once."""

    def __init__(self, detector: Detector, token: str | None, limits: Limits) -> None:
        if token is not None and not re.fullmatch(r"[!-~]+", token):  # what all clients can send
            raise ValueError("token must be of ASCII letters, digits and signs, without spaces")
        self._detector, self._token, self._limits = detector, token, limits
        self._working: set[Future[dict[str, Any]]] = set()
        self._arriving = 0  # bytes of bodies that are not complete
        self._threads = ThreadPoolExecutor(THREADS, "msflow-images")
        self._model = ThreadPoolExecutor(1, "msflow-model")

    def close(self) -> None:
        """Start no new work; images in work are finished."""
        self._threads.shutdown(wait=False, cancel_futures=True)

    def check_token(self, request: Request) -> None:
        if self._token is None:
            return
        given = request.headers.get("authorization", "").encode("latin-1")
        if not hmac.compare_digest(given, f"Bearer {self._token}".encode()):
            wanted = {"WWW-Authenticate": "Bearer"}
            raise HTTPException(401, "the header 'Authorization: Bearer TOKEN' is wanted", wanted)

    @property
    def in_work(self) -> int:
        """How many images wait or are in work, also those whose client has gone."""
        return len(self._working)

    async def answer(self, request: Request, with_image: bool = False) -> dict[str, Any]:
        """What is said of the image in the body; every refusal is an HTTPException."""
        end = time.monotonic() + self._limits.timeout
        self.check_token(request)
        self._check_size(int(request.headers.get("content-length", 0)))
        self._check_places()  # before the body comes, which holds none
        body = await self._body(request, end)
        self._check_places()
        kind = request.headers.get("content-type", "")
        work = self._threads.submit(self._predict, body, kind, with_image)
        # Whoever waits no longer, the place is taken until the work has ended or will not begin.
        self._working.add(work)
        work.add_done_callback(self._working.discard)
        try:
            waiting = asyncio.shield(asyncio.wrap_future(work))
            return await asyncio.wait_for(waiting, end - time.monotonic())
        except TimeoutError:
            work.cancel()
            raise HTTPException(504, self._too_late("was not scored")) from None

    def _check_places(self) -> None:
        if len(self._working) >= self._limits.concurrency:
            raise HTTPException(503, "too many images at once, try again", {"Retry-After": "1"})

    async def _body(self, request: Request, end: float) -> bytes:
        """The whole body, if it arrives in time and without a long silence."""
        limits, stream = self._limits, request.stream()
        parts, size = [], 0
        try:
            while True:
                late = min(limits.idle_timeout, end - time.monotonic())
                part = await asyncio.wait_for(anext(stream, None), late)
                if part is None:
                    break
                parts.append(part)
                size, self._arriving = size + len(part), self._arriving + len(part)
                self._check_size(size)
                if self._arriving > limits.concurrency * limits.max_bytes:
                    raise HTTPException(503, "too many large images at once, try again")
        except TimeoutError:
            text = f"nothing of the image arrived for {limits.idle_timeout:g} s"
            if time.monotonic() >= end:
                text = self._too_late("did not arrive")
            raise HTTPException(408, text) from None
        except ClientDisconnect:
            raise HTTPException(499, "the client hung up") from None
        finally:
            self._arriving -= size
        if not size:
            raise HTTPException(400, "the body is empty, the bytes of an image file are wanted")
        return b"".join(parts)

    def _check_size(self, size: int) -> None:
        if size > self._limits.max_bytes:
            most = self._limits.max_bytes
            raise HTTPException(413, f"the body is too large, at most {most} bytes are accepted")

    def _too_late(self, what: str) -> str:
        return f"the image {what} within {self._limits.timeout:g} s"

    def _predict(self, body: bytes, kind: str, with_image: bool) -> dict[str, Any]:
        """Decode, score and encode, on a thread; the model on its own, one image at a time."""
        try:
            if kind.lower().startswith("multipart/form-data"):
                body = _file_in(body, kind)
            image = load_bytes(body, self._limits.max_pixels)
        except ValueError as error:
            raise HTTPException(400, str(error)) from None
        if min(image.size) < SMALLEST:
            got = f"{image.width}x{image.height}"
            wanted = f"{SMALLEST}x{SMALLEST} or more are wanted"
            raise HTTPException(400, f"the image has {got} pixels, {wanted}")
        try:
            (result,) = self._model.submit(self._detector.predict, image, workers=1).result()
            return self._document(image.size, result.shown(), with_image)
        except Exception:
            logger.exception("an image of %d bytes could not be scored", len(body))
            raise HTTPException(500, "the image could not be scored, the log says why") from None

    def _document(self, size: tuple[int, int], result: Result, with_image: bool) -> dict[str, Any]:
        """The part of the answer that depends on the image."""
        from PIL import Image

        heat = result.heat_map()
        return {
            "score": result.score,
            "label": result.label,
            "p_value": result.p_value,
            "threshold": self._detector.threshold,
            "pixel_threshold": self._detector.pixel_threshold,
            "image_size": size,
            "map_size": heat.size,
            "colour_range": result.colour_range,
            "mask": None if result.mask is None else _png(Image.fromarray(result.mask)),
            "heat_map": _png(heat),
            "image": _png(Image.fromarray(result.image)) if with_image else None,
        }


def _file_in(form: bytes, kind: str) -> bytes:
    """The one file of a form in ``multipart/form-data``; ValueError if it holds none or more."""
    found: list[bytes] = []

    def take(file: File) -> None:
        if found:
            raise ValueError("the form holds more than one file, one image at a time is wanted")
        file.file_object.seek(0)
        found.append(file.file_object.read())

    limits = {"MAX_MEMORY_FILE_SIZE": len(form), "MAX_FIELDS": 100}  # nothing goes to the disk
    try:
        parser = create_form_parser({"Content-Type": kind.encode()}, None, take, limits)
        parser.write(form)
        parser.finalize()
    except FormParserError as error:
        raise ValueError(f"the form cannot be read: {error}") from None
    if not found:
        raise ValueError("the form holds no whole file, one with an image is wanted")
    return found[0]


def _png(image: Image) -> str:
    written = io.BytesIO()
    image.save(written, "PNG")
    return base64.b64encode(written.getvalue()).decode()
