"""The lines of the README give the results that it shows, and the examples in docstrings run."""

from __future__ import annotations

import os
import re
import shlex
import subprocess
import sys
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

import msflow_ext
from msflow_ext import cli

ROOT = Path(__file__).parents[1]
README = (ROOT / "README.md").read_text(encoding="utf-8")
PROJECT = (ROOT / "pyproject.toml").read_text(encoding="utf-8")
HOME = "https://github.com/msflow-ext/msflow_ext"
NOT_PASTED = ("git ", "python3 -m venv ", ". .venv/bin/activate", "pip install ")
#: Extras for developers of the package.
DEVELOPERS = {"test", "dev", "docs"}


def blocks(language: str) -> list[str]:
    return re.findall(rf"^```{language}\n(.*?)^```", README, re.DOTALL | re.MULTILINE)


def lines() -> list[str]:
    """Return every line of shell in the README."""
    return [line for line in "".join(blocks("sh")).splitlines() if line.strip()]


def commands() -> list[str]:
    """Return the lines that run msflow."""
    return [line for line in lines() if line.startswith("msflow ")]


def paste(line: str) -> int | str | None:
    """Run a line of msflow, and return its exit status."""
    program, *arguments = shlex.split(line, comments=True)
    assert program == "msflow"
    try:
        return cli.main(arguments)
    except SystemExit as ended:
        return ended.code


@dataclass(frozen=True)
class Visit:
    """The result of running the README's lines: the folder, the output and the environment."""

    folder: Path
    printed: str
    environment: dict[str, str]


def photos(folder: Path) -> None:
    """Write 30 good photos, some odd ones and two new ones of other sizes."""
    rng = np.random.default_rng(0)
    sizes = {f"normal/part {i:02}.png": (96, 128) for i in range(30)}
    sizes |= {f"odd/{i}.jpg": (96, 128) for i in range(4)}
    sizes |= {"photos/large.jpg": (90, 160), "photos/small.png": (64, 64)}
    for name, size in sizes.items():
        pixels = rng.integers(90, 110, (*size, 3), dtype=np.uint8)
        if name.startswith("odd/"):
            pixels[20:60, 30:70] = 255
        (folder / name).parent.mkdir(exist_ok=True)
        Image.fromarray(pixels).save(folder / name)


@pytest.fixture(scope="module")
def visit(tmp_path_factory: pytest.TempPathFactory) -> Visit:
    """Run the README's lines one after another in a shell, with 30 good photos and no network."""
    folder, bin_folder = (tmp_path_factory.mktemp(name) for name in ("user", "bin"))
    photos(folder)
    program = bin_folder / "msflow"
    program.write_text(f'#!/bin/sh\nexec "{sys.executable}" -m msflow_ext "$@"\n')
    program.chmod(0o755)
    nowhere = dict.fromkeys(("http_proxy", "https_proxy", "all_proxy"), "http://127.0.0.1:9")
    environment = {
        **os.environ,
        **nowhere,
        "PATH": f"{bin_folder}{os.pathsep}{os.environ['PATH']}",
        "PYTHONPATH": str(Path(msflow_ext.__file__).parents[1]),
        "HF_HOME": str(bin_folder),
        "TORCH_HOME": str(bin_folder),
        "COLUMNS": "80",
    }
    script = "set -e\n" + "\n".join(commands())
    done = subprocess.run(
        ["sh", "-c", script], cwd=folder, env=environment, capture_output=True, text=True
    )
    assert done.returncode == 0, done.stderr
    return Visit(folder, done.stdout, environment)


@pytest.mark.slow
def test_the_lines_of_the_readme_write_a_report_predictions_and_an_onnx_file(visit: Visit) -> None:
    promised = re.search(r"^You now have (.*)$", README, re.MULTILINE)
    assert promised
    names = re.findall(r"`([^`]+)`", promised[1])
    assert {Path(name).suffix for name in names} >= {".html", ".csv", ".onnx"}
    for name in names:
        found = visit.folder / name
        assert found.stat().st_size > 0
        assert not found.is_dir() or len(list(found.iterdir())) == 2, name  # one for each photo
    scores = (visit.folder / "results" / "scores.csv").read_text()
    assert "large.jpg" in scores and "small.png" in scores


