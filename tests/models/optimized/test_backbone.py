"""Optimized backbones: fewer operations, the same results."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import timm
import torch
import torch.nn.functional as F
from torch import Tensor, fx, nn

from msflow_ext.models.conv.packed import ACTIVATIONS, PackedConv2d
from msflow_ext.models.optimized.backbone import optimize_network
from msflow_ext.testing import relative_error


def randomized(network: nn.Module, seed: int = 0) -> nn.Module:
    """Return the network in evaluation mode, with random statistics in its batch norms."""
    generator = torch.Generator().manual_seed(seed)
    for part in network.modules():
        if isinstance(part, nn.BatchNorm2d):
            for tensor in (part.weight, part.running_var):
                if tensor is not None:
                    tensor.data.uniform_(0.5, 1.5, generator=generator)
            for tensor in (part.bias, part.running_mean):
                if tensor is not None:
                    tensor.data.normal_(std=0.2, generator=generator)
    return network.eval().requires_grad_(False)


def steps(network: nn.Module) -> list[str]:
    """Return the names of the modules, functions and methods that a traced network calls."""
    assert isinstance(network, fx.GraphModule)
    return [
        type(network.get_submodule(str(node.target))).__name__
        if node.op == "call_module"
        else getattr(node.target, "__name__", str(node.target))
        for node in network.graph.nodes
        if node.op.startswith("call")
    ]


@pytest.mark.parametrize(
    ("name", "left"),
    [
        ("resnet18", {"MaxPool2d"}),
        ("wide_resnet50_2", {"MaxPool2d"}),
        ("efficientnet_lite0", set()),
        ("tf_efficientnet_lite0", set()),
        ("efficientnet_b0", {"mean", "Sigmoid", "mul"}),
        ("mobilenetv3_small_100", {"mean", "Hardsigmoid", "mul"}),
        ("densenet121", None),
        ("regnety_002", None),
        ("ghostnet_100", None),
        ("res2net50_26w_4s", None),
        ("resnetv2_50", None),
        ("convnext_atto", None),
        ("cspresnet50", None),
        ("dm_nfnet_f0", None),
        ("mobileone_s0", None),
        ("repvit_m1", None),
    ],
)
def test_a_network_keeps_its_results(name: str, left: set[str] | None) -> None:
    """Compare at sizes and batch sizes other than those of the trace."""
    network = randomized(timm.create_model(name, features_only=True, out_indices=(1, 2, 3)))
    generator = torch.Generator().manual_seed(0)
    found = optimize_network(network, torch.randn(1, 3, 64, 64, generator=generator), torch.float32)
    assert any(isinstance(part, PackedConv2d) for part in found.modules())
    for shape in ((3, 3, 96, 64), (1, 3, 77, 130)):
        x = torch.randn(shape, generator=generator)
        for a, b in zip(found(x), network(x), strict=True):
            assert relative_error(a, b) <= 1e-4
    if left is not None:
        assert set(steps(found)) - {"PackedConv2d"} == left


def test_fused_additions_and_activations_round_once_in_bfloat16() -> None:
    """A fused addition and activation read the sums before they are rounded."""
    network = randomized(timm.create_model("resnet18", features_only=True, out_indices=(1, 2, 3)))
    x = torch.randn(1, 3, 64, 64, generator=torch.Generator().manual_seed(1))
    found = optimize_network(network, x, torch.bfloat16)(x.bfloat16())
    apart = copy.deepcopy(network).bfloat16()(x.bfloat16())
    exact = copy.deepcopy(network).double()(x.double())
    for each in found:
        assert each.dtype is torch.bfloat16
        assert each.is_contiguous(memory_format=torch.channels_last)
    # One rounding is a small part of the mean square error: the ratio is 0.5 to 0.85 for all weights.
    assert (found[-1] - exact[-1]).square().mean() < (apart[-1] - exact[-1]).square().mean()


class Small(nn.Module):
    """Two convolutions with a batch norm, which each case connects differently."""

    def __init__(self, **parts: nn.Module) -> None:
        super().__init__()
        self.conv = nn.Conv2d(3, 8, 3, padding=1)
        self.norm = nn.BatchNorm2d(8)
        self.act = nn.ReLU(inplace=True)
        self.other = nn.Conv2d(3, 8, 1)
        for name, part in parts.items():
            self.add_module(name, part)


class NormOfAnotherUse(Small):
    def forward(self, x: Tensor) -> Tensor:
        y = self.conv(x)
        return self.norm(y) + y.exp()


class ConvolutionUsedTwice(Small):
    def forward(self, x: Tensor) -> Tensor:
        return self.norm(self.conv(x)) + self.conv(x.flip(2)).sigmoid()


class NormUsedTwice(Small):
    def forward(self, x: Tensor) -> Tensor:
        return self.norm(self.conv(x)) * self.norm(self.other(x))


class AdditionOfItself(Small):
    def forward(self, x: Tensor) -> Tensor:
        y = self.conv(x)
        return torch.relu(y + y)


class AdditionOfNumber(Small):
    def forward(self, x: Tensor) -> Tensor:
        return F.relu(self.conv(x) + 1)


class WeightedAddition(Small):
    def forward(self, x: Tensor) -> Tensor:
        return torch.add(self.conv(x), self.other(x), alpha=3)


class AdditionOfOneImage(Small):
    """Adds a map that is the same for every image, with the shape of a batch of one."""

    def __init__(self) -> None:
        super().__init__()
        self.map = nn.Parameter(torch.linspace(-1, 1, 8 * 8 * 8).view(1, 8, 8, 8))

    def forward(self, x: Tensor) -> Tensor:
        position = F.interpolate(self.map, size=x.shape[2:])
        return self.act(self.conv(x) + position)


class AdditionToWhatIsChanged(Small):
    """Halves the other operand after the convolution, so the addition cannot be fused."""

    def forward(self, x: Tensor) -> Tensor:
        y = self.other(x)
        z = self.conv(x)
        y.mul_(0.5)
        z += y
        return self.act(z)


class ResultThatIsReturned(Small):
    def forward(self, x: Tensor) -> list[Tensor]:
        y = self.conv(x)
        z = y + self.other(x)
        return [y, self.act(z)]


class ChangedInPlace(Small):
    """Overwrites the other operand, and reads it again."""

    def forward(self, x: Tensor) -> Tensor:
        y = self.other(x)
        y += self.conv(x)
        return self.norm(y) + y


class Decides(Small):
    """Cannot be traced, because the control flow depends on values."""

    def forward(self, x: Tensor) -> Tensor:
        y = self.norm(self.conv(x))
        return self.act(y) if float(y.mean()) > -1e9 else y


class ReadsWeights(Small):
    """Reads a weight, which a packed convolution does not have."""

    def forward(self, x: Tensor) -> Tensor:
        return F.conv2d(self.conv(x), self.other.weight.view(3, 8, 1, 1))


class NormWithoutWeights(Small):
    def __init__(self) -> None:
        super().__init__(norm=nn.BatchNorm2d(8, affine=False))

    def forward(self, x: Tensor) -> Tensor:
        return self.act(self.norm(self.conv(x)))


class NormOfTheBatch(Small):
    """Has no running statistics, so it is not constant."""

    def __init__(self) -> None:
        super().__init__(norm=nn.BatchNorm2d(8, track_running_stats=False))

    def forward(self, x: Tensor) -> Tensor:
        return self.act(self.norm(self.conv(x)))


class DtypeOfWeights(Small):
    """Reads the dtype of a weight, which a trace would record as a constant."""

    def forward(self, x: Tensor) -> Tensor:
        return self.act(self.norm(self.conv(x))).to(self.other.weight.dtype)


@pytest.mark.parametrize(("dtype", "bound"), [(torch.float32, 1e-5), (torch.bfloat16, 0.03)])
@pytest.mark.parametrize("case", Small.__subclasses__(), ids=lambda case: case.__name__)
def test_operations_that_cannot_be_fused_stay(
    case: type[nn.Module], dtype: torch.dtype, bound: float
) -> None:
    torch.manual_seed(0)
    network = randomized(case())
    example = torch.randn(1, 3, 8, 8)
    found = optimize_network(network, example, dtype)
    for x in (example, torch.randn(3, 3, 8, 8), torch.randn(2, 3, 12, 5)):
        got, expected = found(x.to(dtype)), network(x.clone())
        pairs = [(got, expected)] if isinstance(got, Tensor) else zip(got, expected, strict=True)
        for a, b in pairs:
            assert a.dtype is dtype and relative_error(a, b) <= bound


def test_the_original_does_not_change() -> None:
    network = randomized(timm.create_model("resnet18", features_only=True, out_indices=(1, 2)))
    before = {name: tensor.clone() for name, tensor in network.state_dict().items()}
    x = torch.randn(1, 3, 64, 64)
    found = optimize_network(network, x, torch.float32)
    expected = found(x)
    assert all(tensor.equal(before[name]) for name, tensor in network.state_dict().items())
    for tensor in network.state_dict().values():
        tensor.zero_()
    assert all(a.equal(b) for a, b in zip(found(x), expected, strict=True))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float64])
@pytest.mark.parametrize("channels", [(8, 6), (64, 64)], ids=str)
@pytest.mark.parametrize("activation", ACTIVATIONS)
def test_fused_additions_and_activations_equal_separate_ones(
    dtype: torch.dtype, channels: tuple[int, int], activation: str
) -> None:
    """With every algorithm: packed, plain (float64), and Winograd's (64 channels, if the processor supports it)."""
    torch.manual_seed(0)
    conv = nn.Conv2d(*channels, 3, padding=1).requires_grad_(False)
    x = torch.randn(2, channels[0], 9, 11).to(dtype)
    other = torch.randn(2, 9, 22, channels[1]).to(dtype)[:, :, ::2].permute(0, 3, 1, 2)
    packed = PackedConv2d(conv, dtype, activation=activation)
    reference: dict[str, Any] = {
        "none": lambda y: y,
        "relu": torch.relu,
        "relu6": lambda y: y.clamp(0, 6),
        "silu": lambda y: y * y.sigmoid(),
        "hardswish": lambda y: y * (y + 3).clamp(0, 6) / 6,
    }
    exact = copy.deepcopy(conv).double()(x.double())
    bound = {torch.float64: 1e-6, torch.float32: 1e-5, torch.bfloat16: 0.02}[dtype]
    assert relative_error(packed(x), reference[activation](exact)) <= bound
    before = other.clone()
    got = packed(x, other)
    assert got.dtype is dtype and other.equal(before)
    assert relative_error(got, reference[activation](exact + other.double())) <= bound
