"""Properties of recomputation: the backward pass uses the parameters, noise, statistics and modes of the forward pass."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.utils.checkpoint import checkpoint

from msflow_ext import FastFlowHead, MSFlowHead, ops
from msflow_ext.activations import recomputed
from msflow_ext.bench import memory
from msflow_ext.choices import Memory
from msflow_ext.flows import AffineCoupling, Flow
from msflow_ext.testing import relative_error

Normal = Callable[..., Tensor]

F64 = torch.float64
MEMORY = pytest.mark.parametrize("kind", ["lean", "reversible"])

HEADS: dict[str, Callable[[], Any]] = {
    "msflow": lambda: MSFlowHead((6, 8), blocks=(1, 2), cond_channels=4, seed=0),
    "fastflow": lambda: FastFlowHead((6, 8), steps=2, seed=0),
}
each_head = pytest.mark.parametrize("name", HEADS)


class Loss(nn.Module):
    """Module whose forward is the loss of a head."""

    def __init__(self, head: Any) -> None:
        super().__init__()
        self.head = head

    def forward(self, features: list[Tensor]) -> Tensor:
        return self.head.loss(features)


def draw(normal: Normal, n: int = 2, dtype: torch.dtype = F64) -> list[Tensor]:
    return [normal(n, 6, 5, 4, dtype=dtype), normal(n, 8, 3, 2, dtype=dtype)]


def moved(module: nn.Module) -> dict[str, Tensor]:
    """Return parameters with other values."""
    generator = torch.Generator().manual_seed(1)
    return {
        n: (p.detach() + 0.2 * torch.randn(p.shape, generator=generator, dtype=p.dtype))
        for n, p in module.named_parameters()
    }


def gradients(head: Any, x: list[Tensor]) -> list[Tensor]:
    return list(torch.autograd.grad(head.loss(x), list(head.parameters())))


def assert_close(got: Any, expected: Any, bound: float = 1e-9) -> None:
    for g, w in zip(got, expected, strict=True):
        assert relative_error(g, w) <= bound


@pytest.mark.family("gradients")
@MEMORY
@pytest.mark.parametrize("n", [2, 6])  # with and without the condition's share kept
@each_head
def test_functional_call_gives_the_gradients_of_the_given_parameters(
    each_backend: str, normal: Normal, name: str, n: int, kind: str
) -> None:
    module, x = Loss(HEADS[name]().double()), draw(normal, n)
    module.head.memory = kind
    given = {k: v.requires_grad_() for k, v in moved(module).items()}
    loss = torch.func.functional_call(module, given, (x,))
    got = torch.autograd.grad(loss, list(given.values()))
    module.load_state_dict({**module.state_dict(), **given})
    module.head.memory = "lean"
    assert_close(got, gradients(module.head, x))


@pytest.mark.family("transforms")
@MEMORY
@each_head
def test_function_transforms_of_a_head_give_its_gradients(
    each_backend: str, normal: Normal, name: str, kind: str
) -> None:
    module, x = Loss(HEADS[name]().double()), draw(normal)
    module.head.memory = kind
    given = {k: v.detach() for k, v in module.named_parameters()}

    def loss(given: dict[str, Tensor], x: list[Tensor]) -> Tensor:
        return torch.func.functional_call(module, given, (x,))

    expected = gradients(module.head, x)
    assert_close(torch.func.grad(loss)(given, x).values(), expected)
    stacked = {k: torch.stack((v, v)) for k, v in given.items()}
    both = torch.func.vmap(torch.func.grad(loss), in_dims=(0, None))(stacked, x)
    assert_close([g[1] for g in both.values()], expected)


@pytest.mark.family("transforms")
@MEMORY
def test_batched_gradients_of_a_head_equal_single_ones(normal: Normal, kind: str) -> None:
    head, x = HEADS["msflow"]().double(), draw(normal)
    head.memory = kind
    losses, leaves = head(x).log_det, list(head.flows.parameters())
    upstream = torch.eye(2, dtype=F64)
    got = torch.autograd.grad(losses, leaves, upstream, is_grads_batched=True, retain_graph=True)
    for i in range(2):
        expected = torch.autograd.grad(losses[i], leaves, retain_graph=True)
        assert_close([g[i] for g in got], expected)


@pytest.mark.family("gradients")
@MEMORY
@pytest.mark.parametrize("name", ["winograd", *HEADS])
def test_a_parameter_changed_before_the_backward_pass_is_refused(
    normal: Normal, name: str, kind: Memory
) -> None:
    winograd = name == "winograd"
    head = FastFlowHead((64,), steps=2, conv3x3_only=True, seed=0) if winograd else HEADS[name]()
    head.memory = kind
    x = [normal(1, 64, 24, 24)] if winograd else draw(normal, 2, torch.float32)
    for parameter in head.parameters():
        if parameter.dim() < 4:
            continue
        loss = head.loss(x)
        with torch.no_grad():
            parameter.mul_(1.5)
        with pytest.raises(RuntimeError, match="modified by an inplace operation"):
            loss.backward()


@pytest.mark.family("gradients")
@MEMORY
@each_head
def test_checkpointing_a_head_keeps_its_gradients(normal: Normal, name: str, kind: str) -> None:
    head, x = HEADS[name]().double(), draw(normal)
    head.memory = kind
    loss: Any = checkpoint(head.loss, x, use_reentrant=False)
    got = torch.autograd.grad(loss, list(head.parameters()))
    assert_close(got, gradients(head, x))


@pytest.mark.family("gradients")
def test_a_checkpoint_around_recomputation_saves_no_activation(normal: Normal) -> None:
    x, weight = normal(30, 30).requires_grad_(), nn.Parameter(normal(30, 30))

    def function(x: Tensor) -> Tensor:
        return recomputed(lambda y: (y @ weight).sum(), lambda h: 2 * h, x.exp())

    def run() -> None:
        loss: Any = checkpoint(function, x, use_reentrant=False)
        loss.backward()

    assert memory.saved(run) < 30 * 30 * 4
    assert x.grad is not None
    assert relative_error(x.grad, (2 * x.exp() * weight.sum(1)).detach()) <= 1e-5


@pytest.mark.family("gradients")
def test_recomputation_supports_in_place_changes_and_other_layouts(normal: Normal) -> None:
    x, weight = normal(4, 6).requires_grad_(), nn.Parameter(normal(6, 4))
    layouts = iter([lambda t: t, lambda t: t.t().contiguous().t()])

    def make(x: Tensor) -> Tensor:
        return next(layouts)(2 * x)

    recomputed(lambda y: y[1:] @ weight, make, x).sum().backward()
    assert torch.equal(weight.grad, (2 * x)[1:].T @ torch.ones(3, 4))  # type: ignore[arg-type]
    weight.grad = None
    recomputed(lambda y: y.mul_(3) @ weight, lambda x: 2 * x, x).sum().backward()
    assert torch.allclose(weight.grad, (6 * x).T @ torch.ones(4, 4))  # type: ignore[arg-type]


@pytest.mark.family("gradients")
def test_a_norm_with_a_hook_runs_once_and_has_its_gradient(normal: Normal) -> None:
    head, x, calls = HEADS["msflow"]().double(), draw(normal), []
    expected = gradients(head, x)
    head.flows[0].steps[0].subnet.norm.register_forward_hook(lambda *_: calls.append(1))
    head.flows[0].steps[0].subnet.conv_cond.register_forward_hook(lambda *_: calls.append(2))
    assert_close(gradients(head, x), expected)
    assert sorted(calls) == [1, 2]


class Subnet(nn.Module):
    """Subnet with an optional condition, dropout and batch norm."""

    def __init__(self, cond: int = 0, drop: float = 0.0, norm: bool = False) -> None:
        super().__init__()
        self.first, self.last = nn.Conv2d(3 + cond, 8, 3, padding=1), nn.Conv2d(8, 6, 1)
        self.norm = nn.BatchNorm2d(8) if norm else nn.Identity()
        self.drop = nn.Dropout(drop)

    def forward(self, x: Tensor, *cond: Tensor) -> Tensor:
        h = self.norm(self.first(torch.cat((x, *cond), 1)))
        return self.last(self.drop(torch.tanh(h)))


def flow(kind: str, steps: int = 3, **options: Any) -> Flow:
    torch.manual_seed(0)
    made = Flow(
        [AffineCoupling(6, Subnet(**options), clamp=1.9, clamp_form="0.2") for _ in range(steps)]
    ).double()
    made.memory = kind
    return made


def loss(flow: Flow, x: Tensor, *cond: Tensor) -> Tensor:
    z, _, log_det = flow(x, *cond)
    return (ops.half_square_norm(z) - log_det).mean()


def both(run: Callable[[str], list[Tensor]]) -> None:
    """Check that ``reversible`` gives the results of ``lean``."""
    assert_close(run("reversible"), run("lean"))


@pytest.fixture
def x(normal: Normal) -> Tensor:
    return normal(2, 6, 4, 4, dtype=F64)


@pytest.mark.family("gradients")
def test_reversible_differentiates_a_learned_condition(x: Tensor, normal: Normal) -> None:
    c = normal(2, 3, 4, 4, dtype=F64).requires_grad_()
    both(lambda kind: list(torch.autograd.grad(loss(flow(kind, cond=3), x, c), c)))


@pytest.mark.family("gradients")
def test_reversible_repeats_the_noise_of_the_forward_pass_and_draws_no_other(x: Tensor) -> None:
    after = []

    def run(kind: str) -> list[Tensor]:
        made = flow(kind, drop=0.5)
        torch.manual_seed(7)
        value = loss(made, x)
        torch.rand(3)
        found = torch.autograd.grad(value, list(made.parameters()))
        after.append(torch.rand(3))
        return list(found)

    both(run)
    assert torch.equal(*after)


@pytest.mark.family("gradients")
def test_reversible_updates_running_statistics_once(x: Tensor) -> None:
    def run(kind: str) -> list[Tensor]:
        made = flow(kind, norm=True).train()
        found = torch.autograd.grad(loss(made, x), list(made.parameters()))
        return [*found, *(b.double() for b in made.buffers())]

    both(run)


@pytest.mark.family("gradients")
def test_reversible_iterates_a_spectral_norm_once(x: Tensor) -> None:
    def run(kind: str) -> list[Tensor]:
        made = flow(kind)
        subnet: Any = made.steps[1].subnet
        nn.utils.parametrizations.spectral_norm(subnet.first)
        return list(torch.autograd.grad(loss(made.train(), x), list(made.parameters())))

    both(run)


@pytest.mark.family("gradients")
def test_reversible_uses_the_training_mode_of_the_forward_pass(x: Tensor) -> None:
    def run(kind: str) -> list[Tensor]:
        made = flow(kind, drop=0.5).train()
        torch.manual_seed(7)
        value = loss(made, x)
        made.eval()
        found = torch.autograd.grad(value, list(made.parameters()))
        assert not any(module.training for module in made.modules())
        return list(found)

    both(run)


@pytest.mark.family("gradients")
def test_reversible_ignores_autocast_and_freezing_after_the_forward_pass(x: Tensor) -> None:
    def run(kind: str) -> list[Tensor]:
        made = flow(kind).float()
        frozen = list(made.steps[1].parameters())
        for parameter in frozen:
            parameter.requires_grad_(False)
        value = loss(made, x.float())
        for parameter in frozen:
            parameter.requires_grad_(kind == "reversible")
        with torch.autocast("cpu", torch.bfloat16):
            return list(torch.autograd.grad(value, list(made.steps[0].parameters())))

    assert_close(run("reversible"), run("lean"), 1e-4)


@pytest.mark.family("gradients")
def test_reversible_refuses_hooks_and_tensors_from_outside(x: Tensor) -> None:
    made = flow("reversible")
    subnet: Any = made.steps[1].subnet
    subnet.drop = Outside()
    value = loss(made, x)
    with pytest.raises(RuntimeError, match="must depend only on its parameters and inputs"):
        value.backward()
    subnet.drop = nn.Identity()
    subnet.first.register_forward_pre_hook(lambda *_: None)
    with pytest.raises(RuntimeError, match=r"got one on module 'first' \(Conv2d\)"):
        loss(made, x)
    with torch.no_grad():
        loss(made, x)


class Outside(nn.Module):
    """Module that multiplies by a tensor that is not a parameter."""

    def __init__(self) -> None:
        super().__init__()
        self.factor = [torch.ones(1, dtype=F64, requires_grad=True)]

    def forward(self, h: Tensor) -> Tensor:
        return h * self.factor[0]


@pytest.mark.family("transforms")
@pytest.mark.parametrize("optimized", [False, True])
@each_head
def test_a_head_caches_nothing_of_fake_tensors(normal: Normal, name: str, optimized: bool) -> None:
    head, x = HEADS[name](), draw(normal, 2, torch.float32)
    head = head.optimize() if optimized else head
    with FakeTensorMode(allow_non_fake_inputs=True) as mode:
        fake = head([mode.from_tensor(t) for t in x])
    assert [t.shape for t in fake.z] == [t.shape for t in x]
    found = head(x)
    assert {type(t) for t in (*found.z, found.log_det)} == {Tensor}
    assert_close(found.z, HEADS[name]()(x).z, 1e-4)
