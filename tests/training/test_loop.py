"""The loop reproduces the authors' training, and a run survives what happens to runs."""

from __future__ import annotations

import json
import math
from pathlib import Path
from types import MethodType, SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.torch import load_file
from torch.optim.lr_scheduler import CosineAnnealingLR, LinearLR, MultiStepLR

from msflow_ext import MSFlow, load
from msflow_ext.choices import MEMORY
from msflow_ext.compat.checkpoints.msflow import head_from_state_dict, to_official_names
from msflow_ext.data import DataSet, Images, Item
from msflow_ext.features import Features
from msflow_ext.files import write_text
from msflow_ext.hardware import free_memory
from msflow_ext.runs.checkpoint import read_checkpoint
from msflow_ext.training import features as training_features
from msflow_ext.training import finish, loop
from msflow_ext.training.loop import Recipe, TrainingDiverged, make_optimizer, train, train_epoch
from msflow_ext.training.recipe import PRESETS
from msflow_ext.training.resume import summary

pytestmark = pytest.mark.usefixtures("one_thread")
GOLDEN = Path(__file__).parents[1] / "golden"
SIZE = 64


def build_model(**options: Any) -> MSFlow:
    """The same tiny MSFlow each time, on a backbone with random weights."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        return MSFlow(
            "test_efficientnet",
            image_size=SIZE,
            pretrained=False,
            blocks=(1, 1, 2),
            cond_channels=8,
            seed=1,
            **options,
        )


@pytest.fixture(scope="module")
def squares() -> DataSet:
    """Gray noise; the defective images have a white square, which is their mask."""
    rng = np.random.default_rng(0)

    def good(name: str) -> Item:
        return Item(name, 0, "good", rng.integers(90, 110, (SIZE, SIZE), dtype=np.uint8))

    def defective(name: str) -> Item:
        image = rng.integers(90, 110, (SIZE, SIZE), dtype=np.uint8)
        mask = np.zeros((SIZE, SIZE), bool)
        mask[16:40, 8:32] = True
        image[mask] = 255
        return Item(name, 1, "square", image, mask)

    trained = tuple(good(f"train/good/{i}") for i in range(6))
    tested = [good(f"good/{i}") for i in range(3)] + [defective(f"square/{i}") for i in range(3)]
    return DataSet("squares", "white", trained, tuple(tested))


@pytest.fixture(scope="module")
def finished_run(tmp_path_factory: pytest.TempPathFactory, squares: DataSet) -> Path:
    """The folder of a run of two epochs; tests must not write to it."""
    folder = tmp_path_factory.mktemp("finished") / "run"
    train(build_model(), squares, folder, Recipe(epochs=2, batch_size=4), device="cpu")
    return folder


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

    def close(got, wanted):
        torch.testing.assert_close(
            torch.as_tensor(got, dtype=torch.float64), wanted, rtol=1e-9, atol=1e-9
        )

    close(rates, golden["lr"])
    close([loss for loss, _ in steps], golden["loss"])
    close([norm for _, norm in steps], golden["grad_norm"])
    names = to_official_names(dict(head.state_dict()), head)
    final = {k.removeprefix("final."): v for k, v in golden.items() if k.startswith("final.")}
    assert names.keys() == final.keys()
    for name, wanted in final.items():
        close(names[name], wanted)


def test_the_rate_is_that_of_torchs_warm_up_and_multi_step_schedulers():
    recipe = Recipe()
    adam = torch.optim.Adam([torch.nn.Parameter(torch.zeros(1))], lr=recipe.lr)
    schedulers = [LinearLR(adam, 0.1, total_iters=12), MultiStepLR(adam, [70, 90], 0.33)]
    for epoch in range(recipe.epochs):
        assert recipe.learning_rate(epoch) == pytest.approx(adam.param_groups[0]["lr"], rel=1e-12)
        adam.step()
        for scheduler in schedulers:
            scheduler.step()


def test_a_cosine_is_that_of_torchs_scheduler_and_the_rate_of_fastflow_is_constant():
    cosine = Recipe(epochs=7, schedule="cosine", warmup=0.0)
    adam = torch.optim.Adam([torch.nn.Parameter(torch.zeros(1))], lr=cosine.lr)
    scheduler = CosineAnnealingLR(adam, 7)
    for epoch in range(7):
        assert cosine.learning_rate(epoch) == pytest.approx(adam.param_groups[0]["lr"], rel=1e-12)
        adam.step()
        scheduler.step()
    assert {PRESETS["paper"]["fastflow"].recipe.learning_rate(epoch) for epoch in range(500)} == {
        1e-3
    }


def test_noise_is_added_anew_in_every_epoch_and_depends_on_the_seed():
    def seen(seed: int, epoch: int, noise: float = 0.5) -> torch.Tensor:
        batches = iter([[torch.zeros(50, 8, 4, 4)], [torch.ones(50, 8, 4, 4)]])
        return torch.stack([b for (b,) in Recipe(seed=seed, noise=noise).disturbed(epoch, batches)])

    first = seen(1, 0)
    assert torch.equal(first, seen(1, 0))
    for mean, batch in enumerate(first):
        assert batch.mean().item() == pytest.approx(mean, abs=0.02)
        assert batch.std().item() == pytest.approx(0.5, rel=0.02)
    for other in (seen(1, 1), seen(2, 0), torch.stack([first[1] - 1, first[0] + 1])):
        assert (first - other).std().item() == pytest.approx(0.5**0.5, rel=0.02)
    assert torch.equal(seen(1, 0, noise=0.0)[0], torch.zeros(50, 8, 4, 4))


def test_without_clip_the_gradient_is_taken_whole_and_weight_decay_is_adams():
    weights = {}
    for clip in (None, 1e-3):
        head = torch.nn.Linear(2, 1)
        torch.nn.init.ones_(head.weight)
        head.loss = lambda x, head=head: head(x[0]).sum()  # type: ignore[assignment]
        sgd = torch.optim.SGD(head.parameters(), lr=1.0)
        ((_, norm),) = train_epoch(head, sgd, [[torch.tensor([3.0, 4.0])]], clip=clip)
        assert norm == pytest.approx(26**0.5)
        weights[clip] = head.weight.tolist()[0]
    assert weights[None] == [-2.0, -3.0]
    assert weights[1e-3] == pytest.approx([1.0, 1.0], abs=1e-3)
    assert make_optimizer(torch.nn.Linear(2, 1), 0.25).param_groups[0]["weight_decay"] == 0.25


def test_an_epoch_names_the_precision_that_it_refuses():
    head = torch.nn.Linear(2, 1)
    with pytest.raises(ValueError, match="precision must be one of float32, bfloat16, got 'half'"):
        train_epoch(head, make_optimizer(head), [], clip=None, precision="half")


def test_warm_up_and_decay_keep_their_proportions_in_a_short_training():
    rates = [Recipe(epochs=24, lr=1.0).learning_rate(epoch) for epoch in range(24)]
    assert rates[:4] == pytest.approx([0.1, 0.4, 0.7, 1.0])
    assert [epoch for epoch in range(1, 24) if rates[epoch] < rates[epoch - 1]] == [17, 22]


def test_the_order_is_a_new_permutation_each_epoch_and_depends_on_the_seed():
    recipe = Recipe(seed=3)
    assert sorted(recipe.order(0, 9).tolist()) == list(range(9))
    assert recipe.order(5, 9).equal(Recipe(seed=3).order(5, 9))
    assert not recipe.order(0, 9).equal(recipe.order(1, 9))
    assert not recipe.order(0, 9).equal(Recipe(seed=4).order(0, 9))


@pytest.mark.parametrize(
    ("wrong", "sentence"),
    [
        ({"epochs": 0}, "epochs must be 1 or more, got 0"),
        ({"lr": float("nan")}, "lr must be above 0, got nan"),
        ({"clip": 0.0}, "clip must be above 0, got 0.0"),
        ({"weight_decay": -1e-5}, "weight_decay must be 0 or more, got -1e-05"),
        ({"noise": float("nan")}, "noise must be 0 or more, got nan"),
        ({"schedule": "steep"}, "schedule must be one of steps, cosine, got 'steep'"),
        ({"milestones": (0.5, 1.5)}, r"milestones must be shares from 0 to 1, got \(0.5, 1.5\)"),
        ({"seed": -1}, "seed must be 0 or more, got -1"),
        ({"precision": "float8"}, "precision must be one of float32, bfloat16, got 'float8'"),
        ({"cache": "tape"}, "cache must be one of memory, disk, off, got 'tape'"),
        ({"hold_out": 1.0}, "hold_out must be a share from 0 to below 1, got 1.0"),
        ({"false_alarms": 0.0}, "false_alarms must be above 0 and below 1, got 0.0"),
        ({"fit": "crop"}, "fit must be one of resize, pad, got 'crop'"),
    ],
)
def test_a_recipe_names_the_value_that_it_refuses(wrong, sentence):
    with pytest.raises(ValueError, match=sentence):
        Recipe(**wrong)


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


def test_the_loss_is_in_nats_per_latent_dimension(squares, finished_run):
    model = build_model()
    features = Features(model, Images(squares.train, 64))
    features.standardize()
    batch = features[torch.arange(4)]
    dimensions = sum(x[0].numel() for x in batch)
    reported = json.loads((finished_run / "metrics.json").read_text())["losses"][0]
    assert reported == pytest.approx(model.head.loss(batch).item() / dimensions, rel=0.2)


def test_metrics_are_null_without_labels_of_both_classes(tmp_path, squares):
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


def _same(run: Path, other: Path) -> bool:
    a, b = _weights(run), _weights(other)
    return a.keys() == b.keys() and all(torch.equal(a[name], b[name]) for name in a)


def test_the_same_seed_gives_the_same_bits_and_another_seed_others(tmp_path, squares, finished_run):
    for name, seed in (("same", 9826), ("other", 1)):
        recipe = Recipe(epochs=2, batch_size=4, seed=seed)
        train(build_model(), squares, tmp_path / name, recipe, device="cpu")
    assert _same(finished_run, tmp_path / "same")
    assert not _same(finished_run, tmp_path / "other")


def test_features_on_disk_give_the_same_bits_and_leave_no_file(tmp_path, squares, finished_run):
    run = tmp_path / "run"
    train(build_model(), squares, run, Recipe(epochs=2, batch_size=4, cache="disk"), device="cpu")
    assert _same(run, finished_run)
    assert not list(run.glob("*.cache"))


def test_features_that_memory_does_not_hold_go_to_the_disk(
    tmp_path, monkeypatch, caplog, squares, finished_run
):
    from msflow_ext import features

    run, seen, recipe = tmp_path / "run", [], Recipe(epochs=2, batch_size=4)
    trained = train_epoch

    def look(*args, **kwargs):
        seen.extend(path.name for path in run.glob("*.cache"))
        return trained(*args, **kwargs)

    images = Features(build_model(), Images(squares.train, SIZE)).nbytes  # test images need as much
    caplog.set_level("INFO", logger="msflow_ext")
    monkeypatch.setattr(loop, "train_epoch", look)
    for free, place in ((2 * images, "memory"), (2 * images - 2, "disk")):
        monkeypatch.setattr(features, "free_memory", lambda free=free: free)
        train(build_model(), squares, run, recipe, device="cpu", overwrite=True)
        assert _same(run, finished_run)
        assert f"(cache: {place})" in caplog.text
        assert (len(seen) > 0) == (place == "disk")
    assert set(seen) == {"features-training.cache", "features-test.cache"}
    assert not list(run.glob("*.cache"))


def test_free_memory_is_what_machine_and_container_leave(tmp_path):
    assert free_memory(tmp_path) is None
    files = {
        "proc/meminfo": "MemTotal: 9000 kB\nMemAvailable:    4000 kB\n",
        "sys/fs/cgroup/memory.max": "max\n",
        "sys/fs/cgroup/memory.current": "1000\n",
    }
    for name, text in files.items():
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / name).write_text(text)
    assert free_memory(tmp_path) == 4000 * 1024
    (tmp_path / "sys/fs/cgroup/memory.max").write_text("3000\n")
    assert free_memory(tmp_path) == 2000
    here = free_memory()
    assert here is None or here > 0


def test_features_computed_anew_every_epoch_give_the_same_training(tmp_path, squares, finished_run):
    recipe = Recipe(epochs=2, batch_size=4, cache="off")
    metrics = train(build_model(), squares, tmp_path / "run", recipe, device="cpu")
    wanted = json.loads((finished_run / "metrics.json").read_text())["losses"]
    assert metrics["losses"] == pytest.approx(wanted, rel=1e-4)


@pytest.mark.parametrize("fast", [True, False])
def test_bfloat16_trains_and_halves_the_cache_and_says_where_it_is_slow(
    tmp_path, monkeypatch, caplog, squares, finished_run, fast
):
    monkeypatch.setattr(loop, "has_bfloat16", lambda: fast)
    recipe = Recipe(epochs=2, batch_size=4, precision="bfloat16")
    metrics = train(build_model(), squares, tmp_path / "run", recipe, device="cpu")
    assert ("no instructions for bfloat16: precision float32" in caplog.text) != fast
    wanted = json.loads((finished_run / "metrics.json").read_text())["losses"]
    assert metrics["losses"] == pytest.approx(wanted, rel=0.02)
    model, images = build_model(), Images(squares.train, 64)
    whole, half = Features(model, images), Features(model, images, dtype=torch.bfloat16)
    assert whole.nbytes == 2 * half.nbytes > 0


def test_standardized_features_have_mean_0_and_deviation_1_and_the_model_agrees(squares):
    model, images = build_model(), Images(squares.train, 64)
    features = Features(model, images)
    features.standardize()
    everything = torch.arange(len(images))
    for maps, anew in zip(
        features[everything], Features(model, images, cache="off")[everything], strict=True
    ):
        torch.testing.assert_close(maps, anew, rtol=1e-3, atol=1e-3)
        spread = maps.transpose(0, 1).flatten(1)
        torch.testing.assert_close(spread.mean(1), torch.zeros(len(spread)), atol=1e-4, rtol=0)
        torch.testing.assert_close(
            spread.std(1, correction=0), torch.ones(len(spread)), atol=1e-3, rtol=0
        )


def test_a_loaded_run_scores_as_it_did_in_training(finished_run, squares):
    rows = (finished_run / "scores.csv").read_text().splitlines()[1:]
    detector, images = load(finished_run, device="cpu"), Images(squares.test, SIZE)
    found = [result.score for result in detector.predict(map(images.__getitem__, range(6)))]
    assert [float(row.split(",")[3]) for row in rows] == pytest.approx(found, rel=1e-5)
    assert detector.colours is not None
    assert detector.colours[0] < detector.colours[1]


def test_padding_is_part_of_the_recipe_and_of_what_is_loaded(tmp_path, squares):
    wide = [Item(i.name, 0, "good", np.asarray(i.image)[:32]) for i in squares.train]
    data = DataSet("squares", "wide", tuple(wide), squares.test)
    run, recipe = tmp_path / "run", Recipe(epochs=1, fit="pad")
    metrics = train(build_model(), data, run, recipe, device="cpu")
    assert metrics["recipe"]["fit"] == load(run, device="cpu").fit == "pad"
    assert metrics["pixel_auroc"] is not None
    with pytest.raises(ValueError, match="its recipe has fit pad, this one fit resize"):
        train(build_model(), data, run, Recipe(epochs=1), device="cpu", resume=True)


def test_images_held_out_set_the_thresholds_and_are_not_trained_on(tmp_path, squares):
    recipe = Recipe(epochs=1, batch_size=2, hold_out=0.5, false_alarms=0.25)
    kept, held = recipe.split(6)
    assert sorted(kept + held) == list(range(6))
    metrics = train(build_model(), squares, tmp_path / "run", recipe, device="cpu")
    found = metrics["decisions"]
    assert found["held_out"] == len(held) == 3

    rest = DataSet(squares.name, squares.category, tuple(squares.train[i] for i in kept), ())
    train(build_model(), rest, tmp_path / "rest", Recipe(epochs=1, batch_size=2), device="cpu")
    assert _same(tmp_path / "run", tmp_path / "rest")

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


def test_too_few_images_to_hold_out_stop_a_run_before_it_begins(tmp_path, squares):
    wanted = "hold_out 0.5 of 6 training images is 3 to hold out and 3 to train on, .* needs 19"
    with pytest.raises(ValueError, match=wanted):
        train(build_model(), squares, tmp_path / "run", Recipe(hold_out=0.5), device="cpu")
    assert not (tmp_path / "run").exists()


def test_a_reversible_run_ends_where_a_lean_one_does(tmp_path, finished_run, squares):
    recipe = Recipe(epochs=2, batch_size=4, memory="reversible")
    losses = train(build_model(), squares, tmp_path / "run", recipe, device="cpu")["losses"]
    wanted = json.loads((finished_run / "metrics.json").read_text())["losses"]
    assert losses == pytest.approx(wanted, rel=1e-5)
    with pytest.raises(ValueError, match="memory 'reversible' needs precision float32"):
        Recipe(memory="reversible", precision="bfloat16")


class Killed(BaseException):
    """Nothing in a run may catch this."""


@pytest.mark.parametrize("cache", ["memory", "disk"])
def test_a_killed_run_resumes_to_the_bits_of_an_undisturbed_one(
    tmp_path, monkeypatch, squares, cache
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
    assert _same(run, tmp_path / "undisturbed")
    wanted = json.loads((tmp_path / "undisturbed" / "metrics.json").read_text())
    for name in ("losses", "evaluations", "best"):
        assert metrics[name] == wanted[name]


def _results(run: Path) -> tuple[Any, ...]:
    """All that a run leaves that does not depend on how long it took."""
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
    tmp_path, monkeypatch, squares, error, seen, sentence
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


def test_a_run_whose_first_test_is_not_finite_leaves_no_checkpoint(tmp_path, squares):
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
    tmp_path, monkeypatch, squares, finished_run, last_file
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
    wanted = json.loads((finished_run / "metrics.json").read_text())
    for name in ("image_auroc", "losses", "evaluations", "best"):
        assert metrics[name] == wanted[name]
    assert _same(run, finished_run)


def test_a_run_is_neither_lost_nor_mixed_with_another(tmp_path, squares):
    run, recipe = tmp_path / "run", Recipe(epochs=1)
    first = train(build_model(), squares, run, recipe, device="cpu")
    kept = (run / "model.safetensors").read_bytes()
    with pytest.raises(ValueError, match="holds a run"):
        train(build_model(), squares, run, recipe, device="cpu")
    with pytest.raises(
        ValueError, match="cannot be resumed: its recipe has epochs 1, this one epochs 2"
    ):
        train(build_model(), squares, run, Recipe(epochs=2), device="cpu", resume=True)
    fewer = DataSet(squares.name, squares.category, squares.train[1:], squares.test)
    with pytest.raises(
        ValueError, match="cannot be resumed: its data has train 6, this one train 5"
    ):
        train(build_model(), fewer, run, recipe, device="cpu", resume=True)
    with pytest.raises(ValueError, match="resume and overwrite exclude each other"):
        train(build_model(), squares, run, recipe, device="cpu", resume=True, overwrite=True)
    assert train(build_model(), squares, run, recipe, device="cpu", resume=True) == first
    assert (run / "model.safetensors").read_bytes() == kept

    (run / "maps" / "stale.png").touch()
    train(build_model(), fewer, run, recipe, device="cpu", overwrite=True)
    assert (run / "model.safetensors").read_bytes() != kept
    assert not (run / "maps" / "stale.png").exists()


def test_a_run_is_only_overwritten_when_all_images_of_the_new_one_are_sound(tmp_path, squares):
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
    tmp_path, squares, what
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


def test_a_mask_of_the_wrong_size_stops_a_run_before_it_trains(tmp_path, squares):
    bad = Item("square/9", 1, "square", np.zeros((64, 64), np.uint8), np.ones((32, 32), bool))
    data = DataSet("squares", "white", squares.train, (*squares.test, bad))
    with pytest.raises(ValueError, match=r"32x32 pixels, its image .* 64x64"):
        train(build_model(), data, tmp_path / "run", Recipe(epochs=1), device="cpu")
    assert not (tmp_path / "run" / "model.safetensors").exists()


def test_no_training_images_is_an_error(tmp_path, squares):
    empty = DataSet("squares", "white", (), squares.test)
    with pytest.raises(ValueError, match="squares white has no images to train on"):
        train(build_model(), empty, tmp_path / "run", device="cpu")
    assert not (tmp_path / "run").exists()


def test_features_that_are_not_finite_name_their_image(squares):
    model = build_model()
    model.backbone.mean.fill_(math.nan)
    with pytest.raises(ValueError, match="features of image train/good/0 hold NaN"):
        Features(model, Images(squares.train, 64))


def test_a_cache_that_the_disk_cannot_hold_is_refused(tmp_path, monkeypatch, squares):
    from msflow_ext import features

    monkeypatch.setattr(features.shutil, "disk_usage", lambda _: SimpleNamespace(free=100))
    file = tmp_path / "features"
    with pytest.raises(OSError, match=r"features needs [\d,]+ bytes, the disk has 100 left"):
        Features(build_model(), Images(squares.train, 64), cache="disk", file=file)
    assert not file.exists()


def test_a_measure_that_older_evaluations_lack_has_its_best_among_the_others() -> None:
    old = [{"epoch": 1, "image_auroc": 0.9}, {"epoch": 2, "image_auroc": 0.8, "aupimo": 0.5}]
    parts = dict.fromkeys(("losses", "recipe", "data"))
    state = {"model": "MSFlow", "config": {}, "epoch": 2, "evaluations": old, **parts}
    best = summary(state, {"image_auroc": 0.8, "aupimo": 0.5})["best"]
    assert (best["image_auroc"], best["aupimo"]) == (0.9, 0.5)
    assert best["epochs"] == {"image_auroc": 1, "aupimo": 2}
