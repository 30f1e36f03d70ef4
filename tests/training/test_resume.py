"""Runs survive kills, other arguments, damaged images and numbers that are not finite."""

from __future__ import annotations

import hashlib
import json
import math
from pathlib import Path
from types import MethodType, SimpleNamespace
from typing import Any

import pytest
import torch
from safetensors.torch import save_file

from msflow_ext.data import DataSet, Item
from msflow_ext.files import write_text
from msflow_ext.runs.checkpoint import read_checkpoint
from msflow_ext.training import features as training_features
from msflow_ext.training import finish, loop
from msflow_ext.training.loop import Recipe, TrainingDiverged, train, train_epoch
from msflow_ext.training.resume import initial_state, summary

pytestmark = pytest.mark.usefixtures("one_thread")
SIZE = 64


class Killed(BaseException):
    """Error that no code of a run may catch."""


@pytest.mark.parametrize("cache", ["memory", "disk"])
def test_a_killed_and_resumed_run_is_bit_identical_to_an_undisturbed_one(
    tmp_path, monkeypatch, squares, cache, build_model, same_weights
):
    recipe = Recipe(epochs=5, batch_size=4, eval_every=2, cache=cache)
    train(build_model(), squares, tmp_path / "undisturbed", recipe, device="cpu")
    undisturbed, calls = train_epoch, []

    def die_in_the_fourth_epoch(*args, **kwargs):
        calls.append(1)
        if len(calls) == 4:
            raise Killed
        return undisturbed(*args, **kwargs)

    run = tmp_path / "killed"
    with monkeypatch.context() as patch:
        patch.setattr(loop, "train_epoch", die_in_the_fourth_epoch)
        with pytest.raises(Killed):
            train(build_model(), squares, run, recipe, device="cpu")
    with pytest.raises(ValueError, match="holds a run: --resume continues it"):
        train(build_model(), squares, run, recipe, device="cpu")
    assert read_checkpoint(run / "model.safetensors")[0]["epoch"] == 2
    metrics = train(build_model(), squares, run, recipe, device="cpu", resume=True)
    assert same_weights(run, tmp_path / "undisturbed")
    expected = json.loads((tmp_path / "undisturbed" / "metrics.json").read_text())
    for name in ("losses", "evaluations", "best"):
        assert metrics[name] == expected[name]


@pytest.mark.family("writers")
@pytest.mark.parametrize("again", [{}, {"resume": True}, {"overwrite": True}], ids=str)
def test_two_trainings_do_not_write_into_one_folder(
    tmp_path, monkeypatch, squares, build_model, again
):
    run, recipe, said = tmp_path / "run", Recipe(epochs=1), []

    def start_another(*args: Any, **options: Any) -> Any:
        with pytest.raises(
            BlockingIOError, match="run is being written by another process"
        ) as error:
            train(build_model(), squares, run, Recipe(epochs=1, seed=7), device="cpu", **again)
        said.append(error)
        return train_epoch(*args, **options)

    monkeypatch.setattr(loop, "train_epoch", start_another)
    train(build_model(), squares, run, recipe, device="cpu")
    assert len(said) == 1
    assert read_checkpoint(run / "model.safetensors")[0]["recipe"]["seed"] == recipe.seed
    assert not list(run.glob(".*"))


def _results(run: Path) -> tuple[Any, ...]:
    """Return the results of a run, without durations."""
    header, tensors = read_checkpoint(run / "model.safetensors")
    metrics = json.loads((run / "metrics.json").read_text())
    del header["seconds"], metrics["seconds"]
    bits = {name: t.numpy().tobytes() for name, t in tensors.items()}
    return header, bits, metrics, (run / "scores.csv").read_bytes()


@pytest.mark.parametrize(
    ("error", "seen", "sentence"),
    [
        (Killed(), Killed, None),
        (
            FloatingPointError("score or map of image good/2 is not finite"),
            TrainingDiverged,
            r"stopped in epoch 2: score or map of image good/2 .*safetensors keeps the last good",
        ),
    ],
    ids=["killed", "not-finite"],
)
def test_a_run_that_ends_in_a_test_keeps_the_state_before_it_and_resumes_to_the_same_results(
    tmp_path, monkeypatch, squares, error, seen, sentence, build_model
):
    recipe, evaluate, calls = (
        Recipe(epochs=3, batch_size=4, eval_every=1),
        training_features.evaluate,
        [],
    )
    train(build_model(anomaly_map="clamped"), squares, tmp_path / "whole", recipe, device="cpu")

    def fail_in_the_second_test(*args: Any) -> Any:
        calls.append(1)
        if len(calls) == 2:
            raise error
        return evaluate(*args)

    run = tmp_path / "run"
    with monkeypatch.context() as patch:
        patch.setattr(training_features, "evaluate", fail_in_the_second_test)
        with pytest.raises(seen, match=sentence):
            train(build_model(anomaly_map="clamped"), squares, run, recipe, device="cpu")
    header = read_checkpoint(run / "model.safetensors")[0]
    assert header["epoch"] == len(header["evaluations"]) == 1
    model = build_model(anomaly_map="clamped")
    train(model, squares, run, recipe, device="cpu", resume=True)
    assert _results(run) == _results(tmp_path / "whole")


