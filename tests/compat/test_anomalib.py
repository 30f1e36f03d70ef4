"""anomalib's Engine trains, tests, applies and loads the MSFlow of msflow_ext."""

from __future__ import annotations

import doctest
import importlib
import shutil
import sys
from pathlib import Path
from types import ModuleType
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image

import msflow_ext as mx
from msflow_ext.compat.checkpoints.detectors import read_detector
from msflow_ext.testing import relative_error

pytestmark = pytest.mark.filterwarnings("ignore")  # of anomalib and Lightning

SIZE = 64
SMALL: dict[str, Any] = {
    "backbone": "test_resnet",
    "image_size": SIZE,
    "pretrained": False,
    "blocks": (1, 1, 1),
    "cond_channels": 4,
    "visualizer": False,
}


@pytest.fixture(scope="session")
def ours(anomalib) -> ModuleType:
    """Return the module ``msflow_ext.compat.anomalib``."""
    return importlib.import_module("msflow_ext.compat.anomalib")


@pytest.fixture(scope="session")
def data(anomalib, tmp_path_factory) -> Any:
    """Return images of gray noise, where the defective ones have a white square."""
    root, rng = tmp_path_factory.mktemp("data"), np.random.default_rng(0)
    for folder, count in (("good", 5), ("bad", 2), ("other", 2), ("mask", 2)):
        (root / folder).mkdir()
        for i in range(count):
            pixels = rng.integers(90, 110, (80, 80, 3), dtype=np.uint8)
            if folder == "mask":
                pixels = np.zeros((80, 80), np.uint8)
            if folder in ("bad", "mask"):
                pixels[10:40, 20:50] = 255
            Image.fromarray(pixels).save(root / folder / f"{i}.png")
    return anomalib("data").Folder(
        name="plate",
        root=root,
        normal_dir="good",
        abnormal_dir="bad",
        normal_test_dir="other",
        mask_dir="mask",
        train_batch_size=2,
        eval_batch_size=2,
        num_workers=0,
    )


def engine(anomalib: Any, folder: Path, **options: Any) -> Any:
    return anomalib("engine").Engine(
        accelerator="cpu",
        devices=1,
        default_root_dir=folder,
        logger=False,
        enable_progress_bar=False,
        enable_model_summary=False,
        **options,
    )


@pytest.fixture(scope="module")
def trained(anomalib, ours, data, tmp_path_factory) -> tuple[Any, Any]:
    """Return a model trained for two epochs, and its engine."""
    torch.manual_seed(0)
    model, folder = ours.MSFlow(**SMALL), tmp_path_factory.mktemp("engine")
    trainer = engine(anomalib, folder, max_epochs=2)
    trainer.fit(model, datamodule=data)
    return model, trainer


def test_the_example_of_the_docstring_runs(ours, data, tmp_path, monkeypatch):
    shutil.copytree(data.root, tmp_path / "plates")
    monkeypatch.chdir(tmp_path)
    exec(doctest.script_from_examples(ours.MSFlow.__doc__), named := {})
    assert 0 <= named["metrics"]["image_AUROC"] <= 1
    assert {batch.anomaly_map.shape[1:] for batch in named["batches"]} == {(192, 192)}


def test_training_moves_the_flows_and_leaves_the_backbone(ours, trained):
    torch.manual_seed(0)
    first, last = ours.MSFlow(**SMALL).state_dict(), trained[0].state_dict()
    moved = {key for key in first if not torch.equal(first[key], last[key])}
    assert any("detector.head.flows.0" in key for key in moved)
    assert any("detector.head.fusion" in key for key in moved)
    assert not any("backbone" in key for key in moved)


def test_features_are_standardized_by_the_training_images(trained, data):
    detector = trained[0].detector
    batches = [trained[0].pre_processor.transform(b.image) for b in data.train_dataloader()]
    assert sum(map(len, batches)) == 5
    for f in detector.features(torch.cat(batches)):
        assert f.mean((0, 2, 3)).abs().max() < 1e-3
        deviation = f.std((0, 2, 3), correction=0)
        alive = deviation > 1e-3  # a ReLU may be 0 for all images
        assert alive.float().mean() > 0.1 and (deviation[alive] - 1).abs().max() < 1e-3


