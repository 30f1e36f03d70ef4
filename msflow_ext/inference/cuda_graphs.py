"""Record a model's inference as a CUDA graph, with its scales in parallel, and replay it without launch overhead."""

from __future__ import annotations

import warnings
from collections.abc import Callable, Sequence
from threading import Lock
from typing import Any, TypeVar

import torch
from torch import Tensor, nn

from msflow_ext.models.optimized.head import side_by_side
from msflow_ext.models.optimized.packing import Optimized

Tensors = Tensor | Sequence[Tensor]
Inputs = TypeVar("Inputs", bound=Tensors)
Output = TypeVar("Output")

_WARM_UPS = 3  # calls before the capture, in which libraries choose algorithms and allocate memory
_RECORDING = Lock()  # a process may capture one graph at a time


def graphed(model: Callable[[Inputs], Output], example: Inputs) -> Callable[[Inputs], Output]:
    """Capture ``model(example)`` as a CUDA graph, and return a function that replays it on new inputs.

    Optimized models (:meth:`~msflow_ext.MSFlow.optimize`) run each scale on its own stream, joined by events.

    Args:
        model: a model, a head, or any function whose GPU work depends only on the values of its argument.
        example: a tensor or a sequence of tensors on one CUDA device.

    Returns:
        ``run(inputs)``, which copies ``inputs`` into the graph's inputs and replays the graph. Inputs must have the
        shapes and dtypes of ``example``. The next call overwrites the results: clone those to keep. No gradients are
        recorded.

    Raises:
        RuntimeError: there is no CUDA device, or the model cannot be captured.
        ValueError: ``example`` is not on one CUDA device, or the inputs of a call differ from it in shape, dtype or
            device.

    Examples:
        >>> import msflow_ext as mx
        >>> if torch.cuda.is_available():
        ...     head = mx.MSFlowHead((8, 16), blocks=(1, 2), cond_channels=8).cuda().eval()
        ...     features = [torch.randn(1, 8, 4, 4).cuda(), torch.randn(1, 16, 2, 2).cuda()]
        ...     run = graphed(head.log_likelihood, features)
        ...     maps = run(features)
    """
    if not torch.cuda.is_available():
        raise RuntimeError("CUDA graphs need a GPU, but torch finds none")
    expected = _list(example)
    devices = {t.device for t in expected}
    if len(devices) != 1 or any(d.type != "cuda" for d in devices):
        raise ValueError(f"example must be on one CUDA device, got {sorted(map(str, devices))}")
    (device,) = devices
    own = [t.detach().clone(memory_format=torch.preserve_format) for t in expected]
    inputs: Any = own[0] if isinstance(example, Tensor) else own
    graph, stream = torch.cuda.CUDAGraph(), torch.cuda.Stream(device)
    stream.wait_stream(torch.cuda.current_stream(device))
    with _RECORDING, torch.cuda.stream(stream), torch.no_grad(), side_by_side(device):
        for _ in range(_WARM_UPS):
            model(inputs)
        # Other threads may use the GPU meanwhile.
        with torch.cuda.graph(graph, stream=stream, capture_error_mode="thread_local"):
            results = model(inputs)
    torch.cuda.current_stream(device).wait_stream(stream)

    def run(inputs: Inputs) -> Output:
        given = _list(inputs)
        if [_kind(t) for t in given] != [_kind(t) for t in own]:
            raise ValueError(
                f"inputs must be as the example, {[_kind(t) for t in own]}, got {[_kind(t) for t in given]}"
            )
        with torch.cuda.device(device):
            for to, t in zip(own, given, strict=True):
                to.copy_(t)
            graph.replay()
        return results

    return run


class Replayed:
    """A detector's model that replays CUDA graphs for repeated batch shapes.

    The second batch of a shape is captured by :func:`graphed`, the first is not: it may be the only one, such as the last
    batch of a folder. The first ``most`` repeated shapes keep their graphs; other shapes run without. If a capture
    fails, one warning is raised and everything runs without graphs. Threads take turns on the GPU, not on the CPU.

    Args:
        model: maps images to :class:`~msflow_ext.Prediction`.
        record: ``record(model, batch)`` returns a replacement for ``model``, whose results the next call may overwrite.
        on: device type to use graphs on.
        most: maximum number of graphs; each has its own working memory.
    """

    def __init__(
        self,
        model: Callable[[Tensor], Any],
        *,
        record: Callable[[Any, Tensor], Callable[[Tensor], Any]] = graphed,
        on: str = "cuda",
        most: int = 4,
    ) -> None:
        self.model = model
        self._record, self._on, self._most = record, on, most
        self._seen: set[Any] = set()
        self._graphs: dict[Any, Callable[[Tensor], Any]] = {}
        self._packed: list[Any] = []  # weights that the graphs read
        self._turn = Lock()

    @torch.inference_mode()
    def __call__(self, images: Tensor, device: torch.device) -> tuple[Tensor, Tensor]:
        """Return scores ``(N,)`` and anomaly maps ``(N, S, S)`` on the CPU, which later calls do not overwrite."""
        if device.type != self._on:
            found = self.model(images.to(device))
            return found.score.cpu(), found.anomaly_map.cpu()
        with self._turn:
            images = images.to(device)
            found = self._run(images)(images)
            return found.score.to("cpu", copy=True), found.anomaly_map.to("cpu", copy=True)

    def _run(self, images: Tensor) -> Callable[[Tensor], Any]:
        """Return the graph for this shape, captured now if it is due; without one, the model."""
        packed = _packed(self.model)
        if list(map(id, packed)) != list(map(id, self._packed)):  # weights were replaced
            self._packed = packed
            self._graphs.clear()
        kind = _kind(images)
        if kind in self._seen and kind not in self._graphs and len(self._graphs) < self._most:
            try:
                self._graphs[kind] = self._record(self.model, images)
            except Exception as error:  # If the model is at fault, it fails again without a graph.
                self._most = 0
                reason = next(iter(str(error).splitlines()), type(error).__name__)
                text = f"inference continues without CUDA graphs, more slowly: {reason}"
                warnings.warn(text, stacklevel=2)
        self._seen.add(kind)
        return self._graphs.get(kind, self.model)

    def __reduce__(self) -> Any:  # a copy captures its own graphs
        return Replayed, (self.model,)


def _packed(model: Any) -> list[Any]:
    """Return the packed weights of a model's optimized parts."""
    parts = model.modules() if isinstance(model, nn.Module) else ()
    return [part.packed() for part in parts if isinstance(part, Optimized)]


def _list(tensors: Tensors) -> list[Tensor]:
    return [tensors] if isinstance(tensors, Tensor) else list(tensors)


def _kind(x: Tensor) -> tuple[tuple[int, ...], str, str]:
    return tuple(x.shape), str(x.dtype).removeprefix("torch."), str(x.device)
