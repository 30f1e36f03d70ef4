"""Packed convolutions for inference equal the original ones."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from timm.layers.conv2d_same import Conv2dSame
from torch import Tensor, nn

from msflow_ext.models.conv import packed
from msflow_ext.models.conv.packed import PackedConv2d
from msflow_ext.models.optimized.backbone import optimize_network
from msflow_ext.testing import relative_error

Normal = Callable[..., Tensor]


@pytest.mark.parametrize("size", [(8, 8), (9, 12)])
@pytest.mark.parametrize("stride", [1, 2])
def test_a_convolution_padded_as_tensorflow_does_is_packed(normal: Normal, stride, size) -> None:
    conv = Conv2dSame(4, 6, 3, stride, groups=2).requires_grad_(False)
    network = nn.Sequential(conv, nn.BatchNorm2d(6)).eval()
    x = normal(2, 4, *size)
    found = optimize_network(network, x[:1], torch.float32)
    assert any(isinstance(part, PackedConv2d) for part in found.modules())
    torch.testing.assert_close(found(x), network(x), rtol=1e-4, atol=1e-5)
    other = normal(2, 4, size[1], size[0] + 1)
    torch.testing.assert_close(found(other), network(other), rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("slow", [True, False])
def test_bfloat16_is_computed_in_float32_on_a_processor_without_such_instructions(
    normal: Normal, monkeypatch: pytest.MonkeyPatch, slow: bool
) -> None:
    monkeypatch.setattr(packed, "has_bfloat16", lambda: not slow)
    conv = nn.Conv2d(8, 6, 1).requires_grad_(False)
    x = normal(2, 8, 5, 7, dtype=torch.bfloat16)
    found = PackedConv2d(conv, torch.bfloat16, activation="relu")(x)
    assert found.dtype is torch.bfloat16
    weight, bias = conv.weight, conv.bias
    assert bias is not None
    exact = nn.functional.conv2d(x.double(), weight.double(), bias.double()).relu()
    assert relative_error(found, exact) < (0.004 if slow else 0.02)
    if slow:
        assert found.equal(nn.functional.conv2d(x.float(), weight, bias).relu().bfloat16())
