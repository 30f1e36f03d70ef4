"""Choice of a convolution's algorithm, which does not change the result."""

from __future__ import annotations

import copy
import math
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from msflow_ext import ops
from msflow_ext.models.conv import winograd
from msflow_ext.models.conv.packed import PackedConv2d
from msflow_ext.models.conv.winograd import winograd_form
from msflow_ext.models.optimized.backbone import optimize_network
from msflow_ext.testing import relative_error

Normal = Callable[..., Tensor]

F32, F64, BF16 = torch.float32, torch.float64, torch.bfloat16
PLAIN: tuple[Any, ...] = ((1, 1), (1, 1), (1, 1), 1)


@pytest.fixture(params=[(F32,), (F32, BF16)], ids=["without-bfloat16", "with-bfloat16"])
def factors(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> Any:
    """Simulate a processor that multiplies these dtypes."""
    monkeypatch.setattr(winograd, "factor_dtypes", lambda: request.param)
    monkeypatch.setattr(winograd, "has_amx", lambda: False)
    return request.param


def form(
    dtype: torch.dtype,
    *,
    channels: tuple[int, int] = (64, 64),
    size: tuple[int, int, int] = (1, 32, 32),
    kernel: int = 3,
    options: tuple[Any, ...] = PLAIN,
) -> Any:
    weight = torch.empty(channels[1], channels[0], kernel, kernel)
    return winograd_form(math.prod(size), dtype, weight, *options)


def test_tiles_are_larger_if_many_positions_share_the_weights(factors: Any) -> None:
    assert form(F32) == form(F32, size=(4, 16, 16)) == (4, F32)
    assert form(F32, size=(1, 16, 16)) == form(F32, size=(1, 8, 8)) == (2, F32)


def test_factors_are_bfloat16_if_the_processor_multiplies_bfloat16(factors: Any) -> None:
    assert form(BF16) == ((3, BF16) if BF16 in factors else (4, F32))


@pytest.mark.parametrize(
    "case",
    [
        {"dtype": F64},
        {"dtype": F32, "channels": (31, 64)},
        {"dtype": F32, "channels": (64, 31)},
        {"dtype": F32, "size": (1, 7, 8)},
        {"dtype": F32, "kernel": 1},
        {"dtype": F32, "options": ((1, 1), (2, 2), (1, 1), 1)},
        {"dtype": F32, "options": ((1, 1), (1, 1), (2, 2), 1)},
        {"dtype": F32, "options": ((1, 1), (1, 1), (1, 1), 2)},
        {"dtype": F32, "options": ("same", (1, 1), (1, 1), 1)},
    ],
    ids=str,
)
def test_convolutions_that_winograd_does_not_speed_up_stay_direct(
    factors: Any, case: dict[str, Any]
) -> None:
    assert form(**case) is None


def test_few_channels_in_bfloat16_stay_direct(factors: Any) -> None:
    assert (form(BF16, channels=(48, 64)) is None) == (BF16 in factors)


def test_matrix_units_keep_bfloat16_direct(monkeypatch: pytest.MonkeyPatch, factors: Any) -> None:
    monkeypatch.setattr(winograd, "has_amx", lambda: True)
    assert BF16 not in factors or form(BF16) is None
    assert form(F32) == (4, F32)


def test_without_kernels_everything_stays_direct() -> None:
    with ops.backend("reference"):
        assert form(F32) is None and form(BF16) is None


@pytest.mark.parametrize(("dtype", "bound"), [(F32, 1e-5), (BF16, 0.02)])
@pytest.mark.parametrize("padding_mode", ["zeros", "reflect"])
@pytest.mark.parametrize("bias", [True, False], ids=["bias", "no-bias"])
def test_winograd_and_direct_convolutions_agree(
    factors: Any, normal: Normal, dtype: torch.dtype, bound: float, padding_mode: Any, bias: bool
) -> None:
    conv = nn.Conv2d(64, 72, 3, padding=1, padding_mode=padding_mode, bias=bias)
    x = normal(2, 64, 9, 13, dtype=dtype)
    expected = copy.deepcopy(conv).double()(x.double()).relu()
    packed = PackedConv2d(conv, dtype, activation="relu")
    with torch.no_grad():
        for y in (packed(x), copy.deepcopy(packed)(x[:1])):
            assert y.dtype is dtype
            assert relative_error(y, expected[: len(y)]) <= bound


def test_a_network_keeps_its_results(native: None, normal: Normal) -> None:
    network = nn.Sequential(
        nn.Conv2d(32, 64, 3, padding=1), nn.BatchNorm2d(64), nn.ReLU(), nn.Conv2d(64, 32, 3)
    ).eval()
    x = normal(1, 32, 12, 12)
    with torch.no_grad():
        got = optimize_network(network, x, F32)(x)
        assert relative_error(got, network(x)) <= 1e-5
