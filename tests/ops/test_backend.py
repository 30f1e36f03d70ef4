"""Tests of the backend: kernels run where they exist and are allowed, the reference elsewhere."""

from __future__ import annotations

import os
import subprocess
import sys
from collections.abc import Callable
from contextlib import nullcontext

import pytest
import torch
from torch import Tensor, nn

from msflow_ext import ops
from msflow_ext.ops import _backend
from msflow_ext.testing import relative_error, tolerance

Normal = Callable[..., Tensor]

F32 = torch.float32


@pytest.mark.filterwarnings("ignore:.torch.jit.script. is deprecated")
def test_forward_mode_differentiation_uses_the_reference(native: None, normal: Normal) -> None:
    x = normal(2, 3, 4)
    with torch.autograd.forward_ad.dual_level():
        dual = torch.autograd.forward_ad.make_dual(x, torch.ones_like(x))
        slope = torch.autograd.forward_ad.unpack_dual(ops.half_square_norm(dual)).tangent
    assert slope is not None
    assert relative_error(slope, x.sum((1, 2))) <= tolerance(F32, 12)


def test_the_backend_is_native_only_for_tensors_that_kernels_support(native: None) -> None:
    class Marked(Tensor):
        pass

    x = torch.zeros(2, 3)
    assert _backend.is_native(x, None, nn.Parameter(x), x.double(), x.bfloat16(), x.long())
    assert _backend.is_native(x, x.half()) == _backend.runs_cuda(x)
    assert not _backend.is_native(x.to(torch.float8_e4m3fn))
    assert not _backend.is_native(x.to("meta"))
    assert not _backend.is_native(x.as_subclass(Marked))
    with ops.backend("reference"):
        assert not _backend.is_native(x)
        with ops.backend("native"):
            assert _backend.is_native(x)
        assert not _backend.is_native(x)
    assert _backend.is_native(x)


@pytest.mark.parametrize("dtype", [torch.float16, torch.float8_e4m3fn], ids=str)
def test_other_floating_dtypes_use_the_reference(
    native: None, normal: Normal, dtype: torch.dtype
) -> None:
    z = normal(2, 3, 4, 5).to(dtype)
    got = ops.log_likelihood_map(z)
    assert got.dtype is F32
    assert relative_error(got, ops.log_likelihood_map(z.double())) <= tolerance(F32, 3)


def test_an_unknown_backend_is_refused() -> None:
    with pytest.raises(ValueError, match="name must be 'native' or 'reference', got 'cuda'"):
        ops.backend("cuda").__enter__()


def test_without_kernels_native_is_refused_and_the_reference_warns_once(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(_backend, "C", None)
    monkeypatch.setattr(_backend, "STATUS", "not compiled (no compiler)")
    monkeypatch.setattr(_backend, "_warned", False)
    with pytest.raises(
        RuntimeError, match=r"must be 'reference', got 'native', because kernels are not comp"
    ):
        ops.backend("native").__enter__()
    z = torch.ones(1, 2, 3)
    with pytest.warns(UserWarning, match=r"slower reference: kernels not compiled \(no compiler\)"):
        assert ops.half_square_norm(z).item() == 3.0
    assert ops.half_square_norm(z).item() == 3.0


@pytest.mark.parametrize("name", ["reference", "cuda"])
def test_the_environment_chooses_the_backend(name: str) -> None:
    code = (
        "import torch; from msflow_ext.ops import _backend as b; print(b.is_native(torch.ones(1)))"
    )
    done = subprocess.run(
        [sys.executable, "-c", code],
        env={**os.environ, "MSFLOW_EXT_BACKEND": name},
        capture_output=True,
        text=True,
        check=False,
    )
    if name == "reference":
        assert done.stdout.strip() == "False", done.stderr
    else:
        message = "MSFLOW_EXT_BACKEND must be 'native' or 'reference', got 'cuda'"
        assert message in done.stderr.splitlines()[-1]


def test_overlapping_windows_are_copied_for_cuda(monkeypatch: pytest.MonkeyPatch) -> None:
    signal = torch.arange(40.0)
    windows = [
        signal.unfold(0, 8, 1)[None, :4],  # channels one step apart
        signal.unfold(0, 8, 1)[:, None],  # samples
        signal.unfold(0, 8, 1),  # vectors
    ]
    for cuda in (False, True):
        monkeypatch.setattr(_backend, "_emulated", cuda)
        for x in windows:
            (kept,), _ = _backend.views(_backend.is_channels_last(x), x)
            assert kept is not None
            assert torch.equal(kept, x)
            assert (kept is x) != cuda
        for x in (torch.zeros(2, 3, 4), torch.zeros(1, 3), torch.zeros(3, 1, 1)):
            (kept,), _ = _backend.views(_backend.is_channels_last(x), x)
            assert kept is x


def test_misaligned_tensors_are_refused_on_cuda(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    odd = torch.frombuffer(bytearray(4 * 24 + 1), dtype=torch.float32, offset=1)
    for cuda in (False, True):
        monkeypatch.setattr(_backend, "_emulated", cuda)
        refused = (
            pytest.raises(ValueError, match="must begin at a multiple of 4 bytes")
            if cuda
            else nullcontext()
        )
        with refused:
            _backend.views(False, odd.view(2, 3, 4))
        with refused:
            _backend.addresses(odd[:3])
