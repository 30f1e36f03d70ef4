"""Files of the repository agree on version, Pythons, commands, extras, workflows and citation."""

from __future__ import annotations

import os
import re
import subprocess
import tomllib
from collections.abc import Iterator
from itertools import product
from pathlib import Path
from typing import Any

import pytest
import yaml
from packaging.requirements import Requirement

import msflow_ext

ROOT = Path(__file__).parents[1]
WORKFLOWS = sorted((ROOT / ".github/workflows").glob("*.yml"))
pytestmark = pytest.mark.skipif(not WORKFLOWS, reason="the sdist has no workflows")

SETTINGS = tomllib.loads((ROOT / "pyproject.toml").read_text())
PROJECT = SETTINGS["project"]
EXTRAS: dict[str, list[str]] = PROJECT["optional-dependencies"]
GROUPS: dict[str, list[Any]] = SETTINGS["dependency-groups"]
PYTHONS = re.findall(r":: Python :: (3\.\d+)", "\n".join(PROJECT["classifiers"]))
SCRIPTS = {path.name: path for path in sorted((ROOT / ".ci").glob("*"))}

Job = dict[str, Any]


def read(path: str | Path) -> str:
    return (ROOT / path).read_text(encoding="utf-8")


def texts() -> Iterator[tuple[Path, str]]:
    """Yield every text that may name an extra, a group or an address."""
    folders = ("msflow_ext", "docs", "benchmarks", "csrc", "tests", "examples", ".ci", ".github")
    paths = [path for folder in folders for path in (ROOT / folder).rglob("*")]
    for path in [*ROOT.iterdir(), *paths]:
        suffixes = {".md", ".py", ".toml", ".yml", ".cff", ".ipynb", ""}
        if path.is_file() and path.suffix in suffixes and path != Path(__file__):
            yield path, path.read_text(encoding="utf-8", errors="replace")


def jobs(path: Path) -> dict[str, Job]:
    return yaml.safe_load(path.read_text())["jobs"]


def each_job() -> Iterator[tuple[str, Job]]:
    yield from ((name, job) for path in WORKFLOWS for name, job in jobs(path).items())


def rows(job: Job) -> list[dict[str, str]]:
    """Return the rows of a job's matrix, or one empty row if it has no matrix."""
    matrix = dict(job.get("strategy", {}).get("matrix", {}))
    added = matrix.pop("include", [])
    return [dict(zip(matrix, row, strict=True)) for row in product(*matrix.values())] + added


def commands(job: Job) -> set[str]:
    """Return the commands of a job, with the values of its matrix inserted."""
    found = set()
    for row, step in product(rows(job), job["steps"]):
        line = step.get("run", "")
        for name, value in row.items():
            line = line.replace(f"${{{{ matrix.{name} }}}}", value)
        found.add(line)
    return found - {""}


# ---- version, Pythons, citation ----


def test_the_version_is_the_same_everywhere() -> None:
    assert PROJECT["dynamic"] == ["version"]
    source = SETTINGS["tool"]["scikit-build"]["metadata"]["version"]["input"]
    assert f'__version__ = "{msflow_ext.__version__}"' in read(source)
    assert yaml.safe_load(read("CITATION.cff"))["version"] == msflow_ext.__version__
    newest = re.findall(r"^## (\S+)", read("CHANGELOG.md"), re.MULTILINE)[0]
    assert newest == re.sub(r"\.dev\d+$", "", msflow_ext.__version__)


def test_every_python_is_named_once_and_tested() -> None:
    oldest = int(PYTHONS[0].partition(".")[2])
    assert [f"3.{minor}" for minor in range(oldest, oldest + len(PYTHONS))] == PYTHONS
    assert PROJECT["requires-python"] == f">={PYTHONS[0]}"
    assert SETTINGS["tool"]["pyright"]["pythonVersion"] == PYTHONS[0]
    test = jobs(ROOT / ".github/workflows/ci.yml")["test"]
    assert [row["python"] for row in rows(test)][: len(PYTHONS)] == PYTHONS
    assert {row["python"] for row in rows(test)} == set(PYTHONS)
    assert {row["python"] for row in rows(test) if row["torch"] == "lowest"} == {PYTHONS[0]}


