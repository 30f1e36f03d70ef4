"""CUDA graphs: a replay equals the model, and without a GPU there is a clear error. Not run on a GPU yet."""

from __future__ import annotations

import copy
import pickle
import threading
import time
import warnings
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

import msflow_ext as mx
from msflow_ext.choices import Precision
from msflow_ext.inference.cuda_graphs import Replayed
from msflow_ext.inference.detector import Detector
from msflow_ext.models.optimized import head as optimized_head
from msflow_ext.testing import relative_error, tolerance

needs_gpu = pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")


def head() -> mx.MSFlowHead:
    return mx.MSFlowHead((16, 32, 32), blocks=(1, 2, 1), cond_channels=8, seed=0).eval()


def features(seed: int, device: str) -> list[torch.Tensor]:
    generator = torch.Generator().manual_seed(seed)
    sizes = ((16, 8), (32, 4), (32, 2))
    return [torch.randn(2, c, s, s, generator=generator).to(device) for c, s in sizes]


def test_without_a_gpu_graphs_are_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    with pytest.raises(RuntimeError, match=r"^CUDA graphs need a GPU, but torch finds none"):
        mx.graphed(head(), features(0, "cpu"))


def test_an_example_on_the_cpu_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    with pytest.raises(ValueError, match=r"example must be on one CUDA device, got \['cpu'\]"):
        mx.graphed(head(), features(0, "cpu"))


@needs_gpu
@pytest.mark.parametrize("optimized", [False, True])
def test_a_replay_equals_the_model(optimized: bool) -> None:
    model = head().cuda()
    run = model.optimize() if optimized else model
    replay = mx.graphed(run.log_likelihood, features(0, "cuda"))
    for seed in (1, 2):
        got = [t.clone() for t in replay(features(seed, "cuda"))]
        with torch.no_grad():
            expected = run.log_likelihood(features(seed, "cuda"))
        for g, w in zip(got, expected, strict=True):
            assert relative_error(g, w) <= 16 * tolerance(torch.float32, 32)


@needs_gpu
def test_a_replay_refuses_inputs_of_another_shape() -> None:
    replay = mx.graphed(head().cuda().log_likelihood, features(0, "cuda"))
    with pytest.raises(ValueError, match=r"^inputs must be as the example"):
        replay([t[:1] for t in features(0, "cuda")])


# ---- automatic capture of a detector's model; a stand-in for CUDA graphs runs on the CPU ----

CPU = torch.device("cpu")


class Sums(torch.nn.Module):
    """A model: the score is the sum of an image, the map its mean over channels."""

    def forward(self, images: torch.Tensor) -> mx.Prediction:
        return mx.Prediction(images.sum((1, 2, 3)), images.mean(1), images.mean(1), [])


class Recorder:
    """A recorder like CUDA's: the next call overwrites inputs and results, and slowly."""

    def __init__(self, error: Exception | None = None) -> None:
        self.shapes: list[tuple[int, ...]] = []
        self.error = error

    def __call__(self, model: Any, batch: torch.Tensor) -> Callable[[torch.Tensor], Any]:
        self.shapes.append(tuple(batch.shape))
        if self.error:
            raise self.error
        own, found = batch.clone(), model(batch)

        def replay(images: torch.Tensor) -> Any:
            own.copy_(images)
            time.sleep(0.001)
            fresh = model(own)
            found.score.copy_(fresh.score)
            time.sleep(0.001)
            found.anomaly_map.copy_(fresh.anomaly_map)
            return found

        return replay


def batch(n: int, value: float = 1.0, side: int = 4) -> torch.Tensor:
    return torch.full((n, 3, side, side), value)


def assert_of(found: tuple[torch.Tensor, torch.Tensor], images: torch.Tensor) -> None:
    expected = Sums()(images)
    assert torch.equal(found[0], expected.score) and torch.equal(found[1], expected.anomaly_map)


def test_the_second_batch_of_a_shape_is_recorded_and_a_single_one_is_not() -> None:
    record = Recorder()
    replayed = Replayed(Sums(), record=record, on="cpu")
    for n in (8, 8, 8, 3, 8, 1, 1):
        images = torch.rand(n, 3, 4, 4)
        assert_of(replayed(images, CPU), images)
    assert record.shapes == [(8, 3, 4, 4), (1, 3, 4, 4)]


@pytest.mark.family("optimized models")
def test_graphs_are_recorded_again_after_weights_are_replaced() -> None:
    options: Any = {"image_size": 64, "pretrained": False, "blocks": (1, 1, 1), "cond_channels": 8}
    model = mx.MSFlow("test_efficientnet", seed=1, **options).eval().optimize()
    record, images = Recorder(), torch.rand(2, 3, 64, 64)
    replayed = Replayed(model, record=record, on="cpu")
    for _ in range(3):
        replayed(images, CPU)
    assert len(record.shapes) == 1
    model.load_state_dict({k: v + 0.01 for k, v in model.state_dict().items()})
    scores, _ = replayed(images, CPU)
    assert len(record.shapes) == 2
    with torch.inference_mode():
        assert torch.equal(scores, model(images).score)


def test_only_the_first_repeated_shapes_keep_a_graph() -> None:
    record = Recorder()
    replayed = Replayed(Sums(), record=record, on="cpu", most=2)
    for n in (1, 2, 3, 1, 2, 3, 3, 1):
        assert_of(replayed(batch(n), CPU), batch(n))
    assert [n for n, *_ in record.shapes] == [1, 2]


