"""What people type: the names at the top of the package, their types, their pages, and a program that uses them."""

from __future__ import annotations

import importlib
import inspect
import json
import re
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, get_args

import pytest

import msflow_ext as mx
from msflow_ext import choices
from msflow_ext.training.recipe import Recipe

ROOT = Path(__file__).parents[1]
PAGES = ROOT / "docs" / "api"
NAMES = sorted(mx._HOME)

SCRIPT = """
import msflow_ext as mx

dataset = mx.open_dataset("photos", "mvtec", "bottle", split_seed=1)
recipe = mx.Recipe(epochs=2, precision="bfloat16", hold_out=0.3)
model = mx.MSFlow("efficientnet_lite0", image_size=64, score="map", anomaly_map="clamped")
metrics = mx.train(model, dataset, "runs/mine", recipe, overwrite=True)
auroc: float | None = metrics["image_auroc"]

detector: mx.Detector = mx.load("runs/mine", precision="float32")
results: list[mx.Result] = detector.predict(["a.png", "b.png"], on_error="skip")
for result in detector.stream("photos", batch_size=4):
    low, high = result.colour_range
    verdict = "defect" if result.label else "good"
    print(result.name, result.score + low, verdict, result.map.max(), high, auroc)
    result.heat_map(alpha=0.3).show()
    result.save(f"maps/{result.name}.png")
"""
MISTAKES = (
    'mx.Recipe(precision="half")',
    'mx.MSFlow(score="best")',
    'mx.load("run", precision="int8")',
    'mx.open_dataset("photos", "mvtek")',
    'mx.load("run").predict("photos", on_error="ignore")',
    'mx.load("run").predict(3)',
    'mx.train(mx.Recipe(), mx.open_dataset("elpv"), "run")',
)


@pytest.mark.parametrize("name", mx.__all__)
def test_a_public_name_is_documented(name: str) -> None:
    found = getattr(mx, name)
    text = inspect.getdoc(found)
    assert text and text.splitlines()[0].endswith((".", ":")), text
    assert name in dir(mx)


@pytest.mark.skipif(not PAGES.is_dir(), reason="the source distribution has no pages")
@pytest.mark.parametrize("name", mx.__all__)
def test_a_public_name_is_on_a_page_of_the_reference(name: str) -> None:
    listed = [
        line
        for page in PAGES.glob("*.md")
        for line in re.findall(r"^::: (\S+)", page.read_text(), re.M)
    ]
    if inspect.ismodule(found := getattr(mx, name)):
        assert any(line.startswith(f"{found.__name__}.") for line in listed)
    else:
        assert any(_resolved(line) is found for line in listed)


def _resolved(path: str) -> Any:
    module, _, name = path.rpartition(".")
    return getattr(importlib.import_module(module), name)


@pytest.mark.parametrize("name", NAMES)
def test_a_public_signature_names_its_types(name: str) -> None:
    for function in _functions(getattr(mx, name)):
        signature = inspect.signature(function)
        each = [p for p in signature.parameters.values() if p.name not in ("self", "cls")]
        annotations = [signature.return_annotation, *(p.annotation for p in each)]
        assert inspect.Signature.empty not in annotations, function
        assert not [a for a in annotations if re.search(r"\bAny\b", str(a))], function


def _functions(public: Any) -> Iterator[Callable[..., Any]]:
    """A function, or the constructor and the public methods of a class that this package defines."""
    if not inspect.isclass(public):
        yield public
        return
    for name, each in inspect.getmembers_static(public):
        function = each.fget if isinstance(each, property) else getattr(each, "__func__", each)
        public_name = name == "__init__" or not name.startswith("_")
        if inspect.isfunction(function) and public_name and "msflow_ext" in function.__module__:
            yield function


@pytest.mark.parametrize("name", choices.CHOICES)
def test_a_choice_is_a_type_and_the_tuple_of_its_words(name: str) -> None:
    types = {get_args(each) for each in vars(choices).values() if get_args(each)}
    assert choices.CHOICES[name] in types


def test_the_fields_of_a_recipe_have_the_types_of_their_words() -> None:
    for name, annotation in Recipe.__annotations__.items():
        if name in choices.CHOICES:
            assert get_args(getattr(choices, annotation)) == choices.CHOICES[name]


def test_a_recipe_shows_what_differs_from_the_paper() -> None:
    assert repr(mx.Recipe()) == "Recipe()"
    recipe = mx.Recipe(epochs=3, milestones=(0.5,), clip=None)
    assert repr(recipe) == "Recipe(epochs=3, clip=None, milestones=(0.5,))"
    assert eval(repr(recipe), {"Recipe": mx.Recipe}) == recipe


# ---- a user's program under a strict type checker ----


@pytest.fixture(scope="module")
def found(tmp_path_factory: pytest.TempPathFactory) -> dict[str, list[dict[str, Any]]]:
    """What pyright says of a program, and of one mistake after another."""
    pytest.importorskip("pyright")
    folder = tmp_path_factory.mktemp("user")
    (folder / "program.py").write_text(SCRIPT)
    (folder / "mistakes.py").write_text("\n".join(["import msflow_ext as mx", *MISTAKES]))
    package = str(Path(mx.__file__).parents[1])
    settings = {"typeCheckingMode": "strict", "extraPaths": [package]}
    (folder / "pyrightconfig.json").write_text(json.dumps(settings))
    command = ["-m", "pyright", "--outputjson", "--pythonpath", sys.executable, "-p", str(folder)]
    done = subprocess.run([sys.executable, *command], capture_output=True, text=True)
    if not done.stdout.startswith("{"):
        pytest.skip(f"pyright cannot be run: {done.stderr[-300:]}")
    said: dict[str, list[dict[str, Any]]] = {"program.py": [], "mistakes.py": []}
    for each in json.loads(done.stdout)["generalDiagnostics"]:
        said[Path(each["file"]).name].append(each)
    return said


@pytest.mark.slow
def test_a_program_that_trains_and_predicts_has_types_throughout(
    found: dict[str, list[dict[str, Any]]],
) -> None:
    assert [(each["range"]["start"]["line"], each["message"]) for each in found["program.py"]] == []


@pytest.mark.slow
def test_a_word_that_is_no_choice_is_found_before_the_program_runs(
    found: dict[str, list[dict[str, Any]]],
) -> None:
    lines = {each["range"]["start"]["line"] for each in found["mistakes.py"]}
    assert lines == set(range(1, 1 + len(MISTAKES)))