def test_the_engine_tests_the_model(trained, data):
    model, trainer = trained
    (metrics,) = trainer.test(model, datamodule=data, verbose=False)
    assert metrics["image_AUROC"] == 1
    assert metrics["pixel_AUROC"] > 0.7


def test_the_engine_ranks_images_as_the_detector(trained, data):
    model, trainer = trained
    batch, *_ = trainer.predict(model, datamodule=data)
    raw = model.detector(torch.stack(list(batch.image)))
    assert batch.anomaly_map.shape == (2, SIZE, SIZE) and batch.pred_label.shape == (2,)
    order = torch.tensor(batch.pred_score).argsort()
    assert torch.equal(order, raw.score.argsort())


@pytest.mark.family("anomalib adapter")
@pytest.mark.parametrize("score", ["map", "log", "nll"])
def test_without_masks_the_map_and_the_mask_show_the_defect(
    anomalib, ours, data, tmp_path, monkeypatch, score
):
    torch.manual_seed(0)
    folders = {"root": data.root, "normal_dir": "good", "abnormal_dir": "bad"}
    sizes = {"train_batch_size": 2, "eval_batch_size": 8, "num_workers": 0}
    bare = anomalib("data").Folder(
        name="plate", normal_test_dir="other", val_split_mode="same_as_test", **folders, **sizes
    )
    options = {} if score == "map" else {"score": score}  # the default has the unit of the map
    model, trainer = ours.MSFlow(**SMALL, **options), engine(anomalib, tmp_path, max_epochs=2)
    trainer.fit(model, datamodule=bare)
    raw: list[Any] = []
    forward = model.model.forward
    monkeypatch.setattr(model.model, "forward", lambda x: raw.append(forward(x)) or raw[-1])
    (batch,) = trainer.predict(model, datamodule=bare)
    defects = batch.gt_label.bool()
    assert defects.tolist().count(True) == 2
    for mask, values, plain in zip(
        batch.pred_mask[defects],
        batch.anomaly_map[defects],
        raw[-1].anomaly_map[defects],
        strict=True,
    ):
        assert values.max() > 0.5 > values.min() and 0 < mask.float().mean() < 1
        middle = (values > 0) & (values < 1)
        assert torch.equal(values[middle].argsort(stable=True), plain[middle].argsort(stable=True))
    if score == "map":
        assert batch.pred_mask.flatten(1).any(1)[batch.pred_label.bool()].all()


def test_a_loaded_checkpoint_gives_the_same_predictions(ours, trained):
    model, trainer = trained
    path = trainer.trainer.checkpoint_callback.last_model_path or trainer.best_model_path
    again = ours.MSFlow.load_from_checkpoint(path, visualizer=False)
    images = torch.rand(2, 3, SIZE, SIZE)
    with torch.no_grad():
        expected, got = model.detector(images), again.detector(images)
    assert torch.equal(got.anomaly_map, expected.anomaly_map)
    assert torch.equal(got.score, expected.score)


@pytest.mark.slow
def test_the_engine_exports_the_model_for_any_number_of_images(anomalib, trained, tmp_path):
    for package in ("onnx", "onnxscript"):
        pytest.importorskip(package)
    runtime: Any = pytest.importorskip("onnxruntime")
    model, trainer = trained
    path = trainer.export(
        model, anomalib("deploy").ExportType.ONNX, export_root=tmp_path, input_size=(SIZE, SIZE)
    )
    session = runtime.InferenceSession(str(path))
    for count in (1, 3):
        images = torch.rand(count, 3, SIZE, SIZE)
        names = [output.name for output in session.get_outputs()]
        got = dict(zip(names, session.run(None, {"input": images.numpy()}), strict=True))
        with torch.no_grad():
            expected = model.eval()(images)
        for name in ("pred_score", "anomaly_map"):
            assert relative_error(torch.tensor(got[name]), getattr(expected, name)) <= 1e-4


