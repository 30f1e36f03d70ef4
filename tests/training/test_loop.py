"""The loop reproduces the authors' training, and a finished run reports what it did."""

from __future__ import annotations

import json
import os
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.torch import load_file

from msflow_ext import load
from msflow_ext.choices import MEMORY
from msflow_ext.compat.checkpoints.msflow import head_from_state_dict, to_reference_names
from msflow_ext.data import DataSet, Images, Item
from msflow_ext.features import Features
from msflow_ext.runs.checkpoint import read_checkpoint
from msflow_ext.training import loop
from msflow_ext.training.loop import Recipe, make_optimizer, train, train_epoch

pytestmark = pytest.mark.usefixtures("one_thread")
GOLDEN = Path(__file__).parents[1] / "golden"
SIZE = 64


@pytest.mark.parametrize("memory", MEMORY)
def test_the_loop_reproduces_the_authors_training_in_float64(memory):
    golden = load_file(GOLDEN / "train_loop.safetensors")
    meta = json.loads((GOLDEN / "train_loop.json").read_text())
    state = {k.removeprefix("sd."): v for k, v in golden.items() if k.startswith("sd.")}
    head = head_from_state_dict(state, clamp=meta["clamp_alpha"]).double()
    head.memory = memory
    maps = [golden[f"x{i}"].double() for i in range(3)]
    epochs = len(golden["order"])
    recipe = Recipe(
        epochs=epochs,
        batch_size=meta["batch"],
        lr=meta["lr"],
        clip=meta["clip"],
        warmup=meta["sub_epochs"] * meta["lr_warmup_epochs"] / epochs,
        warmup_from=meta["lr_warmup_from"],
        decay=meta["gamma"],
        milestones=tuple(m / epochs for m in meta["milestones"]),
    )
    adam = make_optimizer(head)

    rates, steps = [], []
    for epoch, order in enumerate(golden["order"]):
        adam.param_groups[0]["lr"] = recipe.learning_rate(epoch)
        batches = [[x[chunk] for x in maps] for chunk in order.split(recipe.batch_size)]
        steps += train_epoch(head, adam, batches, clip=recipe.clip)
        rates += [recipe.learning_rate(epoch)] * len(batches)

    def close(got, expected):
        torch.testing.assert_close(
            torch.as_tensor(got, dtype=torch.float64), expected, rtol=1e-9, atol=1e-9
        )

    close(rates, golden["lr"])
    close([loss for loss, _ in steps], golden["loss"])
    close([norm for _, norm in steps], golden["grad_norm"])
    names = to_reference_names(dict(head.state_dict()), head)
    final = {k.removeprefix("final."): v for k, v in golden.items() if k.startswith("final.")}
    assert names.keys() == final.keys()
    for name, expected in final.items():
        close(names[name], expected)


def test_a_finished_run_reports_the_last_epoch_and_the_best_one_beside_it(finished_run):
    metrics = json.loads((finished_run / "metrics.json").read_text())
    first, last = metrics["evaluations"]
    assert (first["epoch"], last["epoch"]) == (1, 2)
    for name in ("image_auroc", "pixel_auroc", "aupro"):
        assert metrics[name] == last[name]
        assert metrics["best"][name] == max(first[name], last[name])
    assert "not a result" in metrics["best"]["chosen"]
    assert metrics["epochs"] == len(metrics["losses"]) == 2
    assert metrics["recipe"]["batch_size"] == 4
    assert metrics["seconds"] > 0
    assert torch.__version__.startswith(metrics["versions"]["torch"])
    lines = (finished_run / "scores.csv").read_text().splitlines()
    assert len(lines) == 1 + 6
    assert len(list(finished_run.glob("maps/*.png"))) == 6
    assert {path.name for path in finished_run.iterdir()} == {
        "config.yaml",
        "curves.json",
        "maps",
        "metrics.json",
        "model.safetensors",
        "report.html",
        "scores.csv",
    }


@pytest.mark.family("run files")
@pytest.mark.skipif(sys.platform == "win32", reason="no umask")
def test_every_file_of_a_run_has_the_mode_that_the_umask_gives(finished_run):
    os.umask(umask := os.umask(0))
    modes = {path.name: path.stat().st_mode & 0o777 for path in finished_run.rglob("*.*")}
    assert set(modes.values()) == {0o666 & ~umask}, modes


def test_the_loss_is_in_nats_per_latent_dimension(squares, finished_run, build_model):
    model = build_model()
    features = Features(model, Images(squares.train, 64))
    features.standardize()
    batch = features[torch.arange(4)]
    dimensions = sum(x[0].numel() for x in batch)
    reported = json.loads((finished_run / "metrics.json").read_text())["losses"][0]
    assert reported == pytest.approx(model.head.loss(batch).item() / dimensions, rel=0.2)


