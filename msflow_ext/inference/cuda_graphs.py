"""CUDA graphs: a model's inference recorded once, its scales side by side, and replayed without launch overhead."""

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

_WARM_UPS = 3  # calls before the recording: libraries choose algorithms and allocate in them
_RECORDING = Lock()  # a process may record one graph at a time


def graphed(model: Callable[[Inputs], Output], example: Inputs) -> Callable[[Inputs], Output]:
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

    Examples:
        >>> import msflow_ext as mx
        >>> if torch.cuda.is_available():
        ...     head = mx.MSFlowHead((8, 16), blocks=(1, 2), cond_channels=8).cuda().eval()
        ...     features = [torch.randn(1, 8, 4, 4).cuda(), torch.randn(1, 16, 2, 2).cuda()]
        ...     run = graphed(head.log_likelihood, features)
        ...     maps = run(features)
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
                f"graphed: inputs must be as the example, {[_kind(t) for t in own]}, got {[_kind(t) for t in given]}"
            )
        with torch.cuda.device(device):
            for to, t in zip(own, given, strict=True):
                to.copy_(t)
            graph.replay()
        return results

    return run


class Replayed:
    """A detector's model, replayed as a CUDA graph for the batches that come again.

    The second batch of a shape is recorded by :func:`graphed`; one that comes once, as the last of a folder, is not worth
    it. The first ``most`` shapes that come again keep their graphs, others run without. So does all that follows a
    recording that failed, of which one warning tells. Threads take turns; off the GPU they do not wait.

    Args:
        model: images to :class:`~msflow_ext.Prediction`.
        record: ``record(model, batch)`` gives what is called in its place; the next call may overwrite its results.
        on: type of the devices with graphs.
        most: graphs to keep; each has memory of its own to work in.
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
        self._packed: list[Any] = []  # what the graphs read, kept as long as they are
        self._turn = Lock()

    @torch.inference_mode()
    def __call__(self, images: Tensor, device: torch.device) -> tuple[Tensor, Tensor]:
        """Scores ``(N,)`` and anomaly maps ``(N, S, S)`` by the model on this device: on the CPU, the caller's own."""
        if device.type != self._on:
            found = self.model(images.to(device))
            return found.score.cpu(), found.anomaly_map.cpu()
        with self._turn:
            images = images.to(device)
            found = self._run(images)(images)
            return found.score.to("cpu", copy=True), found.anomaly_map.to("cpu", copy=True)

    def _run(self, images: Tensor) -> Callable[[Tensor], Any]:
        """The graph for such images, if there is one or should be one now, else the model."""
        packed = _packed(self.model)
        if list(map(id, packed)) != list(map(id, self._packed)):  # of weights that were replaced
            self._packed = packed
            self._graphs.clear()
        kind = _kind(images)
        if kind in self._seen and kind not in self._graphs and len(self._graphs) < self._most:
            try:
                self._graphs[kind] = self._record(self.model, images)
            except Exception as error:  # If the model is at fault, it fails again without a graph.
                self._most = 0
                reason = next(iter(str(error).splitlines()), type(error).__name__)
                text = f"inference goes on without CUDA graphs, slower: {reason}"
                warnings.warn(text, stacklevel=2)
        self._seen.add(kind)
        return self._graphs.get(kind, self.model)

    def __reduce__(self) -> Any:  # a copy records its own
        return Replayed, (self.model,)


def _packed(model: Any) -> list[Any]:
    """What optimized parts of a model run at present."""
    parts = model.modules() if isinstance(model, nn.Module) else ()
    return [part.packed() for part in parts if isinstance(part, Optimized)]


def _list(tensors: Tensors) -> list[Tensor]:
    return [tensors] if isinstance(tensors, Tensor) else list(tensors)


def _kind(x: Tensor) -> tuple[tuple[int, ...], str, str]:
    return tuple(x.shape), str(x.dtype).removeprefix("torch."), str(x.device)
