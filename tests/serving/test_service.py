"""The service answers like the detector, and survives bad requests."""

from __future__ import annotations

import base64
import io
import socket
import sys
import threading
import time
from collections.abc import Callable, Iterator
from typing import Any

import httpx
import numpy as np
import pytest
from fastapi import FastAPI
from PIL import Image

import msflow_ext as mx
from msflow_ext import cli, serving
from msflow_ext.inference.detector import Detector
from msflow_ext.inference.result import Result

pytestmark = pytest.mark.usefixtures("one_thread")
Start = Callable[[FastAPI], str]


@pytest.fixture(scope="module")
def detector(run) -> Detector:
    return mx.load(run, device="cpu")


class Waiting(Detector):
    """A detector that waits until ``go`` is set."""

    def __init__(self) -> None:
        super().__init__(None, colours=(0.0, 1.0))  # pyright: ignore[reportArgumentType]
        self.begun, self.go = threading.Semaphore(0), threading.Event()

    def predict(self, source: Any, **_: Any) -> list[Result]:
        self.begun.release()
        assert self.go.wait(30)
        image = np.asarray(source)
        nothing = np.zeros(image.shape[:2], np.float32)
        return [Result("", 0.5, None, None, nothing, None, image, image.shape[:2])]


class Broken(Detector):
    def __init__(self) -> None:
        super().__init__(None)  # pyright: ignore[reportArgumentType]

    def predict(self, source: Any, **_: Any) -> list[Result]:
        raise FloatingPointError("score is not finite")


def png(width: int = 40, height: int = 30, kind: str = "PNG") -> bytes:
    pixels = np.random.default_rng(0).integers(0, 255, (height, width, 3), np.uint8)
    Image.fromarray(pixels).save(written := io.BytesIO(), kind)
    return written.getvalue()


@pytest.fixture(scope="module")
def url(detector, start: Start) -> str:
    limits = serving.Limits(max_bytes=1_000_000, max_pixels=1_000_000)
    return start(serving.application(detector, limits=limits))


def refused(answer: httpx.Response) -> str:
    """Return the sentence of a refusal, which has no other content."""
    (sentence,) = answer.json().values()
    assert list(answer.json()) == ["error"] and "\n" not in sentence
    return sentence


def still_answers(url: str) -> bool:
    return httpx.post(f"{url}predict", content=png()).status_code == 200


def raw(url: str, sent: bytes) -> bytes:
    """Send bytes, and return all that the service answers until it closes the connection."""
    with socket.create_connection(("127.0.0.1", httpx.URL(url).port or 0), 20) as client:
        client.sendall(sent)
        return b"".join(iter(lambda: client.recv(4096), b""))


def bearer(token: str) -> dict[str, str]:
    return {"Authorization": f"Bearer {token}"}


@pytest.mark.parametrize("kind", ["PNG", "JPEG", "BMP", "TIFF", "WEBP"])
def test_an_answer_equals_the_result_of_the_detector(url, detector, kind):
    body = png(kind=kind)
    (expected,) = detector.predict(Image.open(io.BytesIO(body)))
    answer = httpx.post(f"{url}predict", content=body).raise_for_status().json()
    assert answer["score"] == pytest.approx(expected.score, rel=1e-5)
    assert (answer["label"], answer["p_value"]) == (expected.label, expected.p_value) == (1, 1 / 21)
    mask, heat = (
        Image.open(io.BytesIO(base64.b64decode(answer[name]))) for name in ("mask", "heat_map")
    )
    assert mask.mode == "1" and np.array_equal(np.asarray(mask), expected.shown().mask)
    assert heat.mode == "RGB" and heat.size == mask.size == (64, 48)


def test_an_image_in_a_form_is_answered_like_a_plain_body(url):
    plain = httpx.post(f"{url}predict", content=png()).json()
    for name, large in (("image", ""), ("file", "x" * 5000)):
        files = {name: ("part.png", png(), "image/png")}
        answer = httpx.post(f"{url}predict", files=files, data={"note": large})
        assert answer.json() == plain


def form(*bodies: bytes, boundary: str = "----b") -> bytes:
    head = b'Content-Disposition: form-data; name="image"; filename="a.png"\r\n\r\n'
    parts = (b"--%s\r\n%s%s\r\n" % (boundary.encode(), head, body) for body in bodies)
    return b"".join(parts) + f"--{boundary}--\r\n".encode()


