"""Every script and notebook of the folder `examples` runs, and does what its docstring says."""

from __future__ import annotations

import ast
import json
import re
import runpy
import sys
import tomllib
import warnings
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any

import pytest
from PIL import Image

import msflow_ext as mx

pytestmark = [
    pytest.mark.usefixtures("one_thread"),
    pytest.mark.filterwarnings("ignore"),  # of FrEIA, anomalib and Lightning
]
EXAMPLES = Path(__file__).parents[2] / "examples"
NOTEBOOK = EXAMPLES / "quickstart.ipynb"
SCRIPTS = sorted(EXAMPLES.glob("*.py"))
Run = Callable[[str], str]


@pytest.fixture
def run(folder: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> Run:
    """``run(line)``: what a script of the examples prints, in a folder of photos and a trained run."""

    def execute(line: str) -> str:
        name, *arguments = line.split()
        monkeypatch.setattr(sys, "argv", [name, *arguments])
        capsys.readouterr()
        runpy.run_path(str(EXAMPLES / name), run_name="__main__")
        return capsys.readouterr().out

    return execute


def scores(printed: str) -> dict[str, tuple[str, float]]:
    """The verdict and the score of each photo, as scripts print them."""
    lines = re.findall(r"^(\S+): (good|defective), score ([^,\s]+)", printed, re.MULTILINE)
    return {name: (verdict, float(score)) for name, verdict, score in lines}


def test_train_on_own_images_prints_the_threshold_of_the_run(run: Run) -> None:
    options = "--abnormal odd --out runs/own --image-size 64 --epochs 2"
    printed = run(f"train_on_own_images.py normal {options}")
    threshold = mx.load("runs/own").threshold
    assert threshold is not None
    assert f"Scores above {threshold:.4f} are defective" in printed
    assert re.search(r"AUROC on the test photos: [01]\.\d{4}$", printed, re.MULTILINE)
    assert Path("runs/own/report.html").is_file()


def test_train_on_own_images_needs_no_photos_of_defects(run: Run) -> None:
    printed = run("train_on_own_images.py normal --out runs/own --image-size 64 --epochs 1")
    assert "AUROC" not in printed


def test_predict_and_draw_saves_a_heat_map_of_each_photo(run: Run) -> None:
    Path("photos/broken.png").write_bytes(b"not a picture")
    printed = run("predict_and_draw.py runs/mine photos --out maps")
    assert "broken.png: not scored: " in printed
    found = {r.name: r for r in mx.load("runs/mine").predict("photos", on_error="skip")}
    assert {name: score for name, (_, score) in scores(printed).items()} == {
        name: pytest.approx(result.score, abs=1e-4)
        for name, result in found.items()
        if not result.error
    }
    for name in scores(printed):
        with Image.open(f"maps/{name}.png") as picture:
            height, width = found[name].shown().map.shape
            assert picture.size == (width, height)


def test_accelerate_freia_agrees_and_prints_both_times(run: Run) -> None:
    pytest.importorskip("FrEIA", reason="FrEIA is not installed")
    printed = run("accelerate_freia.py --channels 8 --size 8 --blocks 2 --batch 2")
    assert "replaced 2: " in printed
    assert re.search(r"FrEIA [\d.]+ ms, accelerated [\d.]+ ms", printed)


def test_msflow_in_anomalib_scores_the_test_images(run: Run) -> None:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        pytest.importorskip("anomalib.engine", reason="anomalib is not installed")
    printed = run("msflow_in_anomalib.py normal odd --image-size 64 --epochs 1")
    assert "image_AUROC" in printed
    assert len(re.findall(r": (?:good|defective), score ", printed)) == 6  # the others validate


@pytest.mark.slow
def test_onnxruntime_gives_the_scores_and_verdicts_of_python(run: Run) -> None:
    for package in ("onnxscript", "onnxruntime"):
        pytest.importorskip(package, reason=f"{package} is not installed")
    for i in range(2):
        Path(f"odd/{i:03}.png").rename(f"photos/odd{i}.png")
    mx.export.export("runs/mine", "onnx", "mine.onnx")
    found = scores(run("onnxruntime_with_thresholds.py mine.onnx photos"))
    results = mx.load("runs/mine").predict("photos")
    assert len(results) == 4
    assert found == {
        r.name: ("defective" if r.label else "good", pytest.approx(r.score, rel=1e-4))
        for r in results
    }


def test_the_script_for_onnxruntime_imports_neither_torch_nor_msflow_ext() -> None:
    tree = ast.parse((EXAMPLES / "onnxruntime_with_thresholds.py").read_text("utf-8"))
    imports = [node for node in ast.walk(tree) if isinstance(node, (ast.Import, ast.ImportFrom))]
    names = {
        node.module or "" if isinstance(node, ast.ImportFrom) else node.names[0].name
        for node in imports
    }
    others = names - sys.stdlib_module_names - {"__future__"}
    assert others == {"numpy", "onnxruntime", "PIL"}


def test_own_subnet_has_right_gradients_and_learns(run: Run) -> None:
    printed = run("own_subnet.py normal --steps 5")
    assert "The gradients agree" in printed
    losses = [float(loss) for loss in re.findall(r"loss (-?[\d.]+)", printed)]
    assert len(set(losses)) == 5
    assert losses == sorted(losses, reverse=True)


# ---- the notebook ----


def pictures(cells: Iterable[dict[str, Any]]) -> list[int]:
    """How many pictures each cell shows."""
    outputs = (cell.get("outputs", []) for cell in cells)
    return [sum("image/png" in each.get("data", {}) for each in output) for output in outputs]


def test_the_notebook_is_stored_with_its_outputs_and_is_small() -> None:
    assert NOTEBOOK.stat().st_size < 300_000
    cells = json.loads(NOTEBOOK.read_text("utf-8"))["cells"]
    code = [cell for cell in cells if cell["cell_type"] == "code"]
    assert [cell["execution_count"] for cell in code] == list(range(1, len(code) + 1))
    streams = [output.get("name") for cell in code for output in cell["outputs"]]
    assert "stdout" in streams and "stderr" not in streams
    assert sum(pictures(cells)) == 4


@pytest.mark.slow
def test_the_notebook_runs_and_shows_what_is_stored(tmp_path: Path) -> None:
    pytest.importorskip("skimage", reason="scikit-image is not installed")
    pytest.importorskip("ipykernel", reason="ipykernel is not installed")
    nbclient = pytest.importorskip("nbclient", reason="nbclient is not installed")
    nbformat = pytest.importorskip("nbformat", reason="nbformat is not installed")
    notebook = nbformat.read(NOTEBOOK, as_version=4)
    nbformat.validate(notebook)
    stored = pictures(notebook.cells)
    resources = {"metadata": {"path": str(tmp_path)}}
    nbclient.NotebookClient(
        notebook, timeout=500, kernel_name="python3", resources=resources
    ).execute()
    assert pictures(notebook.cells) == stored
    assert (tmp_path / "runs/brick/report.html").is_file()


# ---- what the files must be ----


def test_the_page_lists_every_example_and_extras_that_exist() -> None:
    page = (EXAMPLES / "README.md").read_text("utf-8")
    rows = dict(re.findall(r"^\| \[`([^`]+)`\]\(\1\) \|[^|]+\| (.*) \|$", page, re.MULTILINE))
    assert set(rows) == {path.name for path in (*SCRIPTS, NOTEBOOK)}
    project = tomllib.loads((EXAMPLES.parent / "pyproject.toml").read_text("utf-8"))["project"]
    for needs in rows.values():
        assert set(re.findall(r"`(\w+)`", needs)) <= project["optional-dependencies"].keys()


@pytest.mark.parametrize("path", SCRIPTS, ids=lambda path: path.name)
def test_a_script_is_short_and_says_how_to_run_it(path: Path) -> None:
    text = path.read_text("utf-8")
    assert len(text.splitlines()) < 60
    docstring = ast.get_docstring(ast.parse(text)) or ""
    assert f"python examples/{path.name} " in docstring
