"""A crafted checkpoint is refused by name, before anything large is allocated."""

from __future__ import annotations

import json
import subprocess
import sys
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import save_file
from torch import Tensor

import msflow_ext as mx
from msflow_ext.inference.detector import load
from msflow_ext.runs.checkpoint import _digest, read_checkpoint, save_checkpoint

pytestmark = [pytest.mark.usefixtures("one_thread"), pytest.mark.family("crafted files")]
CALIBRATION = {"scores": [0.1, 0.2, 0.3], "peaks": [1.0, 2.0, 3.0]}


@pytest.fixture(scope="module")
def sound(untrained_run) -> tuple[dict[str, Any], dict[str, Tensor]]:
    """Header and tensors of a checkpoint with thresholds; tests must not change them."""
    run = untrained_run(
        recipe={"false_alarms": 0.4, "fit": "pad"}, calibration=CALIBRATION, colours=[0.0, 1.0]
    )
    return read_checkpoint(run / "model.safetensors")


@pytest.fixture
def crafted(tmp_path, sound) -> Callable[..., Path]:
    """Return ``crafted(header, change)``, which writes a changed checkpoint with a valid checksum."""

    def write(
        header: Mapping[str, Any], change: Callable[[str, Tensor], Tensor] = lambda _, t: t
    ) -> Path:
        text, path = json.dumps({**sound[0], **header}), tmp_path / "crafted.safetensors"
        tensors = {name: change(name, t) for name, t in sound[1].items()}
        save_file(tensors, path, {"msflow_ext": text, "sha256": _digest(text, tensors)})
        return path

    return write


def test_the_unchanged_checkpoint_is_read(crafted):
    detector = load(crafted({}), "cpu")
    assert (detector.threshold, detector.colours, detector.fit) == (0.3, [0.0, 1.0], "pad")


@pytest.mark.parametrize(
    "part",
    [
        {"blocks": [10**6] * 3},
        {"blocks": [10**18] * 3},
        {"blocks": 10**18},
        {"blocks": [[1], [1], [1]]},
        {"blocks": "abc"},
        {"blocks": None},
        {"cond_channels": 4 * 10**9},
        {"cond_channels": [10**30] * 3},
        {"cond_channels": []},
        {"image_size": 10**6},
        {"image_size": 10**30},
        {"image_size": -64},
        {"image_size": "64"},
        {"image_size": 64.5},
        {"image_size": [64, 64]},
        {"whiten": True, "image_size": 10**7},
        {"backbone": "/etc/passwd"},
        {"backbone": "hf-hub:a/b"},
        {"backbone": "resnet18"},
        {"backbone": ["resnet18"]},
        {"out_indices": [10**30]},
        {"out_indices": 10**9},
        {"top_k": float("nan")},
        {"top_k": "x"},
        {"clamp": float("inf")},
        {"smoothing": 1e308},
        {"score": "__class__"},
        {"score": ["log"]},
        {"standardize": "no"},
        {"pretrained": True},
        {"unknown": 1},
    ],
    ids=str,
)
def test_a_configuration_that_does_not_build_the_stored_model_is_refused(crafted, sound, part):
    path = crafted({"config": {**sound[0]["config"], **part}})
    with pytest.raises(ValueError, match=r"crafted\.safetensors"):
        load(path, "cpu")


@pytest.mark.parametrize(
    "header",
    [
        *({"model": value} for value in (None, "os", "__class__", ["MSFlow"], {}, "FastFlow")),
        *({"config": value} for value in (None, [], "abc", 3, {})),
        *({"recipe": value} for value in (None, [], "x", 3)),
        *(
            {"recipe": {"false_alarms": v}}
            for v in (None, "x", 0, 1, -0.5, [0.1], float("nan"), True)
        ),
        *({"recipe": {"false_alarms": 0.4, "fit": v}} for v in ("../x", None, 3, [], {})),
        *({"calibration": value} for value in ("abc", [], {}, 3, {"x": 1}, {"scores": [0.1]})),
        *(
            {"calibration": {**CALIBRATION, "scores": value}}
            for value in (
                *([], [0.1], ["a", "b", "c"], [[0.1], [0.2], [0.3]], [0.3, 0.2, 0.1], "abc", None),
                *([0.1, 0.2, float("nan")], [0.1, 0.2, float("inf")], [0.1, 0.2, 10**400], 3),
            )
        ),
        {"calibration": {"scores": [], "peaks": []}},
        {"calibration": {**CALIBRATION, "more": 1}},
        *(
            {"colours": value}
            for value in ("zz", [], [1], [1, 0], [0, float("nan")], {}, 0, [0, 10**400])
        ),
    ],
    ids=str,
)
def test_a_header_with_wrong_types_or_values_is_refused(crafted, header):
    with pytest.raises(ValueError, match=r"crafted\.safetensors"):
        load(crafted(header), "cpu")


@pytest.mark.parametrize(
    ("change", "sentence"),
    [
        (lambda _, t: t.bool(), "got torch.bool"),
        (lambda _, t: t.to(torch.int8), "got torch.int8"),
        (lambda n, t: t.float() if "perm" in n else t, "perm.* got torch.float32"),
        (lambda _, t: t[None], "must be .* for MSFlow, got|must have shape .* for MSFlow, got"),
        (lambda n, t: t * 0 if "perm" in n else t, "perm must hold every number from 0 to"),
        (lambda n, t: t + 10**12 if n == "head.fusion.perm0" else t, "fusion.perm0 must hold"),
        (lambda n, t: -t - 1 if "perm" in n else t, "perm must hold every number"),
    ],
)
def test_tensors_with_a_wrong_dtype_shape_or_value_are_refused(crafted, change, sentence):
    path = crafted({}, change)
    with pytest.raises(ValueError, match=sentence):
        load(path, "cpu")


@pytest.mark.parametrize(
    "text", ["[" * 100_000, '{"a": ' * 100_000, "9" * 10_000, "NaN", "null", ""]
)
def test_a_header_that_is_not_an_object_or_nests_too_deeply_is_refused(tmp_path, text):
    path, tensors = tmp_path / "crafted.safetensors", {"x": torch.zeros(1)}
    save_file(tensors, path, {"msflow_ext": text, "sha256": _digest(text, tensors)})
    with pytest.raises(ValueError, match=r"crafted\.safetensors is damaged"):
        load(path, "cpu")


def test_a_fastflow_with_more_steps_than_tensors_is_refused(tmp_path):
    model = mx.FastFlow("test_efficientnet", image_size=64, pretrained=False, steps=1)
    for steps in (2, 10**6, 10**30, -1, "1"):
        header = {"model": "FastFlow", "config": {**model.config, "steps": steps}}
        save_checkpoint(tmp_path / "crafted.safetensors", header, model)
        with pytest.raises(ValueError, match=r"crafted\.safetensors"):
            load(tmp_path / "crafted.safetensors", "cpu")


LIMITED = """
import resource, sys
from msflow_ext.inference.detector import load
resource.setrlimit(resource.RLIMIT_AS, (%d, resource.RLIM_INFINITY))
try:
    load(sys.argv[1], "cpu")
except ValueError as error:
    print(error)
"""


@pytest.mark.skipif(sys.platform != "linux", reason="no limit on the memory of a process")
def test_a_model_larger_than_its_file_is_refused_without_allocating_it(crafted, sound):
    path = crafted({"config": {**sound[0]["config"], "cond_channels": [4 * 10**6] * 3}})
    script = LIMITED % (8 * 2**30)
    command = [sys.executable, "-c", script, str(path)]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert "conv_x.weight must have shape" in done.stdout, done.stderr
