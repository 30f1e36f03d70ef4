"""An exported file does not depend on this package and computes the same as the run, or is not written."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

import msflow_ext as mx
from msflow_ext import cli
from msflow_ext.export import export, metadata
from msflow_ext.runs.checkpoint import save_checkpoint

pytestmark = pytest.mark.usefixtures("one_thread")

SUFFIXES = {"torch": ".pt2", "aoti": ".pt2", "onnx": ".onnx", "openvino": ".xml"}
SMALL: dict[str, Any] = {"image_size": 64, "pretrained": False, "seed": 1}


def small(kind: str, backbone: str = "test_efficientnet", **options: Any) -> Any:
    """An untrained model in evaluation mode, with a fitted anomaly map."""
    if kind == "MSFlow":
        options = {"blocks": (1, 1, 1), "cond_channels": 8, **options}
    else:
        options = {"steps": 2, **options}
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        model = getattr(mx, kind)(backbone, **SMALL, **options).eval()
        model.fit_map([model.features(torch.rand(4, 3, 64, 64))])
    return model


@pytest.fixture(scope="module")
def images() -> Tensor:
    """Five images, a batch size that no exporter saw."""
    return torch.rand(5, 3, 64, 64, generator=torch.Generator().manual_seed(7))


@pytest.fixture(scope="module")
def run(tmp_path_factory) -> Path:
    """A folder with the checkpoint of an untrained model; tests must not write to it."""
    folder = tmp_path_factory.mktemp("run")
    model = small("MSFlow")
    header = {"model": "MSFlow", "config": model.config}
    save_checkpoint(folder / "model.safetensors", header, model)
    return folder


def outputs(model: Any, images: Tensor) -> list[np.ndarray]:
    with torch.no_grad():
        found = model(images)
    return [found.score.numpy(), found.anomaly_map.numpy()]


def assert_equal(got: Any, expected: Any) -> None:
    for found, truth in zip(got, expected, strict=True):
        assert np.asarray(found).dtype == np.float32
        np.testing.assert_allclose(found, truth, rtol=0, atol=1e-4 * np.abs(truth).max())


def test_the_command_writes_a_program_that_runs_without_this_package(run, tmp_path, capsys, images):
    path, given, result = tmp_path / "new" / "m.pt2", tmp_path / "images.pt", tmp_path / "result.pt"
    assert cli.main(["export", "--run", str(run), "--format", "torch", "--out", str(path)]) == 0
    (line,) = capsys.readouterr().out.splitlines()
    assert line.startswith(f"{path}: differs from the run on random images by at most ")
    assert str(Path(mx.__file__).parent).encode() not in path.read_bytes()
    torch.save(images, given)
    script = """
