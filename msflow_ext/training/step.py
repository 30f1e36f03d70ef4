"""Train steps on batches of features, in one process or in several."""

from __future__ import annotations

import math
from collections.abc import Iterable
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.utils import clip_grad_norm_

from msflow_ext.choices import PRECISIONS, Precision
from msflow_ext.distributed.ranks import Ranks


class TrainingDiverged(RuntimeError):  # noqa: N818  (it says what happened)
    """Error of a loss, a gradient or a score that is not finite.

    Attributes:
        step: step within the epoch, counted from 0.

    Examples:
        >>> raise TrainingDiverged("the loss is nan", step=2)
        Traceback (most recent call last):
        msflow_ext.training.step.TrainingDiverged: the loss is nan
    """

    def __init__(self, what: str, step: int = 0) -> None:
        super().__init__(what)
        self.step = step


def train_epoch(
    head: Any,
    optimizer: torch.optim.Optimizer,
    batches: Iterable[list[Tensor]],
    *,
    clip: float | None,
    precision: Precision = "float32",
    ranks: Ranks | None = None,
) -> list[tuple[float, float]]:
    """Take one optimizer step per batch, and return the loss and gradient norm of each step.

    Args:
        head: module with ``loss(features)``, see :class:`msflow_ext.models.base.FlowHead`.
        optimizer: optimizer of the parameters of ``head``.
        batches: features ``[(N, C_i, H_i, W_i)]`` of each batch, on the device of ``head``.
        clip: largest norm of the whole gradient; None for no limit.
        precision: ``float32`` computes in the dtype of parameters and features, ``bfloat16`` under autocast.
        ranks: the processes that train together. Each batch is then this process's share, which may be empty, and the
            step is that of the whole batch.

    Returns:
        Loss, and gradient norm before clipping, of each step.

    Raises:
        ValueError: ``precision`` is unknown.
        TrainingDiverged: the loss or the gradient is not finite; the parameters are still those before the step.

    Examples:
        >>> from msflow_ext import FastFlowHead
        >>> head = FastFlowHead([8], steps=1)
        >>> batch = [torch.randn(4, 8, 6, 6)]
        >>> steps = train_epoch(head, make_optimizer(head), [batch, batch], clip=1.0)
        >>> len(steps), steps[1][0] < steps[0][0]
        (2, True)
    """
    if precision not in PRECISIONS:
        raise ValueError(f"precision must be one of {', '.join(PRECISIONS)}, got {precision!r}")
    ranks, steps, mixed = ranks or Ranks(), [], precision == "bfloat16"
    for step, features in enumerate(batches):
        images, loss = len(features[0]), features[0].new_zeros(())
        with ranks.agreed():
            if images:
                with torch.autocast(loss.device.type, torch.bfloat16, enabled=mixed):
                    loss = head.loss(features)
                loss.backward()
        loss = ranks.average(head.parameters(), loss, images)
        norm = clip_grad_norm_(head.parameters(), math.inf if clip is None else clip)
        steps.append((loss.item(), norm.item()))
        for name, value in zip(("loss", "gradient norm"), steps[-1], strict=True):
            if not math.isfinite(value):
                raise TrainingDiverged(f"the {name} is {value}", step)
        optimizer.step()
        optimizer.zero_grad()
    return steps


def make_optimizer(head: nn.Module, weight_decay: float = 0.0) -> torch.optim.Adam:
    """Return Adam over all parameters of ``head``; training sets the learning rate before each epoch.

    Args:
        head: module to optimize.
        weight_decay: weight decay, added to the gradient.

    Examples:
        >>> make_optimizer(nn.Linear(2, 1), weight_decay=0.1).param_groups[0]["weight_decay"]
        0.1
    """
    # With fused, a CPU step of 2.8 M parameters takes 3 ms instead of 37.
    return torch.optim.Adam(head.parameters(), weight_decay=weight_decay, fused=True)
