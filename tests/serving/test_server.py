"""The command serves over HTTP and HTTPS until a signal stops it."""

from __future__ import annotations

import io
import re
import shutil
import signal
import socket
import ssl
import subprocess
from pathlib import Path

import httpx
import numpy as np
import pytest
from PIL import Image

from msflow_ext import cli

pytestmark = pytest.mark.usefixtures("one_thread")


def png(width: int = 40, height: int = 30, kind: str = "PNG") -> bytes:
    pixels = np.random.default_rng(0).integers(0, 255, (height, width, 3), np.uint8)
    Image.fromarray(pixels).save(written := io.BytesIO(), kind)
    return written.getvalue()


def bearer(token: str) -> dict[str, str]:
    return {"Authorization": f"Bearer {token}"}


@pytest.fixture(scope="module")
def certificate(tmp_path_factory) -> tuple[Path, Path]:
    """PEM files of a self-signed certificate for 127.0.0.1 and its key."""
    openssl = shutil.which("openssl") or pytest.skip("no openssl")
    folder = tmp_path_factory.mktemp("certificate")
    pair = folder / "certificate.pem", folder / "key.pem"
    command = [openssl, "req", "-x509", "-newkey", "rsa:2048", "-nodes", "-days", "2"]
    command += ["-subj", "/CN=127.0.0.1", "-addext", "subjectAltName=IP:127.0.0.1"]
    command += ["-out", str(pair[0]), "-keyout", str(pair[1])]
    subprocess.run(command, check=True, capture_output=True)
    return pair


def test_a_wrong_certificate_or_key_is_refused(run, certificate, tmp_path, capsys):
    good, key = map(str, certificate)
    (tmp_path / "text.pem").write_text("hello")
    for flags, sentence in (
        (["--ssl-keyfile", key], "ssl_keyfile requires ssl_certfile"),
        (["--ssl-certfile", "absent.pem"], "absent.pem cannot be read: no such certificate"),
        (["--ssl-certfile", good], "certificate.pem must hold a PEM certificate and its key"),
        (
            ["--ssl-certfile", good, "--ssl-keyfile", str(tmp_path / "text.pem")],
            "text.pem must hold",
        ),
    ):
        assert cli.main(["serve", "--run", str(run), "--port", "0", *flags]) == 2
        assert sentence in capsys.readouterr().err


@pytest.mark.family("service")
def test_the_command_serves_https_and_closes_silent_handshakes(command, certificate):
    pem, key = certificate
    files = ("--ssl-certfile", str(pem), "--ssl-keyfile", str(key))
    with command(*files, "--head-timeout", "3") as (service, url):
        assert url.startswith("https://")
        trusted = ssl.create_default_context(cafile=pem)
        answer = httpx.post(f"{url}predict", content=png(), verify=trusted, timeout=30)
        assert answer.json()["label"] == 1
        with socket.create_connection(("127.0.0.1", httpx.URL(url).port or 0), 30) as silent:
            assert silent.recv(1) == b""  # the time for the first head includes the handshake
        with pytest.raises(httpx.ConnectError, match="CERTIFICATE_VERIFY_FAILED"):
            httpx.get(f"{url}health")
        with pytest.raises(httpx.HTTPError):
            httpx.get(f"{url.replace('https', 'http')}health")
        service.send_signal(signal.SIGTERM)
        assert service.wait(30) == 0
        assert "Traceback" not in service.stderr.read()


@pytest.mark.family("service")
@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM], ids=["int", "term"])
def test_the_command_serves_until_a_signal(command, number):
    flags = ("--max-bytes", "9000", "--precision", "bfloat16")
    with command(*flags, token="geheim") as (service, url):
        for content, token, status in (
            (png(), "geheim", 200),
            (png(), "other", 401),
            (bytes(9001), "geheim", 413),
        ):
            answer = httpx.post(f"{url}predict", content=content, headers=bearer(token))
            assert answer.status_code == status
        service.send_signal(number)
        assert service.wait(30) == 0
        lines = service.stderr.read().splitlines()
    pattern = r"\d{4}-\d\d-\d\dT[\d:]{8}Z 127\.0\.0\.1 \"POST /predict\" (\d+) \d+ bytes \d+ ms"
    statuses = [found[1] for line in lines if (found := re.fullmatch(pattern, line))]
    assert statuses == ["200", "401", "413"] and len(lines) == 3  # the access log only
