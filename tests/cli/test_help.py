"""Help, version, completion and usage errors appear at once and are complete."""

from __future__ import annotations

import os
import re
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

import msflow_ext
from msflow_ext import cli
from msflow_ext.choices import CHOICES
from msflow_ext.cli.parser import Formatter, OrNone, count, number, suggestion, whole

SECONDS = 0.3  # of processor time, including the start of Python
HEAVY = {"torch", "numpy", "scipy", "sklearn", "timm", "PIL"}
REPORT = """
import sys
from msflow_ext import cli
try:
    status = cli.main(sys.argv[1:])
except SystemExit as ended:
    status = ended.code
print(status, *sorted({name.partition(".")[0] for name in sys.modules}), sep="\\n")
"""
QUICK = [
    ["--help"],
    ["--version"],
    *([name, "--help"] for name in cli.TABLE),
    ["data", "check", "--help"],
    ["trian"],
    ["train", "--epoch", "3", "--out", "x"],
    ["train", "--epochs", "many", "--out", "x"],
    ["train"],
    ["train", "--config", "CONFIG"],
]


def help_of(*command: str) -> str:
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("COLUMNS", "100")
        part = cli.parser()
        for name in command:
            part = part.commands[name]
        return part.format_help()


def _spent(command: list[str]) -> tuple[subprocess.CompletedProcess[str], float]:
    before = os.times()
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    after = os.times()
    user, system = after.children_user, after.children_system
    return done, user + system - before.children_user - before.children_system


@pytest.mark.parametrize("words", QUICK, ids=" ".join)
def test_help_and_usage_errors_need_no_torch(words: list[str], tmp_path: Path) -> None:
    (tmp_path / "wrong.yaml").write_text("epochs: many\n")
    words = [str(tmp_path / "wrong.yaml") if word == "CONFIG" else word for word in words]
    done, seconds = _spent([sys.executable, "-c", REPORT, *words])
    expected = "0" if {"--help", "--version"} & set(words) else "2"
    status, *loaded = done.stdout.splitlines()[done.stdout.splitlines().index(expected) :]
    assert (status, bool(done.stderr)) == (expected, expected == "2")
    assert "argparse" in loaded and not HEAVY & set(loaded)
    if seconds >= SECONDS:  # another process may have disturbed it
        seconds = min(_spent([sys.executable, "-c", REPORT, *words])[1] for _ in range(5))
    assert seconds < SECONDS


