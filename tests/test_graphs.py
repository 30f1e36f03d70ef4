"""CUDA graphs: replays give what the model gives; without a GPU the refusal says so. Not run on a GPU yet."""

from __future__ import annotations

import pytest
import torch

import msflow_ext as mx
from msflow_ext.testing import relative_error, tolerance

needs_gpu = pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")


def head() -> mx.MSFlowHead:
    return mx.MSFlowHead((16, 32, 32), blocks=(1, 2, 1), cond_channels=8, seed=0).eval()


def features(seed: int, device: str) -> list[torch.Tensor]:
    generator = torch.Generator().manual_seed(seed)
    sizes = ((16, 8), (32, 4), (32, 2))
    return [torch.randn(2, c, s, s, generator=generator).to(device) for c, s in sizes]


def test_without_a_gpu_it_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    with pytest.raises(
        RuntimeError, match=r"^graphed: CUDA graphs need a GPU, and torch sees none"
    ):
        mx.graphed(head(), features(0, "cpu"))


def test_an_example_on_the_cpu_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    with pytest.raises(ValueError, match=r"example must be on one CUDA device, got \['cpu'\]"):
        mx.graphed(head(), features(0, "cpu"))


@needs_gpu
@pytest.mark.parametrize("optimized", [False, True])
def test_a_replay_gives_what_the_model_gives(optimized: bool) -> None:
    model = head().cuda()
    run = model.optimize() if optimized else model
    replay = mx.graphed(run.log_likelihood, features(0, "cuda"))
    for seed in (1, 2):
        got = [t.clone() for t in replay(features(seed, "cuda"))]
        with torch.no_grad():
            wanted = run.log_likelihood(features(seed, "cuda"))
        for g, w in zip(got, wanted, strict=True):
            assert relative_error(g, w) <= 16 * tolerance(torch.float32, 32)


@needs_gpu
def test_inputs_of_another_shape_are_refused() -> None:
    replay = mx.graphed(head().cuda().log_likelihood, features(0, "cuda"))
    with pytest.raises(ValueError, match=r"^graphed: inputs must be as the example"):
        replay([t[:1] for t in features(0, "cuda")])
