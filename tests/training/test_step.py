"""Train steps clip the gradient and refuse an unknown precision."""

from __future__ import annotations

import pytest
import torch

from msflow_ext.training.loop import make_optimizer, train_epoch


def test_without_clip_the_whole_gradient_is_used_and_weight_decay_is_that_of_adam():
    weights = {}
    for clip in (None, 1e-3):
        head = torch.nn.Linear(2, 1)
        torch.nn.init.ones_(head.weight)
        head.loss = lambda x, head=head: head(x[0]).sum()  # type: ignore[assignment]
        sgd = torch.optim.SGD(head.parameters(), lr=1.0)
        ((_, norm),) = train_epoch(head, sgd, [[torch.tensor([3.0, 4.0])]], clip=clip)
        assert norm == pytest.approx(26**0.5)
        weights[clip] = head.weight.tolist()[0]
    assert weights[None] == [-2.0, -3.0]
    assert weights[1e-3] == pytest.approx([1.0, 1.0], abs=1e-3)
    assert make_optimizer(torch.nn.Linear(2, 1), 0.25).param_groups[0]["weight_decay"] == 0.25


def test_an_unknown_precision_is_refused_by_name():
    head = torch.nn.Linear(2, 1)
    with pytest.raises(ValueError, match="precision must be one of float32, bfloat16, got 'half'"):
        train_epoch(head, make_optimizer(head), [], clip=None, precision="half")  # pyright: ignore[reportArgumentType]
