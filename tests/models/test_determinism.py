"""Models are deterministic, and independent of the rest of the batch, bit for bit."""

from __future__ import annotations

from collections.abc import Callable, Iterator

import pytest
import torch
from torch import Tensor, nn

from msflow_ext import FastFlow, MSFlow
from msflow_ext.testing import relative_error

pytestmark = pytest.mark.usefixtures("one_thread")

MODELS: dict[str, Callable[[], nn.Module]] = {
    "msflow": lambda: MSFlow(
        "test_efficientnet",
        image_size=64,
        pretrained=False,
        blocks=(1, 1, 1),
        cond_channels=8,
        seed=1,
    ),
    "fastflow": lambda: FastFlow(
        "test_efficientnet", image_size=64, pretrained=False, steps=2, seed=1
    ),
}


@pytest.fixture(params=[(name, fast) for name in MODELS for fast in (False, True)], ids=str)
def model(request: pytest.FixtureRequest) -> nn.Module:
    """Return each model, trained and optimized."""
    name, fast = request.param
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        made = MODELS[name]().eval()
    return made.optimize() if fast else made  # pyright: ignore[reportCallIssue]


@pytest.fixture
def deterministic(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """Use deterministic algorithms only, and fill new memory with NaN."""
    monkeypatch.setattr(torch.utils.deterministic, "fill_uninitialized_memory", True)
    torch.use_deterministic_algorithms(True)
    yield
    torch.use_deterministic_algorithms(False)


def images() -> Tensor:
    return torch.rand(3, 3, 64, 64, generator=torch.Generator().manual_seed(0))


def predicted(model: nn.Module, batch: Tensor) -> list[Tensor]:
    with torch.inference_mode():
        found = model(batch)
    return [found.score, found.anomaly_map, found.image_map, *found.log_likelihood]


def test_a_rerun_is_bit_identical_also_in_deterministic_mode(
    each_backend: str, model: nn.Module, request: pytest.FixtureRequest
) -> None:
    first, second = (predicted(model, images()) for _ in range(2))
    request.getfixturevalue("deterministic")
    third = predicted(model, images())
    assert all(map(torch.equal, first, second))
    assert all(map(torch.equal, first, third))
    assert all(t.isfinite().all() for t in third)


def test_a_score_does_not_depend_on_the_rest_of_the_batch(
    each_backend: str, model: nn.Module
) -> None:
    whole = predicted(model, images())
    for k in range(3):
        for single, batch in zip(predicted(model, images()[k : k + 1]), whole, strict=True):
            assert relative_error(single[0], batch[k]) <= 1e-6


@pytest.mark.parametrize("name", MODELS)
def test_gradients_of_a_train_step_are_deterministic(
    each_backend: str, name: str, deterministic: None
) -> None:
    def step() -> list[Tensor]:
        torch.manual_seed(0)
        model = MODELS[name]().train()
        head = model.get_submodule("head")
        with torch.no_grad():
            features = model.features(images())  # pyright: ignore[reportCallIssue]
        head.loss(features).backward()  # pyright: ignore[reportCallIssue]
        return [p.grad for p in head.parameters() if p.grad is not None]

    first, second = step(), step()
    assert first
    assert all(map(torch.equal, first, second))
