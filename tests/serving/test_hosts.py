"""The service accepts only its own names, and no pages of other sites."""

from __future__ import annotations

import socket

import httpx
import pytest

from msflow_ext import cli, serving
from msflow_ext.inference.detector import Detector

pytestmark = [pytest.mark.usefixtures("one_thread"), pytest.mark.family("service")]
PATHS = [("GET", path) for path in ("", "health", "metrics", "docs", "openapi.json")]
PATHS += [("POST", "predict"), ("POST", "predict?image=maybe")]


@pytest.fixture(scope="module")
def url(start) -> str:
    allowed = ["Proxy.Example", "2001:db8::1"]
    app = serving.application(Detector(None), hosts=["plates.local"], allow_hosts=allowed)  # pyright: ignore[reportArgumentType]
    return start(app)


def asked(
    url: str, host: str, origin: str | None = None, method: str = "GET", path: str = "health"
):
    headers = {"Host": host} | ({"Origin": origin} if origin else {})
    return httpx.request(method, f"{url}{path}", headers=headers)


OWN = ["localhost", "LOCALHOST:1", "localhost.:80", "127.0.0.1", "127.8.9.10:8000", "[::1]:8000"]
OWN += ["[0:0:0:0:0:0:0:1]", "plates.local", "proxy.example:443", "[2001:db8::1]"]
FOREIGN = ["evil.example", "localhost.evil.example", "evil-localhost", "localhost@evil.example"]
FOREIGN += [
    "127.0.0.1.evil.example",
    "127.1",
    "10.0.0.1",
    "0.0.0.0",
    "[::]",
    "[2001:db8::2]",
    "[::1",
]
FOREIGN += ["localhost:80:80", "localhost:x", "local host", "", "*", "x.proxy.example", "null"]


@pytest.mark.parametrize("host", OWN)
def test_a_name_of_the_service_is_accepted(url, host):
    assert asked(url, host).status_code == 200


@pytest.mark.parametrize("host", FOREIGN)
def test_another_name_is_refused_in_a_sentence(url, host):
    answer = asked(url, host)
    assert answer.status_code == 403
    assert answer.json()["error"].startswith(f"Host must be a name of this service, got {host!r}.")


@pytest.mark.parametrize(("method", "path"), PATHS)
def test_every_path_refuses_other_hosts_and_pages(url, method, path):
    assert asked(url, "evil.example", None, method, path).status_code == 403
    assert asked(url, "localhost", "http://evil.example", method, path).status_code == 403
    assert asked(url, "localhost", "http://localhost", method, path).status_code != 403


PAGES = {
    ("localhost:8000", "http://localhost:8000"): True,
    ("localhost", "http://localhost:80"): True,
    ("localhost:443", "https://localhost"): True,
    ("plates.local", "https://plates.local"): True,  # behind a proxy that speaks HTTPS
    ("[::1]:8000", "http://[::1]:8000"): True,
    ("localhost:8000", "https://proxy.example"): True,  # allowed by name
    ("localhost:8000", "http://localhost:3000"): False,
    ("localhost:8000", "http://127.0.0.1:8000"): False,
    ("localhost:8000", "https://localhost"): False,
    ("localhost", "http://localhost.evil.example"): False,
    ("localhost", "null"): False,
    ("localhost", "localhost"): False,
    ("localhost", "ftp://localhost"): False,
    ("localhost", "http://evil.example@localhost"): False,
    ("localhost", "http://localhost/"): False,
    ("localhost", "http://"): False,
}


@pytest.mark.parametrize(("pair", "same"), PAGES.items(), ids=map(" ".join, PAGES))
def test_a_page_is_accepted_only_from_the_same_host(url, pair, same):
    assert asked(url, *pair).status_code == (200 if same else 403)


def test_a_missing_host_is_accepted_from_programs_but_not_from_pages(url):
    for more, status in ((b"", b" 200 "), (b"Origin: http://evil.example\r\n", b" 403 ")):
        with socket.create_connection(("127.0.0.1", httpx.URL(url).port or 0), 20) as client:
            client.sendall(b"GET /health HTTP/1.0\r\n" + more + b"\r\n")
            assert status in client.recv(4096)


def test_any_host_and_page_may_be_allowed(start):
    open_to_all = start(serving.application(Detector(None), allow_hosts=["*"]))  # pyright: ignore[reportArgumentType]
    assert asked(open_to_all, "evil.example", "null").status_code == 200


@pytest.mark.parametrize("name", ["http://x.example", "x.example:80", "x example", "", "[::1]:80"])
def test_an_invalid_name_of_a_host_is_refused(name):
    with pytest.raises(ValueError, match="allow_hosts must be names or addresses without scheme"):
        serving.application(Detector(None), allow_hosts=[name])  # pyright: ignore[reportArgumentType]


def test_the_command_refuses_an_invalid_name_of_a_host(run, capsys):
    words = ["serve", "--run", str(run), "--port", "0", "--allow-host", "a", "--allow-host", "b:1"]
    assert cli.main(words) == 2
    assert "allow_hosts must be names" in capsys.readouterr().err
