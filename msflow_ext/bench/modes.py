"""Modes in which PyTorch runs a function: autocast, compiled, and compiled with frozen weights."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch


def autocast(run: Callable[..., Any]) -> Callable[..., Any]:
    """Return ``run`` under PyTorch's autocast, with convolutions in bfloat16."""

    def under_autocast(*inputs: Any) -> Any:
        with torch.autocast("cpu", torch.bfloat16):
            return run(*inputs)

    return under_autocast


def compiled(run: Callable[..., Any], **settings: Any) -> Callable[..., Any]:
    """Return ``run`` compiled by ``torch.compile`` for fixed shapes, with ``settings`` of inductor."""
    import torch._dynamo
    import torch._inductor.config

    # Without this, eager PyTorch would silently be timed after too many recompilations.
    torch._dynamo.config.fail_on_recompile_limit_hit = True
    torch._dynamo.config.recompile_limit = 64
    # The options keep code that was compiled without them from being reused. Tracing reads the patched configuration.
    fast = torch.compile(run, dynamic=False, options=settings or None)

    def under_settings(*inputs: Any) -> Any:
        with torch._inductor.config.patch(**settings):
            return fast(*inputs)

    return under_settings if settings else fast


def freezing(run: Callable[..., Any]) -> Callable[..., Any]:
    """Return ``run`` compiled with weights as constants, which are folded, cast and laid out once."""
    return compiled(run, freezing=True)