def test_the_citation_has_what_its_format_requires() -> None:
    citation = yaml.safe_load(read("CITATION.cff"))
    assert citation["cff-version"] == "1.2.0" and citation["type"] == "software"
    assert {"message", "title", "authors", "license", "repository-code"} <= citation.keys()
    assert citation["license"] == PROJECT["license"]
    assert citation["repository-code"] == PROJECT["urls"]["Homepage"]
    assert citation["authors"] == PROJECT["authors"]
    for paper in citation["references"]:
        assert {"type", "title", "authors", "journal", "year"} <= paper.keys()
        assert all(author.keys() == {"family-names", "given-names"} for author in paper["authors"])
        assert isinstance(paper["year"], int)
    names = [paper["title"].partition(":")[0] for paper in citation["references"]]
    assert names == ["MSFlow", "FastFlow"]


# ---- extras and groups ----


def test_the_extra_all_names_every_other() -> None:
    found = [Requirement(each) for each in EXTRAS["all"]]
    assert {each.name for each in found} == {PROJECT["name"]}
    assert set().union(*(each.extras for each in found)) == EXTRAS.keys() - {"all"}


def test_no_group_asks_an_index_for_this_package() -> None:
    for group in GROUPS.values():
        expected = [Requirement(each) for each in group if isinstance(each, str)]
        assert PROJECT["name"] not in {each.name for each in expected}
        assert {each["include-group"] for each in group if isinstance(each, dict)} <= GROUPS.keys()


def test_every_extra_and_group_that_a_text_names_exists() -> None:
    count = 0
    for path, text in texts():
        lists = re.findall(r"(?:msflow-ext|[\"' ]\.)\[([a-z,]+)\]", text)
        named = [name for each in lists for name in each.split(",")]
        assert set(named) <= EXTRAS.keys(), path
        groups = re.findall(r"--group (\w+)", text)
        assert set(groups) <= GROUPS.keys(), path
        count += len(named) + len(groups)
    assert count > 20


# ---- commands ----


def test_continuous_integration_ends_with_the_test_command_of_the_readme() -> None:
    (command,) = re.findall(r"^python3 -m venv .* \.venv/bin/pytest$", read("README.md"), re.M)
    assert read(".ci/run").splitlines()[-1] == command
    assert f"\n{command}\n" in read("CONTRIBUTING.md")


@pytest.mark.parametrize("name", SCRIPTS)
def test_a_script_is_executable_described_and_called(name: str) -> None:
    head = r"#!/usr/bin/env bash\n(# .+\n)+set -euo pipefail\n"
    assert re.match(head, SCRIPTS[name].read_text())
    assert os.access(SCRIPTS[name], os.X_OK)
    callers = [path.read_text() for path in SCRIPTS.values() if path.name != name]
    called = {line.split()[0] for _, job in each_job() for line in commands(job)}
    assert name == "run" or f".ci/{name}" in called or any(f".ci/{name}" in t for t in callers)


