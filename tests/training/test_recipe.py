"""A recipe decides the order, the noise, the split and the tests of a training, the same in every version."""

from __future__ import annotations

from collections.abc import Iterator

import pytest
import torch
from torch import Tensor

from msflow_ext.training.recipe import Recipe


def with_tests(epochs: int, eval_every: int | None = None) -> list[int]:
    """After how many epochs the model is tested."""
    recipe = Recipe(epochs=epochs, eval_every=eval_every)
    return [epoch for epoch in range(recipe.epochs + 1) if recipe.is_tested(epoch)]


def test_the_model_is_tested_every_so_many_epochs_and_after_the_last():
    assert with_tests(epochs=7, eval_every=3) == [3, 6, 7]
    assert with_tests(epochs=3, eval_every=1) == [1, 2, 3]
    assert with_tests(epochs=3, eval_every=9) == [3]


def test_a_training_of_any_length_is_tested_at_most_ten_times_by_default():
    assert with_tests(epochs=21) == [3, 6, 9, 12, 15, 18, 21]
    assert with_tests(epochs=25) == [3, 6, 9, 12, 15, 18, 21, 24, 25]
    assert with_tests(epochs=100) == list(range(10, 101, 10))
    assert with_tests(epochs=4) == [1, 2, 3, 4]


def test_a_seed_gives_the_recorded_order_and_split():
    """So that a training that an earlier version began is continued."""
    recipe = Recipe(seed=3, hold_out=0.4, false_alarms=0.3)
    assert [recipe.order(epoch, 9).tolist() for epoch in (0, 1)] == [
        [7, 0, 2, 1, 4, 6, 5, 3, 8],
        [5, 1, 2, 4, 0, 7, 8, 6, 3],
    ]
    assert recipe.split(10) == ([0, 1, 2, 4, 5, 6], [3, 7, 8, 9])
    assert Recipe(seed=3).split(3) == ([0, 1, 2], [])


def test_shares_of_epochs_and_images_are_rounded_to_the_nearest():
    recipe = Recipe(epochs=10, warmup=0.14, hold_out=0.24, false_alarms=0.4)
    assert recipe.learning_rate(0) == pytest.approx(recipe.lr * recipe.warmup_from)
    assert recipe.learning_rate(1) == recipe.lr
    assert len(recipe.split(10)[1]) == 2


def test_as_many_images_are_held_out_as_the_rate_needs_and_one_is_left():
    assert len(Recipe(hold_out=0.75, false_alarms=0.25).split(4)[1]) == 3
    for hold_out, images in ((0.5, 4), (0.9, 4)):
        with pytest.raises(ValueError, match=r"false_alarms 0\.25 needs 3 or more to hold out"):
            Recipe(hold_out=hold_out, false_alarms=0.25).split(images)


def test_the_noise_of_a_part_of_a_batch_is_that_of_its_places_in_the_whole():
    recipe = Recipe(seed=3, noise=0.5)
    places = [torch.tensor([2, 0]), torch.tensor([1])]

    def batches(parts: list[Tensor] | None = None) -> Iterator[list[Tensor]]:
        for i in range(2):
            rows = slice(None) if parts is None else parts[i]
            yield [torch.ones(3, 2, 4, 4)[rows], torch.ones(3, 5, 2, 2)[rows]]

    whole = list(recipe.disturbed(1, batches()))
    shares = ((each, 3) for each in places)
    for part, batch, where in zip(
        recipe.disturbed(1, batches(places), shares), whole, places, strict=True
    ):
        for found, wanted in zip(part, batch, strict=True):
            torch.testing.assert_close(found, wanted[where], rtol=0, atol=0)
