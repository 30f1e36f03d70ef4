"""docs/architecture.md lists the files that a command passes through on its way to a kernel."""

from __future__ import annotations

import re
import traceback
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image

import msflow_ext
from msflow_ext import cli
from msflow_ext.ops import _backend

pytestmark = pytest.mark.usefixtures("one_thread", "native")

PACKAGE = Path(msflow_ext.__file__).parent
PAGE = (Path(__file__).parents[2] / "docs" / "architecture.md").read_text(encoding="utf-8")
KERNEL = "coupling_forward_cpu"


class Spy:
    """The compiled kernels, recording the files on the stack when the coupling's kernel is first used."""

    def __init__(self) -> None:
        self.kernels, self.files = _backend.C, list[str]()

    def __getattr__(self, name: str) -> Any:
        if name == KERNEL and not self.files:
            paths = [Path(frame.filename) for frame in traceback.extract_stack()[:-1]]
            ours = [p.relative_to(PACKAGE).as_posix() for p in paths if p.is_relative_to(PACKAGE)]
            self.files = list(dict.fromkeys(ours))
        return getattr(self.kernels, name)


def listed(title: str) -> list[str]:
    """Return the files in the list below a heading of the page."""
    _, _, rest = PAGE.partition(f"### {title}\n")
    return re.findall(r"^\s*\d+\. `([^`]+)`", rest.partition("\n#")[0], re.M)


def passed() -> set[str]:
    """Return the files that the page says need not be read on the way."""
    _, _, rest = PAGE.partition("### Passed on the way\n")
    return set(re.findall(r"^\* `([^`]+)`", rest.partition("\n#")[0], re.M))


@pytest.fixture(scope="module")
def normal_images(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder, rng = tmp_path_factory.mktemp("images"), np.random.default_rng(0)
    for i in range(3):
        pixels = rng.integers(0, 255, (64, 64, 3), dtype=np.uint8)
        Image.fromarray(pixels).save(folder / f"{i}.png")
    return folder


def test_the_listed_files_are_on_the_call_stack_and_at_most_eight(
    normal_images: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    run, size = str(tmp_path / "run"), ["--backbone", "efficientnet_lite0", "--image-size", "64"]
    data = ["--layout", "folder", "--normal", str(normal_images), "--epochs", "1"]
    for title, arguments in (
        ("`msflow train`", ["train", *data, *size, "--device", "cpu", "--out", run]),
        ("`msflow predict`", ["predict", "--run", run, "--device", "cpu", str(normal_images)]),
    ):
        spy = Spy()
        with monkeypatch.context() as patch:
            patch.setattr(_backend, "C", spy)
            out = [] if "--out" in arguments else ["--out", str(tmp_path / "scores")]
            assert cli.main([*arguments, *out]) == 0
        walk = listed(title)
        assert 4 < len(walk) <= 8
        assert [file for file in spy.files if file not in passed()] == walk