def test_a_run_whose_first_test_is_not_finite_leaves_no_checkpoint(tmp_path, squares, build_model):
    model = build_model()
    model.predict_features = MethodType(  # type: ignore[method-assign]
        lambda self, x: SimpleNamespace(
            score=torch.full((len(x[0]),), math.inf), anomaly_map=torch.zeros(len(x[0]), SIZE, SIZE)
        ),
        model,
    )
    sentence = "stopped in epoch 1: score or map of image good/0 is not finite; nothing was saved"
    with pytest.raises(TrainingDiverged, match=sentence):
        train(model, squares, tmp_path / "run", Recipe(epochs=2, eval_every=1), device="cpu")
    assert not (tmp_path / "run" / "model.safetensors").exists()


@pytest.mark.parametrize("last_file", ["scores.csv", "metrics.json"])
def test_a_run_killed_after_its_last_epoch_resumes_to_the_same_results(
    tmp_path, monkeypatch, squares, finished_run, last_file, build_model, same_weights
):
    def die(*_):
        raise Killed

    def die_at_metrics(path, text):
        return die() if path.name == "metrics.json" else write_text(path, text)

    run, recipe = tmp_path / "run", Recipe(epochs=2, batch_size=4)
    with monkeypatch.context() as patch:
        if last_file == "scores.csv":
            patch.setattr(finish, "write_results", die)
        else:
            patch.setattr(finish, "write_text", die_at_metrics)
        with pytest.raises(Killed):
            train(build_model(), squares, run, recipe, device="cpu")
    assert (run / "scores.csv").exists() == (last_file == "metrics.json")
    metrics = train(build_model(), squares, run, recipe, device="cpu", resume=True)
    expected = json.loads((finished_run / "metrics.json").read_text())
    for name in ("image_auroc", "losses", "evaluations", "best"):
        assert metrics[name] == expected[name]
    assert same_weights(run, finished_run)


def test_a_run_is_not_overwritten_or_mixed_with_another(tmp_path, squares, build_model):
    run, recipe = tmp_path / "run", Recipe(epochs=1)
    first = train(build_model(), squares, run, recipe, device="cpu")
    kept = (run / "model.safetensors").read_bytes()
    with pytest.raises(ValueError, match="holds a run"):
        train(build_model(), squares, run, recipe, device="cpu")
    with pytest.raises(
        ValueError, match="cannot be resumed: its recipe has epochs 1, this one has epochs 2"
    ):
        train(build_model(), squares, run, Recipe(epochs=2), device="cpu", resume=True)
    fewer = DataSet(squares.name, squares.category, squares.train[1:], squares.test)
    with pytest.raises(
        ValueError, match="cannot be resumed: its data has train 6, this one has train 5"
    ):
        train(build_model(), fewer, run, recipe, device="cpu", resume=True)
    with pytest.raises(ValueError, match="overwrite must be False if resume is True"):
        train(build_model(), squares, run, recipe, device="cpu", resume=True, overwrite=True)
    assert train(build_model(), squares, run, recipe, device="cpu", resume=True) == first
    assert (run / "model.safetensors").read_bytes() == kept

    (run / "maps" / "stale.png").touch()
    train(build_model(), fewer, run, recipe, device="cpu", overwrite=True)
    assert (run / "model.safetensors").read_bytes() != kept
    assert not (run / "maps" / "stale.png").exists()


def test_a_run_is_overwritten_only_after_all_images_are_decoded(tmp_path, squares, build_model):
    run, recipe = tmp_path / "run", Recipe(epochs=1)
    train(build_model(), squares, run, recipe, device="cpu", settings={"data": "old"})
    kept = {path: path.read_bytes() for path in run.rglob("*") if path.is_file()}
    (tmp_path / "empty.png").touch()
    broken = Item("good/9", 0, "good", tmp_path / "empty.png")
    for data in (
        DataSet("squares", "white", (*squares.train, broken), squares.test),
        DataSet("squares", "white", squares.train, (*squares.test, broken)),
    ):
        with pytest.raises(ValueError, match=r"empty\.png is empty"):
            train(build_model(), data, run, recipe, device="cpu", overwrite=True)
        assert {path: path.read_bytes() for path in run.rglob("*") if path.is_file()} == kept


