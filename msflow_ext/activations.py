"""Recomputation in the backward pass: the input of a function, and the states of a reversible chain."""

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
    """Return ``function(make(*inputs))``, and recompute the result of ``make`` in the backward pass instead of saving it.

    Use it if the result is cheap to compute from ``inputs``. Only ``inputs`` are saved, as autograd saves tensors: hooks
    for saved tensors (checkpoints, offloading) see them, and in-place changes are detected.

    Args:
        function: Differentiable function of the result of ``make``.
        make: Function of ``inputs`` that depends on nothing else that changes, and draws no random numbers.
        inputs: All inputs of ``make``, parameters included.

    Raises:
        RuntimeError: In the backward pass, if a saved tensor was modified in place.

    Examples:
        >>> x = torch.ones(3, requires_grad=True)
        >>> recomputed(lambda y: (y * y).sum(), lambda t: 2 * t, x).backward()
        >>> x.grad
        tensor([8., 8., 8.])
    """
    x = make(*inputs)
    if not torch.is_grad_enabled() or _backend.hides_values(x):
        return function(x)
    recipe = _Recipe(make, x, inputs)
    with saved_tensors_hooks(recipe.pack, recipe.unpack):
        try:
            return function(x)
        finally:
            recipe.inputs = []  # the packed values hold them, unless outer hooks replaced them


class _Recipe:
    """Hooks that pack views of ``x`` as the inputs that it is made from, and save other tensors as autograd does."""

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
        if x.stride() != self.strides:  # another backend may return another memory format
            x = x.new_empty_strided(self.shape, self.strides).copy_(x)
        shape, strides, offset = view
        return x.as_strided(shape, strides, x.storage_offset() + offset)

    def _save(self, tensor: Tensor) -> Any:
        return (tensor, tensor._version) if self.outer is None else self.outer[0](tensor)

    def _restore(self, saved: Any) -> Tensor:
        if self.outer is not None:
            return self.outer[1](saved)
        tensor, version = saved
        if tensor._version != version:  # autograd does not check tensors that hooks packed
            raise RuntimeError(
                "one of the variables needed for gradient computation has been modified by an inplace operation: "
                f"a {tensor.dtype} tensor {tuple(tensor.shape)} is at version {tensor._version}; expected version "
                f"{version} instead"
            )
        return tensor


class Surroundings:
    """State of autocast and of the backend, to restore in the backward pass."""

    def __init__(self, device: str) -> None:
        dtype, enabled = torch.get_autocast_dtype(device), torch.is_autocast_enabled(device)
        self.autocast = torch.autocast(device, dtype, enabled)
        self.backend = _backend.forced()

    @contextmanager
    def __call__(self) -> Iterator[None]:
        """Restore the state in this context."""
        with self.autocast, _backend.forcing(self.backend):
            yield


class Step(Protocol):
    """Step of a reversible chain: it maps a state to the next state and a ``log_det``, and calls a module once."""

    @property
    def subnet(self) -> nn.Module:
        """Return the module that the step calls."""
        ...

    @property
    def tensors(self) -> Sequence[Tensor]:
        """Return the other tensors that the step reads: its parameters, permutations, conditions."""
        ...

    def __call__(self, *state: Tensor) -> tuple[Tensor, ...]:
        """Return ``(*state, log_det)``."""
        ...

    def retrace(
        self, ask: Callable[..., Any], results: State, tensors: State
    ) -> tuple[list[Tensor], tuple[Tensor, ...]]:
        """Recompute the inputs as leaves of a graph, and ``(*results, log_det)`` in that graph.

        Args:
            ask: Function to call instead of ``subnet``.
            results: State that the step returned.
            tensors: Tensors to read instead of the attribute of this name.
        """
        ...


def in_turn(steps: Sequence[Any], state: State) -> tuple[Tensor, ...]:
    """Run the steps in order; return the last state and the sum of their ``log_det``."""
    total: Tensor | float = 0.0
    for step in steps:
        *state, log_det = step(*state)
        total = total + log_det
    return *state, total  # type: ignore[return-value]