import sys, torch
sys.modules["msflow_ext"] = None  # from here on it cannot be imported
program, given, result = sys.argv[1:]
found = torch.export.load(program).module()(torch.load(given))
torch.save(tuple(found), result)
"""
    command = [sys.executable, "-c", script, str(path), str(given), str(result)]
    done = subprocess.run(command, capture_output=True, text=True, check=False, cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    assert_equal(torch.load(result), outputs(mx.load(run, "cpu").model, images))


def test_an_onnx_file_is_self_contained_with_the_documented_inputs_and_outputs(tmp_path, images):
    onnxruntime = pytest.importorskip("onnxruntime")
    options = {"anomaly_map": "clamped", "smoothing": 4.0, "score": "map"}
    model = small("MSFlow", **options)
    differences = export(model, "onnx", tmp_path / "m.onnx", images=images[:2])
    assert differences.keys() == {"score", "anomaly_map"}
    assert max(differences.values()) <= 1e-4
    assert [p.name for p in tmp_path.iterdir()] == ["m.onnx"]
    assert str(Path(mx.__file__).parent).encode() not in (tmp_path / "m.onnx").read_bytes()
    session = onnxruntime.InferenceSession(tmp_path / "m.onnx")
    described = {each.name: each.shape for each in (*session.get_inputs(), *session.get_outputs())}
    assert described == {
        "images": ["batch", 3, 64, 64],
        "score": ["batch"],
        "anomaly_map": ["batch", 64, 64],
    }
    expected = outputs(model, images)
    assert_equal(session.run(None, {"images": images.numpy()}), expected)
    single = {"images": images[:1].numpy()}
    assert_equal(session.run(None, single), [each[:1] for each in expected])


def test_an_openvino_file_has_its_weights_beside_it(tmp_path, images):
    openvino = pytest.importorskip("openvino")
    model = small("FastFlow")
    export(model, "openvino", tmp_path / "m.xml")
    assert sorted(p.name for p in tmp_path.iterdir()) == ["m.bin", "m.xml"]
    exactly = {"INFERENCE_PRECISION_HINT": "f32"}
    compiled = openvino.compile_model(tmp_path / "m.xml", "CPU", exactly)
    found = compiled(images.numpy())
    assert_equal([found["score"], found["anomaly_map"]], outputs(model, images))


@pytest.fixture(scope="module")
def calibrated() -> mx.inference.Detector:
    """A detector with thresholds."""
    known: dict[str, Any] = {"threshold": 1.5, "pixel_threshold": 0.25, "false_alarms": 0.05}
    return mx.inference.Detector(small("FastFlow"), colours=[0.0, 2.0], fit="pad", **known)


FACTS = {
    "model": "FastFlow",
    "backbone": "test_efficientnet",
    "image_size": "64",
    "fit": "pad",
    "input_layout": "NCHW",
    "input_range": "[0.0, 1.0]",
    "normalization": "inside",
    "threshold": "1.5",
    "pixel_threshold": "0.25",
    "false_alarms": "0.05",
    "colours": "[0.0, 2.0]",
    "version": mx.__version__,
}


@pytest.mark.family("exports")
def test_a_torch_program_has_the_metadata(calibrated, run, tmp_path):
    export(calibrated, "torch", tmp_path / "m.pt2")
    extra = {"metadata.json": ""}
    torch.export.load(tmp_path / "m.pt2", extra_files=extra)
    found = json.loads(extra["metadata.json"])
    assert FACTS.items() <= found.items()
    mean, std = (json.loads(found[name]) for name in ("mean", "std"))
    backbone = calibrated.model.backbone
    assert mean == pytest.approx(backbone.mean.flatten().tolist())
    assert std == pytest.approx(backbone.std.flatten().tolist())
    bare = metadata(mx.load(run, "cpu"))
    assert (bare["model"], bare["threshold"], bare["false_alarms"]) == ("MSFlow", "null", "null")


@pytest.mark.family("exports")
def test_an_onnx_file_has_the_metadata(calibrated, tmp_path):
    onnxruntime = pytest.importorskip("onnxruntime")
    pytest.importorskip("onnxscript")
    export(calibrated, "onnx", tmp_path / "m.onnx")
    session = onnxruntime.InferenceSession(tmp_path / "m.onnx")
    assert FACTS.items() <= session.get_modelmeta().custom_metadata_map.items()


@pytest.mark.family("exports")
def test_an_openvino_file_has_the_metadata_and_both_differences_are_returned(
    calibrated, tmp_path, images
):
    openvino = pytest.importorskip("openvino")
    found = export(calibrated, "openvino", tmp_path / "m.xml", images=images)
    model = openvino.Core().read_model(tmp_path / "m.xml")
    assert {name: model.get_rt_info(["msflow_ext", name]).astype(str) for name in FACTS} == FACTS
    outputs_of = ("score", "anomaly_map")
    assert list(found) == [*outputs_of, *(f"{name} by default" for name in outputs_of)]
    compiled = openvino.compile_model(tmp_path / "m.xml", "CPU")
    for name, expected in zip(outputs_of, outputs(calibrated.model, images), strict=True):
        difference = (
            np.abs(compiled(images.numpy())[name] - expected).max() / np.abs(expected).max()
        )
        assert found[name] <= 1e-4 and found[f"{name} by default"] >= difference * 0.5


@pytest.mark.family("exports")
def test_the_command_prints_the_differences_with_and_without_the_hint(
    run, tmp_path, capsys, monkeypatch
):
    found = {"score": 1e-7, "anomaly_map": 2e-7}
    found |= {"score by default": 0.03, "anomaly_map by default": 0.02}
    monkeypatch.setattr("msflow_ext.export.export", lambda *_, **__: found)
    path = tmp_path / "m.xml"
    assert cli.main(["export", "--run", str(run), "--format", "openvino", "--out", str(path)]) == 0
    exact, default = capsys.readouterr().out.splitlines()
    assert "1.0e-07 of score, 2.0e-07 of anomaly_map with INFERENCE_PRECISION_HINT f32" in exact
    assert "3.0e-02 of score by default, 2.0e-02 of anomaly_map by default" in default


@pytest.mark.parametrize(
    ("kind", "options"),
    [
        ("MSFlow", {"score": "paper", "standardize": True, "whiten": True}),
        ("FastFlow", {"score": "log", "anomaly_map": "clamped", "smoothing": 2.0}),
        ("FastFlow", {"score": "nll", "padding_mode": "reflect", "backbone": "resnet18"}),
        ("FastFlow", {"backbone": "test_vit"}),
    ],
    ids=str,
)
def test_every_score_and_map_of_both_models_can_be_exported(tmp_path, images, kind, options):
    model = small(kind, **options)
    export(model, "torch", tmp_path / "m.pt2")
    found = torch.export.load(tmp_path / "m.pt2").module()(images)
    assert_equal(found, outputs(model, images))


def test_a_graph_that_differs_from_the_run_is_not_written(tmp_path, monkeypatch):
    model = small("FastFlow", anomaly_map="clamped")
    # Change the map during export only.
    localize = type(model).localize

    def differs(self: Any, *arguments: Any) -> Tensor:
        shift = 0.01 if torch.compiler.is_exporting() else 0.0
        return localize(self, *arguments) * (1 + shift)

    monkeypatch.setattr(type(model), "localize", differs)
    with pytest.raises(
        RuntimeError, match=r"its anomaly_map must be within .* but differs by 1\.0e-02"
    ):
        export(model, "torch", tmp_path / "m.pt2")
    assert not list(tmp_path.iterdir())


def test_a_model_that_cannot_be_exported_is_named(tmp_path, monkeypatch):
    model = small("FastFlow")
    # A graph cannot branch on a value.
    monkeypatch.setattr(
        type(model), "pool", lambda self, x: x if bool((x.mean() > 0).item()) else -x
    )
    sentence = "FastFlow on test_efficientnet cannot be exported to torch: "
    with pytest.raises(RuntimeError, match=sentence):
        export(model, "torch", tmp_path / "m.pt2")
    assert not list(tmp_path.iterdir())


def test_weights_too_large_for_one_onnx_file_are_refused(tmp_path, monkeypatch):
    pytest.importorskip("onnxruntime")
    exporter = "torch.onnx._internal.exporter._onnx_program._LARGE_MODEL_THRESHOLD"
    monkeypatch.setattr(exporter, 1000)
    with pytest.raises(RuntimeError, match="weights are too large for one ONNX file"):
        export(small("FastFlow", steps=1), "onnx", tmp_path / "m.onnx")
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize("format", SUFFIXES)
def test_an_existing_file_is_kept(run, tmp_path, format):
    path = tmp_path / f"m{SUFFIXES[format]}"
    path.write_text("mine")
    with pytest.raises(FileExistsError, match=r"m\..* exists already"):
        export(run, format, path)
    assert path.read_text() == "mine"


def test_wrong_arguments_are_refused(run, tmp_path):
    with pytest.raises(
        ValueError, match="format must be one of torch, aoti, onnx, openvino, got 'tf'"
    ):
        export(run, "tf", tmp_path / "m.tf")  # pyright: ignore[reportArgumentType]
    with pytest.raises(ValueError, match=r"m\.onnx must end in \.pt2 for format torch"):
        export(run, "torch", tmp_path / "m.onnx")
    (tmp_path / "file").write_text("")
    with pytest.raises(OSError, match="cannot be written: Not a directory"):
        export(run, "torch", tmp_path / "file" / "m.pt2")
    with pytest.raises(FileNotFoundError, match="no such checkpoint"):
        export(tmp_path / "absent", "torch", tmp_path / "m.pt2")
    with pytest.raises(
        ValueError, match=r"images must have shape \(N, 3, 64, 64\) and dtype float32, got \(3"
    ):
        export(run, "torch", tmp_path / "m.pt2", images=torch.zeros(3, 64, 64))
    assert [p.name for p in tmp_path.iterdir()] == ["file"]


def test_other_sources_than_float32_models_are_refused(tmp_path):
    model = small("FastFlow")
    refused: list[tuple[Any, str]] = [
        (model.optimize(), "not an optimized model, got FastFlow"),
        (torch.nn.Identity(), "got Identity"),
        (model.double(), "source must be float32, got torch.float64"),
    ]
    for source, sentence in refused:
        with pytest.raises(TypeError, match=sentence):
            export(source, "torch", tmp_path / "m.pt2")


@pytest.mark.parametrize(
    ("format", "module"),
    [("onnx", "onnxruntime"), ("onnx", "onnxscript"), ("openvino", "openvino")],
)
def test_a_missing_package_names_what_to_install(run, tmp_path, monkeypatch, format, module):
    monkeypatch.setitem(sys.modules, module, None)
    with pytest.raises(ModuleNotFoundError, match=r"pip install 'msflow-ext\[export\]'") as caught:
        export(run, format, tmp_path / f"m{SUFFIXES[format]}")
    assert module in str(caught.value)


def test_an_export_does_not_change_the_detector(tmp_path):
    model = small("FastFlow").train()
    before = {name: t.clone() for name, t in model.state_dict().items()}
    export(mx.inference.Detector(model), "torch", tmp_path / "m.pt2")
    assert model.training
    assert all(torch.equal(t, before[name]) for name, t in model.state_dict().items())
