"""Code that the benchmark files share: sizes, layouts, derivatives, and runs in pytest-benchmark."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import replace
from typing import Any

import pytest
import torch
from torch import Tensor

from msflow_ext.bench import Case, machine
from msflow_ext.bench.harness import prepare

LAYOUTS = {"nchw": torch.contiguous_format, "nhwc": torch.channels_last}
DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16}


def scales(quick: bool) -> list[tuple[int, int]]:
    """Return channels and side of wide_resnet50_2's pooled features at 512 px, or toy sizes."""
    return [(16, 8), (32, 4)] if quick else [(256, 64), (512, 32), (1024, 16)]


def without_slow(case: Case) -> Case:
    """Return the case without providers that take a minute or more to build."""
    return replace(case, providers={n: p for n, p in case.providers.items() if not p.slow})


def run_in_pytest(benchmark: Any, case: Case, provider: str) -> None:
    """Compare the results of a provider, and time it with pytest-benchmark."""
    ready = prepare(case, [provider], slow=True)
    if provider not in ready.runs:
        pytest.fail(f"refused: {ready.found[provider]['refused']}")
    arguments = ready.arguments()
    benchmark.group = case.name
    benchmark.extra_info |= {**machine.facts(), **ready.found[provider], "case": case.name}
    with torch.set_grad_enabled(case.grad):
        benchmark.pedantic(
            ready.runs[provider],
            setup=lambda: (tuple(next(arguments)), {}),
            rounds=max(case.rounds, len(ready.sets)),
            warmup_rounds=0 if case.rounds == 1 else len(ready.sets),
        )


def normal(*shape: int, dtype: torch.dtype = torch.float32, layout: str = "nchw") -> Tensor:
    """Return standard normal numbers."""
    return torch.randn(*shape).to(dtype).contiguous(memory_format=LAYOUTS[layout])


def widened(tensors: Sequence[Tensor]) -> list[Tensor]:
    """Return float64 copies that require gradients if the originals do; integer tensors are returned as they are."""
    return [
        t.detach().double().requires_grad_(t.requires_grad) if t.is_floating_point() else t
        for t in tensors
    ]


def backward_of(function: Callable[..., Any], results: int) -> Callable[..., Any]:
    """Return a function that computes only gradients.

    Its last ``results`` arguments are the gradients of the results of ``function``. The forward pass runs once for each
    set of inputs, in the first call.
    """
    graphs: dict[int, tuple[Any, list[Tensor]]] = {}

    def run(*inputs: Tensor) -> Any:
        arguments, upstream = inputs[:-results], inputs[-results:]
        key = id(inputs[0])
        if key not in graphs:
            found = function(*arguments)
            graphs[key] = (found, [t for t in arguments if t.requires_grad])
        found, leaves = graphs[key]
        return torch.autograd.grad(found, leaves, upstream, retain_graph=True)

    return run
