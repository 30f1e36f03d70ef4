"""A build without kernels keeps the compiler's messages, warns at run time, and is refused for wheels."""

from __future__ import annotations

import importlib.util
import os
import sys
import tomllib
import types
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from msflow_ext import ops, testing
from msflow_ext.ops import _backend

pytestmark = pytest.mark.family("builds")

ROOT = Path(__file__).parents[1]
LOG = Path("msflow_ext/ops/compile_log.txt")


@pytest.fixture
def build(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Callable[..., Any]:
    """Return ``build(hook, during)``, which runs the backend's hook with ``during()`` as scikit-build-core."""
    monkeypatch.chdir(tmp_path)
    LOG.parent.mkdir(parents=True)

    def run(hook: str, during: Callable[[], str]) -> str:
        core, module = types.ModuleType("scikit_build_core"), types.ModuleType("build")
        vars(core)["build"] = module
        for name in ("build_wheel", "build_editable"):
            vars(module)[name] = lambda *arguments: during()
        monkeypatch.setitem(sys.modules, "scikit_build_core", core)
        monkeypatch.setitem(sys.modules, "scikit_build_core.build", module)
        spec = importlib.util.spec_from_file_location("backend", ROOT / "cmake/build_backend.py")
        assert spec is not None and spec.loader is not None
        backend = importlib.util.module_from_spec(spec)
        spec.loader.exec_module(backend)
        return getattr(backend, hook)("dist")

    return run


def compile_with_error() -> str:
    """Act as scikit-build-core when the compiler fails: pack the log into a pure Python wheel."""
    os.system("echo 'kernel.cpp:1: error: invented'; echo to stderr >&2")
    print("*** CMake build failed - retrying due to override...", flush=True)
    Path("packed.txt").write_text(LOG.read_text())
    return "msflow_ext-0-py3-none-any.whl"


def compile_without_error() -> str:
    return "msflow_ext-0-cp311-cp311-linux_x86_64.whl"


def test_messages_of_the_compiler_are_shown_and_packed(build: Any, capfd: Any) -> None:
    assert build("build_wheel", compile_with_error) == "msflow_ext-0-py3-none-any.whl"
    messages = "kernel.cpp:1: error: invented\nto stderr\n"
    assert Path("packed.txt").read_text().startswith(messages)
    assert messages in capfd.readouterr().out
    assert not LOG.exists()


def test_an_editable_install_keeps_the_compiler_log_until_a_build_succeeds(build: Any) -> None:
    build("build_editable", compile_with_error)
    assert "invented" in LOG.read_text()
    build("build_editable", compile_without_error)
    assert not LOG.exists()


def test_a_build_that_fails_leaves_no_log(build: Any) -> None:
    def fail() -> str:
        raise SystemExit(1)

    for hook in ("build_wheel", "build_editable"):
        with pytest.raises(SystemExit):
            build(hook, fail)
    assert os.write(1, b"") == 0  # stdout is restored
    build("build_wheel", compile_without_error)
    assert not LOG.exists()


def test_info_and_status_show_the_messages_of_the_compiler(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    log = tmp_path / "compile_log.txt"
    lines = [f"line {i}" for i in range(50)] + ["kernel.cpp:1: error: invented", "*** failed"]
    log.write_text("\n".join(lines) + " - retrying due to override...\n*** Making wheel...\n")
    monkeypatch.setattr(_backend, "_COMPILE_LOG", log)
    assert testing.info().get("compiler") == lines[-20:]
    monkeypatch.setitem(sys.modules, "msflow_ext.ops._C", None)
    monkeypatch.delattr(sys.modules["msflow_ext.ops"], "_C", raising=False)
    status = "not compiled (its compiler failed when msflow_ext was installed)"
    assert _backend._load() == (None, status)
    log.unlink()
    assert "compiler" not in testing.info()
    module, status = _backend._load()
    assert module is None and status.startswith("not compiled (") and "_C" in status


def test_the_warning_says_what_to_install(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(_backend, "C", None)
    monkeypatch.setattr(_backend, "_warned", False)
    with pytest.warns(UserWarning, match=r"Install a C\+\+17 compiler .*, then msflow_ext again"):
        ops.half_square_norm(torch.ones(1, 2, 3))


def test_a_wheel_without_kernels_is_built_for_local_installs_only() -> None:
    settings = tomllib.loads((ROOT / "pyproject.toml").read_text())["tool"]["scikit-build"]
    (override,) = settings["overrides"]
    required = ("CIBUILDWHEEL", "CONDA_BUILD", "MSFLOW_EXT_REQUIRE_NATIVE")
    assert override["if"] == {"failed": True, "env": dict.fromkeys(required, False)}
    assert override["wheel"] == {"cmake": False, "exclude": []}
    assert settings["wheel"]["exclude"] == override["sdist"]["include"] == [LOG.as_posix()]
    assert all(name in settings["messages"]["after-failure"] for name in required)
