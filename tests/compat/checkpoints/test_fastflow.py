"""Weights of gathierry's and anomalib's FastFlow give the same maps, and convert both ways unchanged."""

from __future__ import annotations

import warnings
from collections.abc import Callable
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from msflow_ext import FastFlow, FastFlowHead, ops
from msflow_ext.compat import load_fastflow_checkpoint
from msflow_ext.compat.checkpoints.fastflow import head_from_state_dict, to_peer_state_dict
from msflow_ext.testing import relative_error

Normal = Callable[..., Tensor]

# (channels, height, width) of the scales; arguments of the flows.
CASES: dict[str, tuple[list[tuple[int, int, int]], dict[str, Any]]] = {
    "cnn": ([(8, 8, 6), (12, 4, 3)], {"steps": 4, "hidden_ratio": 1.0, "conv3x3_only": False}),
    "3x3-only": ([(8, 4, 4)], {"steps": 3, "hidden_ratio": 1.0, "conv3x3_only": True}),
    "odd": ([(7, 3, 5), (9, 2, 2)], {"steps": 2, "hidden_ratio": 0.7, "conv3x3_only": False}),
    "narrow": ([(40, 4, 4)], {"steps": 3, "hidden_ratio": 0.16, "conv3x3_only": False}),
    "wider": ([(6, 4, 4)], {"steps": 1, "hidden_ratio": 1.5, "conv3x3_only": False}),
}


class Peer(nn.Module):
    """FastFlow after the backbone, as both packages build it from FrEIA's blocks, with its list called ``flows``."""

    def __init__(
        self,
        freia: Any,
        flows: str,
        shapes: list[tuple[int, int, int]],
        normed: bool,
        *,
        steps: int,
        hidden_ratio: float,
        conv3x3_only: bool,
    ) -> None:
        super().__init__()

        def subnet(k: int) -> Callable[[int, int], nn.Module]:
            def make(channels: int, out: int) -> nn.Module:
                hidden = int(channels * hidden_ratio)
                first = nn.Conv2d(channels, hidden, k, padding="same")
                return nn.Sequential(first, nn.ReLU(), nn.Conv2d(hidden, out, k, padding="same"))

            return make

        if normed:
            self.norms = nn.ModuleList(nn.LayerNorm(list(shape)) for shape in shapes)
        chains = nn.ModuleList()
        for shape in shapes:
            chain = freia.framework.SequenceINN(*shape)
            for i in range(steps):
                chain.append(
                    freia.modules.AllInOneBlock,
                    subnet_constructor=subnet(3 if conv3x3_only or i % 2 == 0 else 1),
                    affine_clamping=2.0,
                    permute_soft=False,
                )
            chains.append(chain)
        setattr(self, flows, chains)
        self.chains = [chains]  # hidden from the state dict
        with torch.no_grad():
            for name, parameter in self.named_parameters():
                if "w_perm" not in name:
                    parameter.add_(0.3 * torch.randn_like(parameter))

    def forward(self, features: list[Tensor], size: int) -> tuple[list[Tensor], Tensor, Tensor]:
        """Return latents, loss and map."""
        if hasattr(self, "norms"):
            features = [norm(f) for norm, f in zip(self.norms, features, strict=True)]
        z, loss, maps = [], torch.zeros(()), []
        for f, chain in zip(features, self.chains[0], strict=True):
            latent, log_det = chain(f)
            z.append(latent)
            loss = loss + (0.5 * latent.square().sum((1, 2, 3)) - log_det).mean()
            likelihood = torch.exp(-0.5 * latent.square().mean(1, keepdim=True))
            maps.append(F.interpolate(-likelihood, size, mode="bilinear", align_corners=False))
        return z, loss, torch.stack(maps).mean(0)[:, 0]


def peer(freia: ModuleType, case: str, flows: str = "nf_flows", normed: bool = True) -> Peer:
    torch.manual_seed(0)
    shapes, options = CASES[case]
    return Peer(freia, flows, shapes, normed, **options)


@pytest.mark.parametrize("normed", [True, False], ids=["normed", "plain"])
@pytest.mark.parametrize("case", CASES)
def test_the_same_weights_give_the_same_latents_loss_and_map(
    freia: ModuleType, normal: Normal, case: str, normed: bool
) -> None:
    theirs = peer(freia, case, normed=normed)
    ours = head_from_state_dict(theirs.state_dict())
    x = [normal(3, *shape) for shape in CASES[case][0]]
    with torch.no_grad():
        z, loss, anomaly_map = theirs(x, 20)
        for head in (ours, ours.optimize()):
            got = head(x)
            for a, b in zip(got.z, z, strict=True):
                assert relative_error(a, b) <= 1e-5
            likelihoods = head.log_likelihood(x)
            assert (
                relative_error(ops.mean_aggregate(likelihoods, 20).anomaly_map, anomaly_map) <= 1e-5
            )
        assert relative_error(ours.loss(x), loss) <= 1e-5


