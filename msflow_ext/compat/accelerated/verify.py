"""Compare a module's original forward with the accelerated one, on copies and random inputs."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor, nn

from msflow_ext.compat.accelerated.blocks import (
    BlockFacts,
    FastBlock,
    FastGlowCoupling,
    FastSequence,
    FastSubnet,
)
from msflow_ext.compat.accelerated.swap import switch
from msflow_ext.testing import relative_error

#: Tolerance between the two forwards in float64, relative to the largest magnitude.
BOUND = 1e-8

SIZES = ((3, 2, 2), (2, 3, 3))  # of the random data

Shapes = Sequence[tuple[int, ...]]


class MismatchError(Exception):
    """The accelerated forward gives other results."""


class UntriedError(Exception):
    """The original forward fails, so there is no result to compare with."""


def try_block(block: Any, *, full: bool) -> BlockFacts:
    """Return the facts with which :class:`FastBlock` equals an ``AllInOneBlock``, tried with a random subnet.

    Args:
        block: the block.
        full: also compare the inverse and all gradients.

    Raises:
        MismatchError: if no clamp form gives the same results.
    """

    def trial(shapes: Shapes, facts: BlockFacts | None) -> float:
        copy = bare(block, {block.subnet: Mixer.of(block, 6.0)}).to(device)

        def forward(x: Tensor, *c: Tensor) -> Any:
            return copy.forward([x], list(c))

        def inverse(y: Tensor, *c: Tensor) -> Any:
            return copy.forward([y], list(c), rev=True)

        calls = [forward, inverse] if full else [forward]
        fast = None if facts is None else lambda: switch(copy, FastBlock, facts)
        return _deviation(copy, calls, shapes, fast, gradients=full)

    own = tuple(block.dims_in[0][1:])
    other = next((s for s in (size[: len(own)] for size in SIZES) if s != own), own)
    channels = [block.in_channels, *(dims[0] for dims in block.dims_c)]
    with _quiet(block) as device:
        fixed, shapes = False, [(2, n, *other) for n in channels]
        try:
            trial(shapes, None)
        except UntriedError:
            fixed, shapes = True, [(2, n, *own) for n in channels]
        errors = []
        for clamp_form in ("0.2", "head"):
            facts = BlockFacts(clamp_form, fixed)
            facts.read(block.w_perm, block.w_perm_inv)
            errors.append(trial(shapes, facts))
            if errors[-1] <= BOUND:
                return facts
    raise MismatchError(f"its results deviate by {min(errors):.1e}")


def try_sequence(sequence: Any, facts: Mapping[nn.Module, BlockFacts]) -> None:
    """Check that :class:`FastSequence` equals a ``SequenceINN`` of blocks with these ``facts``."""
    blocks = list(sequence.module_list)
    fixed = any(facts[block].fixed_size for block in blocks)
    own = tuple(blocks[0].dims_in[0][1:])
    size = own if fixed else SIZES[0][: len(own)]
    conditions = [k for k in sequence.conditions if k is not None]
    channels = [1] * (max(conditions, default=-1) + 1)
    for block, k in zip(blocks, sequence.conditions, strict=True):
        if k is not None:
            channels[k] = block.dims_c[0][0]
    with _quiet(sequence) as device:
        stubs = {block.subnet: Mixer.of(block, 0.3) for block in blocks}
        copy = bare(sequence, stubs).to(device)

        def forward(x: Tensor, *c: Tensor) -> Any:
            return copy.forward(x, list(c))

        def inverse(y: Tensor, *c: Tensor) -> Any:
            return copy.forward(y, list(c), rev=True)

        def fast() -> None:
            for block, original in zip(copy.module_list, blocks, strict=True):
                switch(block, FastBlock, replace(facts[original]))
            switch(copy, FastSequence)

        shapes = [(2, n, *size) for n in (blocks[0].in_channels, *channels)]
        _check_error(_deviation(copy, [forward, inverse], shapes, fast))


def try_subnet(subnet: Any) -> None:
    """Check that :class:`FastSubnet` equals a module of ``conv1``, ``ln`` and ``conv2``, in training and evaluation."""
    with _quiet(subnet) as device:
        copy = bare(subnet, {}).to(device)

        def training(x: Tensor) -> Any:
            return copy.train().forward(x)

        def evaluation(x: Tensor) -> Any:
            return copy.eval().forward(x)

        shapes = [(2, subnet.conv1.in_channels, *SIZES[0][:2])]
        fast = lambda: switch(copy, FastSubnet)  # noqa: E731
        _check_error(_deviation(copy, [training, evaluation], shapes, fast))


def try_glow_coupling(coupling: Any) -> None:
    """Check that :class:`FastGlowCoupling` equals CS-Flow's coupling, with random subnets."""
    left, right = coupling.split_len1, coupling.split_len2
    with _quiet(coupling) as device:
        stubs = {
            coupling.cross_convolution1: Mixer(left, 2 * right, 3.0),
            coupling.cross_convolution2: Mixer(right, 2 * left, 3.0),
        }
        copy = bare(coupling, stubs).to(device)

        def forward(*x: Tensor) -> Any:
            return copy.forward(list(x))

        shapes = [(2, left + right, height, 2) for height in (4, 3, 2)]
        _check_error(_deviation(copy, [forward], shapes, lambda: switch(copy, FastGlowCoupling)))


