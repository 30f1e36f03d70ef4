"""The torchmetrics classes give the values of the functions in msflow_ext.metrics."""

from __future__ import annotations

import pickle
import subprocess
import sys

import pytest
import torch
from torch import Tensor

from msflow_ext import metrics

torchmetrics = pytest.importorskip("torchmetrics")
exact = pytest.importorskip("msflow_ext.compat.torchmetrics")

FUNCTIONS = {
    "AUROC": metrics.auroc,
    "AveragePrecision": metrics.average_precision,
    "F1Max": metrics.f1_max,
    "AUPRO": metrics.aupro,
    "AUPIMO": metrics.aupimo,
}


@pytest.fixture
def batches() -> list[tuple[Tensor, Tensor]]:
    """Return maps and masks of 5 + 3 images, the first two without a defect; some scores tie."""
    generator = torch.Generator().manual_seed(0)
    masks = torch.zeros(8, 30, 30, dtype=torch.int64)
    masks[2:, 5:15, 8:20] = 1
    maps = (torch.randn(8, 30, 30, generator=generator) * 4 + 2 * masks).round()
    return list(zip(maps.split(5), masks.split(5), strict=True))


def joined(batches: list[tuple[Tensor, Tensor]]) -> tuple[Tensor, Tensor]:
    maps, masks = (torch.cat(each) for each in zip(*batches, strict=True))
    return masks, maps


@pytest.mark.parametrize("name", FUNCTIONS)
def test_a_class_gives_the_value_of_its_function_on_all_batches(name, batches):
    metric = getattr(exact, name)()
    for preds, target in batches:
        metric.update(preds, target)
    assert metric.compute().item() == FUNCTIONS[name](*joined(batches))
    metric.reset()
    metric.update(*batches[0])
    assert metric.compute().item() == FUNCTIONS[name](*reversed(batches[0]))


def test_limits_of_the_false_positive_rate_are_used(batches):
    masks, maps = joined(batches)
    collection = torchmetrics.MetricCollection(
        {"narrow": exact.AUPRO(0.05), "aupimo": exact.AUPIMO((1e-2, 0.5))}
    )
    for preds, target in batches:
        collection.update(preds, target)
    found = collection.compute()
    assert found["narrow"].item() == metrics.aupro(masks, maps, 0.05)
    assert found["aupimo"].item() == metrics.aupimo(masks, maps, (1e-2, 0.5))


@pytest.mark.family("masks")
def test_aupimo_does_not_count_a_defect_without_a_mask_as_normal(batches):
    masks, maps = joined(batches)
    masks[2] = 0  # a defect without a mask
    labels = (torch.arange(8) >= 2).long()
    metric = exact.AUPIMO((1e-2, 0.5))
    for part in zip(maps.split(5), masks.split(5), labels.split(5), strict=True):
        metric.update(*part)
    known = torch.tensor([0, 1, 3, 4, 5, 6, 7])
    expected = metrics.aupimo(masks[known], maps[known], (1e-2, 0.5))
    assert metric.compute().item() == expected
    assert metrics.aupimo(masks, maps, (1e-2, 0.5)) != expected
    metric.update(maps, masks)
    with pytest.raises(ValueError, match=r"labels must have shape \(16,\) and hold only 0 and 1"):
        metric.compute()
    with pytest.raises(
        ValueError, match=r"AUPIMO: labels must have shape \(N,\), got \(7,\) for maps"
    ):
        metric.update(maps, masks, labels[:7])


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float64], ids=str)
def test_scores_keep_their_precision(dtype):
    labels = torch.tensor([0, 1, 0, 1])
    scores = torch.tensor([0.3, 0.1 + 1e-12, 0.1, 0.7], dtype=torch.float64).to(dtype)
    metric = exact.AUROC()
    metric.update(scores.requires_grad_(), labels)
    assert metric.compute().item() == metrics.auroc(labels, scores)
    assert not metric.preds[0].requires_grad


def test_calling_a_metric_returns_the_value_of_the_batch_and_keeps_its_scores(batches):
    metric = exact.AUROC()
    for preds, target in batches:
        assert metric(preds, target).item() == metrics.auroc(target, preds)
    assert metric.compute().item() == metrics.auroc(*joined(batches))


def test_an_unpickled_metric_continues(batches):
    metric = exact.AUPRO(0.1)
    metric.update(*batches[0])
    again = pickle.loads(pickle.dumps(metric))
    again.update(*batches[1])
    assert again.compute().item() == metrics.aupro(*joined(batches), 0.1)


def test_more_scores_than_the_limit_are_refused_and_earlier_ones_stay():
    metric = exact.AUROC(limit=5)
    metric.update(torch.rand(4), torch.tensor([0, 1, 0, 1]))
    with pytest.raises(
        ValueError, match="AUROC: preds must have at most 5 scores in all, got 2 after 4"
    ):
        metric.update(torch.rand(2), torch.zeros(2))
    assert sum(each.numel() for each in metric.preds) == 4


@pytest.mark.parametrize(
    ("preds", "target", "message"),
    [
        (torch.rand(2), torch.zeros(3), r"F1Max: preds and target must have one shape, got \(2,\)"),
        (torch.rand(2), torch.tensor([0, 2]), "F1Max: target must hold only 0 and 1, got 2"),
    ],
    ids=["shapes", "label"],
)
def test_a_wrong_batch_is_refused(preds, target, message):
    with pytest.raises(ValueError, match=message):
        exact.F1Max().update(preds, target)


def test_computing_a_single_class_is_refused():
    metric = exact.AUROC()
    metric.update(torch.rand(2), torch.zeros(2))
    with pytest.raises(
        ValueError, match=r"labels must hold both 0 and 1 for auroc, got only 0 \(normal\)"
    ):
        metric.compute()


def test_without_torchmetrics_the_error_names_what_to_install():
    script = "import sys; sys.modules['torchmetrics'] = None; import msflow_ext.compat.torchmetrics"
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True)
    assert "needs torchmetrics: pip install 'msflow-ext[torchmetrics]'" in done.stderr