@pytest.mark.parametrize(
    ("body", "kind", "sentence"),
    [
        (
            form(png(), png()),
            "; boundary=----b",
            "the form must hold one image file, got more than one",
        ),
        (form(), "; boundary=----b", "the form must hold one image file, got no complete one"),
        (
            form(png())[:-20],
            "; boundary=----b",
            "the form must hold one image file, got no complete one",
        ),
        (form(b"hello"), "; boundary=----b", "the body is not an image of the formats PNG"),
        (b"hello", "; boundary=----b", "the form cannot be read: "),
        (form(png()), "", "the form cannot be read: "),
    ],
    ids=["two", "none", "cut-off", "text", "no-form", "no-boundary"],
)
def test_a_bad_form_is_refused_in_a_sentence(url, body, kind, sentence):
    headers = {"Content-Type": f"multipart/form-data{kind}"}
    answer = httpx.post(f"{url}predict", content=body, headers=headers)
    assert answer.status_code == 400 and sentence in refused(answer)
    assert still_answers(url)


def test_without_thresholds_an_answer_has_no_label_and_no_mask(detector, start):
    plain = start(serving.application(Detector(detector.model)))
    answer = httpx.post(f"{plain}predict", content=png()).json()
    assert (answer["label"], answer["p_value"], answer["mask"]) == (None, None, None)
    assert answer["heat_map"]


@pytest.mark.parametrize(
    ("body", "status", "sentence"),
    [
        (b"", 400, "the body must be an image file, got no bytes"),
        (b"hello", 400, "the body is not an image of the formats PNG, JPEG"),
        (png()[:200], 400, "the body cannot be decoded"),
        (b"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 9 9\n", 400, "the body is not an image"),
        (png(1, 1), 400, "the image must have at least 8x8 pixels, got 1x1"),
        (png(2000, 501, "JPEG"), 400, "2000x501 pixels are more than 1000000"),
        (bytes(1_000_001), 413, "too large: it must have at most 1000000 bytes"),
    ],
    ids=["empty", "text", "cut-off", "postscript", "one-pixel", "many-pixels", "many-bytes"],
)
def test_a_bad_body_is_refused_in_a_sentence(url, body, status, sentence):
    answer = httpx.post(f"{url}predict", content=body)
    assert answer.status_code == status and sentence in refused(answer)
    assert still_answers(url)


@pytest.mark.parametrize("declared", [True, False], ids=["declared", "chunked"])
def test_an_upload_of_100_mb_is_refused_before_it_is_read(url, declared):
    sent = 0

    def upload() -> Iterator[bytes]:
        nonlocal sent
        for _ in range(100):
            sent += 1
            yield bytes(1_000_000)

    headers = {"Content-Length": "100000000"} if declared else {}
    answer = httpx.post(f"{url}predict", content=upload(), headers=headers)
    assert answer.status_code == 413 and "too large" in refused(answer)
    assert sent < 50
    assert still_answers(url)


def test_a_declared_length_is_refused_before_any_of_the_body_arrives(url):
    answer = raw(
        url, b"POST /predict HTTP/1.1\r\nHost: localhost\r\nContent-Length: 100000000\r\n\r\n"
    )
    assert b" 413 " in answer and b"too large" in answer


def test_a_client_that_is_still_sending_gets_the_refusal(detector, start):
    url = httpx.URL(start(serving.application(detector, "geheim")))
    with socket.create_connection(("127.0.0.1", url.port or 0)) as client:
        client.sendall(
            b"POST /predict HTTP/1.1\r\nHost: localhost\r\nContent-Length: 9\r\n\r\n1234"
        )
        answer = b""
        while not answer.endswith(b"}"):
            answer += client.recv(1 << 16)
        client.sendall(b"56789")
        assert b" 401 " in answer and client.recv(1) == b""  # else ConnectionResetError
    with socket.create_connection(("127.0.0.1", url.port or 0)) as client:
        client.sendall(
            b"POST /predict HTTP/1.1\r\nHost: localhost\r\nContent-Length: 9\r\n\r\n1234"
        )
        began = time.monotonic()
        while client.recv(1 << 16):
            pass
        assert time.monotonic() - began < 20, "the service waits too long for the rest"


def test_an_unknown_path_or_a_wrong_method_is_refused_with_a_hint(url):
    for answer, status in ((httpx.get(f"{url}nowhere"), 404), (httpx.get(f"{url}predict"), 405)):
        assert answer.status_code == status and "POST /predict" in refused(answer)


