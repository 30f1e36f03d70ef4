"""The exact metrics as classes for torchmetrics, Lightning and anomalib.

Exact means that all scores are kept until ``reset()``: 5 bytes each in host memory (9 where they
are float64), and as many again while ``compute()`` joins them. ``limit`` bounds that.
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
        "these classes need the package torchmetrics: pip install 'msflow-ext[torchmetrics]'"
    ) from error

MOST = 2**31 - 1  # scores that the metrics rank: 11 GB


class ExactMetric(Metric):
    """A metric of all scores that ``update`` was given; equal to the function of :mod:`msflow_ext.metrics`.

    ``update(preds, target)`` takes scores or maps and what is true of them, 0 or 1, of one shape.
    Calling the metric also computes the value of that batch, which needs both classes in it;
    ``update`` does not. Processes of a distributed run share their scores before ``compute``.

    Args:
        function: of labels and scores, to a float.
        limit: the most scores to keep.
        kwargs: those of torchmetrics; ``compute_on_cpu`` is True unless given.

    Raises:
        ValueError: in ``update``, shapes that differ, or more scores than ``limit``.
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
                f"{name}: keeps at most {self.limit} scores, got {preds.numel()} after {kept}"
            )
        wrong = target[(target != 0) & (target != 1)]
        if wrong.numel():
            raise ValueError(f"{name}: target must hold only 0 and 1, got {wrong[0].item()}")
        wide = torch.float64 if preds.dtype == torch.float64 else torch.float32
        self.preds.append(preds.detach().to(wide))
        self.target.append(target != 0)

    def compute(self) -> Tensor:
        """Return the metric of all that was kept, a float64 scalar."""
        scores, truth = dim_zero_cat(self.preds), dim_zero_cat(self.target)
        return torch.tensor(self.function(truth, scores), dtype=torch.float64, device=self.device)


class AUROC(ExactMetric):
    """:func:`msflow_ext.metrics.auroc` of image scores ``(N,)`` or maps ``(N, H, W)``."""

    def __init__(self, limit: int = MOST, **kwargs: Any) -> None:
        super().__init__(metrics.auroc, limit, **kwargs)


class AveragePrecision(ExactMetric):
    """:func:`msflow_ext.metrics.average_precision` of image scores or maps."""

    def __init__(self, limit: int = MOST, **kwargs: Any) -> None:
        super().__init__(metrics.average_precision, limit, **kwargs)


class F1Max(ExactMetric):
    """:func:`msflow_ext.metrics.f1_max` of image scores or maps."""

    def __init__(self, limit: int = MOST, **kwargs: Any) -> None:
        super().__init__(metrics.f1_max, limit, **kwargs)


class AUPRO(ExactMetric):
    """:func:`msflow_ext.metrics.aupro` of maps ``(N, H, W)``."""

    def __init__(self, max_fpr: float = 0.3, limit: int = MOST, **kwargs: Any) -> None:
        super().__init__(partial(metrics.aupro, max_fpr=max_fpr), limit, **kwargs)


class AUPIMO(ExactMetric):
    """:func:`msflow_ext.metrics.aupimo` of maps ``(N, H, W)``.

    ``update(preds, target, labels)`` also takes the images' labels ``(N,)``, by which a defective image
    whose mask is empty is not taken for a normal one; in every call or in none.
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
            raise ValueError(f"AUPIMO: labels must be (N,), got {shapes}")
        super().update(preds, target)
        if labels is not None:
            self.labels.append(labels)

    def compute(self) -> Tensor:
        """Return the metric of all that was kept, a float64 scalar."""
        scores, truth = dim_zero_cat(self.preds), dim_zero_cat(self.target)
        labels = dim_zero_cat(self.labels) if len(self.labels) else None
        value = metrics.aupimo(truth, scores, self.fpr_bounds, labels)
        return torch.tensor(value, dtype=torch.float64, device=self.device)
