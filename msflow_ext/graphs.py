"""CUDA graphs: a model's inference recorded once, its scales side by side, and replayed without launch overhead."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor

from msflow_ext.models.frozen import side_by_side

Tensors = Tensor | Sequence[Tensor]

_WARM_UPS = 3  # calls before the recording: libraries choose algorithms and allocate in them


def graphed(model: Callable[[Any], Any], example: Tensors) -> Callable[[Any], Any]:
    """Record ``model(example)`` as a CUDA graph; what is returned replays it on other inputs of the same shapes.

    Inference forms (:meth:`~msflow_ext.MSFlow.optimize`) run each scale on a stream of its own, joined by events.

    Args:
        model: a detector, a head, or any function whose work on the GPU depends on nothing but its argument's values.
        example: a tensor or a sequence of tensors on one CUDA device.

    Returns:
        ``run(inputs)``: copies the inputs into the graph's own and replays it. Its results are the graph's: the next
        call overwrites them, so clone what must last. No gradients are recorded.

    Raises:
        RuntimeError: there is no CUDA, or the model does what a graph cannot hold.
        ValueError: ``example`` is not on one CUDA device; a call's inputs differ from it in shape, dtype or device.
    """
    if not torch.cuda.is_available():
        raise RuntimeError("graphed: CUDA graphs need a GPU, and torch sees none")
    wanted = _list(example)
    devices = {t.device for t in wanted}
    if len(devices) != 1 or any(d.type != "cuda" for d in devices):
        raise ValueError(
            f"graphed: example must be on one CUDA device, got {sorted(map(str, devices))}"
        )
    (device,) = devices
    own = [t.detach().clone(memory_format=torch.preserve_format) for t in wanted]
    inputs = own[0] if isinstance(example, Tensor) else own
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.device(device), torch.no_grad(), side_by_side(device):
        warm_up = torch.cuda.Stream()
        warm_up.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(warm_up):
            for _ in range(_WARM_UPS):
                model(inputs)
        torch.cuda.current_stream().wait_stream(warm_up)
        with torch.cuda.graph(graph):
            results = model(inputs)

    def run(inputs: Tensors) -> Any:
        given = _list(inputs)
        if [_kind(t) for t in given] != [_kind(t) for t in own]:
            raise ValueError(
                f"graphed: inputs must be as the example, {[_kind(t) for t in own]}, got {[_kind(t) for t in given]}"
            )
        with torch.cuda.device(device):
            for to, t in zip(own, given, strict=True):
                to.copy_(t)
            graph.replay()
        return results

    return run


def _list(tensors: Tensors) -> list[Tensor]:
    return [tensors] if isinstance(tensors, Tensor) else list(tensors)


def _kind(x: Tensor) -> tuple[tuple[int, ...], str, str]:
    return tuple(x.shape), str(x.dtype).removeprefix("torch."), str(x.device)