def reversible(steps: Sequence[Any], state: State) -> tuple[Tensor, ...]:
    """Run :func:`in_turn`, and save only the last state and the tensors that the steps read.

    The backward pass computes each step's inputs from its results by the inverse, then runs the step again. That needs
    about a third more work, and a small fraction of the memory. The inverse rounds, so that half precision is not
    supported. Random numbers, buffers and the training mode are those of the forward pass. Function transforms use
    :func:`in_turn`.

    Args:
        steps: Steps, each a :class:`Step`.
        state: Tensors of one dtype.

    Raises:
        TypeError: The state is in half precision, or autocast is enabled.
        RuntimeError: A subnet has forward hooks, which would run twice. In the backward pass: a subnet depends on a
            tensor that is neither its parameter nor its input, or a saved tensor was modified in place.
    """
    device, dtype = state[0].device.type, state[0].dtype
    if torch.is_autocast_enabled(device) or dtype.itemsize < 4:
        dtype = torch.get_autocast_dtype(device) if dtype.itemsize >= 4 else dtype
        raise TypeError(
            f"dtype must be float32 or float64 for memory='reversible', got {dtype}. Use memory='lean' for half precision."
        )
    if not torch.is_grad_enabled() or _backend.hides_values(*state):
        return in_turn(steps, state)
    visits = [_Visit(step) for step in steps]
    tensors = [t for visit in visits for t in visit.inputs]
    return _Reversible.apply(visits, len(state), *state, *tensors)  # type: ignore[return-value]


class _Visit:
    """Step of a forward pass, with the random state, buffers and modes that it ran with."""

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
                    "subnet must have no forward hooks for memory='reversible', which runs it twice, got one on module "
                    f"{name!r} ({type(module).__name__}). Use memory='lean'."
                )

    def run(self, state: State) -> tuple[Tensor, ...]:
        before = {name: (b, b.clone(), b._version) for name, b in self.buffers.items()}
        random = _Random(state)
        results = self.step(*state)
        self.random = random if random.was_used(state) else None
        # A copy is kept of each buffer that the step changed (running statistics). A later change of others is an error.
        self.buffers = {n: copy if b._version != v else b for n, (b, copy, v) in before.items()}
        del self.inputs  # the graph holds them
        return results

    def retrace(self, results: State, tensors: State, buffers: State) -> Any:
        """Run :meth:`Step.retrace` with the random state, buffers and modes of the forward pass."""
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
            visit.buffers = {}  # the graph holds them
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
            own = _pop(tensors, visit.own + len(visit.names))
            with torch.enable_grad(), ctx.surroundings():
                inputs, results = visit.retrace(state, own, _pop(buffers, len(visit.changing)))
            leaves = [*inputs, *(t for t in own if t.requires_grad)]
            pairs = zip(results, (*grad_state, grad_log_det), strict=True)
            outputs, upstream = zip(*((r, g) for r, g in pairs if r.requires_grad), strict=True)
            _check_leaves(outputs, leaves)
            with ctx.surroundings():
                gradients = torch.autograd.grad(outputs, leaves, upstream, allow_unused=True)
            grad_state, rest = gradients[: len(inputs)], iter(gradients[len(inputs) :])
            found = [*(next(rest) if t.requires_grad else None for t in own), *found]
            state = [x.detach() for x in inputs]
        return None, None, *grad_state, *found


def _pop(tensors: list[Tensor], count: int) -> list[Tensor]:
    """Remove and return the last ``count`` tensors of a list."""
    start = len(tensors) - count
    taken, tensors[start:] = tensors[start:], []
    return taken


def _check_leaves(results: State, leaves: State) -> None:
    """Raise an error if the graph has other leaves, because their gradients would be lost."""
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
                "subnet must depend only on its parameters and inputs for memory='reversible', got another tensor that "
                f"requires a gradient, of shape {tuple(node.variable.shape)}. Use memory='lean'."
            )
        todo += [following for following, _ in node.next_functions]


class _Random:
    """States of the random number generators of the CPU and of the device of some tensors."""

    def __init__(self, tensors: State) -> None:
        self.kind: Any = tensors[0].device.type
        self.cpu, (self.devices, self.states) = torch.get_rng_state(), get_device_states(tensors[0])

    def was_used(self, tensors: State) -> bool:
        """Return whether numbers were drawn since then; ``tensors`` are on the same device."""
        now, (_, states) = torch.get_rng_state(), get_device_states(tensors[0])
        pairs = zip((self.cpu, *self.states), (now, *states), strict=True)
        return not all(torch.equal(a, b) for a, b in pairs)

    @contextmanager
    def again(self) -> Iterator[None]:
        """Draw the same numbers again in this context; afterwards the generators continue as if none were drawn."""
        kind = self.kind if self.devices else "cuda"
        with torch.random.fork_rng(self.devices, device_type=kind):
            torch.set_rng_state(self.cpu)
            if self.devices:
                set_device_states(self.devices, self.states, device_type=kind)
            yield


@contextmanager
def _training_as(module: nn.Module, modes: Sequence[bool]) -> Iterator[None]:
    """Set the training modes of a module and its submodules in this context."""
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
    """Return whether calling the module only runs the forward method of its class: no hook, nothing compiled."""
    return not (
        module._forward_hooks
        or module._forward_pre_hooks
        or module._backward_hooks
        or module._backward_pre_hooks
        or module._compiled_call_impl is not None
        or "forward" in module.__dict__
        or torch_module._has_any_global_hook()
    )
