"""Every hyper-parameter has a flag and a YAML key, made from its declaration."""

from __future__ import annotations

import re
from argparse import Namespace
from dataclasses import asdict, fields
from inspect import signature
from pathlib import Path
from typing import Any

import pytest
import yaml

from msflow_ext import cli
from msflow_ext.choices import CHECKPOINT_FORMATS, CHOICES
from msflow_ext.cli.hyperparameters import MODELS, RECIPE, SET_ELSEWHERE, parameters
from msflow_ext.cli.train import model_arguments, recipe_of
from msflow_ext.compat.checkpoints.detectors import PEERS
from msflow_ext.models.fastflow import FastFlow
from msflow_ext.models.msflow import MSFlow
from msflow_ext.training.recipe import PRESETS, Recipe

KINDS = {"msflow": MSFlow, "fastflow": FastFlow}
ARGUMENTS = [
    (model, name, each)
    for model, kind in KINDS.items()
    for name, each in signature(kind).parameters.items()
    if name not in SET_ELSEWHERE
]
COMBINATIONS = [(preset, model) for preset in PRESETS for model in PRESETS[preset]]


def parsed(*words: str) -> Namespace:
    return cli.parser().parse(["train", "--out", "runs/x", *words])


def configured(folder: Path, values: Any) -> Namespace:
    path = folder / "some.yaml"
    path.write_text(values if isinstance(values, str) else yaml.safe_dump(values))
    return cli.parser().parse(["train", "--config", str(path)])


def sample(name: str, annotation: str) -> Any:
    """Return a value that no preset has."""
    if name in CHOICES:
        return CHOICES[name][-1]
    if "[" in annotation:
        return [0.25, 0.5] if "float" in annotation else [4, 8, 12]
    kinds = {"int": 7, "float": 0.375, "bool": True, "str": "resnet18"}
    return next(value for kind, value in kinds.items() if kind in annotation)


def words_of(name: str, value: Any) -> list[str]:
    values = value if isinstance(value, list) else [value]
    return [f"--{name.replace('_', '-')}", *(str(each).lower() for each in values)]


@pytest.mark.parametrize("field", fields(Recipe), ids=lambda f: f.name)
def test_every_field_of_the_recipe_has_a_flag_and_a_key(field: Any, tmp_path: Path) -> None:
    value = sample(field.name, str(field.type))
    expected: Any = tuple(value) if isinstance(value, list) else value
    for options in (
        parsed(*words_of(field.name, value)),
        configured(tmp_path, {"out": "x", field.name: value}),
    ):
        recipe = recipe_of(options)
        assert getattr(recipe, field.name) == expected
        assert recipe == Recipe(**{field.name: expected})


@pytest.mark.parametrize(("model", "name", "argument"), ARGUMENTS, ids=lambda x: str(x)[:16])
def test_every_argument_of_a_model_has_a_flag_and_a_key(
    model: str, name: str, argument: Any, tmp_path: Path
) -> None:
    value = sample(name, argument.annotation)
    for options in (
        parsed("--model", model, *words_of(name, value)),
        configured(tmp_path, {"out": "x", "model": model, name: value}),
    ):
        assert model_arguments(options) == {name: value}


@pytest.mark.parametrize("owner", [RECIPE, *MODELS.values()], ids=lambda o: o[0])
def test_parameters_read_from_the_source_match_the_signature(owner: tuple[str, ...]) -> None:
    kind = {"Recipe": Recipe, "MSFlow": MSFlow, "FastFlow": FastFlow}[owner[0]]
    found = parameters(*owner)
    seen = signature(kind).parameters
    assert list(found) == list(seen)
    for name, each in found.items():
        assert (each.default, each.annotation) == (seen[name].default, seen[name].annotation)


def test_every_hyper_parameter_is_documented_where_it_is_declared() -> None:
    for owner in (RECIPE, *MODELS.values()):
        for name, each in parameters(*owner).items():
            if name not in SET_ELSEWHERE:
                assert len(each.text) > 15, name
                assert not re.search(r"[`:]class|``|\bsee\b", each.text), each.text


