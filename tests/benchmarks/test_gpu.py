"""The measurements for a GPU run on the CPU with toy sizes, and keep their results."""

from __future__ import annotations

import json
import subprocess
import sys
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import nullcontext
from functools import partial
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
import torch
from torch import nn
from torch.overrides import TorchFunctionMode

import msflow_ext
from msflow_ext.ops import _backend

Load = Callable[[str], ModuleType]
ROOT = Path(__file__).parents[2]
TIMED = ("ceilings", "kernels", "norm", "aggregation", "training", "inference")


class InsteadOfCUDA(TorchFunctionMode):
    """Mode that makes tensors for the GPU on another device."""

    def __init__(self, device: str) -> None:
        super().__init__()
        self.device = device

    def __torch_function__(
        self, function: Any, types: Any, args: tuple[Any, ...] = (), kwargs: Any = None
    ) -> Any:
        if function is torch.Tensor.cuda:
            return args[0].to(self.device)
        given = dict(kwargs or {})
        if given.get("device") == "cuda":
            given["device"] = self.device
        return function(*args, **given)


@pytest.fixture
def gpu(load: Load, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> ModuleType:
    (tmp_path / "benchmarks.md").write_text("<!-- gpu:begin -->\nnot yet\n<!-- gpu:end -->\n")
    monkeypatch.setattr(load("gpu.report"), "SPEED", tmp_path / "benchmarks.md")
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda: "A GPU, 1 GB")
    return load("gpu.__main__")


@pytest.fixture
def speed(
    request: pytest.FixtureRequest, load: Load, monkeypatch: pytest.MonkeyPatch
) -> Iterator[ModuleType]:
    """Return the timed steps at toy sizes, on the CPU or on the meta device, which refuses tensors of the CPU."""
    speed = load("gpu.speed")
    small = {"CHANNELS": (16, 32, 64), "BLOCKS": (1, 1, 1), "SIZES": (8, 4, 2)}
    for name, value in {**small, "COPIED": 2**20, "SIDE": 128}.items():
        monkeypatch.setattr(speed, name, value)
    monkeypatch.setattr(speed, "_time", once)
    monkeypatch.setattr(speed, "_recorded", lambda run: run)
    monkeypatch.setattr(nn.Module, "cuda", lambda module: module.to(request.param))
    monkeypatch.setattr(torch, "compile", lambda function, **_: function)
    monkeypatch.setattr(torch.cuda, "Stream", lambda: None)
    monkeypatch.setattr(torch, "autocast", lambda *_, **__: nullcontext())
    monkeypatch.setattr(msflow_ext, "graphed", lambda function, _: function)
    monkeypatch.setattr(torch.optim, "Adam", partial(adam, torch.optim.Adam))
    precision = torch.get_float32_matmul_precision()
    with InsteadOfCUDA(request.param):
        yield speed
    torch.set_float32_matmul_precision(precision)


def adam(kind: Any, parameters: Any, *, lr: float, fused: bool) -> Any:
    assert fused
    return kind(parameters, lr=lr)


@pytest.mark.parametrize("speed", ["meta"], indirect=True)
@pytest.mark.parametrize("step", ["kernels", "norm", "aggregation"])
def test_timed_steps_do_not_mix_devices(speed: ModuleType, step: str) -> None:
    assert all(number > 0 for number in numbers(getattr(speed, step)({})))


@pytest.mark.parametrize("speed", ["meta"], indirect=True)
def test_the_reference_implementation_does_not_mix_devices(speed: ModuleType) -> None:
    features = speed._features(2, torch.channels_last)
    for name, flows in speed._flows().items():
        if name != "ours":
            speed._step(flows, features, False)()
            assert all(m.is_meta for m in flows.log_likelihood(features))


@pytest.mark.parametrize("speed", ["cpu"], indirect=True)
def test_every_timed_step_runs_and_fills_the_table(speed: ModuleType, load: Load) -> None:
    found = {step: getattr(speed, step)({}) for step in TIMED}
    assert all(number > 0 for number in numbers(found))
    errors = [each["error against eager fp32"] for each in found["inference"].values()]
    assert max(errors) < 0.03
    block = "\n".join(load("gpu.report").block({"device": "A GPU", "date": "today", **found}))
    assert block.count("| 1x |") == 7 and "not measured" not in block  # all times are equal


def once(runs: Mapping[str, Callable[[], Any]], **_: Any) -> dict[str, float]:
    for run in runs.values():
        run()
    return dict.fromkeys(runs, 1e-3)


def numbers(found: Mapping[str, Any]) -> Iterator[float]:
    for value in found.values():
        yield from numbers(value) if isinstance(value, dict) else [value]


