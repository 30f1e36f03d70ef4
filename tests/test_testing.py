"""Tests of the self-check: it finds wrong kernels, tolerances grow with the number of terms, info names backends."""

from __future__ import annotations

import math
import platform
import re
from importlib.metadata import PackageNotFoundError
from typing import Any

import pytest
import torch
from torch import Tensor

import msflow_ext
from msflow_ext import hardware, testing
from msflow_ext.ops import _backend, coupling


def test_the_tolerance_is_16_eps_times_the_root_of_the_terms() -> None:
    for dtype in (torch.float32, torch.float64):
        eps = torch.finfo(dtype).eps
        assert testing.tolerance(dtype) == 16 * eps
        assert testing.tolerance(dtype, 0) == 16 * eps
        assert testing.tolerance(dtype, 100) == pytest.approx(160 * eps)


def test_the_tolerance_of_half_precision_adds_its_rounding_to_that_of_float32() -> None:
    for dtype in (torch.bfloat16, torch.float16):
        rounding = testing.tolerance(dtype, 9) - testing.tolerance(torch.float32, 9)
        assert rounding == pytest.approx(2 * torch.finfo(dtype).eps)


@pytest.mark.parametrize(
    ("got", "expected", "error"),
    [
        ([1.0, 2.0], [1.0, 2.0], 0.0),
        ([1.0, -9.0], [1.0, -10.0], 0.1),
        ([0.0, 0.25], [0.0, 0.5], 0.25),
        ([], [], 0.0),
        ([math.nan, 1.0], [1.0, 1.0], math.nan),
        ([1.0, 1.0], [math.inf, 1.0], math.nan),
    ],
    ids=["equal", "relative-to-the-largest", "small-numbers-to-one", "empty", "nan", "infinite"],
)
def test_the_relative_error_is_divided_by_the_largest_magnitude_or_one(
    got: list[float], expected: list[float], error: float
) -> None:
    found = testing.relative_error(torch.tensor(got, requires_grad=True), torch.tensor(expected))
    assert found == pytest.approx(error, nan_ok=True)


def test_the_relative_error_refuses_different_shapes() -> None:
    with pytest.raises(ValueError, match=r"got must have shape \(1, 2\), got \(2, 1\)"):
        testing.relative_error(torch.zeros(2, 1), torch.zeros(1, 2))


def test_every_kernel_passes_the_check_on_this_machine(native: None) -> None:
    rows = testing.check()
    assert [case for case, error, bound in rows if not error <= bound] == []
    for word in (*_forms(), "inverse", "backward", "norm", "score", "aggregate", "bfloat16"):
        assert any(word in case for case, _, _ in rows), word


@pytest.mark.parametrize("wrong", [1.01, math.nan], ids=["off", "nan"])
def test_the_check_finds_a_wrong_kernel(
    native: None, monkeypatch: pytest.MonkeyPatch, wrong: float
) -> None:
    run = coupling._coupling.run

    def run_wrongly(results: tuple[Tensor, ...], *args: Any) -> None:
        run(results, *args)
        results[2].mul_(wrong)

    monkeypatch.setattr(coupling._coupling, "run", run_wrongly)
    found = {case for case, error, bound in testing.check() if not error <= bound}
    assert found
    assert all(case.startswith("coupling") and "inverse" not in case for case in found)
    assert {f"coupling {form} float32 contiguous" for form in _forms()} <= found


def _forms() -> tuple[str, ...]:
    return coupling.CLAMP_FORMS


def test_info_names_versions_and_the_backend_of_each_op() -> None:
    info = msflow_ext.info()
    assert info["msflow_ext"] == msflow_ext.__version__
    assert info["torch"] == torch.__version__
    assert info["threads"] == torch.get_num_threads()
    assert info["kernels"] == _backend.STATUS
    kind = "reference" if _backend.C is None else "native"
    for op in testing.OPS:
        assert info["backends"][op]["cpu"].startswith(f"{kind}: ")
        assert re.match(r"(native|reference): \w", info["backends"][op]["cuda"])
    if not hasattr(_backend.C, "cuda_problem"):
        assert info["backends"]["coupling"]["cuda"] == "reference: no CUDA kernel is built"


def test_missing_packages_have_no_version(monkeypatch: pytest.MonkeyPatch) -> None:
    def version(package: str) -> str:
        if package == "torch":
            return "2.0"
        raise PackageNotFoundError(package)

    monkeypatch.setattr(hardware, "version", version)
    assert hardware.versions() == {"python": platform.python_version(), "torch": "2.0"}
    assert testing.info()["timm"] is None