@pytest.mark.parametrize(("preset", "model"), COMBINATIONS)
def test_the_preset_sets_every_value_that_is_not_given(preset: str, model: str) -> None:
    options = parsed("--preset", preset, "--model", model)
    assert recipe_of(options) == PRESETS[preset][model].recipe
    assert model_arguments(options) == PRESETS[preset][model].model
    for field in fields(Recipe):
        assert getattr(options, field.name) is None
    own = parsed("--preset", preset, "--model", model, "--epochs", "3", "--top-k", "0.5")
    assert recipe_of(own).epochs == 3
    assert recipe_of(own).lr == PRESETS[preset][model].recipe.lr
    assert model_arguments(own) == {**PRESETS[preset][model].model, "top_k": 0.5}


def test_the_defaults_in_the_help_are_those_of_the_papers_preset() -> None:
    recipe, arguments = PRESETS["paper"]["msflow"].recipe, signature(MSFlow).parameters
    actions = {each.dest: each for each in cli.parser().commands["train"]._actions}

    def shown(value: Any) -> str:
        values = value if isinstance(value, tuple) else [value]
        return " ".join(str(v).lower() if isinstance(v, bool) else str(v) for v in values)

    declared = {**asdict(recipe), **{n: p.default for n, p in arguments.items()}, "seed": 9826}
    for name in declared.keys() & actions.keys():
        found = re.findall(r"\(default: (.*)\)$", actions[name].help or "")
        assert found == ([] if declared[name] is None else [shown(declared[name])]), name


def test_none_sets_a_value_and_null_leaves_it_to_the_preset(tmp_path: Path) -> None:
    assert recipe_of(parsed("--clip", "none")).clip is None
    assert recipe_of(configured(tmp_path, "{out: x, clip: none}")).clip is None
    assert recipe_of(configured(tmp_path, "{out: x, clip: null}")).clip == 2.0
    assert recipe_of(configured(tmp_path, "out: x\nclip:\nlr: ~")) == Recipe()
    assert recipe_of(parsed("--milestones")).milestones == ()


def test_text_means_the_same_in_a_file_as_on_the_command_line(tmp_path: Path) -> None:
    text = "out: x\nlr: 1e-3\ncategory: 01\nclamp_form: 0.2\nblocks: [1, 2, 3]\nwhiten: true\n"
    options = configured(tmp_path, text + "baseline: true\ncond_channels: 8\n")
    more = ["--lr", "1e-3", "--category", "01", "--clamp-form", "0.2", "--blocks", "1", "2", "3"]
    expected = parsed(*more, "--whiten", "true", "--baseline", "--cond-channels", "8")
    ours = {**vars(options), "config": None, "out": None}
    assert ours == {**vars(expected), "config": None, "out": None}
    assert (options.lr, options.category, options.blocks) == (1e-3, "01", [1, 2, 3])
    assert options.baseline is True


def test_the_configuration_in_the_documentation_is_read(tmp_path: Path) -> None:
    page = (Path(__file__).parents[2] / "docs" / "command-line.md").read_text(encoding="utf-8")
    (shown,) = re.findall(r"^```yaml config\n(.*?)^```", page, re.DOTALL | re.MULTILINE)
    options = configured(tmp_path, "out: x\n" + shown)
    assert recipe_of(options) == Recipe(epochs=50, milestones=(0.6, 0.8), clip=None)
    assert (options.layout, options.normal, options.baseline) == ("folder", "good", True)


def test_flags_and_files_replace_values_further_left(tmp_path: Path) -> None:
    path = tmp_path / "some.yaml"
    path.write_text("epochs: 5\nlr: 0.5\n")
    options = parsed("--epochs", "3", "--config", str(path), "--lr", "0.25")
    assert (options.epochs, options.lr) == (5, 0.25)


