"""Saving less for the backward pass changes no gradient."""

from __future__ import annotations

import copy
import pickle
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from msflow_ext import FastFlowHead, MSFlowHead, ops
from msflow_ext.activations import recomputed
from msflow_ext.bench import memory
from msflow_ext.models.msflow_head import ConditionedSubnet, CrossScaleSubnet
from msflow_ext.testing import relative_error

Normal = Callable[..., Tensor]
Layout = Callable[[Tensor], Tensor]

CHANNELS, SIZES = (6, 8, 10), ((6, 8), (3, 4), (2, 2))
HEADS: dict[str, Callable[[], Any]] = {
    "msflow": lambda: MSFlowHead(CHANNELS, blocks=(1, 2, 3), cond_channels=4, seed=0),
    "fastflow": lambda: FastFlowHead(CHANNELS, steps=3, input_sizes=SIZES, seed=0),
}


def make(name: str, dtype: torch.dtype = torch.float64) -> Any:
    """Return a small head with parameters that are not the initial ones."""
    head = HEADS[name]()
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for parameter in head.parameters():
            parameter += 0.1 * torch.randn(parameter.shape, generator=generator)
    return head.to(dtype)


def draw(normal: Normal, dtype: torch.dtype = torch.float64) -> list[Tensor]:
    maps = zip(CHANNELS, SIZES, strict=True)
    return [normal(2, c, *s, dtype=dtype).requires_grad_() for c, s in maps]


def differentiate(head: Any, x: list[Tensor]) -> list[Tensor]:
    """Return the loss, and its gradients with respect to features and parameters."""
    loss = head.loss(x)
    return [loss, *torch.autograd.grad(loss, [*x, *head.parameters()])]


@pytest.mark.parametrize(
    ("dtype", "bound"), [(torch.float64, 1e-11), (torch.float32, 1e-4)], ids=["float64", "float32"]
)
@pytest.mark.parametrize("name", HEADS)
def test_reversible_memory_gives_the_gradients_of_lean_memory(
    each_backend: str,
    normal: Normal,
    memory_format: Layout,
    name: str,
    dtype: torch.dtype,
    bound: float,
) -> None:
    head = make(name, dtype)
    x = [memory_format(t.detach()).requires_grad_() for t in draw(normal, dtype)]
    expected = differentiate(head, x)
    head.memory = "reversible"
    for got, right in zip(differentiate(head, x), expected, strict=True):
        assert relative_error(got, right) <= bound


@pytest.mark.parametrize("name", HEADS)
def test_frozen_parameters_and_features_get_no_gradient_with_reversible_memory(
    each_backend: str, normal: Normal, name: str
) -> None:
    head, x = make(name), [t.detach() for t in draw(normal)]
    names = [n for n, _ in head.named_parameters()][::2]
    for n, parameter in head.named_parameters():
        parameter.requires_grad_(n in names)
    head.loss(x).backward()
    expected = {n: head.get_parameter(n).grad for n in names}
    head.zero_grad()
    head.memory = "reversible"
    head.loss(x).backward()
    for n, parameter in head.named_parameters():
        if n in names:
            assert relative_error(parameter.grad, expected[n]) <= 1e-11
        else:
            assert parameter.grad is None


def test_reversible_memory_saves_only_the_latent_tensors(native: None, normal: Normal) -> None:
    head = make("msflow", torch.float32)
    x = [t.detach() for t in draw(normal, torch.float32)]
    head.loss(x)  # computes the positional encodings, which are cached

    def saved(kind: str) -> int:
        head.memory = kind
        return memory.saved(lambda: head.loss(x).backward())

    latent = sum(4 * t.numel() for t in x)
    assert 2 * latent <= saved("reversible") <= 2 * latent + 100  # of flows and fusion flow; sums
    assert saved("lean") > 4 * latent


def test_a_deeper_flow_needs_no_additional_memory_if_reversible(
    native: None, normal: Normal
) -> None:
    def saved(steps: int) -> int:
        head = FastFlowHead((8,), steps=steps, seed=0)
        head.memory = "reversible"
        x = [normal(2, 8, 9, 9)]
        return memory.saved(lambda: head.loss(x).backward())

    assert saved(2) == saved(8)


def test_the_choice_of_memory_reaches_every_module_and_survives_copies(normal: Normal) -> None:
    head = make("msflow")
    head.memory = "reversible"
    for each in (head, copy.deepcopy(head), pickle.loads(pickle.dumps(head))):
        assert [each.memory, *(flow.memory for flow in each.flows), each.fusion.memory] == (
            ["reversible"] * 5
        )
    assert "memory" not in " ".join(head.state_dict())
    head.memory = "lean"
    assert head.fusion.memory == "lean"


