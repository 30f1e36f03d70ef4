"""Importing the package is quick and loads no heavy dependency."""

from __future__ import annotations

import json
import subprocess
import sys
from types import ModuleType

import pytest
import torch

import msflow_ext
from msflow_ext.ops import _backend

HEAVY = ("timm", "sklearn", "scipy", "skimage", "matplotlib", "PIL", "pandas", "torchvision")
HEAVY += ("torch._dynamo", "sympy", "triton")  # for compiled graphs; as slow to import as torch


# Run in one interpreter, so a step counts only the modules that earlier steps have not loaded.
STEPS = (
    "import msflow_ext",
    "import msflow_ext.ops, msflow_ext.flows, msflow_ext.metrics, msflow_ext.testing",
    "msflow_ext.MSFlowHead",
    "msflow_ext.compat.load_msflow_checkpoint",
    "msflow_ext.data.open_dataset",
)
SCRIPT = """
import json, sys, time
import torch
for step in sys.argv[1:]:
    before, start = set(sys.modules), time.process_time()
    exec(step)
    seconds = time.process_time() - start
    print(json.dumps([sorted(set(sys.modules) - before), seconds]))
"""


@pytest.fixture(scope="module")
def steps() -> dict[str, tuple[list[str], float]]:
    """Return the modules that each step loads beyond torch, and its seconds of processor time."""
    command = [sys.executable, "-W", "error", "-c", SCRIPT, *STEPS]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    return dict(zip(STEPS, map(json.loads, done.stdout.splitlines()), strict=True))


@pytest.mark.parametrize("step", STEPS)
def test_an_import_is_quick_and_loads_nothing_heavy(
    steps: dict[str, tuple[list[str], float]], step: str
) -> None:
    loaded, seconds = steps[step]
    assert any(name.startswith("msflow_ext") for name in loaded)
    assert not set(loaded) & set(HEAVY)
    assert seconds < 1


def test_importing_the_package_loads_only_its_version(
    steps: dict[str, tuple[list[str], float]],
) -> None:
    loaded, _ = steps[STEPS[0]]
    own = [name for name in loaded if name.startswith("msflow_ext")]
    assert own == ["msflow_ext", "msflow_ext.version"]


def test_every_public_name_exists_and_is_listed() -> None:
    for name in msflow_ext.__all__:
        assert getattr(msflow_ext, name) is not None
    assert set(msflow_ext.__all__) <= set(dir(msflow_ext))
    assert set(msflow_ext._HOME) | set(msflow_ext._MODULES) == set(msflow_ext.__all__)


def test_a_name_that_does_not_exist_is_an_attribute_error() -> None:
    with pytest.raises(AttributeError, match="module 'msflow_ext' has no attribute 'Msflow'"):
        msflow_ext.Msflow  # noqa: B018


def test_a_constant_is_marked_as_torch_marks_it() -> None:
    def marked() -> None: ...

    torch.compiler.assume_constant_result(marked)
    assert vars(_backend.cuda_problem) == vars(marked) != {}


def test_recipe_presets_and_layouts_need_no_torch() -> None:
    script = (
        "import sys\n"
        "from msflow_ext.training import PRESETS, Recipe\n"
        "from msflow_ext.data import FITS, FIXED, LAYOUTS, PACKAGED\n"
        "assert PRESETS['paper']['msflow'].recipe == Recipe() and set(FIXED) < set(LAYOUTS)\n"
        "assert not {'torch', 'numpy', 'PIL'} & set(sys.modules)\n"
    )
    subprocess.run([sys.executable, "-c", script], check=True)


@pytest.mark.parametrize("package", [msflow_ext.data, msflow_ext.training])
def test_a_package_resolves_every_public_name_and_no_other(package: ModuleType) -> None:
    for name in package.__all__:
        assert getattr(package, name) is not None
    assert set(package._HOME) < set(package.__all__)
    with pytest.raises(AttributeError, match=f"module '{package.__name__}' has no attribute 'No'"):
        package.No  # noqa: B018