def test_the_learning_rate_and_the_clipping_follow_the_paper(anomalib, ours, data, tmp_path):
    from msflow_ext.training.recipe import Recipe

    rates: list[float] = []

    class Watched(ours.MSFlow):
        def on_train_epoch_start(self) -> None:
            rates.append(self.optimizers().param_groups[0]["lr"])

    trainer = engine(anomalib, tmp_path, max_epochs=10, limit_train_batches=1, limit_val_batches=0)
    trainer.fit(Watched(**SMALL, lr=1e-3), datamodule=data)
    recipe = Recipe(epochs=10, lr=1e-3)
    assert rates == pytest.approx([recipe.learning_rate(epoch) for epoch in range(10)])
    assert trainer.trainer.gradient_clip_val == recipe.clip


def test_the_model_gives_the_maps_of_the_detector(ours):
    torch.manual_seed(0)
    model = ours.MSFlow(**SMALL).eval()
    torch.manual_seed(0)
    names = ("backbone", "image_size", "pretrained", "blocks", "cond_channels")
    detector: Any = mx.MSFlow(**{name: SMALL[name] for name in names}).eval()
    images = torch.rand(2, 3, SIZE, SIZE)
    assert relative_error(model.model(images).anomaly_map, detector(images).anomaly_map) == 0


def test_a_wrong_pre_processor_learning_rate_or_number_of_epochs_is_refused(
    anomalib, ours, data, tmp_path
):
    normalizing = anomalib("models").Fastflow.configure_pre_processor((SIZE, SIZE))
    with pytest.raises(
        ValueError, match=r"with values in 0\.\.1, got \(64, 64\) with values up to 2"
    ):
        ours.MSFlow(**SMALL, pre_processor=normalizing)
    wider = ours.MSFlow.configure_pre_processor((SIZE, 2 * SIZE))
    with pytest.raises(ValueError, match=r"images of 64 x 64 pixels .* got \(64, 128\)"):
        ours.MSFlow(**SMALL, pre_processor=wider)
    with pytest.raises(ValueError, match="lr must be above 0, got -1"):
        ours.MSFlow(**SMALL, lr=-1)
    with pytest.raises(ValueError, match=r"max_epochs must be 1 or more, got -1"):
        engine(anomalib, tmp_path, max_steps=1).fit(ours.MSFlow(**SMALL), datamodule=data)


def test_the_engine_trains_an_accelerated_fastflow_to_the_weights_of_the_original(
    anomalib, data, tmp_path
):
    Fastflow: Any = anomalib("models").Fastflow
    ends = []
    for name in ("original", "accelerated"):
        torch.manual_seed(0)
        np.random.seed(0)
        model = Fastflow(
            "resnet18",
            pre_trained=False,
            flow_steps=2,
            pre_processor=Fastflow.configure_pre_processor((SIZE, SIZE)),
            visualizer=False,
        )
        if name == "accelerated":
            assert len(mx.accelerate(model).replaced) == 6
        trainer = engine(anomalib, tmp_path / name, max_epochs=2)
        trainer.fit(model, datamodule=data)
        path = trainer.trainer.checkpoint_callback.last_model_path or trainer.best_model_path
        ends.append(torch.load(path, weights_only=True)["state_dict"])
        assert read_detector(path).config["backbone"] == "resnet18"
    assert ends[0].keys() == ends[1].keys()
    for key, value in ends[0].items():
        assert relative_error(ends[1][key], value) <= 1e-4, key


def test_without_anomalib_the_error_says_what_to_install(monkeypatch):
    monkeypatch.setitem(sys.modules, "anomalib", None)
    monkeypatch.delitem(sys.modules, "msflow_ext.compat.anomalib", raising=False)
    with pytest.raises(ModuleNotFoundError, match=r"pip install 'msflow-ext\[anomalib\]'"):
        importlib.import_module("msflow_ext.compat.anomalib")
