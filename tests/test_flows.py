"""Properties of couplings and flows: they are invertible, log_det is that of the Jacobian, a flow equals its steps."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from torch import Tensor, nn

from msflow_ext import ops
from msflow_ext.flows import AffineCoupling, Flow, inverse_softplus_scale
from msflow_ext.testing import relative_error, tolerance

Normal = Callable[..., Tensor]
Layout = Callable[[Tensor], Tensor]

SHAPES = {
    "even": (2, 6, 3, 4),
    "odd-channels": (2, 5, 3, 4),
    "one-pixel": (3, 5, 1, 1),
    "vectors": (4, 5),
    "sequences": (2, 5, 7),
    "volumes": (2, 4, 2, 3, 2),
}


class Mixing(nn.Module):
    """Smallest subnet for any number of dimensions: a matrix over channels, plus the condition."""

    def __init__(self, channels: int, seed: int = 0) -> None:
        super().__init__()
        transformed = channels // 2
        weight = torch.randn(
            2 * transformed, channels - transformed, generator=torch.Generator().manual_seed(seed)
        )
        self.weight = nn.Parameter(3 * weight)

    def forward(self, x1: Tensor, *cond: Tensor) -> Tensor:
        a = torch.einsum("dc,nc...->nd...", self.weight, x1)
        return sum(cond, a)


def make(channels: int, steps: int = 3, clamp_form: str = "0.2") -> Flow:
    """Return a flow with parameters that differ from their initial values."""
    generator = torch.Generator().manual_seed(1)
    flow = Flow(
        [
            AffineCoupling(
                channels, Mixing(channels, i), clamp=1.9, clamp_form=clamp_form, generator=generator
            )
            for i in range(steps)
        ]
    )
    with torch.no_grad():
        for name, parameter in flow.named_parameters():
            if "global" in name:
                parameter += 0.5 * torch.randn(parameter.shape, generator=generator)
    return flow.double()


@pytest.mark.parametrize("clamp_form", ["0.2", "head", "atan"])
@pytest.mark.parametrize("shape", SHAPES)
def test_the_inverse_undoes_the_flow(
    each_backend: str, normal: Normal, shape: str, clamp_form: str, layout: Layout
) -> None:
    x = layout(normal(*SHAPES[shape], dtype=torch.float64))
    flow = make(x.size(1), clamp_form=clamp_form)
    y, rest, log_det = flow(x)
    back, log_det_back = flow.inverse(layout(y))
    assert rest.size(1) == 0
    assert relative_error(back, x) <= 1e-12
    assert relative_error(log_det_back, -log_det) <= 1e-12


@pytest.mark.parametrize("channels", [4, 5])
def test_log_det_is_that_of_the_jacobian(each_backend: str, normal: Normal, channels: int) -> None:
    flow, x = make(channels), normal(1, channels, 2, 2, dtype=torch.float64)
    jacobian = torch.autograd.functional.jacobian(lambda x: flow(x)[0], x)
    assert isinstance(jacobian, Tensor)
    expected = torch.linalg.slogdet(jacobian.reshape(x.numel(), x.numel())).logabsdet
    assert relative_error(flow(x)[2], expected[None]) <= 1e-11


def test_a_flow_equals_its_steps_in_order(each_backend: str, normal: Normal) -> None:
    flow = make(5)
    x, cond = normal(2, 5, 3, 4, dtype=torch.float64), normal(1, 1, 3, 4, dtype=torch.float64)
    x1, x2, total = x[:, :3], x[:, 3:], torch.zeros(2, dtype=torch.float64)
    for step in flow.steps:
        x1, x2, log_det = step(x1, x2, cond)
        assert x1.size(1) == 3
        total = total + log_det
    y, _, log_det = flow(x, cond)
    assert torch.equal(y, torch.cat((x1, x2), 1))
    assert torch.equal(log_det, total)
    assert not torch.equal(y, flow(x)[0])
    assert relative_error(flow.inverse(y, cond)[0], x) <= 1e-12


def test_a_step_equals_the_op_with_a_softplus_scale(normal: Normal) -> None:
    (step,) = make(5, steps=1).steps
    assert isinstance(step, AffineCoupling)
    x1, x2 = normal(2, 3, 4, dtype=torch.float64), normal(2, 2, 4, dtype=torch.float64)
    scale = 0.1 * 2 * torch.log(1 + torch.exp(0.5 * step.global_scale))
    expected = ops.affine_coupling(
        x1, x2, step.subnet(x1), scale, step.global_offset, step.perm, clamp=1.9
    )
    for got, want in zip(step(x1, x2), expected, strict=True):
        assert relative_error(got, want) <= 1e-14


def test_a_flow_can_permute_and_split_its_results(each_backend: str, normal: Normal) -> None:
    flow, x = make(5), normal(2, 5, 3, dtype=torch.float64)
    then = torch.tensor([3, 0, 4, 1, 2])
    whole, _, log_det = flow(x)
    y1, y2, same = flow(x, then=then, split=2)
    assert (y1.size(1), y2.size(1)) == (2, 3)
    assert torch.equal(torch.cat((y1, y2), 1), whole[:, then])
    assert torch.equal(same, log_det)


def test_under_autocast_subnets_read_copies_that_equal_casts(
    each_backend: str, normal: Normal, memory_format: Layout
) -> None:
    flow = make(5).float()
    x = memory_format(normal(2, 5, 3, 4)).requires_grad_()
    read: list[Tensor] = []
    for step in flow.steps:
        step.subnet.register_forward_pre_hook(lambda _, inputs: read.append(inputs[0]))  # type: ignore[union-attr]
    with torch.autocast("cpu", torch.bfloat16):
        y, _, log_det = flow(x)
        assert [t.dtype for t in read] == [torch.float32, torch.bfloat16, torch.bfloat16]
        x1, x2, total = x[:, :3], x[:, 3:], torch.zeros(2)
        for step in flow.steps:
            x1, x2, step_log_det = step(x1, x2)
            total = total + step_log_det
    assert torch.equal(y, torch.cat((x1, x2), 1))
    assert torch.equal(log_det, total)
    leaves = [x, *flow.parameters()]
    got = torch.autograd.grad(y.square().sum() - log_det.sum(), leaves)
    expected = torch.autograd.grad(x1.square().sum() + x2.square().sum() - total.sum(), leaves)
    for g, w in zip(got, expected, strict=True):
        assert relative_error(g, w) <= tolerance(torch.bfloat16)


def test_kernels_and_reference_give_the_same_gradients(
    native: None, normal: Normal, memory_format: Layout
) -> None:
    flow = make(5)
    x = memory_format(normal(2, 5, 3, 4, dtype=torch.float64)).requires_grad_()

    def gradients() -> list[Tensor]:
        y, _, log_det = flow(x)
        back, log_det_back = flow.inverse(y * 1.1)
        results = (y, log_det, back, log_det_back)
        total = torch.stack([r.square().sum() for r in results]).sum()
        return list(torch.autograd.grad(total, [x, *flow.parameters()]))

    got = gradients()
    with ops.backend("reference"):
        expected = gradients()
    for g, w in zip(got, expected, strict=True):
        assert relative_error(g, w) <= 1e-12


def test_a_flow_in_bfloat16_and_its_inverse_return_bfloat16(
    each_backend: str, normal: Normal
) -> None:
    flow, x = make(5).bfloat16(), normal(2, 5, 3, 4, dtype=torch.bfloat16)
    y, _, log_det = flow(x)
    back, log_det_back = flow.inverse(y)
    assert (y.dtype, back.dtype) == (torch.bfloat16, torch.bfloat16)
    assert (log_det.dtype, log_det_back.dtype) == (torch.float32, torch.float32)
    assert relative_error(back, x) <= 0.1


@pytest.mark.parametrize("scale", [0.1, 1.0, 7.0])
def test_the_scale_of_a_new_step_is_the_one_it_was_initialized_with(scale: float) -> None:
    step = AffineCoupling(6, Mixing(6), clamp=1.9, clamp_form="0.2")
    assert torch.equal(step.affine(torch.float32)[1], torch.zeros(6))
    torch.testing.assert_close(step.affine(torch.float32)[0], torch.ones(6))
    nn.init.constant_(step.global_scale, inverse_softplus_scale(scale))
    torch.testing.assert_close(step.affine(torch.float32)[0], torch.full((6,), scale))


def test_the_generator_draws_the_permutation() -> None:
    def draw(seed: int) -> list[int]:
        generator = torch.Generator().manual_seed(seed)
        step = AffineCoupling(16, Mixing(16), clamp=1.0, clamp_form="0.2", generator=generator)
        return step.perm.tolist()

    assert draw(3) == draw(3) != draw(4)
    assert sorted(draw(3)) == list(range(16))
