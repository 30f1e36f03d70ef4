"""Models of anomalib give the same maps, scores, gradients and training runs after ``accelerate``."""

from __future__ import annotations

import copy

import pytest
import torch
from torch import Tensor, nn

import msflow_ext as mx
from msflow_ext.testing import relative_error

pytestmark = pytest.mark.filterwarnings("ignore")  # of the packages that these models call

RESNET = {"backbone": "resnet18", "pre_trained": False}
WIDE = {"backbone": "wide_resnet50_2", "pre_trained": False, "flow_steps": 2}
PATCH = {"flow_steps": 2, "flow_feature_dim": 16, "flow_hidden_dim": 8, "num_scales": 2}


@pytest.mark.parametrize(
    ("name", "options", "blocks", "chains"),
    [
        ("FastflowModel", {**RESNET, "input_size": (64, 64)}, 24, 3),
        ("FastflowModel", {**WIDE, "input_size": (64, 64)}, 6, 3),
        ("UflowModel", {"backbone": "resnet18", "flow_steps": 2, "input_size": (64, 64)}, 6, 0),
        ("CflowModel", {**RESNET, "layers": ["layer2", "layer3"], "coupling_blocks": 2}, 4, 2),
        ("PatchflowModel", {**RESNET, **PATCH, "input_size": (64, 64)}, 2, 1),
    ],
    ids=["fastflow-resnet18", "fastflow-wide_resnet50_2", "uflow", "cflow", "patchflow"],
)
def test_anomalibs_models_give_the_same_anomaly_maps(
    anomalib, monkeypatch, name, options, blocks, chains
):
    import timm

    create = timm.create_model  # U-Flow always asks for trained weights
    monkeypatch.setattr(
        timm, "create_model", lambda *a, **o: create(*a, **{**o, "pretrained": False})
    )
    module = anomalib(f"models.image.{name.removesuffix('Model').lower()}.torch_model")
    net = getattr(module, name)(**options).eval()
    with torch.no_grad():
        for name, p in net.named_parameters():
            if "global_" in name:
                p += 0.1 * torch.randn_like(p)
    images = torch.rand(2, 3, 64, 64)
    with torch.no_grad():
        expected = net(images)
        report = mx.accelerate(net)
        got = net(images)
    assert len(report.replaced) == blocks and len(report.fused) == chains and not report.kept
    assert relative_error(got.anomaly_map, expected.anomaly_map) <= 1e-5
    assert relative_error(got.pred_score, expected.pred_score) <= 1e-5
    assert expected.anomaly_map.std() > 0


@pytest.mark.slow
def test_training_anomalibs_fastflow_gives_the_weights_of_the_original_run(anomalib):
    Model = anomalib("models.image.fastflow.torch_model").FastflowModel
    loss_of = anomalib("models.image.fastflow.loss").FastflowLoss()
    net = Model(**RESNET, input_size=(32, 32), flow_steps=2).double()
    ends = []
    for accelerated in (False, True):
        model = copy.deepcopy(net).train()
        if accelerated:
            mx.accelerate(model)
        numbers = torch.Generator().manual_seed(0)
        adam = torch.optim.Adam([p for p in model.parameters() if p.requires_grad], lr=1e-3)
        for _ in range(100):
            z, log_det = model(torch.rand(1, 3, 32, 32, generator=numbers, dtype=torch.float64))
            loss = loss_of(z, log_det)
            adam.zero_grad()
            loss.backward()
            adam.step()
        ends.append(model.state_dict())
    assert any(float((ends[0][k] - v).abs().max()) > 0.05 for k, v in net.state_dict().items())
    for key, value in ends[0].items():
        assert relative_error(ends[1][key], value) <= 1e-8, key


def test_csflows_coupling_gives_the_same_results_and_keeps_its_inverse(anomalib):
    csflow = anomalib("models.image.csflow.torch_model")
    sizes = [(7, 8, 4), (7, 4, 2), (7, 2, 1)]
    layer = csflow.ParallelGlowCouplingLayer(sizes, {"channels_hidden": 5}, clamp=3).double()
    for p in layer.parameters():
        nn.init.normal_(p)
    x = [torch.randn(2, *size, dtype=torch.float64, requires_grad=True) for size in sizes]

    def results(rev: bool) -> list[Tensor]:
        z, log_det = layer(x, rev=rev)
        return [*z, log_det, *torch.autograd.grad([*(t.sum() for t in z), log_det], x)]

    expected = results(False)
    assert mx.accelerate(layer).replaced == [""]
    for got, want in zip(results(False), expected, strict=True):
        torch.testing.assert_close(got, want, rtol=1e-10, atol=1e-10)
    mx.restore(layer)
    even = csflow.ParallelGlowCouplingLayer([(6, *s[1:]) for s in sizes], {"channels_hidden": 5})
    x = [t[:, :6].float() for t in x]
    expected, _ = even(x, rev=True)
    mx.accelerate(even)
    for got, want in zip(even(x, rev=True)[0], expected, strict=True):
        assert torch.equal(got, want)


def test_csflows_graph_gives_the_same_scores_and_gradients(anomalib):
    csflow = anomalib("models.image.csflow.torch_model")
    flow = csflow.CrossScaleFlow((3, 128, 128), 2, 3, 8).double()
    for p in flow.parameters():
        if p.dim() > 1:
            nn.init.normal_(p, std=0.02)
    x = [torch.randn(2, 304, side, side, dtype=torch.float64) for side in (4, 2, 1)]

    def results() -> list[Tensor]:
        z, log_det = flow(x)
        scores = csflow.CsFlowModel._compute_anomaly_scores(z)
        leaves = [p for p in flow.parameters() if p.requires_grad]
        total = sum(t.square().sum() for t in z) - log_det.sum()
        return [*z, scores, log_det, *torch.autograd.grad(total, leaves)]

    expected = results()
    assert len(mx.accelerate(flow).replaced) == 2
    for got, want in zip(results(), expected, strict=True):
        torch.testing.assert_close(got, want, rtol=1e-9, atol=1e-9)
