"""Give a module another forward by changing the class of the object, and undo it."""

from __future__ import annotations

from functools import cache
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn


class Accelerated(nn.Module):
    """Base class that precedes the original class of an accelerated module."""

    _accelerated: Any
    _form: type[Accelerated]
    _original: type[nn.Module]

    if TYPE_CHECKING:  # attributes of the original class

        def __getattr__(self, name: str) -> Any: ...

    def __reduce_ex__(self, protocol: Any) -> tuple[Any, ...]:
        # The class is made at run time, so a copy must make it again instead of importing it by name.
        _, _, *state = super().__reduce_ex__(protocol)
        return (_revived, (self._form, self._original), *state)


@cache
def accelerated_class(form: type[Accelerated], original: type[nn.Module]) -> type[Any]:
    """Return a subclass of ``original`` with the forward of ``form``."""
    members = {"_form": form, "_original": original, "__module__": original.__module__}
    return type(f"Accelerated{original.__name__}", (form, original), members)


def switch(module: nn.Module, form: type[Accelerated], facts: Any = None) -> None:
    """Give ``module`` the forward of ``form``, which reads ``facts`` about it."""
    module._accelerated = facts
    module.__class__ = accelerated_class(form, type(module))


def switch_back(module: Any) -> None:
    """Undo :func:`switch`."""
    module.__class__ = type(module)._original
    del module._accelerated


def _revived(form: type[Accelerated], original: type[nn.Module]) -> Any:
    made = accelerated_class(form, original)
    return object.__new__(made)


def leaves_pytorch(x: Any) -> bool:
    """Return whether a graph for other runtimes is recorded (export, ONNX, tracing), which need PyTorch's operators."""
    if torch.compiler.is_compiling():
        return torch.compiler.is_exporting()
    return (
        not isinstance(x, Tensor)
        or torch._C._get_tracing_state() is not None
        or torch._C._get_dispatch_mode(torch._C._TorchDispatchModeKey.PROXY) is not None
    )