@pytest.mark.parametrize("what", ["loss", "gradient norm"])
def test_training_stops_at_a_non_finite_number_and_keeps_the_last_good_checkpoint(
    tmp_path, squares, what, build_model
):
    model, calls = build_model(), []
    loss = model.head.loss

    def spoilt(_, features):
        calls.append(1)
        value = loss(features)
        if len(calls) < 4:
            return value
        if what == "loss":
            return value * math.nan
        return (
            value + torch.where(value > math.inf, value, 0.0) + torch.sqrt(value - value.detach())
        )

    model.head.loss = MethodType(spoilt, model.head)
    run, recipe = tmp_path / "run", Recipe(epochs=3, batch_size=4)
    with pytest.raises(TrainingDiverged, match=rf"epoch 2: the {what} is .* in step 2 \(images "):
        train(model, squares, run, recipe, device="cpu")
    header, weights = read_checkpoint(run / "model.safetensors")
    assert header["epoch"] == 1
    assert all(w.isfinite().all() for w in weights.values())
    assert all(p.isfinite().all() for p in model.parameters())


def test_the_best_epoch_ignores_evaluations_without_the_metric() -> None:
    old = [{"epoch": 1, "image_auroc": 0.9}, {"epoch": 2, "image_auroc": 0.8, "aupimo": 0.5}]
    parts = dict.fromkeys(("losses", "recipe", "data"))
    state = {"model": "MSFlow", "config": {}, "epoch": 2, "evaluations": old, **parts}
    best = summary(state, {"image_auroc": 0.8, "aupimo": 0.5})["best"]
    assert (best["image_auroc"], best["aupimo"]) == (0.9, 0.5)
    assert best["epochs"] == {"image_auroc": 1, "aupimo": 2}


@pytest.fixture(scope="module")
def interrupted(tmp_path_factory, squares, build_model) -> Path:
    """Return the checkpoint of a training that ended before it wrote its results; tests must not change it."""
    run = tmp_path_factory.mktemp("interrupted")
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(finish, "write_results", lambda *_: (_ for _ in ()).throw(Killed))
        with pytest.raises(Killed):
            train(build_model(), squares, run, Recipe(epochs=2, batch_size=4), device="cpu")
    return run / "model.safetensors"


@pytest.mark.family("crafted files")
@pytest.mark.parametrize(
    "crafted",
    [
        *({"epoch": value} for value in (None, -1, 1, "2", 1.5, [])),
        *({"losses": value} for value in (None, [], ["a", "b"], 3, [[1.0], 2])),
        *({"seconds": value} for value in (None, "a", -1.0, 1e400, [])),
        *({"evaluations": value} for value in (None, 3, [1], [{}], [{"epoch": 1, "aupro": "x"}])),
    ],
    ids=str,
)
def test_a_checkpoint_with_invalid_progress_is_not_resumed(
    tmp_path, squares, build_model, interrupted, crafted
):
    header, tensors = read_checkpoint(interrupted)
    save_file(tensors, tmp_path / interrupted.name, {"msflow_ext": json.dumps(header | crafted)})
    with pytest.raises(ValueError, match=r"model\.safetensors is damaged: "):
        train(build_model(), squares, tmp_path, Recipe(epochs=2, batch_size=4), resume=True)


@pytest.mark.family("crafted files")
@pytest.mark.parametrize(
    ("change", "sentence"),
    [
        (
            lambda t: {"optimizer.0.exp_avg": t["optimizer.0.exp_avg"][None]},
            "exp_avg must fit a parameter, got shape",
        ),
        (
            lambda t: {"optimizer.999.step": t["optimizer.0.step"]},
            "optimizer.999.step must fit a parameter",
        ),
        (
            lambda t: {"optimizer.x.step": t["optimizer.0.step"]},
            "has optimizer.x.step, which the optimizer does not know",
        ),
        (
            lambda t: {"optimizer.0.more": t["optimizer.0.step"]},
            "must hold exp_avg, exp_avg_sq, step",
        ),
    ],
)
def test_the_state_of_another_optimizer_is_not_resumed(
    tmp_path, squares, build_model, interrupted, change, sentence
):
    header, tensors = read_checkpoint(interrupted)
    tensors = {**tensors, **{name: t.clone() for name, t in change(tensors).items()}}
    save_file(tensors, tmp_path / interrupted.name, {"msflow_ext": json.dumps(header)})
    with pytest.raises(ValueError, match=sentence):
        train(build_model(), squares, tmp_path, Recipe(epochs=2, batch_size=4), resume=True)


@pytest.mark.family("folders")
def test_names_that_are_not_utf_8_have_a_digest_and_other_digests_are_unchanged() -> None:
    def digest(*names: str) -> str:
        items = tuple(Item(name, 0, "good", Path(f"{name}.png")) for name in names)
        data = DataSet("folder", "parts", items, ())
        state = initial_state(SimpleNamespace(config={}), data, Recipe(epochs=1))
        return state["data"]["sha256"]

    assert digest("Gu\udcdf") != digest("Gu\udcdc")
    assert digest("Guß") == hashlib.sha256("Guß 0\n".encode()).hexdigest()