def test_requests_without_the_right_token_are_refused(detector, start):
    guarded = start(serving.application(detector, "geheim-17"))
    with pytest.raises(ValueError, match="token must consist of ASCII letters"):
        serving.application(detector, "geheim-ü")
    for header in (
        "",
        "geheim-17",
        "Bearer",
        "Bearer geheim",
        b"Bearer geheim-\xff",
        "Basic geheim-17",
    ):
        headers: Any = {"Authorization": header} if header else {}
        for method, path in (("POST", "predict"), ("GET", "metrics")):
            answer = httpx.request(method, f"{guarded}{path}", headers=headers)
            assert answer.status_code == 401 and "Bearer TOKEN" in refused(answer)
    headers = bearer("geheim-17")
    assert httpx.post(f"{guarded}predict", content=png(), headers=headers).status_code == 200
    assert httpx.get(f"{guarded}metrics", headers=headers).status_code == 200
    assert httpx.get(f"{guarded}health").json() == {"status": "ok"}
    assert "Access token" in httpx.get(guarded).text


def test_a_closed_connection_frees_its_place(detector, start):
    limits = serving.Limits(concurrency=1)
    url = start(serving.application(detector, limits=limits))
    head = b"POST /predict HTTP/1.1\r\nHost: localhost\r\nContent-Length: %d\r\n\r\n"
    for whole, part in ((png(), 20), (png(), None)):
        with socket.create_connection(("127.0.0.1", httpx.URL(url).port or 0)) as client:
            client.sendall(head % len(whole) + whole[:part])
        until = time.monotonic() + 20
        while not still_answers(url):
            assert time.monotonic() < until, "its place is still taken"
            time.sleep(0.02)
    assert 'msflow_requests_total{status="499"} 1.0' in httpx.get(f"{url}metrics").text


def test_a_full_service_refuses_at_once_and_a_slow_model_exceeds_the_time_limit(start):
    slow = Waiting()
    url = start(serving.application(slow, limits=serving.Limits(concurrency=2, timeout=1.0)))
    answers: list[httpx.Response] = []
    clients = [
        threading.Thread(
            target=lambda: answers.append(httpx.post(f"{url}predict", content=png(), timeout=20))
        )
        for _ in range(2)
    ]
    for client in clients:
        client.start()
    assert slow.begun.acquire(timeout=20)
    until = time.monotonic() + 20
    while "msflow_requests_in_flight 2.0" not in httpx.get(f"{url}metrics").text:
        assert time.monotonic() < until
    full = httpx.post(f"{url}predict", content=png())
    assert full.status_code == 503 and full.headers["retry-after"] == "1"
    assert "too many images at once" in refused(full)
    for client in clients:
        client.join()
    assert [answer.status_code for answer in answers] == [504, 504]
    assert "the image was not scored within 1 s" in refused(answers[0])
    assert httpx.post(f"{url}predict", content=png()).status_code == 503  # they are still in work
    slow.go.set()
    until = time.monotonic() + 20
    while not still_answers(url):
        assert time.monotonic() < until, "their places are still taken"
    text = httpx.get(f"{url}metrics").text
    assert 'msflow_requests_total{status="504"} 2.0' in text
    assert "msflow_requests_in_flight 0.0" in text
    assert "msflow_request_seconds_bucket" in text


def test_a_body_that_does_not_arrive_is_refused_after_the_time_limit(detector, start):
    url = start(serving.application(detector, limits=serving.Limits(timeout=0.3)))
    answer = raw(url, b"POST /predict HTTP/1.1\r\nHost: localhost\r\nContent-Length: 9\r\n\r\nhi")
    assert b" 408 " in answer and b"the image did not arrive within 0.3 s" in answer


def test_an_error_of_the_model_is_an_error_of_the_service_and_logged(start, caplog):
    url = start(serving.application(Broken()))
    answer = httpx.post(f"{url}predict", content=png())
    assert answer.status_code == 500 and "see the service's log" in refused(answer)
    assert "score is not finite" in caplog.text


@pytest.mark.parametrize("name", ["max_bytes", "max_pixels", "concurrency", "timeout"])
def test_a_limit_of_0_is_refused(name):
    with pytest.raises(ValueError, match=f"{name} must be above 0 and finite, got 0"):
        serving.Limits(**{name: 0})


def test_a_host_that_other_machines_can_reach_requires_a_token(run, capsys, monkeypatch):
    monkeypatch.delenv("MSFLOW_TOKEN", raising=False)
    assert cli.main(["serve", "--run", str(run), "--host", "0.0.0.0", "--port", "0"]) == 2
    assert (
        "token must be set for host 0.0.0.0, which other machines can reach. Give --token"
        in capsys.readouterr().err
    )


def test_a_missing_package_is_named_with_the_command_to_install_it(run, capsys, monkeypatch):
    monkeypatch.setitem(sys.modules, "prometheus_client", None)
    monkeypatch.delitem(sys.modules, "msflow_ext.serving")
    monkeypatch.delattr(mx, "serving")
    assert cli.main(["serve", "--run", str(run)]) == 2
    assert "prometheus_client: pip install 'msflow-ext[serve]'" in capsys.readouterr().err