@pytest.mark.parametrize("case", CASES)
@pytest.mark.parametrize("package", ["gathierry", "anomalib"])
def test_weights_convert_both_ways_unchanged(freia: ModuleType, case: str, package: str) -> None:
    flows = {"gathierry": "nf_flows", "anomalib": "fast_flow_blocks"}[package]
    theirs = peer(freia, case, flows).double()
    ours = head_from_state_dict(theirs.state_dict())
    back = to_peer_state_dict(ours, package)
    assert back.keys() == theirs.state_dict().keys()
    assert all(torch.equal(value, back[key]) for key, value in theirs.state_dict().items())
    index = head_from_state_dict(to_peer_state_dict(ours, package, index_permutations=True))
    for key, value in ours.state_dict().items():
        assert torch.equal(index.state_dict()[key], value), key


def test_the_arguments_of_the_head_are_read_from_the_weights(freia: ModuleType) -> None:
    for case, (shapes, options) in CASES.items():
        for normed in (True, False):
            head = head_from_state_dict(peer(freia, case, normed=normed).state_dict())
            assert head.channels == tuple(c for c, _, _ in shapes)
            assert head.input_sizes == ([(h, w) for _, h, w in shapes] if normed else None)
            assert head.steps == options["steps"]
            assert head.conv3x3_only is options["conv3x3_only"]
            for c, (first, *_) in zip(head.channels, subnets(head), strict=True):
                assert first.out_channels == int((c - c // 2) * options["hidden_ratio"])


@pytest.mark.parametrize("ratio", [0.16, 0.5, 1.0])
def test_the_ratios_of_the_paper_are_read_exactly(ratio: float) -> None:
    head = FastFlowHead((768,), steps=1, hidden_ratio=ratio)
    assert head_from_state_dict(to_peer_state_dict(head)).hidden_ratio == ratio


def subnets(head: FastFlowHead) -> list[Any]:
    """Return the first subnet of every scale."""
    return [flow.steps[0].subnet for flow in head.flows]  # type: ignore[index,union-attr]


@pytest.mark.parametrize("package", ["gathierry", "anomalib", "bare"])
def test_checkpoints_load_without_the_backbone_in_them(package: str, tmp_path: Path) -> None:
    head = FastFlowHead((6, 8), steps=2, input_sizes=[(4, 4), (2, 2)], seed=0)
    weights = to_peer_state_dict(head, "gathierry" if package == "bare" else package)
    weights["feature_extractor.conv1.weight"] = torch.ones(1)
    content: dict[str, Any] = weights
    if package == "gathierry":
        content = {"epoch": 3, "model_state_dict": weights, "optimizer_state_dict": {"state": {}}}
    if package == "anomalib":
        content = {"state_dict": {f"model.{key}": value for key, value in weights.items()}}
    torch.save(content, tmp_path / "model.ckpt")
    loaded = load_fastflow_checkpoint(tmp_path / "model.ckpt", clamp=1.5, clamp_form="head")
    assert (loaded.clamp, loaded.clamp_form) == (1.5, "head")
    assert loaded.state_dict().keys() == head.state_dict().keys()
    assert all(torch.equal(v, loaded.state_dict()[k]) for k, v in head.state_dict().items())


def weights_of(**options: Any) -> dict[str, Tensor]:
    return to_peer_state_dict(FastFlowHead((6, 8), steps=2, seed=0, **options), "gathierry")


FLOW = "nf_flows.0.module_list.0"
BROKEN: dict[str, tuple[Callable[[dict[str, Any]], Any], str]] = {
    "missing": (lambda w: w.pop(f"{FLOW}.subnet.2.bias"), r"missing flows\.0\.0\.subnet\.2\.bias"),
    "unexpected": (lambda w: w.update({f"{FLOW}.x": torch.ones(1)}), r"unexpected flows\.0\.0\.x"),
    "misshapen": (
        lambda w: w.update({f"{FLOW}.global_offset": torch.ones(1, 5, 1, 1)}),
        r"flows\.0\.0\.global_offset must have shape \(1, 6, 1, 1\), got \(1, 5, 1, 1\)",
    ),
    "integers": (
        lambda w: w.update({f"{FLOW}.global_offset": torch.ones(1, 6, 1, 1).long()}),
        r"flows\.0\.0\.global_offset must be floating-point, got torch\.int64",
    ),
    "no tensor": (
        lambda w: w.update({f"{FLOW}.global_offset": 3.0}),
        r"nf_flows\.0\.module_list\.0\.global_offset must be a tensor, got float",
    ),
    "foreign": (lambda w: w.update({"other.weight": torch.ones(1)}), r"unexpected other\.weight"),
    "no scale": (lambda w: w.pop(f"{FLOW}.global_scale"), r"flows\.0\.0\.global_scale is missing"),
    "soft": (
        lambda w: w.update({f"{FLOW}.w_perm": torch.full((6, 6, 1, 1), 0.5)}),
        r"w_perm must be a matrix of zeros and ones",
    ),
    "uneven": (
        lambda w: [w.pop(k) for k in list(w) if k.startswith("nf_flows.1.module_list.1.")],
        r"flows of one length, got steps by scale \{0: 2, 1: 1\}",
    ),
    "empty": (lambda w: w.clear(), "must hold flows of one length"),
    "one norm": (
        lambda w: w.update({"norms.0.weight": torch.ones(6, 2, 2)}),
        r"unexpected norms\.0\.weight",
    ),
}


@pytest.mark.parametrize("case", BROKEN)
def test_weights_that_do_not_fit_are_named(case: str, tmp_path: Path) -> None:
    breaking, message = BROKEN[case]
    weights = weights_of()
    breaking(weights)
    torch.save(weights, tmp_path / "model.pt")
    with pytest.raises(ValueError, match=rf"model\.pt: .*{message}"):
        load_fastflow_checkpoint(tmp_path / "model.pt")


def test_a_file_that_is_not_a_checkpoint_is_refused(tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError, match=r"nowhere\.pt cannot be read: no such file"):
        load_fastflow_checkpoint(tmp_path / "nowhere.pt")
    (tmp_path / "text.pt").write_text("hello")
    with pytest.raises(ValueError, match=r"text\.pt cannot be read as a torch checkpoint"):
        load_fastflow_checkpoint(tmp_path / "text.pt")
    torch.save([1, 2], tmp_path / "list.pt")
    with pytest.raises(ValueError, match=r"list\.pt: a state dict must be a dictionary, got list"):
        load_fastflow_checkpoint(tmp_path / "list.pt")
    with pytest.raises(ValueError, match="package must be one of gathierry, anomalib, got 'other'"):
        to_peer_state_dict(FastFlowHead((4,), steps=1), "other")


@pytest.mark.parametrize(
    "backbone",
    ["resnet18", pytest.param("deit_base_distilled_patch16_384", marks=pytest.mark.slow)],
)
def test_anomalibs_model_and_fastflow_give_the_same_map(backbone: str) -> None:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        name = "anomalib.models.image.fastflow.torch_model"
        anomalib = pytest.importorskip(name, exc_type=ImportError)
    torch.manual_seed(0)
    transformer = backbone != "resnet18"
    size, steps, ratio = (384, 20, 0.16) if transformer else (64, 8, 1.0)
    options: dict[str, Any] = {"hidden_ratio": ratio, "conv3x3_only": not transformer}
    theirs = anomalib.FastflowModel(
        (size, size), backbone, pre_trained=False, flow_steps=steps, **options
    ).eval()
    ours = FastFlow(backbone, image_size=size, pretrained=False).eval()
    assert {name: ours.config[name] for name in options} == options
    assert ours.head.steps == steps
    ours.head.load_state_dict(head_from_state_dict(theirs.state_dict()).state_dict())
    extractor = theirs.feature_extractor.state_dict()
    expected = ours.backbone.network.state_dict()
    ours.backbone.network.load_state_dict(
        {k: extractor[k.removeprefix("model.")] for k in expected}
    )
    images = torch.rand(2, 3, size, size)
    mean, std = torch.tensor([0.485, 0.456, 0.406]), torch.tensor([0.229, 0.224, 0.225])
    with torch.no_grad():
        normalized = (images - mean.view(3, 1, 1)) / std.view(3, 1, 1)
        want = theirs(normalized)
        got = ours(images)
    assert relative_error(got.anomaly_map, want.anomaly_map[:, 0]) <= 1e-5
    assert relative_error(got.score, want.pred_score.flatten()) <= 1e-5