def test_finished_steps_are_kept_and_not_repeated(
    gpu: ModuleType, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    calls = []

    def first(_: Any) -> dict[str, Any]:
        calls.append("first")
        return {"ms": 1}

    def second(_: Any) -> dict[str, Any]:
        calls.append("second")
        if calls.count("second") == 1:
            raise RuntimeError("CUDA: out of memory")
        return {"ms": 2}

    monkeypatch.setattr(gpu, "STEPS", {"first": first, "second": second})
    file = ["--file", str(tmp_path / "found.json")]
    assert gpu.main(file) == 1
    found = json.loads((tmp_path / "found.json").read_text())
    assert found["device"] == "A GPU, 1 GB" and found["first"]["ms"] == 1
    assert found["second"]["error"] == "RuntimeError: CUDA: out of memory"
    assert gpu.main(file) == 0 and calls == ["first", "second", "second"]
    assert "On one A GPU, 1 GB" in (tmp_path / "benchmarks.md").read_text()


def test_the_kernels_are_not_loaded_before_they_are_built() -> None:
    code = "import sys, benchmarks.gpu.__main__; raise SystemExit('msflow_ext' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], cwd=ROOT, check=False).returncode == 0


@pytest.mark.parametrize("step", ["kernels", "training"])
def test_steps_without_kernels_are_refused(
    gpu: ModuleType, step: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(torch.cuda, "current_device", lambda: 0)
    monkeypatch.setattr(_backend, "cuda_problem", lambda _: "no CUDA kernel is built")
    with pytest.raises(RuntimeError, match="no CUDA kernel is built"):
        gpu.STEPS[step]({})


def test_failed_tests_are_named(gpu: ModuleType, monkeypatch: pytest.MonkeyPatch) -> None:
    said = "..F\nFAILED tests/ops/a.py::b - x\nFAILED tests/ops/a.py::c\n2 failed, 1 passed"
    done = subprocess.CompletedProcess([], 1, said, "")
    monkeypatch.setattr(gpu, "_ended", lambda *_, **__: done)
    found = gpu.STEPS["tests"]({})
    assert found["error"] == "2 failed, 1 passed"
    assert found["failed"] == ["FAILED tests/ops/a.py::b - x", "FAILED tests/ops/a.py::c"]


def test_a_command_that_takes_too_long_is_killed_with_its_children(
    gpu: ModuleType, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    child = f"import time; time.sleep(3); open({str(tmp_path / 'lived')!r}, 'w')"
    code = f"import subprocess, sys; subprocess.run([sys.executable, '-c', {child!r}])"
    monkeypatch.setattr(gpu, "LONGEST", 1)
    assert gpu._ended([sys.executable, "-c", code]) is None
    time.sleep(4)
    assert not (tmp_path / "lived").exists()


@pytest.mark.parametrize("tool", ["memcheck", "initcheck"])
def test_findings_of_the_sanitizer_are_kept(
    gpu: ModuleType, tool: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    seen = []

    def ended(command: Any, **_: str) -> Any:
        seen.append(command)
        return subprocess.CompletedProcess(command, 9, "Invalid __global__ read of size 16", "")

    monkeypatch.setattr(gpu.shutil, "which", lambda *_, **__: "/bin/compute-sanitizer")
    monkeypatch.setattr(gpu, "_ended", ended)
    assert gpu.STEPS[tool]({}) == {"error": "Invalid __global__ read of size 16"}
    assert seen[0][1:3] == ["--tool", tool]
    assert ("kns=msflow" in seen[0]) == (tool == "memcheck")


def test_a_report_needs_no_gpu(
    gpu: ModuleType, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    (tmp_path / "found.json").write_text('{"device": "A GPU", "date": "today"}')
    assert gpu.main(["--file", str(tmp_path / "found.json"), "--report"]) == 0
    assert "On one A GPU, today" in (tmp_path / "benchmarks.md").read_text()


def test_without_a_build_nothing_is_measured(
    gpu: ModuleType, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def build(_: Any) -> dict[str, Any]:
        raise RuntimeError("no nvcc")

    monkeypatch.setattr(gpu, "STEPS", {"build": build, "kernels": lambda _: pytest.fail("ran")})
    assert gpu.main(["--file", str(tmp_path / "found.json")]) == 1
    assert set(json.loads((tmp_path / "found.json").read_text())) == {"device", "date", "build"}


def test_a_comparison_shows_its_worst_case(load: Load) -> None:
    rows = {"norm forward 8": {"share": 0.9}, "norm forward 16": {"share": 0.7}}
    document = {"device": "A GPU", "date": "today", "kernels": rows, "check": {"error": "x\ny"}}
    lines = list(load("gpu.report").block(document))
    assert "| norm, copy of its bytes | 70% |" in lines
    assert "| norm, eager | not measured |" in lines
    assert "* check: error x y" in lines and "* tests: not run yet" in lines


@pytest.mark.skipif(_backend.C is None, reason="nothing is compiled")
def test_checking_kernels_needs_no_package_of_the_command_line(
    gpu: ModuleType, tmp_path: Path
) -> None:
    code = gpu.CHECK.format(every=9).replace('device("cuda")', 'device("cpu")')
    alone = f"import sys; sys.modules['yaml'] = None\n{code}"
    done = subprocess.run(
        [sys.executable, "-c", alone],
        cwd=tmp_path,  # otherwise the checkout would be imported instead of the installed package
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stdout + done.stderr
    agree, of = done.stdout.split()[0:3:2]
    assert agree == of != "0"
