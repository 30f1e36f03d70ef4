"""Every code block of the documentation runs as it stands there, page by page, from top to bottom."""

from __future__ import annotations

import contextlib
import csv
import io
import json
import re
import shlex
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import yaml

from msflow_ext import cli

pytestmark = [
    pytest.mark.usefixtures("one_thread"),
    pytest.mark.filterwarnings("ignore"),  # of anomalib and Lightning
]
ROOT = Path(__file__).parents[2]
FENCE = re.compile(r"^( *)```(?P<info>[^\n`]+)\n(?P<text>.*?)^\1```$", re.DOTALL | re.MULTILINE)
SHOWN = {"bibtex", "cpp", "dockerfile", "html", "ini", "mermaid", "text", "toml"}  # not executed
CHECKED = {".", "cd", "curl", "docker", "git", "pip", "python3", "source"}
EXTRAS = set(re.findall(r"^([a-z]+) = \[", (ROOT / "pyproject.toml").read_text("utf-8"), re.M))


@dataclass(frozen=True)
class Block:
    """A fenced block: its language, the other words after the fence, its text, and where that begins."""

    language: str
    options: tuple[str, ...]
    text: str
    line: int


def blocks(text: str) -> Iterator[Block]:
    """The blocks of a page that name a language, without the indentation of a list."""
    for match in FENCE.finditer(text):
        language, *options = match["info"].split()
        body = re.sub(rf"^{match[1]}", "", match["text"], flags=re.MULTILINE)
        yield Block(language, tuple(options), body, text.count("\n", 0, match.start()) + 2)


def commands(block: Block) -> Iterator[list[str]]:
    """The words of each line of a shell block, without comments; a backslash joins a line with the next one."""
    for line in block.text.replace("\\\n", " ").splitlines():
        if words := shlex.split(line, comments=True):
            yield words


PAGES = [
    path for path in sorted((ROOT / "docs").rglob("*.md")) if any(blocks(path.read_text("utf-8")))
]


@pytest.mark.parametrize("page", PAGES, ids=lambda path: str(path.relative_to(ROOT / "docs")))
def test_the_blocks_of_a_page_run(page: Path, folder: Path) -> None:
    named: dict[str, Any] = {"__name__": "page"}
    for block in blocks(page.read_text("utf-8")):
        try:
            run(block, named, page)
        except Exception as error:
            error.add_note(f"in the block at {page.relative_to(ROOT)}:{block.line}")
            raise


def run(block: Block, named: dict[str, Any], page: Path) -> None:
    """Execute, parse or check a block, by its language."""
    if block.language == "python":
        lines = "\n" * (block.line - 1) + block.text  # so that a traceback shows the page's line
        exec(compile(lines, str(page), "exec"), named)
    elif block.language == "sh":
        for words in commands(block):
            (check if "no-run" in block.options else execute)(words)
    elif block.language == "yaml":
        parse_yaml(block)
    elif block.language == "json":
        json.loads(block.text)
    elif block.language == "csv":
        rows = list(csv.reader(block.text.splitlines(), strict=True))
        assert len({len(row) for row in rows}) == 1
    else:
        assert block.language in SHOWN, f"no rule for blocks of {block.language!r}"


def parse_yaml(block: Block) -> None:
    """Parse YAML; a block ``yaml config`` must also do as a file for ``msflow train --config``."""
    assert yaml.safe_load(block.text)
    if "config" in block.options:
        Path("config-of-the-page.yaml").write_text(block.text, encoding="utf-8")
        words = [
            "train",
            "--config",
            "config-of-the-page.yaml",
            "--out",
            "runs/x",
            "--print-config",
        ]
        assert status(words) == 0


def execute(words: list[str]) -> None:
    """Run a line of ``msflow``, and check a line of another program."""
    if words[0] == "msflow":
        assert status(words[1:]) == 0, shlex.join(words)
    else:
        assert words[0] in CHECKED, f"{shlex.join(words)}: such a line is for a block `sh no-run`"
        check(words)


def check(words: list[str]) -> None:
    """Check flags of ``msflow``, and the extras, modules and files that a line of another program names."""
    if words[0] == "msflow":
        check_flags(words[1:])
        return
    for word in words[1:]:
        for extras in re.findall(r"(?:\.|msflow-ext)\[([a-z,]+)\]", word):
            assert set(extras.split(",")) <= EXTRAS, f"no extra {extras}"
        uploaded = words[0] == "curl" and "@" in word
        if uploaded or word.endswith((".py", "Dockerfile")):
            path = word.rpartition("@")[2]
            assert Path(path).is_file() or (ROOT / path).is_file(), f"no file {path}"
    for module in words[words.index("-m") + 1 :][:1] if "-m" in words else []:
        if module.startswith("benchmarks"):
            path = ROOT / module.replace(".", "/")
            assert path.is_dir() or path.with_suffix(".py").is_file(), f"no module {module}"


def check_flags(words: list[str]) -> None:
    command = [word for word in words[:2] if word in (*cli.COMMANDS, "check")]
    with contextlib.redirect_stdout(io.StringIO()) as printed:
        assert status([*command, "--help"]) == 0
    for flag in {word.partition("=")[0] for word in words if word.startswith("--")} - {"--debug"}:
        known = re.search(rf"{flag}\b(?!-)", printed.getvalue())
        assert known, f"msflow {' '.join(command)} has no flag {flag}"


def status(words: list[str]) -> Any:
    try:
        return cli.main(words)
    except SystemExit as ended:
        return ended.code or 0


# ---- what the runner itself must do ----


def test_a_block_that_fails_is_found(folder: Path) -> None:
    wrong = {
        "python": "assert False",
        "sh": "msflow trian",
        "sh no-run": "msflow train --no-such-flag",
        "yaml": "a: [",
        "yaml config": "epochs: many",
        "json": "{",
        "csv": "a,b\nc\n",
        "cobol": "STOP RUN",
    }
    for info, text in wrong.items():
        (block,) = blocks(f"```{info}\n{text}\n```\n")
        with pytest.raises((AssertionError, ValueError, yaml.YAMLError)):
            run(block, {}, Path("page.md"))


@pytest.mark.parametrize(
    "line",
    [
        "ls",
        "pip install '" + ".[nothing" + "]'",  # in parts: another test looks for extras in texts
        "curl --data-binary @photos/none.png http://127.0.0.1:8000/predict",
        "python3 nothing.py",
        "python3 -m benchmarks.nothing",
    ],
)
def test_a_line_that_names_what_is_not_there_is_found(line: str, folder: Path) -> None:
    with pytest.raises(AssertionError):
        execute(shlex.split(line))


def test_a_block_in_a_list_is_read_without_its_indentation() -> None:
    page = "1. Do:\n\n    ```python no-run\n    if x:\n        y()\n    ```\n"
    assert list(blocks(page)) == [Block("python", ("no-run",), "if x:\n    y()\n", 4)]