@pytest.mark.slow
def test_the_lines_print_what_the_readme_shows(visit: Visit) -> None:
    def shape(text: str) -> list[str]:
        return [
            " ".join(re.sub(r"-?\d[\d.]*%?|nan", "#", line).split()) for line in text.splitlines()
        ]

    (shown,) = blocks("text")
    printed = shape(visit.printed)
    for line in shape(shown):
        assert line in printed, f"{line!r} is not in {printed}"
    assert len(shown.splitlines()) >= 3


@pytest.mark.slow
def test_the_python_of_the_readme_runs_after_its_lines(visit: Visit) -> None:
    (shown,) = blocks("python")
    done = subprocess.run(
        [sys.executable, "-c", shown],
        cwd=visit.folder,
        env=visit.environment,
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stderr
    assert [line.split()[0] for line in done.stdout.splitlines()] == ["large.jpg", "small.png"]
    assert len(shown.splitlines()) == 5


@pytest.mark.parametrize(
    "line",
    [
        "msflow trian --out runs/mine",
        "msflow train --layout folder --normal nowhere --out runs/mine",
        "msflow train --layout folder --normal normal --no-such-flag --out runs/mine",
        "msflow predict --run runs/none photos --out results",
    ],
)
def test_a_line_that_fails_is_detected(
    line: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    assert paste(line) not in (0, None)


def test_every_line_is_run_here_or_listed() -> None:
    for line in lines():
        assert line.startswith(("msflow ", *NOT_PASTED)), line
    assert {line.split()[1] for line in commands()} >= {"info", "train", "predict", "export"}


@pytest.mark.parametrize("line", [line for line in lines() if ".venv/bin/msflow " in line])
def test_the_demo_has_the_flags_in_the_readme(
    line: str, capsys: pytest.CaptureFixture[str]
) -> None:
    command = line.partition(".venv/bin/msflow ")[2]
    assert paste(f"msflow {command.split()[0]} --help") == 0
    known = capsys.readouterr().out
    flags = re.findall(r"--[a-z-]+", command)
    assert flags
    for flag in flags:
        assert re.search(rf"{flag}\b(?!-)", known), flag


# ---- installations, which are not run here ----


def extras() -> set[str]:
    """Return the extras that pyproject.toml defines."""
    table = PROJECT.partition("[project.optional-dependencies]\n")[2].partition("\n[")[0]
    return set(re.findall(r"^([a-z-]+) = ", table, re.MULTILINE))


def test_the_readme_installs_extras_that_exist() -> None:
    named = {name for each in re.findall(r'"\.\[([^]]+)\]"', README) for name in each.split(",")}
    assert {"demo", "export"} <= named <= extras()


def test_the_table_of_extras_lists_every_extra_for_users() -> None:
    rows = re.findall(r"^\| (`[a-z`, ]+`) \| ", README, re.MULTILINE)
    assert {name for row in rows for name in re.findall(r"`(.+?)`", row)} == extras() - DEVELOPERS


def test_ci_runs_the_test_command_of_the_readme() -> None:
    (command,) = (line for line in lines() if "pytest" in line)
    run = ROOT / ".ci" / "run"
    if not run.is_file():
        pytest.skip("the source distribution has no .ci")
    assert command in run.read_text().splitlines()


# ---- pictures and links ----


def addresses() -> Iterator[str]:
    """Yield the targets of the README's links and pictures."""
    return (match[1] for match in re.finditer(r"\]\(([^)]+)\)", README))


def test_a_package_index_can_show_every_picture_and_link() -> None:
    assert len(list(addresses())) > 5
    for address in addresses():
        assert address.startswith((f"{HOME}/raw/main/docs/images/", f"{HOME}/blob/main/")), address
    urls = PROJECT.partition("[project.urls]\n")[2].partition("\n[")[0]
    assert not urls or f'"{HOME}"' in urls


@pytest.mark.skipif(
    not (ROOT / "docs" / "images").is_dir(), reason="the source distribution has no pictures"
)
def test_every_picture_is_in_the_tree_and_small() -> None:
    pictures = [each for each in addresses() if "/raw/main/" in each]
    assert len(pictures) == 2
    for address in pictures:
        assert 0 < (ROOT / address.partition("/raw/main/")[2]).stat().st_size < 400_000


@pytest.mark.skipif(not (ROOT / "mkdocs.yml").is_file(), reason="there is no documentation here")
def test_every_page_that_the_readme_links_to_exists() -> None:
    for address in addresses():
        assert (ROOT / re.split(r"/(?:raw|blob)/main/", address)[1].partition("#")[0]).is_file()
