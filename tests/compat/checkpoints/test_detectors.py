"""Checkpoints of other packages convert to models and back without loss."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

import msflow_ext as mx
from msflow_ext.compat.checkpoints.detectors import for_peer, read_detector
from msflow_ext.testing import relative_error

GOLDEN = Path(__file__).parents[2] / "golden"
SMALL: dict[str, Any] = {"image_size": 64, "pretrained": False}


def msflow(**options: Any) -> mx.MSFlow:
    shape = {"blocks": (1, 2, 1), "cond_channels": (4, 8, 4), "seed": 0}
    reference = {"padding_mode": "reflect", "standardize": False}
    return mx.MSFlow("resnet18", **{**shape, **reference, **SMALL, **options}).eval()


def fastflow(**options: Any) -> mx.FastFlow:
    shape = {"steps": 2, "conv3x3_only": False, "seed": 0}
    return mx.FastFlow("resnet18", **{**shape, **SMALL, **options}).eval()


def written(model: Any, to: str, path: Path) -> Path:
    torch.save(for_peer(model, to), path)
    return path


def assert_same(got: dict[str, Tensor], expected: dict[str, Tensor]) -> None:
    assert got.keys() == expected.keys()
    assert all(torch.equal(got[key], value) for key, value in expected.items())


def test_msflow_converts_to_the_reference_layout_and_back(tmp_path):
    model = msflow()
    content = for_peer(model, "msflow")
    assert list(content) == ["epoch", "fusion_flow", "parallel_flows"]
    assert [len(flow) for flow in content["parallel_flows"]] == [10, 20, 10]
    again = read_detector(written(model, "msflow", tmp_path / "a.pt"), "resnet18", **SMALL)
    assert again.config == model.config
    assert_same(again.head.state_dict(), model.head.state_dict())


@pytest.mark.parametrize("package", ["gathierry", "anomalib"])
@pytest.mark.parametrize("options", [{}, {"conv3x3_only": True, "hidden_ratio": 0.5}], ids=str)
def test_fastflow_converts_to_another_package_and_back_with_its_backbone(
    tmp_path, package, options
):
    model = fastflow(**options)
    backbone = "resnet18" if package == "gathierry" else None  # anomalib's files name it
    again = read_detector(written(model, package, tmp_path / "a.ckpt"), backbone)
    assert again.config == model.config
    assert_same(again.state_dict(), model.state_dict())


def test_a_transformer_is_written_without_its_backbone_and_reads_that_of_a_file(tmp_path):
    timm = pytest.importorskip("timm")
    name, options = "vit_tiny_patch16_224", {"pretrained": False, "out_indices": (11,), "steps": 1}
    model = mx.FastFlow(name, **options, hidden_ratio=0.16)
    content = for_peer(model, "anomalib")
    keys = [key for key in content["state_dict"] if key.startswith("model.")]
    assert {key.split(".")[1] for key in keys} == {"fast_flow_blocks"}
    whole = timm.create_model(name).state_dict()
    state = {f"model.feature_extractor.{key}": value for key, value in whole.items()}
    torch.save({"state_dict": {**content["state_dict"], **state}}, tmp_path / "a.ckpt")
    network = read_detector(tmp_path / "a.ckpt", name).backbone.network.state_dict()
    assert network
    for key, value in network.items():
        assert torch.equal(value, whole[key.removeprefix("model.")]), key


@pytest.mark.parametrize(
    ("model", "to", "message"),
    [
        (msflow, "anomalib", "model must be a FastFlow for anomalib, got MSFlow"),
        (fastflow, "msflow", "model must be an MSFlow for msflow, got FastFlow"),
        (
            lambda: msflow(standardize=True),
            "msflow",
            "standardize of the model must be False for msflow, got True",
        ),
        (
            lambda: msflow(padding_mode="zeros"),
            "msflow",
            "padding_mode of the model must be 'reflect' for msflow, got 'z",
        ),
        (lambda: fastflow(clamp=1.5), "gathierry", "clamp of the model must be 2.0 .* got 1.5"),
        (lambda: fastflow(clamp_form="head"), "anomalib", "clamp_form .* must be '0.2' .* 'head'"),
    ],
)
def test_a_model_with_other_results_in_the_package_is_refused(model, to, message):
    with pytest.raises(ValueError, match=message):
        for_peer(model(), to)


def without(content: Any, *path: str) -> None:
    for name in path[:-1]:
        content = content[name]
    content.pop(path[-1])


def added(content: Any, *path: Any) -> None:
    for name in path[:-1]:
        content = content[name]
    content[path[-1]] = torch.ones(1)


FLOW = "fast_flow_blocks.0.module_list.0"


@pytest.mark.parametrize(
    ("to", "change", "path", "message"),
    [
        ("anomalib", without, [f"model.{FLOW}.subnet.0.bias"], r"missing flows\.0\.0\.subnet\.0\."),
        (
            "anomalib",
            added,
            [f"model.{FLOW}.subnet.0.bias"],
            r"subnet\.0\.bias must have shape \(3.*got \(1,",
        ),
        ("anomalib", added, [f"model.{FLOW}.subnet.7.bias"], r"unexpected flows\.0\.0\.subnet\.7"),
        ("anomalib", added, ["model.other"], "unexpected other"),
        ("anomalib", without, ["model.feature_extractor.conv1.weight"], r"Missing .*conv1\.weight"),
        ("anomalib", added, ["model.feature_extractor.more"], 'Unexpected .*"more"'),
        ("anomalib", added, ["model.feature_extractor.bn1.weight"], r"size mismatch for bn1\.wei"),
        (
            "msflow",
            without,
            ["fusion_flow", "module_list.0.perm"],
            r"missing fusion_flow\.module_l",
        ),
        ("msflow", added, ["fusion_flow", "more"], r"unexpected fusion_flow\.more"),
        ("msflow", added, ["parallel_flows", 0, "more"], r"unexpected parallel_flows\.0\.more"),
    ],
)
def test_missing_unexpected_and_misshapen_keys_are_named(tmp_path, to, change, path, message):
    content = for_peer(fastflow() if to == "anomalib" else msflow(), to)
    change(content["state_dict"] if to == "anomalib" else content, *path)
    torch.save(content, tmp_path / "model.ckpt")
    with pytest.raises(ValueError, match=rf"(?s)model\.ckpt: .*{message}"):
        read_detector(tmp_path / "model.ckpt", "resnet18", **SMALL)


def test_a_file_for_another_backbone_or_of_another_kind_is_refused(tmp_path):
    with pytest.raises(ValueError, match=r"channels \(16, 24, 32\), got resnet18 with \(64"):
        read_detector(GOLDEN / "model_a.checkpoint.pt", "resnet18", **SMALL)
    with pytest.raises(ValueError, match="clamp must be positive and finite, got 0"):
        read_detector(GOLDEN / "model_a.checkpoint.pt", "resnet18", clamp=0, **SMALL)
    (tmp_path / "damaged").write_bytes(b"no checkpoint")
    torch.save([1, 2], tmp_path / "list")
    torch.save({"weight": torch.ones(1)}, tmp_path / "other")
    for name, message in (
        ("damaged", "damaged cannot be read as a torch checkpoint"),
        ("list", "a state dict must be a dictionary, got list"),
        ("other", "the state dict must hold flows"),
    ):
        with pytest.raises(ValueError, match=message):
            read_detector(tmp_path / name)
    with pytest.raises(FileNotFoundError, match=r"absent\.pt cannot be read: no such file"):
        read_detector(tmp_path / "absent.pt")


def test_a_file_with_code_is_refused_and_its_code_is_not_run(tmp_path):
    class Evil:
        def __reduce__(self) -> Any:
            return Path.touch, (tmp_path / "ran",)

    torch.save({"state_dict": Evil()}, tmp_path / "evil.ckpt")
    with pytest.raises(ValueError, match=r"evil\.ckpt cannot be read as a torch checkpoint"):
        read_detector(tmp_path / "evil.ckpt")
    assert not (tmp_path / "ran").exists()


@pytest.mark.filterwarnings("ignore")
def test_anomalib_loads_a_converted_checkpoint_and_gives_the_same_map(anomalib, tmp_path):
    Fastflow: Any = anomalib("models").Fastflow
    ours: Any = fastflow()
    path = written(ours, "anomalib", tmp_path / "model.ckpt")
    size = Fastflow.configure_pre_processor((64, 64))
    theirs: Any = Fastflow.load_from_checkpoint(path, pre_processor=size).eval()
    images = torch.rand(2, 3, 64, 64)
    with torch.no_grad():
        expected, got = theirs.model(theirs.pre_processor(images)), ours(images)
    assert relative_error(got.anomaly_map, expected.anomaly_map[:, 0]) <= 1e-5
    assert relative_error(got.score, expected.pred_score[:, 0]) <= 1e-5
    torch.save({"state_dict": theirs.state_dict()}, path)
    assert_same(read_detector(path, "resnet18").state_dict(), ours.state_dict())