class Mixer(nn.Module):
    """Random subnet that mixes channels at each position, separately for each scale."""

    def __init__(self, channels_in: int, channels_out: int, strength: float) -> None:
        super().__init__()
        (weight,) = _normal([(channels_in, channels_out)])
        self.weight = nn.Parameter(weight / max(1, channels_in) ** 0.5)
        self.strength = strength

    @classmethod
    def of(cls, block: Any, strength: float) -> Mixer:
        """Return a replacement of the subnet of an ``AllInOneBlock``."""
        channels = block.splits[0] + block.condition_channels
        return cls(channels, 2 * block.splits[1], strength)

    def forward(self, *x: Tensor) -> Any:
        y = [self.strength * torch.tanh(t.movedim(1, -1) @ self.weight).movedim(-1, 1) for t in x]
        return y if len(y) > 1 else y[0]


def bare(module: nn.Module, stubs: Mapping[nn.Module, nn.Module]) -> Any:
    """Return a float64 copy without hooks on the CPU, in which ``stubs`` replace submodules.

    Other attributes are shared with ``module``.
    """
    copy = nn.Module.__new__(getattr(type(module), "_original", type(module)))
    nn.Module.__init__(copy)
    for name, value in vars(module).items():
        vars(copy).setdefault(name, value)
    for name, p in module._parameters.items():
        copy._parameters[name] = (
            None if p is None else nn.Parameter(_in_float64(p), p.requires_grad)
        )
    for name, b in module._buffers.items():
        copy._buffers[name] = None if b is None else _in_float64(b)
    for name, child in module._modules.items():
        if child is not None:
            copy._modules[name] = stubs[child] if child in stubs else bare(child, stubs)
    return copy


def _deviation(
    module: nn.Module,
    calls: Sequence[Callable[..., Any]],
    shapes: Shapes,
    fast: Callable[[], None] | None,
    gradients: bool = True,
) -> float:
    """Return the largest difference between the results of ``calls`` before and after ``fast()``."""
    try:
        expected = _results(module, calls, shapes, gradients)
    except Exception as error:
        raise UntriedError(str(error)) from error
    if fast is None:
        return 0.0
    fast()
    try:
        got = _results(module, calls, shapes, gradients)
        errors = [relative_error(g, w) for g, w in zip(got, expected, strict=True)]
    except Exception as error:
        raise MismatchError(str(error)) from error
    return max(errors) if all(error >= 0 for error in errors) else math.nan


def _check_error(error: float) -> None:
    if not error <= BOUND:
        raise MismatchError(f"its results deviate by {error:.1e}")


def _results(
    module: nn.Module, calls: Sequence[Callable[..., Any]], shapes: Shapes, gradients: bool
) -> list[Tensor]:
    parameters = [p for p in module.parameters() if p.requires_grad]
    device = next(module.parameters()).device
    found: list[Tensor] = []
    for call in calls:
        inputs = [t.to(device).requires_grad_(gradients) for t in _normal(shapes)]
        outputs = list(_leaves(call(*inputs)))
        found += outputs
        if gradients:
            upstream = [torch.arange(1.0, 1 + t.numel()).to(t).cos().view_as(t) for t in outputs]
            leaves = [*inputs, *parameters]
            found += torch.autograd.grad(
                outputs, leaves, upstream, allow_unused=True, materialize_grads=True
            )
    return found


def _leaves(value: Any) -> Iterator[Tensor]:
    if isinstance(value, Tensor):
        yield value
    else:
        for each in value:
            yield from _leaves(each)


def _normal(shapes: Iterable[tuple[int, ...]]) -> list[Tensor]:
    """Return the same standard normal numbers in every call, without the program's random generator."""
    generator = torch.Generator("cpu").manual_seed(0)
    options: dict[str, Any] = {"generator": generator, "dtype": torch.float64, "device": "cpu"}
    return [torch.randn(shape, **options) for shape in shapes]


def _in_float64(t: Tensor) -> Tensor:
    dtype = torch.float64 if t.is_floating_point() else t.dtype
    return t.detach().to("cpu", dtype, copy=True)


@contextmanager
def _quiet(module: nn.Module) -> Iterator[torch.device]:
    """Enable gradients and full precision, keep the program's random state, and yield the device to use."""
    device = next(module.parameters()).device
    with (
        torch.random.fork_rng([device] if device.type == "cuda" else []),
        torch.inference_mode(False),
        torch.enable_grad(),
        torch.autocast(device.type, enabled=False),
    ):
        # MPS has no float64.
        yield torch.device("cpu") if device.type == "mps" else device
