"""What the backward pass computes again instead of keeping: inputs of a function, and the states of a reversible chain."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any, Protocol

import torch
from torch import Tensor, nn
from torch._C import _autograd  # pyright: ignore[reportAttributeAccessIssue]
from torch.autograd.graph import saved_tensors_hooks
from torch.nn.modules import module as torch_module
from torch.utils.checkpoint import get_device_states, set_device_states

from msflow_ext.ops import _backend

State = Sequence[Tensor]


def recomputed(
    function: Callable[[Tensor], Any], make: Callable[..., Tensor], *inputs: Tensor | None
) -> Any:
    """``function(make(*inputs))``; ``make``'s result, and views of it, are made again in the backward pass, not kept.

    For results that are cheap to make from ``inputs``, which are saved as autograd saves tensors: hooks for saved tensors
    see them (checkpoints, offloading), and a change in place is refused.

    Args:
        make: depends on nothing that changes but ``inputs``, parameters included, and draws no random numbers.

    Raises:
        RuntimeError: in the backward pass, if a saved tensor was modified in place.
    """
    x = make(*inputs)
    if not torch.is_grad_enabled() or _backend.hides_values(x):
        return function(x)
    recipe = _Recipe(make, x, inputs)
    with saved_tensors_hooks(recipe.pack, recipe.unpack):
        try:
            return function(x)
        finally:
            recipe.inputs = []  # what is packed has them; hooks of others may have dropped them


class _Recipe:
    """Hooks that pack views of ``x`` as what makes it, and save all other tensors as they would be saved without."""

    def __init__(self, make: Callable[..., Tensor], x: Tensor, inputs: Sequence[Tensor | None]):
        self.make = make
        self.inputs = [None if t is None else t.detach() for t in inputs]
        self.address, self.version = x.untyped_storage().data_ptr(), x._version
        self.shape, self.strides, self.start = x.shape, x.stride(), x.storage_offset()
        self.dtype = x.dtype
        self.surroundings = Surroundings(x.device.type)
        self.outer = _autograd._top_saved_tensors_default_hooks(True)

    def pack(self, saved: Tensor) -> Any:
        if (
            saved.untyped_storage().data_ptr() != self.address
            or saved._version != self.version
            or saved.dtype is not self.dtype
        ):
            return None, [self._save(saved)]
        view = saved.shape, saved.stride(), saved.storage_offset() - self.start
        return view, [None if t is None else self._save(t) for t in self.inputs]

    def unpack(self, packed: Any) -> Tensor:
        view, kept = packed
        tensors = [None if k is None else self._restore(k) for k in kept]
        if view is None:
            assert tensors[0] is not None
            return tensors[0]
        with torch.no_grad(), self.surroundings():
            x = self.make(*tensors)
        if x.stride() != self.strides:  # another backend may choose another memory format
            x = x.new_empty_strided(self.shape, self.strides).copy_(x)
        shape, strides, offset = view
        return x.as_strided(shape, strides, x.storage_offset() + offset)

    def _save(self, tensor: Tensor) -> Any:
        return (tensor, tensor._version) if self.outer is None else self.outer[0](tensor)

    def _restore(self, saved: Any) -> Tensor:
        if self.outer is not None:
            return self.outer[1](saved)
        tensor, version = saved
        if (
            tensor._version != version
        ):  # as autograd says it, which cannot look where there are hooks
            raise RuntimeError(
                "one of the variables needed for gradient computation has been modified by an inplace operation: "
                f"a {tensor.dtype} tensor {tuple(tensor.shape)} is at version {tensor._version}; expected version "
                f"{version} instead"
            )
        return tensor


class Surroundings:
    """What a computation depends on besides tensors and random numbers: autocast, and the choice of kernels."""

    def __init__(self, device: str) -> None:
        dtype, enabled = torch.get_autocast_dtype(device), torch.is_autocast_enabled(device)
        self.autocast = torch.autocast(device, dtype, enabled)
        self.backend = _backend.forced()

    @contextmanager
    def __call__(self) -> Iterator[None]:
        """Restore them."""
        with self.autocast, _backend.forcing(self.backend):
            yield


class Step(Protocol):
    """A step of a reversible chain: maps a state to the next one and a ``log_det``, and calls a module once for that."""

    @property
    def subnet(self) -> nn.Module:
        """The module that it calls."""
        ...

    @property
    def tensors(self) -> Sequence[Tensor]:
        """What else it reads: parameters of its own, permutations, conditions."""
        ...

    def __call__(self, *state: Tensor) -> tuple[Tensor, ...]:
        """``(*state, log_det)``."""
        ...

    def retrace(
        self, ask: Callable[..., Any], results: State, tensors: State
    ) -> tuple[list[Tensor], tuple[Tensor, ...]]:
        """The inputs that led to ``results``, as leaves of a graph, and ``(*results, log_det)`` in that graph.

        ``ask`` is to be called instead of ``subnet``, ``tensors`` are to be read instead of those of the same name.
        """
        ...


def in_turn(steps: Sequence[Any], state: State) -> tuple[Tensor, ...]:
    """Steps one after the other: the last state, and the sum of their ``log_det``."""
    total: Tensor | float = 0.0
    for step in steps:
        *state, log_det = step(*state)
        total = total + log_det
    return *state, total  # type: ignore[return-value]


def reversible(steps: Sequence[Any], state: State) -> tuple[Tensor, ...]:
    """:func:`in_turn`, with nothing saved for the backward pass but the last state, and what steps read.

    The backward pass computes each step's inputs from its results, by the inverse, then the step once more: about a
    third more work, and a small fraction of the memory. Inputs come back with the rounding of the inverse, hence
    float32 and float64 only. Random numbers, buffers and the training mode are those of the forward pass. Under
    function transforms it is :func:`in_turn`.

    Args:
        steps: each a :class:`Step`.
        state: tensors of one dtype.

    Raises:
        TypeError: half precision, as a dtype or by autocast. RuntimeError: a subnet has forward hooks, which would run
            twice; in the backward pass, a subnet depends on a tensor that is no parameter and no input of it, or
            something that was saved was modified in place.
    """
    if torch.is_autocast_enabled(state[0].device.type) or state[0].dtype.itemsize < 4:
        raise TypeError(
            "memory='reversible' needs float32 or float64, because half precision forgets the inputs; use memory='lean'"
        )
    if not torch.is_grad_enabled() or _backend.hides_values(*state):
        return in_turn(steps, state)
    visits = [_Visit(step) for step in steps]
    tensors = [t for visit in visits for t in visit.inputs]
    return _Reversible.apply(visits, len(state), *state, *tensors)  # type: ignore[return-value]


class _Visit:
    """One step of a forward pass, and what it saw."""

    def __init__(self, step: Step) -> None:
        self.step = step
        parameters = dict(step.subnet.named_parameters())
        self.buffers = dict(step.subnet.named_buffers())
        self.names, self.changing = list(parameters), list(self.buffers)
        self.own = len(step.tensors)
        self.inputs = [*step.tensors, *parameters.values()]
        self.modes = [module.training for module in step.subnet.modules()]
        self.random: _Random | None = None
        for name, module in step.subnet.named_modules():
            if module._forward_hooks or module._forward_pre_hooks:
                raise RuntimeError(
                    f"memory='reversible' runs a subnet twice, and so the forward hooks of its module {name!r} "
                    f"({type(module).__name__}); use memory='lean'"
                )

    def run(self, state: State) -> tuple[Tensor, ...]:
        before = {name: (b, b.clone(), b._version) for name, b in self.buffers.items()}
        random = _Random(state)
        results = self.step(*state)
        self.random = random if random.was_used(state) else None
        # A buffer that the step changed (running statistics) is kept as it was; of others a change is an error.
        self.buffers = {n: copy if b._version != v else b for n, (b, copy, v) in before.items()}
        del self.inputs  # which the graph holds
        return results

    def retrace(self, results: State, tensors: State, buffers: State) -> Any:
        """As :meth:`Step.retrace`, with everything as it was."""
        given = dict(zip(self.names, tensors[self.own :], strict=True))
        given.update({n: b.clone() for n, b in zip(self.changing, buffers, strict=True)})

        def ask(*inputs: Any) -> Any:
            with _training_as(self.step.subnet, self.modes):
                return torch.func.functional_call(self.step.subnet, given, inputs)

        if self.random is None:
            return self.step.retrace(ask, results, tensors[: self.own])
        with self.random.again():
            return self.step.retrace(ask, results, tensors[: self.own])


class _Reversible(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, visits: Sequence[_Visit], count: int, *tensors: Tensor) -> Any:
        state, total = tensors[:count], 0.0
        for visit in visits:
            *state, log_det = visit.run(state)
            total = total + log_det
        ctx.visits, ctx.surroundings = visits, Surroundings(tensors[0].device.type)
        buffers = [b for visit in visits for b in visit.buffers.values()]
        for visit in visits:
            visit.buffers = {}  # which the graph holds
        ctx.counts = [len(state), len(tensors) - count]
        ctx.save_for_backward(*state, *tensors[count:], *buffers)
        return *state, total

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx: Any, *grads: Tensor) -> Any:  # pyright: ignore[reportIncompatibleMethodOverride]
        *grad_state, grad_log_det = grads
        saved = [t.detach() for t in ctx.saved_tensors]
        count, read = ctx.counts
        state, tensors, buffers = saved[:count], saved[count : count + read], saved[count + read :]
        for t, needed in zip(tensors, ctx.needs_input_grad[-read:] if read else (), strict=True):
            t.requires_grad_(needed)
        found: list[Tensor | None] = []
        for visit in reversed(ctx.visits):
            own = _taken(tensors, visit.own + len(visit.names))
            with torch.enable_grad(), ctx.surroundings():
                inputs, results = visit.retrace(state, own, _taken(buffers, len(visit.changing)))
            leaves = [*inputs, *(t for t in own if t.requires_grad)]
            pairs = zip(results, (*grad_state, grad_log_det), strict=True)
            outputs, upstream = zip(*((r, g) for r, g in pairs if r.requires_grad), strict=True)
            _refuse_strangers(outputs, leaves)
            with ctx.surroundings():
                gradients = torch.autograd.grad(outputs, leaves, upstream, allow_unused=True)
            grad_state, rest = gradients[: len(inputs)], iter(gradients[len(inputs) :])
            found = [*(next(rest) if t.requires_grad else None for t in own), *found]
            state = [x.detach() for x in inputs]
        return None, None, *grad_state, *found


def _taken(tensors: list[Tensor], count: int) -> list[Tensor]:
    """The last ``count`` of a list, which it loses."""
    start = len(tensors) - count
    taken, tensors[start:] = tensors[start:], []
    return taken


def _refuse_strangers(results: State, leaves: State) -> None:
    """Refuse a graph with other leaves, whose gradient would be lost."""
    known = {id(t) for t in leaves}
    todo: list[Any] = [r.grad_fn for r in results]
    seen = {None}
    while todo:
        node = todo.pop()
        if node in seen:
            continue
        seen.add(node)
        if type(node).__name__ == "AccumulateGrad" and id(node.variable) not in known:
            raise RuntimeError(
                "memory='reversible': a subnet depends on a tensor that requires a gradient and is neither a parameter "
                f"nor an input of it, of shape {tuple(node.variable.shape)}; use memory='lean'"
            )
        todo += [following for following, _ in node.next_functions]


class _Random:
    """States of the random number generators of the CPU and of the devices of some tensors."""

    def __init__(self, tensors: State) -> None:
        self.kind: Any = tensors[0].device.type
        self.cpu, (self.devices, self.states) = torch.get_rng_state(), get_device_states(tensors[0])

    def was_used(self, tensors: State) -> bool:
        """Whether numbers were drawn since; ``tensors`` are on the device of those before."""
        now, (_, states) = torch.get_rng_state(), get_device_states(tensors[0])
        pairs = zip((self.cpu, *self.states), (now, *states), strict=True)
        return not all(torch.equal(a, b) for a, b in pairs)

    @contextmanager
    def again(self) -> Iterator[None]:
        """Draw the same numbers inside; outside, the generators continue as if none were drawn."""
        kind = self.kind if self.devices else "cuda"
        with torch.random.fork_rng(self.devices, device_type=kind):
            torch.set_rng_state(self.cpu)
            if self.devices:
                set_device_states(self.devices, self.states, device_type=kind)
            yield


@contextmanager
def _training_as(module: nn.Module, modes: Sequence[bool]) -> Iterator[None]:
    """Training or evaluation mode of a module and of those in it."""
    modules = list(module.modules())
    now = [m.training for m in modules]
    for m, mode in zip(modules, modes, strict=True):
        m.training = mode
    try:
        yield
    finally:
        for m, mode in zip(modules, now, strict=True):
            m.training = mode


def is_plain(module: nn.Module) -> bool:
    """Whether to call the module is to call its class's forward, and no hook sees it."""
    return not (
        module._forward_hooks
        or module._forward_pre_hooks
        or module._backward_hooks
        or module._backward_pre_hooks
        or module._compiled_call_impl is not None
        or "forward" in module.__dict__
        or torch_module._has_any_global_hook()
    )
