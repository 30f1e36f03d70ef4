"""The OpenAPI document describes the service, a page shows it, and a log has a line per answer."""

from __future__ import annotations

import base64
import io
import json
import logging
import re
import time
from typing import Any

import httpx
import jsonschema
import numpy as np
import pytest
from PIL import Image

import msflow_ext as mx
from msflow_ext import serving
from msflow_ext.inference.detector import Detector

pytestmark = [pytest.mark.usefixtures("one_thread"), pytest.mark.family("service")]


def png(width: int = 40, height: int = 30) -> bytes:
    Image.new("RGB", (width, height), (90, 120, 150)).save(written := io.BytesIO(), "PNG")
    return written.getvalue()


@pytest.fixture(scope="module")
def detector(run) -> Detector:
    return mx.load(run, device="cpu")


@pytest.fixture(scope="module")
def url(detector, start) -> str:
    return start(serving.application(detector, name="plates"))


@pytest.fixture(scope="module")
def document(url) -> dict[str, Any]:
    return httpx.get(f"{url}openapi.json").json()


def size_of(coded: str) -> tuple[int, int]:
    return Image.open(io.BytesIO(base64.b64decode(coded))).size


def test_an_answer_has_thresholds_run_version_and_sizes(url, detector):
    answer = httpx.post(f"{url}predict", content=png()).json()
    assert (answer["run"], answer["version"]) == ("plates", mx.__version__)
    assert answer["threshold"] == detector.threshold is not None
    assert answer["pixel_threshold"] == detector.pixel_threshold is not None
    assert answer["label"] == (answer["score"] > answer["threshold"])
    assert answer["image_size"] == [40, 30] and answer["colour_range"] == [0.5, 2.0]
    assert tuple(answer["map_size"]) == size_of(answer["heat_map"]) == size_of(answer["mask"])
    assert answer["image"] is None


def test_the_input_of_the_model_is_returned_on_request(url, detector):
    answer = httpx.post(f"{url}predict?image=true", content=png()).json()
    (seen,) = detector.predict(Image.open(io.BytesIO(png())))
    picture = Image.open(io.BytesIO(base64.b64decode(answer["image"])))
    assert np.array_equal(np.asarray(picture), seen.shown().image)
    wrong = httpx.post(f"{url}predict?image=maybe", content=png())
    assert wrong.status_code == 422
    assert wrong.json() == {"error": "image must be true or false, got 'maybe'"}


def test_the_thresholds_of_a_run_without_them_are_null(start, detector):
    plain = start(serving.application(Detector(detector.model)))
    answer = httpx.post(f"{plain}predict", content=png()).json()
    assert answer["threshold"] is answer["pixel_threshold"] is answer["mask"] is None
    low, high = answer["colour_range"]
    assert low < high


def test_the_document_describes_every_path_and_field(document, url):
    paths = {"/predict", "/metrics", "/health", "/", "/docs", "/openapi.json"}
    assert document["paths"].keys() == paths
    for methods in document["paths"].values():
        for each in methods.values():
            assert each["summary"] and each["description"] and "200" in each["responses"]
    for schema in document["components"]["schemas"].values():
        assert all(field["description"] for field in schema["properties"].values())
    assert "securitySchemes" not in document["components"]


def test_the_document_says_which_paths_require_a_token(start):
    document = httpx.get(
        f"{start(serving.application(Detector(None), 'geheim'))}openapi.json"  # pyright: ignore[reportArgumentType]
    ).json()
    expected = {
        path for path, methods in document["paths"].items() if "security" in str(methods.values())
    }
    assert expected == {"/predict", "/metrics"}
    assert document["components"]["securitySchemes"]["HTTPBearer"]["scheme"] == "bearer"


def test_answers_agree_with_the_document(document, url):
    def check(answer: httpx.Response, method: str, path: str) -> None:
        said = document["paths"][path][method]["responses"][str(answer.status_code)]["content"]
        kind = answer.headers["content-type"].split(";")[0]
        if kind == "application/json":
            schema = {**said[kind]["schema"], "components": document["components"]}
            jsonschema.validate(answer.json(), schema)
        else:
            assert said[kind]["schema"] == {"type": "string"}

    for path in document["paths"].keys() - {"/predict"}:
        check(httpx.get(f"{url}{path[1:]}"), "get", path)
        check(httpx.get(f"{url}{path[1:]}", headers={"Host": "evil"}), "get", path)
    for body, query in ((png(), ""), (png(), "?image=1"), (b"hello", ""), (png(), "?image=2")):
        check(httpx.post(f"{url}predict{query}", content=body), "post", "/predict")


def test_the_page_of_docs_lists_every_path_and_field_and_loads_nothing(document, url):
    page = httpx.get(f"{url}docs").text
    for path, methods in document["paths"].items():
        assert all(f"<code>{method.upper()} {path}</code>" in page for method in methods)
    for field in document["components"]["schemas"]["Answer"]["properties"]:
        assert f"<code>{field}</code>" in page
    assert "<script" not in page and not re.search(r"(src|href)\s*=\s*.?(https?:)?//", page)


def test_markup_in_a_name_is_escaped(start):
    url = start(serving.application(Detector(None), name="<script>alert(1)</script>"))  # pyright: ignore[reportArgumentType]
    for path in ("", "docs"):
        page = httpx.get(f"{url}{path}").text
        assert "&lt;script&gt;alert" in page and "<script>alert" not in page


LINE = re.compile(r'[\d-]{10}T[\d:]{8}Z (\S+) "(\S+ \S+)" (\S+) (\d+) bytes (\d+) ms', re.ASCII)


class Lines(logging.Handler):
    """A handler that keeps the logged lines."""

    def __init__(self) -> None:
        super().__init__(logging.INFO)
        self.kept: list[str] = []

    def emit(self, record: logging.LogRecord) -> None:
        self.kept.append(record.getMessage())


def test_the_access_log_has_one_line_per_answer(url, monkeypatch):
    logger, lines = logging.getLogger("msflow_ext.serving.access_log"), Lines()
    monkeypatch.setattr(logger, "handlers", [lines])
    monkeypatch.setattr(logger, "propagate", False)
    logger.setLevel(logging.INFO)
    httpx.get(f"{url}begin")  # the line of the previous test may come after its answer
    answers = [httpx.post(f"{url}predict", content=png()), httpx.get(f"{url}nowhere")]
    answers += [httpx.get(f"{url}%0d%0a%1b[31mforged%20line?token=secret")]
    until = time.monotonic() + 20
    while "forged" not in "".join(lines.kept):
        assert time.monotonic() < until
        time.sleep(0.01)
    begin = next(i for i, line in enumerate(lines.kept) if "/begin" in line)
    found = [LINE.fullmatch(line) for line in lines.kept[begin + 1 :]]
    assert [each and each.groups()[:3] for each in found] == [
        ("127.0.0.1", "POST /predict", "200"),
        ("127.0.0.1", "GET /nowhere", "404"),
        ("127.0.0.1", "GET /%0D%0A%1B%5B31mforged%20line", "404"),
    ]
    sizes = [int(each[4]) for each in found if each]
    assert sizes == [len(answer.content) for answer in answers]


def test_there_is_no_redirect_to_an_address_from_host(url):
    answer = httpx.post(f"{url}predict/", content=png())
    assert answer.status_code == 404 and "location" not in answer.headers
    assert json.loads(answer.text)["error"]