def test_the_printed_configuration_reads_back_as_the_same_options(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    flags = ["--clip", "none", "--milestones", "0.5", "--blocks", "1", "2", "--whiten", "false"]
    flags += ["--seed", "3", "--data", "elpv", "--baseline"]
    assert cli.main(["train", "--out", "x", *flags, "--print_config"]) == 0
    again = configured(tmp_path, capsys.readouterr().out + "out: runs/x\n")
    assert {**vars(again), "config": None, "out": "runs/x"} == vars(parsed(*flags))


def test_the_configuration_of_an_older_run_is_read(tmp_path: Path) -> None:
    old = "out: x\nposition_base: false\nlr: null\nworkers: 2\nmodel: msflow\nblocks: null\n"
    assert recipe_of(configured(tmp_path, old)) == Recipe()
    with pytest.raises(ValueError, match=r"some\.yaml: unknown key 'position_base'"):
        configured(tmp_path, "position_base: true")


@pytest.mark.parametrize(
    ("text", "sentence"),
    [
        ("epochz: 3", "unknown key 'epochz', did you mean epochs?"),
        ("image-size: 3", "unknown key 'image-size', did you mean image_size?"),
        ("colours: red", "unknown key 'colours'"),
        ("help: true", "unknown key 'help'"),
        ("? [a, b]\n: 1", "found unhashable key"),
        ("epochs: many", "epochs must be a whole number, got 'many'"),
        ("epochs: [1, 2]", "epochs must be one value, got ['1', '2']"),
        ("data: {a: 1}", "data must be one value, got {'a': '1'}"),
        ("blocks: [1, null]", "blocks must be values, got ['1', None]"),
        ("blocks: [1, x]", "blocks must be a whole number, got 'x'"),
        ("lr: fast", "lr must be a finite number, got 'fast'"),
        ("fit: pat", "fit must be one of resize, pad, got 'pat', did you mean pad?"),
        ("baseline: maybe", "baseline must be true or false, got 'maybe'"),
        ("a: b: c", "line 1, column 5: mapping values are not allowed here"),
        ("- 1", "must hold keys and values, got a list"),
        ("\x00", "unacceptable character"),
        (b"\xff\xfe\x00", "utf-8"),
        (None, "No such file or directory"),
    ],
)
def test_an_error_in_a_configuration_file_names_the_file_and_the_key(
    text: str | bytes | None, sentence: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    path = tmp_path / "some.yaml"
    if text is not None:
        path.write_bytes(text if isinstance(text, bytes) else text.encode())
    assert cli.main(["train", "--config", str(path), "--out", str(tmp_path / "out")]) == 2
    (line,) = capsys.readouterr().err.splitlines()
    assert line.startswith(f"msflow: error: {path}")
    assert sentence in line
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize(
    ("flags", "sentence"),
    [
        (["--milestones", "0.5", "2"], "milestones must be shares from 0 to 1, got (0.5, 2.0)"),
        (["--warmup", "-1"], "warmup must be a share from 0 to 1, got -1.0"),
        (["--warmup-from", "0"], "warmup_from must be above 0, got 0.0"),
        (["--decay", "0"], "decay must be above 0, got 0.0"),
        (["--weight-decay", "-1"], "weight_decay must be 0 or more, got -1.0"),
        (["--eval-every", "0"], "eval_every must be 1 or more, got 0"),
        (
            ["--memory", "reversible", "--precision", "bfloat16"],
            "precision must be float32 if memory is",
        ),
    ],
)
def test_a_value_that_the_recipe_refuses_is_named(
    flags: list[str], sentence: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    command = ["train", "--data", "elpv", "--category", "mono", "--out", str(tmp_path / "out")]
    assert cli.main([*command, "--device", "cpu", *flags]) == 2
    assert sentence in capsys.readouterr().err.splitlines()[-1]


def test_only_two_fields_of_the_recipe_may_be_none() -> None:
    for field in fields(Recipe):
        if "None" not in str(field.type) and field.name != "milestones":
            nothing: dict[str, Any] = {field.name: None}
            with pytest.raises(ValueError, match=f"{field.name} must be .*, got None"):
                Recipe(**nothing)
    assert Recipe(clip=None, eval_every=None).clip is None


def test_the_flag_and_the_function_convert_have_the_same_formats() -> None:
    assert ("msflow_ext", *PEERS) == CHECKPOINT_FORMATS
