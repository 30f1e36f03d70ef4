"""Exact metrics as classes for torchmetrics, Lightning and anomalib.

Exact metrics keep all scores until ``reset()``: 5 bytes each in host memory (9 for float64 scores),
and as many again while ``compute()`` concatenates them. ``limit`` bounds this memory.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any

import torch
from torch import Tensor

from msflow_ext import metrics

try:
    from torchmetrics import Metric
    from torchmetrics.utilities import dim_zero_cat
except ModuleNotFoundError as error:
    raise ModuleNotFoundError(
        "msflow_ext.compat.torchmetrics needs torchmetrics: pip install 'msflow-ext[torchmetrics]'"
    ) from error

MOST = 2**31 - 1  # largest number of scores that the metrics can rank: 11 GB


class ExactMetric(Metric):
    """Metric of all scores that ``update`` received, computed by a function of :mod:`msflow_ext.metrics`.

    ``update(preds, target)`` accepts scores or maps, and their labels or masks (0 or 1) in the same
    shape. Calling the metric also computes the value of the batch, so the batch must have both classes.
    Processes of a distributed run gather their scores before ``compute``.

    Args:
        function: maps labels and scores to a float.
        limit: largest number of scores to keep.
        kwargs: arguments of ``torchmetrics.Metric``; ``compute_on_cpu`` is True unless given.

    Raises:
        ValueError: by ``update``, if the shapes differ, a label is not 0 or 1, or more scores than
            ``limit`` are kept.

    Examples:
        >>> import torch
        >>> from msflow_ext import metrics
        >>> from msflow_ext.compat.torchmetrics import ExactMetric
        >>> metric = ExactMetric(metrics.auroc)
        >>> metric.update(torch.tensor([0.1, 0.4, 0.9]), torch.tensor([0, 1, 1]))
        >>> metric.compute()
        tensor(1., dtype=torch.float64)
    """

    is_differentiable = False
    higher_is_better = True
    full_state_update = False
    plot_lower_bound = 0.0
    plot_upper_bound = 1.0
    preds: list[Tensor]
    target: list[Tensor]

    def __init__(
        self, function: Callable[[Tensor, Tensor], float], limit: int = MOST, **kwargs: Any
    ) -> None:
        super().__init__(**{"compute_on_cpu": True, **kwargs})
        self.function = function
        self.limit = limit
        self.add_state("preds", [], dist_reduce_fx="cat")
        self.add_state("target", [], dist_reduce_fx="cat")

    def update(self, preds: Tensor, target: Tensor) -> None:
        """Keep scores and their labels, or maps and their masks."""
        name = type(self).__name__
        if preds.shape != target.shape:
            shapes = f"{tuple(preds.shape)} and {tuple(target.shape)}"
            raise ValueError(f"{name}: preds and target must have one shape, got {shapes}")
        kept = sum(each.numel() for each in self.preds)
        if kept + preds.numel() > self.limit:
            raise ValueError(
                f"{name}: preds must have at most {self.limit} scores in all, got {preds.numel()} "
                f"after {kept}"
            )
        wrong = target[(target != 0) & (target != 1)]
        if wrong.numel():
            raise ValueError(f"{name}: target must hold only 0 and 1, got {wrong[0].item()}")
        dtype = torch.float64 if preds.dtype == torch.float64 else torch.float32
        self.preds.append(preds.detach().to(dtype))
        self.target.append(target != 0)

    def compute(self) -> Tensor:
        """Return the metric of all kept scores, a float64 scalar."""
        scores, truth = dim_zero_cat(self.preds), dim_zero_cat(self.target)
        return torch.tensor(self.function(truth, scores), dtype=torch.float64, device=self.device)


class AUROC(ExactMetric):
    """Area under the ROC curve of scores ``(N,)`` or maps ``(N, H, W)``, see :func:`msflow_ext.metrics.auroc`.

    Args:
        limit, kwargs: as for :class:`ExactMetric`.

    Examples:
        >>> import torch
        >>> from msflow_ext.compat.torchmetrics import AUROC
        >>> metric = AUROC()
        >>> metric.update(torch.tensor([0.1, 0.6]), torch.tensor([0, 1]))
        >>> metric.update(torch.tensor([0.5, 0.4]), torch.tensor([0, 1]))
        >>> metric.compute()
        tensor(0.7500, dtype=torch.float64)
    """

    def __init__(self, limit: int = MOST, **kwargs: Any) -> None:
        super().__init__(metrics.auroc, limit, **kwargs)


class AveragePrecision(ExactMetric):
    """Average precision of scores or maps, see :func:`msflow_ext.metrics.average_precision`.

    Args:
        limit, kwargs: as for :class:`ExactMetric`.

    Examples:
        >>> import torch
        >>> from msflow_ext.compat.torchmetrics import AveragePrecision
        >>> metric = AveragePrecision()
        >>> metric.update(torch.tensor([0.1, 0.6, 0.5]), torch.tensor([0, 1, 1]))
        >>> metric.compute()
        tensor(1., dtype=torch.float64)
    """

    def __init__(self, limit: int = MOST, **kwargs: Any) -> None:
        super().__init__(metrics.average_precision, limit, **kwargs)


class F1Max(ExactMetric):
    """Largest F1 of scores or maps over all thresholds, see :func:`msflow_ext.metrics.f1_max`.

    Args:
        limit, kwargs: as for :class:`ExactMetric`.

    Examples:
        >>> import torch
        >>> from msflow_ext.compat.torchmetrics import F1Max
        >>> metric = F1Max()
        >>> metric.update(torch.tensor([0.1, 0.6, 0.5]), torch.tensor([0, 1, 1]))
        >>> metric.compute()
        tensor(1., dtype=torch.float64)
    """

    def __init__(self, limit: int = MOST, **kwargs: Any) -> None:
        super().__init__(metrics.f1_max, limit, **kwargs)


class AUPRO(ExactMetric):
    """Area under the per-region overlap curve of maps ``(N, H, W)``, see :func:`msflow_ext.metrics.aupro`.

    Args:
        max_fpr: as for :func:`msflow_ext.metrics.aupro`.
        limit, kwargs: as for :class:`ExactMetric`.

    Examples:
        >>> import torch
        >>> from msflow_ext.compat.torchmetrics import AUPRO
        >>> masks = torch.zeros(2, 8, 8, dtype=torch.int64)
        >>> masks[1, 2:4, 2:4] = 1
        >>> metric = AUPRO()
        >>> metric.update(masks + 0.1, masks)
        >>> metric.compute()
        tensor(1., dtype=torch.float64)
    """

    def __init__(self, max_fpr: float = 0.3, limit: int = MOST, **kwargs: Any) -> None:
        super().__init__(partial(metrics.aupro, max_fpr=max_fpr), limit, **kwargs)


class AUPIMO(ExactMetric):
    """Area under the per-image overlap curve of maps ``(N, H, W)``, see :func:`msflow_ext.metrics.aupimo`.

    ``update(preds, target, labels)`` also accepts the images' labels ``(N,)``. Without them, a defective
    image with an empty mask counts as normal. Pass labels in every call or in none.

    Args:
        fpr_bounds: as for :func:`msflow_ext.metrics.aupimo`.
        limit, kwargs: as for :class:`ExactMetric`.

    Examples:
        >>> import torch
        >>> from msflow_ext.compat.torchmetrics import AUPIMO
        >>> masks = torch.zeros(2, 8, 8, dtype=torch.int64)
        >>> masks[1, 2:4, 2:4] = 1
        >>> metric = AUPIMO()
        >>> metric.update(masks + torch.linspace(0, 0.5, 128).view(2, 8, 8), masks)
        >>> metric.compute()
        tensor(1., dtype=torch.float64)
    """

    labels: list[Tensor]

    def __init__(
        self,
        fpr_bounds: tuple[float, float] = (1e-5, 1e-4),
        limit: int = MOST,
        **kwargs: Any,
    ) -> None:
        super().__init__(metrics.aupimo, limit, **kwargs)
        self.fpr_bounds = fpr_bounds
        self.add_state("labels", [], dist_reduce_fx="cat")

    def update(self, preds: Tensor, target: Tensor, labels: Tensor | None = None) -> None:
        """Keep maps and their masks, and the labels of their images."""
        if labels is not None and labels.shape != preds.shape[:1]:
            shapes = f"{tuple(labels.shape)} for maps {tuple(preds.shape)}"
            raise ValueError(f"AUPIMO: labels must have shape (N,), got {shapes}")
        super().update(preds, target)
        if labels is not None:
            self.labels.append(labels)

    def compute(self) -> Tensor:
        """Return the metric of all kept scores, a float64 scalar."""
        scores, truth = dim_zero_cat(self.preds), dim_zero_cat(self.target)
        labels = dim_zero_cat(self.labels) if len(self.labels) else None
        value = metrics.aupimo(truth, scores, self.fpr_bounds, labels)
        return torch.tensor(value, dtype=torch.float64, device=self.device)
