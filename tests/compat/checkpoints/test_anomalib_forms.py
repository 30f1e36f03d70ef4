"""Checkpoints of every version of anomalib's Fastflow load, and equal weights give equal scores."""

from __future__ import annotations

import sys
import types
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from msflow_ext.compat import load_fastflow_checkpoint
from msflow_ext.compat.checkpoints.detectors import read_detector
from msflow_ext.compat.checkpoints.fastflow import head_from_state_dict
from msflow_ext.testing import relative_error

pytestmark = pytest.mark.family("foreign checkpoints")

RECORDED = Path(__file__).parents[2] / "fixtures" / "anomalib_fastflow"
FORMS = ("1.2.0", "2.6.0", "2.7.0")
HYPER_PARAMETERS = {"backbone": "resnet18", "pre_trained": True, "flow_steps": 2}


def state_dict(version: str) -> dict[str, Tensor]:
    """Return tensors of the recorded names and sizes, with the same values in all versions."""
    generator = torch.Generator().manual_seed(0)
    state: dict[str, Tensor] = {}
    for line in (RECORDED / f"{version}.txt").read_text().splitlines():
        name, dtype, *sizes = line.split()
        shape = [int(size) for size in sizes]
        if not name.startswith("model."):
            state[name] = torch.zeros(shape)
        elif name.endswith("w_perm"):
            order = torch.randperm(shape[0], generator=generator)
            state[name] = torch.eye(shape[0])[order].view(shape)
        elif name.endswith("w_perm_inv"):
            state[name] = state[name.removesuffix("_inv")].transpose(0, 1).contiguous()
        elif dtype == "int64":
            state[name] = torch.zeros(shape, dtype=torch.int64)
        else:
            state[name] = 0.05 * torch.rand(shape, generator=generator)
    return state


def saved(path: Path, version: str, **beside: Any) -> Path:
    content = {"epoch": 1, "state_dict": state_dict(version), "hyper_parameters": HYPER_PARAMETERS}
    torch.save({**content, **beside}, path)
    return path


def test_every_form_loads_with_its_backbone_and_equal_weights_give_equal_scores(
    tmp_path: Path,
) -> None:
    image = torch.rand(1, 3, 256, 256, generator=torch.Generator().manual_seed(1))
    found = []
    for version in FORMS:
        model = read_detector(saved(tmp_path / f"{version}.ckpt", version))
        assert (model.config["steps"], model.image_size) == (2, 256)
        with torch.no_grad():
            prediction = model(image)
        found.append((model.state_dict(), prediction.score, prediction.anomaly_map))
    for state, score, anomaly_map in found[1:]:
        assert all(torch.equal(value, found[0][0][key]) for key, value in state.items())
        assert torch.equal(score, found[0][1])
        assert torch.equal(anomaly_map, found[0][2])
    weight = "fast_flow_blocks.2.module_list.1.subnet.4.weight"
    expected = state_dict("1.2.0")[f"model.{weight}"]
    assert torch.equal(found[0][0]["head.flows.2.steps.1.subnet.2.weight"], expected)


def test_padding_layers_give_the_latents_of_padded_convolutions(freia: Any) -> None:
    def subnet(channels: int, out: int) -> nn.Module:
        pad = nn.ZeroPad2d(1)
        return nn.Sequential(pad, nn.Conv2d(channels, 5, 3), nn.ReLU(), pad, nn.Conv2d(5, out, 3))

    block: Any = nn.Module()
    chain = freia.framework.SequenceINN(10, 6, 7)
    for _ in range(2):
        chain.append(freia.modules.AllInOneBlock, subnet_constructor=subnet, affine_clamping=2.0)
    block.fast_flow_blocks = nn.ModuleList([chain])
    block.double()
    head = head_from_state_dict(block.state_dict())
    x = torch.randn(3, 10, 6, 7, dtype=torch.float64)
    latents, log_det = chain(x)
    ours = head([x])
    assert relative_error(ours.z[0], latents) <= 1e-10
    assert relative_error(ours.log_det, log_det) <= 1e-10


def test_a_convolution_under_both_names_is_refused(tmp_path: Path) -> None:
    state = state_dict("2.6.0")
    old = "model.fast_flow_blocks.0.module_list.0.subnet.1.weight"
    state[old.replace("subnet.1", "subnet.0")] = state[old]
    torch.save({"state_dict": state}, tmp_path / "both.ckpt")
    with pytest.raises(ValueError, match=r"both\.ckpt: .*subnet\.0\.weight must occur once"):
        load_fastflow_checkpoint(tmp_path / "both.ckpt")


def test_a_missing_convolution_is_named(tmp_path: Path) -> None:
    state = state_dict("2.6.0")
    del state["model.fast_flow_blocks.0.module_list.1.subnet.4.bias"]
    torch.save({"state_dict": state}, tmp_path / "cut.ckpt")
    with pytest.raises(ValueError, match=r"missing flows\.0\.1\.subnet\.2\.bias"):
        load_fastflow_checkpoint(tmp_path / "cut.ckpt")


@pytest.fixture
def foreign() -> Iterator[Callable[[str], Any]]:
    """Return ``foreign("package.Class")``, which makes an object of a package that exists until the test ends."""
    made = []

    def make(name: str) -> Any:
        package, _, cls = name.rpartition(".")
        module = sys.modules[package] = types.ModuleType(package)
        made.append(package)
        kind = type(cls, (), {"__module__": package})
        setattr(module, cls, kind)
        thing: Any = kind()
        thing.content = {"lr": 0.1}
        return thing

    yield make
    for package in made:
        sys.modules.pop(package, None)


def test_transforms_in_a_checkpoint_are_ignored(tmp_path: Path) -> None:
    # anomalib 1 saves its transform as an object.
    v2: Any = pytest.importorskip("torchvision.transforms.v2")
    transform = v2.Compose([v2.Resize((256, 256)), v2.Normalize([0.5] * 3, [0.2] * 3)])
    path = saved(tmp_path / "old.ckpt", "1.2.0", transform=transform)
    assert read_detector(path).config["steps"] == 2


def test_settings_of_a_package_that_is_not_installed_are_ignored(
    tmp_path: Path, foreign: Callable[[str], Any]
) -> None:
    # anomalib 0 saves its settings as an object of omegaconf, so the backbone is not known.
    path = saved(tmp_path / "old.ckpt", "1.2.0", hyper_parameters=foreign("omegaconf.DictConfig"))
    del sys.modules["omegaconf"]
    assert read_detector(path, "resnet18").config["steps"] == 2
    with pytest.raises(ValueError, match=r"backbone must have channels .* got wide_resnet50_2"):
        read_detector(path, pretrained=False)


@pytest.mark.parametrize("name", ["unknown.Thing", "torchvisionary.Thing"])
def test_an_object_of_any_other_package_is_refused(
    tmp_path: Path, foreign: Callable[[str], Any], name: str
) -> None:
    both = [foreign("omegaconf.DictConfig"), foreign(name)]
    path = saved(tmp_path / "odd.ckpt", "1.2.0", callbacks=both)
    with pytest.raises(ValueError, match=r"odd\.ckpt cannot be read as a torch checkpoint"):
        read_detector(path)