def test_an_unknown_memory_is_refused() -> None:
    with pytest.raises(
        ValueError, match=r"memory must be one of \('lean', 'reversible'\), got 'x'"
    ):
        make("msflow").memory = "x"


@pytest.mark.parametrize("name", HEADS)
def test_reversible_memory_refuses_half_precision(normal: Normal, name: str) -> None:
    head = make(name, torch.float32)
    head.memory = "reversible"
    x = draw(normal, torch.float32)
    message = "dtype must be float32 or float64 for memory='reversible'"
    with pytest.raises(TypeError, match=message), torch.autocast("cpu", torch.bfloat16):
        head.loss(x)
    with pytest.raises(TypeError, match=message):
        head.to(torch.bfloat16).loss([t.to(torch.bfloat16) for t in x])


def test_reversible_memory_refuses_clamped_latent_values(normal: Normal) -> None:
    head = make("msflow")
    head.memory = "reversible"
    loss = head.loss([head.fusion.limit * 10 * t.detach() for t in draw(normal)])
    with pytest.raises(RuntimeError, match=r"if latent values exceed 1e\+06, got .reversible"):
        loss.backward()


def test_predictions_do_not_depend_on_memory(normal: Normal) -> None:
    head, x = make("msflow"), [t.detach() for t in draw(normal)]
    expected = head(x).z
    head.memory = "reversible"
    with torch.no_grad():
        assert all(map(torch.equal, head(x).z, expected))
    with torch.autocast("cpu", torch.bfloat16, enabled=False):
        assert all(map(torch.equal, head(x).z, expected))


def test_recomputed_operations_have_first_and_second_derivatives(normal: Normal) -> None:
    subnet = ConditionedSubnet(4, 4).double()
    x1, cond = normal(1, 2, 2, 2, dtype=torch.float64), normal(1, 4, 2, 2, dtype=torch.float64)
    assert torch.autograd.gradcheck(lambda x: subnet(x, cond), x1.requires_grad_())
    assert torch.autograd.gradgradcheck(lambda x: subnet(x, cond), x1)


def test_recomputed_results_are_not_kept(normal: Normal) -> None:
    x, weight = normal(10, 10).requires_grad_(), nn.Parameter(normal(10, 10))
    calls = []

    def make_input(x: Tensor) -> Tensor:
        calls.append(torch.is_grad_enabled())
        return 2 * x

    def run() -> None:
        recomputed(lambda y: y @ weight, make_input, x).sum().backward()

    assert memory.saved(run) == 4  # the sum
    assert calls == [True, False]
    x.grad = weight.grad = None
    run()
    assert weight.grad is not None and x.grad is not None
    assert torch.equal(weight.grad, (2 * x).T @ torch.ones(10, 10))


def test_autocast_applies_to_recomputation(normal: Normal) -> None:
    subnet, x1, cond = ConditionedSubnet(8, 4), normal(2, 4, 5, 5), normal(1, 4, 5, 5)

    def grads(keep: bool) -> list[Tensor]:
        with torch.autocast("cpu", torch.bfloat16):
            if keep:
                h = subnet.conv_x(x1)
                y = subnet.conv_out(subnet.norm(h, subnet.conv_cond(cond).float()))
            else:
                y = subnet(x1, cond)
        return list(torch.autograd.grad(y.float().square().sum(), list(subnet.parameters())))

    assert all(map(torch.equal, grads(True), grads(False)))


def test_autocast_recomputes_the_upsampled_sum_bit_for_bit(native: None, normal: Normal) -> None:
    subnet = CrossScaleSubnet((4, 6))
    x = [normal(2, 4, 9, 7).requires_grad_(), normal(2, 6, 4, 3).requires_grad_()]

    def with_casts(x: list[Tensor]) -> list[Tensor]:
        mixed = subnet.norm(subnet.conv1(ops.pool_and_concatenate(x, (4, 3))))
        parts = torch.relu(subnet.conv2(mixed)).float().split(subnet.channels, 1)
        sums = [ops.upsample_and_add(t, m) for t, m in zip(x, parts, strict=True)]
        return [conv(t) for conv, t in zip(subnet.conv_out, sums, strict=True)]

    def differentiate(run: Callable[[list[Tensor]], list[Tensor]]) -> list[Tensor]:
        with torch.autocast("cpu", torch.bfloat16):
            y = run(x)
        loss = torch.stack([t.float().square().sum() for t in y]).sum()
        return [*y, *torch.autograd.grad(loss, [*x, *subnet.parameters()])]

    assert all(map(torch.equal, differentiate(subnet), differentiate(with_casts)))
    ours, theirs = (memory.saved(lambda f=f: differentiate(f)) for f in (subnet, with_casts))
    assert theirs - ours >= sum(torch.bfloat16.itemsize * t.numel() for t in x)
