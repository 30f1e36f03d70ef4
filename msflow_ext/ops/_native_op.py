"""Connects a compiled op to PyTorch: autograd in eager mode, and registration for ``torch.compile``."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from msflow_ext.ops._backend import in_memory, is_transformed


class NativeOp:
    """Compiled op with autograd in eager mode, registered for ``torch.compile``.

    Args:
        name: Name of the op in the library ``msflow_ext``.
        schema: Arguments, tensors first, and results.
        allocate: ``(*args)`` -> empty results. It is also the op's shape function.
        run: ``(results, *args)`` fills the results.
        reference: ``(*args)`` -> results in plain PyTorch, for derivatives of the derivative.
        tensors: Number of arguments that are tensors.
        extra: Number of results, the last ones, that only serve the backward pass.
        allocate_grads: ``(*args)`` -> empty gradients of the tensor arguments, None for an argument without one.
        run_backward: ``(grads_of_results, grads, extra, *args)`` fills the gradients. Without these two functions, the
            reference computes the gradients, and ``torch.compile`` compiles the reference.
    """

    def __init__(
        self,
        name: str,
        schema: str,
        *,
        allocate: Callable[..., tuple[Tensor, ...]],
        run: Callable[..., None],
        reference: Callable[..., Any],
        tensors: int,
        extra: int = 0,
        allocate_grads: Callable[..., tuple[Tensor | None, ...]] | None = None,
        run_backward: Callable[..., None] | None = None,
    ) -> None:
        self.allocate, self.run = allocate, run
        self.allocate_grads, self.run_backward = allocate_grads, run_backward
        self.reference, self.tensors, self.extra = reference, tensors, extra
        self.library = None if run_backward is None else self._register(name, schema)

    def __call__(self, *args: Any) -> Any:
        if torch.compiler.is_compiling():
            if self.library is None:
                return self.reference(*args)
            results = self.library(*args)
            results = (results,) if isinstance(results, Tensor) else results
        elif torch.is_grad_enabled() and any(
            a is not None and a.requires_grad for a in args[: self.tensors]
        ):
            return _Eager.apply(self, *args)
        else:
            results = self.forward(*args)
        return results[: len(results) - self.extra]

    def forward(self, *args: Any) -> tuple[Tensor, ...]:
        """Compute the results, extra ones included."""
        args = self._in_memory(args)
        results = self.allocate(*args)
        self.run(results, *args)
        return results

    def backward(self, grads: Any, extra: Any, *args: Any) -> tuple[Tensor | None, ...]:
        """Compute the gradients of the tensor arguments."""
        if self.allocate_grads is None or self.run_backward is None or torch.is_grad_enabled():
            return self._differentiate_reference(grads, *args)
        if is_transformed(*grads, *args[: self.tensors]):  # batched or dual gradients from above
            return self._differentiate_reference(grads, *args)
        args = self._in_memory(args)
        grads = [in_memory(g) for g in grads]
        results = self.allocate_grads(*args)
        self.run_backward(grads, results, extra, *args)
        return results

    def _in_memory(self, args: tuple[Any, ...]) -> tuple[Any, ...]:
        tensors = [None if t is None else in_memory(t) for t in args[: self.tensors]]
        return *tensors, *args[self.tensors :]

    def _differentiate_reference(self, grads: Any, *args: Any) -> tuple[Tensor | None, ...]:
        """Compute the gradients of the reference; they are differentiable if grad mode is on."""
        create_graph = torch.is_grad_enabled()
        tensors, rest = args[: self.tensors], args[self.tensors :]
        with torch.enable_grad(), torch.autocast(args[0].device.type, enabled=False):
            # Views, because one argument may be computed from another, and these are partial derivatives.
            tensors = [None if t is None else t.view_as(t) for t in tensors]
            results = self.reference(*tensors, *rest)
            results = results if isinstance(results, tuple) else (results,)
            # A result may not depend on the inputs that require grad: log_det does not depend on x1.
            pairs = [(r, g) for r, g in zip(results, grads, strict=True) if r.requires_grad]
            results, grads = zip(*pairs, strict=True)
            inputs = [t for t in tensors if t is not None and t.requires_grad]
            found = iter(
                torch.autograd.grad(
                    results, inputs, grads, create_graph=create_graph, allow_unused=True
                )
            )
        return tuple(next(found) if t is not None and t.requires_grad else None for t in tensors)

    def _register(self, name: str, schema: str) -> Any:
        """Register the op and its backward pass as custom ops; return the former."""
        arguments = schema[1 : schema.index(")")]
        results = schema.count("Tensor", schema.index("->"))
        grads = ", ".join(f"Tensor grad{i}" for i in range(results - self.extra))
        extra = ", ".join(f"Tensor extra{i}" for i in range(self.extra))
        split = results - self.extra

        def unpacked(function: Callable[..., tuple[Tensor, ...]]) -> Callable[..., Any]:
            """Return the tensor, not a tuple, if the op has one result."""
            return function if results > 1 else lambda *args: function(*args)[0]

        # A registered op returns only tensors, so an empty one stands for a missing gradient.
        def backward(*flat: Any) -> list[Tensor]:
            out = self.backward(flat[:split], flat[split:results], *flat[results:])
            return [flat[0].new_empty(0) if g is None else g for g in out]

        def allocate_grads(*flat: Any) -> list[Tensor]:
            assert self.allocate_grads is not None
            out = self.allocate_grads(*flat[results:])
            return [flat[0].new_empty(0) if g is None else g for g in out]

        forward_op = torch.library.custom_op(
            f"msflow_ext::{name}", unpacked(self.forward), mutates_args=(), schema=schema
        )
        forward_op.register_fake(unpacked(self.allocate))
        backward_op = torch.library.custom_op(
            f"msflow_ext::{name}_backward",
            backward,
            mutates_args=(),
            schema=f"({', '.join(filter(None, (grads, extra, arguments)))}) -> Tensor[]",
        )
        backward_op.register_fake(allocate_grads)

        def setup_context(ctx: Any, inputs: Any, output: Any) -> None:
            ctx.rest = inputs[self.tensors :]
            extra = output[split:] if results > 1 else ()
            ctx.save_for_backward(*inputs[: self.tensors], *extra)

        def differentiate(ctx: Any, *upstream: Tensor) -> tuple[Tensor | None, ...]:
            saved = ctx.saved_tensors
            args = (*saved[: self.tensors], *ctx.rest)
            out = backward_op(*upstream[:split], *saved[self.tensors :], *args)
            needed = ctx.needs_input_grad[: self.tensors]
            return (
                *(g if n else None for g, n in zip(out, needed, strict=True)),
                *[None] * len(ctx.rest),
            )

        forward_op.register_autograd(differentiate, setup_context=setup_context)
        return forward_op


class _Eager(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, op: NativeOp, *args: Any) -> Any:
        results = op.forward(*args)
        split = len(results) - op.extra
        ctx.op, ctx.rest = op, args[op.tensors :]
        ctx.save_for_backward(*args[: op.tensors], *results[split:])
        return results[:split]

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> Any:
        op: NativeOp = ctx.op
        saved = ctx.saved_tensors  # read once, because checkpointing allows only one access
        out = op.backward(grads, saved[op.tensors :], *saved[: op.tensors], *ctx.rest)
        needed = ctx.needs_input_grad[1 : 1 + op.tensors]
        out = (g if n else None for g, n in zip(out, needed, strict=True))
        return (None, *out, *[None] * len(ctx.rest))
