"""A compiled export gives the results of its run, in Python and in the C++ example of the documentation."""

from __future__ import annotations

import os
import re
import shutil
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image

import msflow_ext as mx
from msflow_ext import cli, export
from msflow_ext.runs.checkpoint import save_checkpoint

EXAMPLE = Path(__file__).parents[1] / "docs" / "cpp"
TOOLS = f"{Path(sys.executable).parent}{os.pathsep}{os.environ.get('PATH', '')}"
LINE = r"(.*) score (\S+), most anomalous at x (\d+), y (\d+)"
Score = Callable[..., "subprocess.CompletedProcess[str]"]

pytestmark = pytest.mark.usefixtures("one_thread")
needs_compiler = pytest.mark.skipif(
    shutil.which(export._compiler()) is None, reason="no C++ compiler"
)


@pytest.fixture(scope="module")
def run(tmp_path_factory) -> Path:
    """Return a folder with the checkpoint of an untrained model; tests must not write to it."""
    folder = tmp_path_factory.mktemp("run")
    small: dict[str, Any] = {"image_size": 32, "steps": 1, "pretrained": False, "seed": 1}
    model = mx.FastFlow("test_resnet", **small)
    save_checkpoint(
        folder / "model.safetensors", {"model": "FastFlow", "config": model.config}, model
    )
    return folder


@pytest.fixture(scope="module")
def package(run, tmp_path_factory) -> Path:
    path = tmp_path_factory.mktemp("package") / "model.pt2"
    assert cli.main(["export", "--run", str(run), "--format", "aoti", "--out", str(path)]) == 0
    assert [each.name for each in path.parent.iterdir()] == ["model.pt2"]
    return path


@pytest.fixture(scope="module")
def score(tmp_path_factory) -> Score:
    """Build the C++ example once, and return a function that runs it."""
    cmake = shutil.which("cmake", path=TOOLS)
    if cmake is None:
        pytest.skip("no CMake")
    folder = tmp_path_factory.mktemp("build")
    for step in (
        ["-S", str(EXAMPLE), "-B", str(folder), f"-DPython_EXECUTABLE={sys.executable}"],
        ["--build", str(folder)],
    ):
        done = subprocess.run([cmake, *step], capture_output=True, text=True, check=False)
        assert done.returncode == 0, done.stdout + done.stderr

    def run(*arguments: Path | str) -> subprocess.CompletedProcess[str]:
        command = [folder / "msflow_score", *arguments]
        return subprocess.run(command, capture_output=True, text=True, check=False, cwd=folder)

    return run


def ppm(path: Path, width: int = 32, height: int = 32, seed: int = 0) -> Path:
    pixels = np.random.default_rng(seed).integers(0, 255, (height, width, 3), np.uint8)
    Image.fromarray(pixels).save(path)
    return path


@needs_compiler
@pytest.mark.slow
def test_the_package_gives_the_results_of_the_run_for_any_batch(run, package, tmp_path):
    images = torch.rand(5, 3, 32, 32, generator=torch.Generator().manual_seed(7))
    batches, given, result = [images[:1], images], tmp_path / "images.pt", tmp_path / "result.pt"
    torch.save(batches, given)
    script = """
import sys, torch
sys.modules["msflow_ext"] = None  # from here on it cannot be imported
from torch._inductor import aoti_load_package
package, given, result = sys.argv[1:]
model = aoti_load_package(package)
torch.save([tuple(model(images)) for images in torch.load(given)], result)
"""
    command = [sys.executable, "-c", script, str(package), str(given), str(result)]
    done = subprocess.run(command, capture_output=True, text=True, check=False, cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    for batch, found in zip(batches, torch.load(result), strict=True):
        with torch.no_grad():
            prediction = mx.load(run, "cpu").model(batch)
        for got, expected in zip(found, (prediction.score, prediction.anomaly_map), strict=True):
            torch.testing.assert_close(
                got, expected, rtol=0, atol=1e-4 * float(expected.abs().max())
            )


@needs_compiler
@pytest.mark.slow
@pytest.mark.family("exports")
def test_the_package_contains_the_metadata_for_deployment(run, package):
    from torch._inductor import aoti_load_package

    found = aoti_load_package(str(package)).get_metadata()
    expected = export.metadata(mx.load(run, "cpu"))
    assert expected["image_size"] == "32" and expected.items() <= found.items()


@needs_compiler
@pytest.mark.slow
def test_the_example_in_cpp_gives_the_results_of_the_run(run, package, score, tmp_path):
    images = [ppm(tmp_path / f"{seed}.ppm", seed=seed) for seed in range(3)]
    done = score(package, *images)
    assert done.returncode == 0, done.stderr
    pixels = [np.asarray(Image.open(path)) for path in images]  # predict does not read PPM files
    results, lines = mx.load(run, "cpu").predict(pixels), done.stdout.splitlines()
    for path, line, expected in zip(images, lines, results, strict=True):
        parts = re.fullmatch(LINE, line)
        assert parts, line
        name, found, x, y = parts.groups()
        assert name == str(path)
        assert float(found) == pytest.approx(expected.score, rel=1e-4)
        assert expected.map[int(y), int(x)] == pytest.approx(expected.map.max(), rel=1e-4)


@needs_compiler
@pytest.mark.slow
def test_the_example_in_cpp_refuses_invalid_input_with_one_line(run, package, score, tmp_path):
    graph = tmp_path / "graph.pt2"
    export.export(run, "torch", graph)
    good, other = ppm(tmp_path / "good.ppm"), tmp_path / "other.ppm"
    other.write_bytes(good.read_bytes()[:99])
    (tmp_path / "text.ppm").write_text("hello")
    for arguments, sentence in (
        ((package,), "usage: msflow_score model.pt2 image.ppm"),
        ((package, tmp_path / "absent.ppm"), "absent.ppm cannot be read"),
        ((package, tmp_path / "text.ppm"), "text.ppm is not a binary PPM (P6) of 8 bits"),
        ((package, other), "other.ppm is cut off"),
        (
            (package, good, ppm(tmp_path / "wide.ppm", 40)),
            "wide.ppm has 40x32 pixels, the model takes 32x32",
        ),
        ((tmp_path / "absent.pt2", good), "absent.pt2 is no compiled detector: "),
        ((good, good), "good.ppm is no compiled detector: "),
        ((graph, good), "graph.pt2 is no compiled detector: "),
    ):
        done = score(*arguments)
        assert done.returncode == 1 and done.stdout == ""
        *_, line = done.stderr.splitlines()
        assert line.startswith("msflow_score: ") and sentence in line


def test_a_missing_compiler_is_named_before_any_work(run, tmp_path, capsys, monkeypatch):
    monkeypatch.setenv("CXX", "absent-c++ -O1")
    out = ["--format", "aoti", "--out", str(tmp_path / "m.pt2")]
    assert cli.main(["export", "--run", str(run), *out]) == 2
    assert (
        "format aoti needs a C++ compiler, but absent-c++ is not found" in capsys.readouterr().err
    )
    assert not list(tmp_path.iterdir())