def test_metrics_are_null_without_labels_of_both_classes(tmp_path, squares, build_model):
    untested = DataSet("squares", "white", squares.train, ())
    unmarked = [Item(i.name, i.label, i.defect, i.image) for i in squares.test]
    for name, test in (("untested", ()), ("unmarked", tuple(unmarked))):
        data = DataSet("squares", name, squares.train, test)
        metrics = train(build_model(), data, tmp_path / name, Recipe(epochs=1), device="cpu")
        assert (metrics["image_auroc"] is None) == (name == "untested")
        assert metrics["pixel_auroc"] is metrics["aupro"] is metrics["best"]["aupro"] is None
        assert (tmp_path / name / "report.html").exists()
    assert untested.train == squares.train


def _weights(run: Path) -> dict[str, torch.Tensor]:
    return read_checkpoint(run / "model.safetensors")[1]


def test_the_same_seed_gives_the_same_bits_and_another_seed_others(
    tmp_path, squares, finished_run, build_model, same_weights
):
    for name, seed in (("same", 9826), ("other", 1)):
        recipe = Recipe(epochs=2, batch_size=4, seed=seed)
        train(build_model(), squares, tmp_path / name, recipe, device="cpu")
    assert same_weights(finished_run, tmp_path / "same")
    assert not same_weights(finished_run, tmp_path / "other")


@pytest.mark.parametrize("fast", [True, False])
def test_bfloat16_trains_and_halves_the_cache_and_says_where_it_is_slow(
    tmp_path, monkeypatch, caplog, squares, finished_run, fast, build_model
):
    monkeypatch.setattr(loop, "has_bfloat16", lambda: fast)
    recipe = Recipe(epochs=2, batch_size=4, precision="bfloat16")
    metrics = train(build_model(), squares, tmp_path / "run", recipe, device="cpu")
    assert ("no instructions for bfloat16: precision float32" in caplog.text) != fast
    expected = json.loads((finished_run / "metrics.json").read_text())["losses"]
    assert metrics["losses"] == pytest.approx(expected, rel=0.02)
    model, images = build_model(), Images(squares.train, 64)
    whole, half = Features(model, images), Features(model, images, dtype=torch.bfloat16)
    assert whole.nbytes == 2 * half.nbytes > 0


def test_a_loaded_run_scores_as_it_did_in_training(finished_run, squares):
    rows = (finished_run / "scores.csv").read_text().splitlines()[1:]
    detector, images = load(finished_run, device="cpu"), Images(squares.test, SIZE)
    found = [result.score for result in detector.predict(map(images.__getitem__, range(6)))]
    assert [float(row.split(",")[3]) for row in rows] == pytest.approx(found, rel=1e-5)
    assert detector.colours is not None
    assert detector.colours[0] < detector.colours[1]


def test_padding_is_part_of_the_recipe_and_of_what_is_loaded(tmp_path, squares, build_model):
    wide = [Item(i.name, 0, "good", np.asarray(i.image)[:32]) for i in squares.train]
    data = DataSet("squares", "wide", tuple(wide), squares.test)
    run, recipe = tmp_path / "run", Recipe(epochs=1, fit="pad")
    metrics = train(build_model(), data, run, recipe, device="cpu")
    assert metrics["recipe"]["fit"] == load(run, device="cpu").fit == "pad"
    assert metrics["pixel_auroc"] is not None
    with pytest.raises(ValueError, match="its recipe has fit pad, this one fit resize"):
        train(build_model(), data, run, Recipe(epochs=1), device="cpu", resume=True)