def test_later_calls_do_not_overwrite_results() -> None:
    replayed = Replayed(Sums(), record=Recorder(), on="cpu")
    found = [replayed(batch(2, value), CPU) for value in (0.0, 1.0, 2.0, 3.0)]
    for value, each in enumerate(found):
        assert_of(each, batch(2, float(value)))


def test_threads_get_their_own_results() -> None:
    replayed = Replayed(Sums(), record=Recorder(), on="cpu")
    inputs = [torch.rand(1 + i % 2, 3, 4, 4) for i in range(48)]
    with ThreadPoolExecutor(8) as pool:
        results = list(pool.map(lambda images: replayed(images, CPU), inputs))
    for images, found in zip(inputs, results, strict=True):
        assert_of(found, images)


def test_a_model_that_cannot_be_recorded_runs_without_graphs_after_one_warning() -> None:
    record = Recorder(RuntimeError("operation not permitted\nwhile capturing"))
    replayed = Replayed(Sums(), record=record, on="cpu")
    replayed(batch(1), CPU)
    with pytest.warns(
        UserWarning, match=r"without CUDA graphs, more slowly: operation not permitted$"
    ):
        assert_of(replayed(batch(1), CPU), batch(1))
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        for n in (1, 2, 2):
            assert_of(replayed(batch(n), CPU), batch(n))
    assert len(record.shapes) == 1


def test_on_the_cpu_nothing_is_recorded_and_threads_run_in_parallel() -> None:
    together = threading.Barrier(2, timeout=20)

    class Meeting(Sums):
        def forward(self, images: torch.Tensor) -> mx.Prediction:
            together.wait()
            return super().forward(images)

    record = Recorder()
    replayed = Replayed(Meeting(), record=record)
    with ThreadPoolExecutor(2) as pool:
        for _ in range(3):
            assert len(list(pool.map(lambda n: replayed(batch(n), CPU), (2, 2)))) == 2
    assert not record.shapes


def test_a_detector_records_repeated_batches_again_after_its_model_is_replaced() -> None:
    class Scaled(Sums):
        image_size = 4

        def __init__(self, scale: float) -> None:
            super().__init__()
            self.scale = torch.nn.Parameter(torch.tensor(scale))

        def forward(self, images: torch.Tensor) -> mx.Prediction:
            return super().forward(images * self.scale)

    record = Recorder()
    detector = Detector(Scaled(1.0))  # pyright: ignore[reportArgumentType]
    detector._replayed = Replayed(detector.model, record=record, on="cpu")
    for value in (0.25, 0.5, 0.75):
        (found,) = detector.predict(batch(1, value)[0])
        assert found.score == 48 * value
        assert np.array_equal(found.map, np.full((4, 4), value, np.float32))
    assert record.shapes == [(1, 3, 4, 4)]
    detector.model = Scaled(2.0)  # pyright: ignore[reportAttributeAccessIssue]
    assert detector.predict(batch(1, 0.5)[0])[0].score == 48
    for copied in (copy.deepcopy(detector), copy.copy(detector)):
        assert copied.predict(batch(1, 0.25)[0])[0].score == 24


def test_a_detector_with_graphs_can_be_pickled() -> None:
    replayed = Replayed(Sums(), record=Recorder(), on="cpu")
    for _ in range(3):
        replayed(batch(2), CPU)
    assert_of(pickle.loads(pickle.dumps(replayed))(batch(2), CPU), batch(2))


def test_streams_of_a_recording_are_not_used_by_other_threads(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    def current_stream() -> Any:
        raise RuntimeError("on a stream")

    monkeypatch.setattr(torch.cuda, "Stream", lambda device: object())
    monkeypatch.setattr(torch.cuda, "current_stream", current_stream)
    with optimized_head.side_by_side(torch.device("cuda")), ThreadPoolExecutor(1) as pool:
        assert pool.submit(optimized_head.each_scale, lambda x: x + 1, [1, 2]).result() == [2, 3]
        with pytest.raises(RuntimeError, match="on a stream"):
            optimized_head.each_scale(lambda x: x + 1, [1, 2])


@needs_gpu
@pytest.mark.parametrize("precision", [None, "float32", "bfloat16"])
def test_a_detector_with_graphs_scores_alike_from_many_threads(
    untrained_run: Callable[..., Path], precision: Precision | None
) -> None:
    rng = np.random.default_rng(0)
    images = [rng.integers(0, 255, (64, 64, 3), np.uint8) for _ in range(8)]
    shared, alone = (mx.load(untrained_run(), "cuda", precision=precision) for _ in range(2))
    alone._replayed = Replayed(alone.model, most=0)
    expected = [alone.predict(image)[0] for image in images]
    with warnings.catch_warnings(), ThreadPoolExecutor(4) as pool:
        warnings.simplefilter("error")
        found = list(pool.map(lambda image: shared.predict(image)[0], images * 4))
    assert shared._replayed._graphs
    bound = 0.05 if precision == "bfloat16" else 1e-4
    for result, other in zip(found, expected * 4, strict=True):
        assert result.score == pytest.approx(other.score, rel=bound)
        assert np.abs(result.map - other.map).max() <= bound * np.abs(other.map).max()
