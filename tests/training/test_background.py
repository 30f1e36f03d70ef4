"""Tests of a model run beside its training, and change nothing in it."""

from __future__ import annotations

import json
import threading
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import nn

from msflow_ext import MSFlow
from msflow_ext.data import DataSet, Item
from msflow_ext.evaluation.evaluator import Evaluation
from msflow_ext.runs.checkpoint import read_checkpoint
from msflow_ext.training import loop as training
from msflow_ext.training.background import Examiner
from msflow_ext.training.loop import TrainingDiverged, train
from msflow_ext.training.recipe import Recipe

SIZE = 64
RECIPE = Recipe(epochs=4, batch_size=4, eval_every=1)


@pytest.fixture(autouse=True)
def room(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """One thread, and a core more."""
    monkeypatch.setattr(training, "cores", lambda: 2)
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


@pytest.fixture(scope="module")
def squares() -> DataSet:
    """Gray noise; the defective images have a white square, which is their mask."""
    rng = np.random.default_rng(0)
    mask = np.zeros((SIZE, SIZE), bool)
    mask[16:40, 8:32] = True
    images = [rng.integers(90, 110, (SIZE, SIZE), dtype=np.uint8) for _ in range(10)]
    for image in images[8:]:
        image[mask] = 255
    good = [Item(f"good/{i}", 0, "good", image) for i, image in enumerate(images[:8])]
    bad = [Item(f"square/{i}", 1, "square", image, mask) for i, image in enumerate(images[8:])]
    return DataSet("squares", "white", tuple(good[:6]), (*good[6:], *bad))


def build_model() -> MSFlow:
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        options: dict[str, Any] = {"blocks": (1, 1, 2), "cond_channels": 8, "seed": 1}
        return MSFlow(
            "test_efficientnet",
            image_size=SIZE,
            pretrained=False,
            position_base=True,
            anomaly_map="clamped",
            **options,
        )


def results(run: Path) -> tuple[Any, ...]:
    """All that a run leaves that must not depend on when its tests ran."""
    header, tensors = read_checkpoint(run / "model.safetensors")
    metrics = json.loads((run / "metrics.json").read_text())
    del header["seconds"], metrics["seconds"]
    bits = {name: t.numpy().tobytes() for name, t in tensors.items()}
    return header, bits, metrics, (run / "scores.csv").read_bytes()


@pytest.fixture(scope="module")
def waited(tmp_path_factory: pytest.TempPathFactory, squares: DataSet) -> Path:
    """A run that waits for every test."""
    run = tmp_path_factory.mktemp("waited") / "run"
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(training, "cores", lambda: 1)
        torch.set_num_threads(1)
        train(build_model(), squares, run, RECIPE, device="cpu")
    return run


def test_a_run_is_the_same_whether_it_waits_for_its_tests_or_not(tmp_path, squares, waited):
    train(build_model(), squares, tmp_path / "run", RECIPE, device="cpu")
    assert results(tmp_path / "run") == results(waited)


def test_epochs_go_on_while_a_test_runs(tmp_path, monkeypatch, squares, waited):
    trained, second = training.train_epoch, threading.Event()
    threads, calls = set(), []

    def epoch(*args: Any, **kwargs: Any) -> Any:
        calls.append(1)
        found = trained(*args, **kwargs)
        if len(calls) == 2:
            second.set()
        return found

    tested = training.evaluate

    def test(*args: Any) -> Evaluation:
        threads.add(threading.current_thread())
        assert second.wait(60), "the first test ends after the second epoch, or never"
        return tested(*args)

    monkeypatch.setattr(training, "train_epoch", epoch)
    monkeypatch.setattr(training, "evaluate", test)
    monkeypatch.setattr(training.Saver, "SECONDS", 1e9)
    train(build_model(), squares, tmp_path / "run", RECIPE, device="cpu")
    assert threading.main_thread() not in threads
    assert results(tmp_path / "run") == results(waited)


class Killed(BaseException):
    """Nothing in a run may catch this."""


@pytest.mark.parametrize("epoch", [2, 3, 4])
def test_a_run_killed_beside_a_test_resumes_to_the_same_results(
    tmp_path, monkeypatch, squares, waited, epoch
):
    trained, calls = training.train_epoch, []

    def die(*args: Any, **kwargs: Any) -> Any:
        calls.append(1)
        if len(calls) == epoch:
            raise Killed
        return trained(*args, **kwargs)

    run = tmp_path / "run"
    with monkeypatch.context() as patch:
        patch.setattr(training, "train_epoch", die)
        with pytest.raises(Killed):
            train(build_model(), squares, run, RECIPE, device="cpu")
    header = read_checkpoint(run / "model.safetensors")[0]
    assert header["epoch"] == epoch - 1
    assert [each["epoch"] for each in header["evaluations"]] == list(range(1, epoch - 1))
    train(build_model(), squares, run, RECIPE, device="cpu", resume=True)
    assert results(run) == results(waited)


def test_a_map_that_is_not_finite_stops_the_run_and_its_checkpoint_is_taken_back(
    tmp_path, monkeypatch, squares, waited
):
    tested, calls, spoilt = training.evaluate, [], 0

    def test(*args: Any) -> Evaluation:
        calls.append(1)
        if len(calls) == spoilt:
            raise FloatingPointError("score or map of image good/7 is not finite")
        return tested(*args)

    run = tmp_path / "run"
    for spoilt, rest in ((2, "keeps the last good state"), (1, "nothing was saved yet")):
        calls.clear()
        with monkeypatch.context() as patch:
            patch.setattr(training, "evaluate", test)
            sentence = f"stopped in epoch {spoilt}: score or map of image good/7.*{rest}"
            with pytest.raises(TrainingDiverged, match=sentence):
                train(build_model(), squares, run, RECIPE, device="cpu", overwrite=True)
        assert not any(thread.name.startswith("test_") for thread in threading.enumerate())
        if spoilt == 2:
            assert read_checkpoint(run / "model.safetensors")[0]["epoch"] == 1
            train(build_model(), squares, run, RECIPE, device="cpu", resume=True)
            assert results(run) == results(waited)
        else:
            assert not (run / "model.safetensors").exists()


def test_a_test_that_fails_is_told_before_the_epoch_that_fails_beside_it(
    tmp_path, monkeypatch, squares
):
    trained, second, calls = training.train_epoch, threading.Event(), []

    def epoch(*args: Any, **kwargs: Any) -> Any:
        calls.append(1)
        if len(calls) == 2:
            second.set()
            raise TrainingDiverged("the loss is nan")
        return trained(*args, **kwargs)

    def test(*_: Any) -> Evaluation:
        assert second.wait(60)
        raise FloatingPointError("score or map of image good/6 is not finite")

    monkeypatch.setattr(training, "train_epoch", epoch)
    monkeypatch.setattr(training, "evaluate", test)
    monkeypatch.setattr(training.Saver, "SECONDS", 1e9)
    sentence = "stopped in epoch 1: score or map of image good/6.*nothing was saved yet"
    with pytest.raises(TrainingDiverged, match=sentence):
        train(build_model(), squares, tmp_path / "run", RECIPE, device="cpu")


class Model(nn.Module):
    """Counts how often it was trained; its backbone must not be copied."""

    def __init__(self) -> None:
        super().__init__()
        self.backbone = nn.Linear(1, 1)
        self.register_buffer("steps", torch.zeros(()))


@pytest.mark.parametrize("beside", [True, False])
def test_an_examiner_tests_the_model_as_it_was_and_one_test_at_a_time(beside):
    model, seen = Model(), []

    def test(copy: Model) -> Any:
        seen.append(copy)
        return float(copy.steps)  # type: ignore[arg-type]

    with Examiner(model, test, beside=beside) as examiner:
        assert examiner.take() is None
        for epoch in (3, 7):
            model.steps.fill_(epoch)  # type: ignore[operator]
            examiner.begin(epoch)
            assert examiner.epoch == epoch
            with pytest.raises(RuntimeError, match=f"test of epoch {epoch} was not taken"):
                examiner.begin(epoch + 1)
            model.steps.fill_(99)  # type: ignore[operator]
            assert examiner.take() == epoch
            assert examiner.epoch == 0
    assert all((copy is not model) == beside for copy in seen)
    assert all(copy.backbone is model.backbone for copy in seen)