def test_images_held_out_set_the_thresholds_and_are_not_trained_on(
    tmp_path, squares, build_model, same_weights
):
    recipe = Recipe(epochs=1, batch_size=2, hold_out=0.5, false_alarms=0.25)
    kept, held = recipe.split(6)
    assert sorted(kept + held) == list(range(6))
    metrics = train(build_model(), squares, tmp_path / "run", recipe, device="cpu")
    found = metrics["decisions"]
    assert found["held_out"] == len(held) == 3

    rest = DataSet(squares.name, squares.category, tuple(squares.train[i] for i in kept), ())
    train(build_model(), rest, tmp_path / "rest", Recipe(epochs=1, batch_size=2), device="cpu")
    assert same_weights(tmp_path / "run", tmp_path / "rest")

    detector = load(tmp_path / "run", device="cpu")
    assert (detector.threshold, detector.pixel_threshold) == (
        found["threshold"],
        found["pixel_threshold"],
    )
    normal = detector.predict(squares.train[i].image for i in held)
    assert found["threshold"] == pytest.approx(max(r.score for r in normal), rel=1e-5)
    assert found["pixel_threshold"] == pytest.approx(max(r.map.max() for r in normal), rel=1e-5)
    results = detector.predict(item.image for item in squares.test)
    assert found["on_test"]["detected"] == sum(r.label == 1 for r in results[3:]) / 3
    assert [r.label == 1 for r in results] == [r.p_value == 0.25 for r in results]
    assert load(tmp_path / "run", device="cpu", false_alarms=0.5).threshold < found["threshold"]
    with pytest.raises(ValueError, match=r"rate of 0\.01 needs 99 held-out"):
        load(tmp_path / "run", device="cpu", false_alarms=0.01)


def test_the_default_recipe_holds_nothing_out(finished_run, squares):
    assert Recipe().split(3) == ([0, 1, 2], [])
    assert "decisions" not in json.loads((finished_run / "metrics.json").read_text())
    (result,) = load(finished_run, device="cpu").predict(squares.test[0].image)
    assert (result.label, result.p_value, result.mask) == (None, None, None)
    with pytest.raises(ValueError, match="its training held no images out"):
        load(finished_run, device="cpu", false_alarms=0.1)


def test_too_few_images_to_hold_out_stop_a_run_before_it_begins(tmp_path, squares, build_model):
    expected = "hold_out 0.5 of 6 training images is 3 to hold out and 3 to train on, .* needs 19"
    with pytest.raises(ValueError, match=expected):
        train(build_model(), squares, tmp_path / "run", Recipe(hold_out=0.5), device="cpu")
    assert not (tmp_path / "run").exists()


@pytest.mark.family("early refusals")
@pytest.mark.parametrize(
    ("name", "images", "recipe", "sentence"),
    [
        (
            "baseline",
            1,
            {},
            "baseline must have 2 training images or more, got 1: train without it",
        ),
        ("baseline", 2, {"hold_out": 0.5, "false_alarms": 0.5}, "baseline must have 2 .*, got 1"),
        ("whiten", 2, {}, "whiten must have 3 training images or more, got 2: train without it"),
        ("whiten", 4, {"hold_out": 0.5, "false_alarms": 0.4}, "whiten must have 3 .*, got 2"),
    ],
)
def test_what_needs_more_images_says_so_before_the_first_epoch(
    tmp_path, monkeypatch, squares, build_model, name, images, recipe, sentence
):
    monkeypatch.setattr(loop, "features_of_parts", None)
    model = build_model(standardize=True, whiten=name == "whiten")
    data = DataSet("squares", "few", squares.train[:images], squares.test)
    options = {"device": "cpu", "baseline": name == "baseline"}
    with pytest.raises(ValueError, match=sentence):
        train(model, data, tmp_path / "run", Recipe(**recipe), **options)
    assert not (tmp_path / "run").exists()


@pytest.mark.family("early refusals")
@pytest.mark.parametrize(("name", "images"), [("baseline", 2), ("whiten", 3), ("neither", 1)])
def test_the_fewest_images_that_are_asked_for_are_enough(
    tmp_path, squares, build_model, name, images
):
    model = build_model(standardize=True, whiten=name == "whiten")
    data = DataSet("squares", "few", squares.train[:images], squares.test)
    recipe = Recipe(epochs=1, batch_size=2)
    options = {"device": "cpu", "baseline": name == "baseline"}
    metrics = train(model, data, tmp_path / "run", recipe, **options)
    assert metrics["image_auroc"] is not None


def test_a_reversible_run_ends_where_a_lean_one_does(tmp_path, finished_run, squares, build_model):
    recipe = Recipe(epochs=2, batch_size=4, memory="reversible")
    losses = train(build_model(), squares, tmp_path / "run", recipe, device="cpu")["losses"]
    expected = json.loads((finished_run / "metrics.json").read_text())["losses"]
    assert losses == pytest.approx(expected, rel=1e-5)
    with pytest.raises(ValueError, match="memory 'reversible' needs precision float32"):
        Recipe(memory="reversible", precision="bfloat16")


def test_no_training_images_is_an_error(tmp_path, squares, build_model):
    empty = DataSet("squares", "white", (), squares.test)
    with pytest.raises(ValueError, match="squares white has no images to train on"):
        train(build_model(), empty, tmp_path / "run", device="cpu")
    assert not (tmp_path / "run").exists()