@pytest.mark.parametrize(
    ("arguments", "system", "expected"),
    [
        ("lowest gcc", "", "gcc g++ torch==2.10.* python3 .venv/bin/pip .venv/bin/pytest"),
        ("newest clang", "", "clang clang++ python3 .venv/bin/pip .venv/bin/pytest"),
        (
            "newest msvc",
            "Windows_NT",
            "python .venv/Scripts/python -m pip .venv/Scripts/pytest",
        ),
    ],
)
def test_the_test_command_adapts_to_platform_torch_and_compiler(
    arguments: str, system: str, expected: str, tmp_path: Path
) -> None:
    (tmp_path / ".ci").mkdir()
    (tmp_path / ".ci/test").write_text(SCRIPTS["test"].read_text())
    (tmp_path / "pyproject.toml").write_text(read("pyproject.toml"))
    shown = "echo ${CC:-} ${CXX:-} $(cat ${PIP_CONSTRAINT:-/dev/null})"
    (tmp_path / ".ci/run").write_text(f"{shown} python3 .venv/bin/pip .venv/bin/pytest\n")
    environment = {"PATH": os.environ["PATH"], "OS": system, "TMPDIR": str(tmp_path)}
    command = ["bash", ".ci/test", *arguments.split()]
    done = subprocess.run(command, cwd=tmp_path, env=environment, capture_output=True, text=True)
    assert (done.stdout.strip(), done.stderr) == (expected, "")


# ---- workflows ----


@pytest.mark.parametrize("path", WORKFLOWS, ids=lambda path: path.stem)
def test_a_workflow_runs_scripts_of_this_repository_only(path: Path) -> None:
    for job in jobs(path).values():
        for command in commands(job):
            assert re.fullmatch(r"\.ci/[a-z]+( [a-z]+)*", command), command
            assert command.split()[0].removeprefix(".ci/") in SCRIPTS, command


def test_the_checks_are_those_that_run_before_the_tests() -> None:
    called = re.findall(r"^\.ci/(\w+)", read(".ci/run"), re.MULTILINE)
    check = jobs(ROOT / ".github/workflows/ci.yml")["check"]
    assert called[0] == "setup"
    assert [row["check"] for row in rows(check)] == called[1:]


@pytest.mark.parametrize("path", WORKFLOWS, ids=lambda path: path.stem)
def test_an_action_is_pinned_to_a_commit_with_its_version_in_a_comment(path: Path) -> None:
    used = re.findall(r"uses: (.*)", path.read_text())
    assert used
    for each in used:
        assert re.fullmatch(r"[\w-]+/[\w-]+@[0-9a-f]{40}  # v\d+\.\d+\.\d+", each), each


def test_an_action_has_one_version() -> None:
    used = {each for path in WORKFLOWS for each in re.findall(r"uses: (.*)", path.read_text())}
    assert len(used) == len({each.partition("@")[0] for each in used})


def test_only_jobs_that_publish_may_write() -> None:
    for path in WORKFLOWS:
        assert yaml.safe_load(path.read_text())["permissions"] == {"contents": "read"}
    permissions = {name: job["permissions"] for name, job in each_job() if "permissions" in job}
    assert permissions == {
        "publish": {"id-token": "write"},
        "deploy": {"pages": "write", "id-token": "write"},
    }
    for _, job in each_job():
        for step in job["steps"]:
            if step.get("uses", "").startswith("actions/checkout@"):
                assert step["with"] == {"persist-credentials": False}


def test_wheels_are_published_only_for_tags() -> None:
    publish = jobs(ROOT / ".github/workflows/wheels.yml")["publish"]
    assert "startsWith(github.ref, 'refs/tags/v')" in publish["if"]
    assert set(publish["needs"]) == {"wheels", "sdist"}
    wheels = SETTINGS["tool"]["cibuildwheel"]
    assert wheels["test-command"] == "msflow info --check"


# ---- addresses and forms ----


def test_the_address_of_the_repository_is_the_same_everywhere() -> None:
    home = PROJECT["urls"]["Homepage"]
    found = [
        (path, address)
        for path, text in texts()
        for address in re.findall(r"https://(?:www\.)?github\.com/[\w-]+/msflow[_-]ext", text)
    ]
    assert len(found) > 3
    assert {address for _, address in found} == {home}


def test_the_form_for_bugs_asks_for_the_output_of_info() -> None:
    form = yaml.safe_load(read(".github/ISSUE_TEMPLATE/bug.yml"))
    asked = {each["id"]: each for each in form["body"]}
    assert "`msflow info`" in asked["info"]["attributes"]["label"]
    assert asked["info"]["validations"] == {"required": True}