def test_the_version_is_that_of_the_package(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as ended:
        cli.main(["--version"])
    assert ended.value.code == 0
    assert capsys.readouterr().out == f"msflow {msflow_ext.__version__}\n"


def test_the_help_lists_every_command_with_one_phrase() -> None:
    text = help_of()
    for name, command in cli.COMMANDS.items():
        phrase = command.__doc__ or ""
        assert re.fullmatch(r"[A-Z][^\n]+\.|[A-Z].+: data check\.", phrase), name
        assert re.search(rf"^ +{name} +{phrase[:20]}", text, re.MULTILINE)


def _actions(part: Any) -> list[Any]:
    subs = [each for sub in part.commands.values() for each in _actions(sub)]
    return [*(a for a in part._actions if a.dest not in part.commands and a.help), *subs]


ACTIONS = [each for each in _actions(cli.parser()) if each.option_strings or each.metavar]


@pytest.mark.parametrize("action", ACTIONS, ids=lambda a: a.dest)
def test_the_help_of_a_flag_is_a_phrase_that_shows_choices_and_one_default(action: Any) -> None:
    text = Formatter("msflow")._get_help_string(action) or ""
    assert re.match(r"[A-Z0-9.]", text) and re.search(r"[.)]$", text)
    assert len(re.findall(r"\(default: |by default", text.lower())) <= 1
    assert "None)" not in text and "`" not in text and ":class:" not in text
    shown = action.metavar or ("{" + ",".join(action.choices) + "}" if action.choices else "")
    if action.nargs != 0:
        assert re.fullmatch(r"[A-Z:]+|\{[\w.,]+\}", shown), "metavars are units or kinds"
    if action.dest in CHOICES and action.choices:
        assert action.choices == CHOICES[action.dest]


def test_the_flags_of_train_stand_in_groups() -> None:
    groups = re.findall(r"^([a-z ]+):$", help_of("train"), re.MULTILINE)
    names = ["data", "model", "training", "evaluation", "hardware", "many runs"]
    assert groups == ["options", *names]


@pytest.mark.parametrize(
    ("words", "sentence"),
    [
        (["trian"], "unknown command 'trian', did you mean train?"),
        (["dance"], "unknown command 'dance'; known are info, demo, data, train, "),
        (["data", "chek"], "unknown command 'chek', did you mean check?"),
        (["train", "--epoch", "3"], "unknown flag --epoch, did you mean --epochs?"),
        (["train", "--ot=runs", "--lr", "1"], "unknown flag --ot, did you mean --out?"),
        (["predict", "a.png", "--watsh"], "unknown flag --watsh, did you mean --watch?"),
        (["train", "--zzzz"], "error: unknown flag --zzzz\n"),
        (["train", "--out", "x", "y"], "unexpected argument 'y'"),
        (
            ["train", "--fit", "pat", "--out", "x"],
            "--fit must be one of resize, pad, got 'pat', did",
        ),
        (["train", "--epochs", "1.5", "--out", "x"], "--epochs must be a whole number, got '1.5'"),
        (["train", "--lr", "fast", "--out", "x"], "--lr must be a finite number, got 'fast'"),
        (["train", "--whiten", "1", "--out", "x"], "--whiten must be true or false, got '1'"),
        (["train", "--blocks", "--out", "x"], "--blocks must be given one value or more"),
        (["train", "--out"], "--out must be given a value"),
        (["train", "--out", "x", "--baseline=1"], "--baseline must be given without a value"),
        (["evaluate", "--out", "x"], "required but not given: --run"),
        (["data"], "required but not given: ACTION"),
    ],
)
def test_a_usage_error_is_one_sentence_with_a_suggestion(
    words: list[str], sentence: str, capsys: pytest.CaptureFixture[str]
) -> None:
    assert cli.main(words) == 2
    printed = capsys.readouterr()
    assert sentence in printed.err
    assert printed.err.count("\n") == 1 and not printed.out


FLAGS = [
    (name, action)
    for name, part in cli.parser().commands.items()
    for action in part._actions
    if action.option_strings
]


@pytest.mark.parametrize("value", ["nan", "inf", "-inf", "1e400", ""])
def test_infinite_undefined_and_empty_numbers_are_refused(
    value: str, capsys: pytest.CaptureFixture[str]
) -> None:
    numeric = [(name, each.option_strings[0]) for name, each in FLAGS if _is_numeric(each)]
    assert len(numeric) > 30
    for name, flag in numeric:
        assert cli.main([name, f"{flag}={value}"]) == 2
        assert f"{flag} must " in capsys.readouterr().err, (name, flag)


def _is_numeric(action: Any) -> bool:
    kind = action.type.kind if isinstance(action.type, OrNone) else action.type
    return kind in (count, number, whole)


@pytest.mark.parametrize("name", ["train", "predict"])
@pytest.mark.parametrize("value", ["0", "-1"])
def test_fewer_than_one_thread_is_refused(
    name: str, value: str, capsys: pytest.CaptureFixture[str]
) -> None:
    assert cli.main([name, f"--threads={value}"]) == 2
    assert (
        f"--threads must be a whole number of 1 or more, got '{value}'" in capsys.readouterr().err
    )


@pytest.mark.parametrize(
    ("words", "sentence"),
    [
        (["predict", "--run", "r", "", "--out", "o"], "an argument must not be empty"),
        (["predict", "", "--run", "r", "--out", "o"], "an argument must not be empty"),
        (["predict", "--run", "", "a.png"], "--run must not be empty"),
        (["predict", "--run=", "a.png"], "--run must not be empty"),
        (["data", "check", ""], "an argument must not be empty"),
    ],
)
def test_an_unset_shell_variable_is_not_the_working_folder(
    words: list[str], sentence: str, capsys: pytest.CaptureFixture[str]
) -> None:
    assert cli.main(words) == 2
    assert sentence in capsys.readouterr().err


def test_only_a_close_word_is_suggested() -> None:
    assert suggestion("--epcohs", ["--epochs", "--lr"]) == ", did you mean --epochs?"
    assert suggestion("--colour", ["--epochs", "--lr"]) == ""


@pytest.mark.parametrize(
    ("line", "expected", "missing"),
    [
        ("msflow ev", {"evaluate"}, {"train"}),
        ("msflow data ", {"check"}, {"train"}),
        ("msflow train --ep", {"--epochs"}, {"--lr"}),
        ("msflow train --weight", {"--weights", "--weight-decay"}, {"--out"}),
        ("msflow train --schedule ", {"steps", "cosine"}, {"--lr"}),
        ("msflow train --config ", {"here.yaml"}, set()),
    ],
)
def test_the_shell_completes_commands_flags_choices_and_files(
    line: str, expected: set[str], missing: set[str], tmp_path: Path
) -> None:
    (tmp_path / "here.yaml").touch()
    source = str(Path(msflow_ext.__file__).parents[1])
    variables = {
        "_ARGCOMPLETE": "1",
        "_ARGCOMPLETE_IFS": "\n",
        "_ARGCOMPLETE_STDOUT_FILENAME": str(tmp_path / "found"),
        "COMP_LINE": line,
        "COMP_POINT": str(len(line)),
        "PYTHONPATH": os.pathsep.join([source, os.environ.get("PYTHONPATH", "")]),
    }
    command = [sys.executable, "-m", "msflow_ext"]
    subprocess.run(command, env={**os.environ, **variables}, cwd=tmp_path, check=True)
    found = {word.strip() for word in (tmp_path / "found").read_text().split("\n")}
    assert expected <= found
    assert not missing & found
