"""docs/anomalib.md describes the installed anomalib."""

from __future__ import annotations

import inspect
import re
from pathlib import Path
from typing import Any

import pytest

pytestmark = pytest.mark.filterwarnings("ignore")  # of anomalib and Lightning
PAGE = (Path(__file__).parents[2] / "docs" / "anomalib.md").read_text(encoding="utf-8")


def defaults(function: Any) -> dict[str, Any]:
    return {p.name: p.default for p in inspect.signature(function).parameters.values()}


def test_the_page_names_arguments_and_defaults_of_anomalib(anomalib):
    folder = defaults(anomalib("data").Folder.__init__)
    processor = defaults(anomalib("post_processing").PostProcessor.__init__)
    assert {"normal_dir", "abnormal_dir", "mask_dir"} < set(folder)
    assert f"normal_split_ratio={folder['normal_split_ratio']}" in PAGE
    assert f"val_split_mode={folder['val_split_mode'].value}" in PAGE
    assert folder["val_split_ratio"] == 0.5
    assert processor["image_sensitivity"] == 0.5  # and so is the normalized threshold


@pytest.mark.parametrize(
    ("module", "names"),
    [
        ("data", ["Folder", "MVTecAD", "Visa", "BTech"]),
        ("deploy", ["TorchInferencer", "OpenVINOInferencer", "ExportType"]),
        ("callbacks", ["TilerConfigurationCallback"]),
        ("metrics", ["F1AdaptiveThreshold"]),
        ("pre_processing", ["PreProcessor"]),
    ],
)
def test_the_classes_that_the_page_names_exist(anomalib, module, names):
    assert all(re.search(rf"\b{name}\b", PAGE) for name in names)
    assert all(hasattr(anomalib(module), name) for name in names)


def test_the_page_lists_every_export_format_of_anomalib(anomalib):
    (row,) = re.findall(r"^\| `ExportType\.(.*?) \|", PAGE, re.MULTILINE)
    assert re.findall(r"[A-Z]{4,}", row) == sorted(
        (each.name for each in anomalib("deploy").ExportType), key=row.index
    )


def test_the_page_names_commands_of_anomalib(anomalib):
    command = anomalib("cli.cli").AnomalibCLI
    known = {*command.subcommands(), *command.anomalib_subcommands()}
    known |= set(anomalib("cli.pipelines").pipeline_subcommands())
    assert set(re.findall(r"`anomalib (\w+)", PAGE)) <= known
