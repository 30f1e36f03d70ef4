"""The modes in which PyTorch can run the same function: autocast, compiled, frozen."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch


def autocast(run: Callable[..., Any]) -> Callable[..., Any]:
    """Run a function under PyTorch's bfloat16 autocast."""

    def under_autocast(*inputs: Any) -> Any:
        with torch.autocast("cpu", torch.bfloat16):
            return run(*inputs)

    return under_autocast


def compiled(run: Callable[..., Any], **settings: Any) -> Callable[..., Any]:
    """Compile a function by ``torch.compile`` for fixed shapes; ``settings`` are inductor's."""
    import torch._dynamo
    import torch._inductor.config

    # A recompilation beyond the limit would silently time eager PyTorch instead.
    torch._dynamo.config.fail_on_recompile_limit_hit = True
    torch._dynamo.config.recompile_limit = 64
    # As options, or what was compiled without them would be taken; patched, as tracing looks there.
    fast = torch.compile(run, dynamic=False, options=settings or None)

    def under_settings(*inputs: Any) -> Any:
        with torch._inductor.config.patch(**settings):
            return fast(*inputs)

    return under_settings if settings else fast


def freezing(run: Callable[..., Any]) -> Callable[..., Any]:
    """Compile a function with weights as constants, which are folded, cast and laid out once."""
    return compiled(run, freezing=True)
