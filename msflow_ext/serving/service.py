"""Answer requests with a detector, within limits of number, size and time."""

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

LINGER = 2.0  # seconds in which the rest of a refused body is read and dropped
THREADS = 4  # threads that decode images and encode answers; the model has a separate one
SMALLEST = 8  # pixels per side; smaller images show nothing

logger = logging.getLogger(__name__)


@dataclass(frozen=True)
class Limits:
    """The limits of the service.

    Attributes:
        max_bytes: largest body; larger ones are refused with 413 as soon as the size is known.
        max_pixels: largest number of pixels of an image; larger images are refused before they are decoded.
        concurrency: images that wait or are being scored; more are refused with 503. Bodies that are still arriving do
            not count. Together, these have at most ``concurrency * max_bytes`` bytes.
        timeout: seconds from a request's head to its answer, else 504, or 408 while the body arrives.
        connections: open connections. A new one closes the one that has waited longest for its client.
        head_timeout: seconds until a request's head is complete, from the first byte of the request, or from the start
            of a new connection.
        idle_timeout: seconds without data within a body or between two requests.
        grace: seconds to finish answers after the service is told to stop.

    Raises:
        ValueError: a limit is not above 0 and finite, or ``connections`` is not more than ``concurrency``.

    Examples:
        >>> Limits(max_bytes=1_000_000).timeout
        30.0
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
        if self.connections <= self.concurrency:  # images could block /health
            given = f"{self.connections} and {self.concurrency}"
            raise ValueError(f"connections must be more than concurrency, got {given}")


class Service:
    """A detector that scores a limited number of images at once."""

    def __init__(self, detector: Detector, token: str | None, limits: Limits) -> None:
        if token is not None and not re.fullmatch(r"[!-~]+", token):  # what every client can send
            raise ValueError(
                "token must consist of ASCII letters, digits and punctuation, without spaces"
            )
        self._detector, self._token, self._limits = detector, token, limits
        self._working: set[Future[dict[str, Any]]] = set()
        self._arriving = 0  # bytes of incomplete bodies
        self._threads = ThreadPoolExecutor(THREADS, "msflow-images")
        self._model = ThreadPoolExecutor(1, "msflow-model")

    def close(self) -> None:
        """Start no new work; images in work are finished."""
        self._threads.shutdown(wait=False, cancel_futures=True)

    def check_token(self, request: Request) -> None:
        """Refuse a request without the token with 401."""
        if self._token is None:
            return
        given = request.headers.get("authorization", "").encode("latin-1")
        if not hmac.compare_digest(given, f"Bearer {self._token}".encode()):
            text = "the request must have the header 'Authorization: Bearer TOKEN'"
            raise HTTPException(401, text, {"WWW-Authenticate": "Bearer"})

    @property
    def in_work(self) -> int:
        """Return how many images wait or are being scored, including those of closed connections."""
        return len(self._working)

    async def answer(self, request: Request, with_image: bool = False) -> dict[str, Any]:
        """Return the answer for the image in the body; raise HTTPException for a refusal."""
        end = time.monotonic() + self._limits.timeout
        self.check_token(request)
        self._check_size(int(request.headers.get("content-length", 0)))
        self._check_places()  # before the body arrives: arriving bodies do not count
        body = await self._body(request, end)
        self._check_places()
        kind = request.headers.get("content-type", "")
        work = self._threads.submit(self._predict, body, kind, with_image)
        # The place is taken until the work ends or is canceled, even if the client has left.
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
        """Return the body, if it arrives in time and without a long pause."""
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
            text = f"no data of the image arrived for {limits.idle_timeout:g} s"
            if time.monotonic() >= end:
                text = self._too_late("did not arrive")
            raise HTTPException(408, text) from None
        except ClientDisconnect:
            raise HTTPException(499, "the client closed the connection") from None
        finally:
            self._arriving -= size
        if not size:
            raise HTTPException(400, "the body must be an image file, got no bytes")
        return b"".join(parts)

    def _check_size(self, size: int) -> None:
        if size > self._limits.max_bytes:
            most = self._limits.max_bytes
            raise HTTPException(413, f"the body is too large: it must have at most {most} bytes")

    def _too_late(self, what: str) -> str:
        return f"the image {what} within {self._limits.timeout:g} s"

    def _predict(self, body: bytes, kind: str, with_image: bool) -> dict[str, Any]:
        """Decode and encode on a worker thread, and score on the model's thread, one image at a time."""
        try:
            if kind.lower().startswith("multipart/form-data"):
                body = _file_in(body, kind)
            image = load_bytes(body, self._limits.max_pixels)
        except ValueError as error:
            raise HTTPException(400, str(error)) from None
        if min(image.size) < SMALLEST:
            least, got = f"{SMALLEST}x{SMALLEST}", f"{image.width}x{image.height}"
            raise HTTPException(400, f"the image must have at least {least} pixels, got {got}")
        try:
            (result,) = self._model.submit(self._detector.predict, image, workers=1).result()
            return self._document(image.size, result.shown(), with_image)
        except Exception:
            logger.exception("an image of %d bytes could not be scored", len(body))
            raise HTTPException(
                500, "the image could not be scored; see the service's log"
            ) from None

    def _document(self, size: tuple[int, int], result: Result, with_image: bool) -> dict[str, Any]:
        """Return the part of the answer that depends on the image."""
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
    """Return the file of a ``multipart/form-data`` form; raise ValueError unless it has exactly one."""
    found: list[bytes] = []

    def take(file: File) -> None:
        if found:
            raise ValueError("the form must hold one image file, got more than one")
        file.file_object.seek(0)
        found.append(file.file_object.read())

    limits = {"MAX_MEMORY_FILE_SIZE": len(form), "MAX_FIELDS": 100}  # keep all in memory
    try:
        parser = create_form_parser({"Content-Type": kind.encode()}, None, take, limits)
        parser.write(form)
        parser.finalize()
    except FormParserError as error:
        raise ValueError(f"the form cannot be read: {error}") from None
    if not found:
        raise ValueError("the form must hold one image file, got no complete one")
    return found[0]


def _png(image: Image) -> str:
    written = io.BytesIO()
    image.save(written, "PNG")
    return base64.b64encode(written.getvalue()).decode()
