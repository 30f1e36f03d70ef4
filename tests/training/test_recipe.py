"""A recipe sets order, noise, split and tests of a training, the same in every version."""

from __future__ import annotations

import re
from collections.abc import Iterator
from dataclasses import replace

import pytest
import torch
from torch import Tensor
from torch.optim.lr_scheduler import CosineAnnealingLR, LinearLR, MultiStepLR

from msflow_ext.training.recipe import PRESETS, Recipe


def with_tests(epochs: int, eval_every: int | None = None) -> list[int]:
    """Return the numbers of epochs after which the model is tested."""
    recipe = Recipe(epochs=epochs, eval_every=eval_every)
    return [epoch for epoch in range(recipe.epochs + 1) if recipe.is_tested(epoch)]


def test_the_model_is_tested_at_intervals_and_after_the_last_epoch():
    assert with_tests(epochs=7, eval_every=3) == [3, 6, 7]
    assert with_tests(epochs=3, eval_every=1) == [1, 2, 3]
    assert with_tests(epochs=3, eval_every=9) == [3]


def test_a_training_of_any_length_is_tested_at_most_ten_times_by_default():
    assert with_tests(epochs=21) == [3, 6, 9, 12, 15, 18, 21]
    assert with_tests(epochs=25) == [3, 6, 9, 12, 15, 18, 21, 24, 25]
    assert with_tests(epochs=100) == list(range(10, 101, 10))
    assert with_tests(epochs=4) == [1, 2, 3, 4]


def test_a_seed_gives_the_recorded_order_and_split():
    """A training of an earlier version can then be resumed."""
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


def test_enough_images_for_the_rate_are_held_out_and_one_is_left():
    assert len(Recipe(hold_out=0.75, false_alarms=0.25).split(4)[1]) == 3
    for hold_out, images in ((0.5, 4), (0.9, 4)):
        with pytest.raises(
            ValueError, match=r"must hold out 3 or more of 4 .* for false_alarms 0\.25"
        ):
            Recipe(hold_out=hold_out, false_alarms=0.25).split(images)


@pytest.mark.family("early refusals")
@pytest.mark.parametrize("images", [2, 3, 7, 10, 40, 1000])
@pytest.mark.parametrize("hold_out", [0.001, 0.3, 0.999])
@pytest.mark.parametrize("false_alarms", [0.001, 0.05, 0.3])
def test_suggested_values_of_hold_out_are_accepted(images, hold_out, false_alarms):
    recipe = Recipe(hold_out=hold_out, false_alarms=false_alarms)
    try:
        kept, held = recipe.split(images)
    except ValueError as error:
        words = re.findall(r"(hold_out|false_alarms) ([\d.e-]+)", str(error).partition(": ")[2])
        offered = {name: float(value) for name, value in words}
        assert "hold_out" in offered
        kept, held = replace(recipe, **offered).split(images)
    assert len(kept) >= 1
    assert len(held) >= 1


@pytest.mark.family("early refusals")
def test_holding_out_needs_two_images():
    with pytest.raises(ValueError, match="at least 2 images are needed"):
        Recipe(hold_out=0.5, false_alarms=0.5).split(1)


def test_a_share_of_a_batch_has_the_noise_of_the_whole_batch():
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
        for found, expected in zip(part, batch, strict=True):
            torch.testing.assert_close(found, expected[where], rtol=0, atol=0)


def test_the_learning_rate_equals_that_of_the_schedulers_of_torch():
    recipe = Recipe()
    adam = torch.optim.Adam([torch.nn.Parameter(torch.zeros(1))], lr=recipe.lr)
    schedulers = [LinearLR(adam, 0.1, total_iters=12), MultiStepLR(adam, [70, 90], 0.33)]
    for epoch in range(recipe.epochs):
        assert recipe.learning_rate(epoch) == pytest.approx(adam.param_groups[0]["lr"], rel=1e-12)
        adam.step()
        for scheduler in schedulers:
            scheduler.step()


def test_the_cosine_equals_that_of_torch_and_the_rate_of_fastflow_is_constant():
    cosine = Recipe(epochs=7, schedule="cosine", warmup=0.0)
    adam = torch.optim.Adam([torch.nn.Parameter(torch.zeros(1))], lr=cosine.lr)
    scheduler = CosineAnnealingLR(adam, 7)
    for epoch in range(7):
        assert cosine.learning_rate(epoch) == pytest.approx(adam.param_groups[0]["lr"], rel=1e-12)
        adam.step()
        scheduler.step()
    assert {PRESETS["paper"]["fastflow"].recipe.learning_rate(epoch) for epoch in range(500)} == {
        1e-3
    }


def test_noise_is_new_in_every_epoch_and_depends_on_the_seed():
    def seen(seed: int, epoch: int, noise: float = 0.5) -> torch.Tensor:
        batches = iter([[torch.zeros(50, 8, 4, 4)], [torch.ones(50, 8, 4, 4)]])
        return torch.stack([b for (b,) in Recipe(seed=seed, noise=noise).disturbed(epoch, batches)])

    first = seen(1, 0)
    assert torch.equal(first, seen(1, 0))
    for mean, batch in enumerate(first):
        assert batch.mean().item() == pytest.approx(mean, abs=0.02)
        assert batch.std().item() == pytest.approx(0.5, rel=0.02)
    for other in (seen(1, 1), seen(2, 0), torch.stack([first[1] - 1, first[0] + 1])):
        assert (first - other).std().item() == pytest.approx(0.5**0.5, rel=0.02)
    assert torch.equal(seen(1, 0, noise=0.0)[0], torch.zeros(50, 8, 4, 4))


def test_warm_up_and_decay_keep_their_proportions_in_a_short_training():
    rates = [Recipe(epochs=24, lr=1.0).learning_rate(epoch) for epoch in range(24)]
    assert rates[:4] == pytest.approx([0.1, 0.4, 0.7, 1.0])
    assert [epoch for epoch in range(1, 24) if rates[epoch] < rates[epoch - 1]] == [17, 22]


def test_the_order_is_a_new_permutation_each_epoch_and_depends_on_the_seed():
    recipe = Recipe(seed=3)
    assert sorted(recipe.order(0, 9).tolist()) == list(range(9))
    assert recipe.order(5, 9).equal(Recipe(seed=3).order(5, 9))
    assert not recipe.order(0, 9).equal(recipe.order(1, 9))
    assert not recipe.order(0, 9).equal(Recipe(seed=4).order(0, 9))


@pytest.mark.parametrize(
    ("wrong", "sentence"),
    [
        ({"epochs": 0}, "epochs must be 1 or more, got 0"),
        ({"lr": float("nan")}, "lr must be above 0, got nan"),
        ({"clip": 0.0}, "clip must be above 0, got 0.0"),
        ({"weight_decay": -1e-5}, "weight_decay must be 0 or more, got -1e-05"),
        ({"noise": float("nan")}, "noise must be 0 or more, got nan"),
        ({"schedule": "steep"}, "schedule must be one of steps, cosine, got 'steep'"),
        ({"milestones": (0.5, 1.5)}, r"milestones must be shares from 0 to 1, got \(0.5, 1.5\)"),
        ({"seed": -1}, r"seed must be a whole number from 0 to 2\*\*64 - 1, got -1"),
        (
            {"seed": 2**64},
            r"seed must be a whole number from 0 to 2\*\*64 - 1, got 18446744073709551616",
        ),
        ({"seed": 0.5}, r"seed must be a whole number from 0 to 2\*\*64 - 1, got 0.5"),
        ({"epochs": 2**31}, r"epochs must be at most 2\*\*31 - 1, got 2147483648"),
        ({"batch_size": 10**30}, r"batch_size must be at most 2\*\*31 - 1, got 1"),
        ({"precision": "float8"}, "precision must be one of float32, bfloat16, got 'float8'"),
        ({"cache": "tape"}, "cache must be one of memory, disk, off, got 'tape'"),
        ({"hold_out": 1.0}, "hold_out must be a share from 0 to below 1, got 1.0"),
        ({"false_alarms": 0.0}, "false_alarms must be above 0 and below 1, got 0.0"),
        ({"fit": "crop"}, "fit must be one of resize, pad, got 'crop'"),
    ],
)
def test_a_recipe_names_the_value_that_it_refuses(wrong, sentence):
    with pytest.raises(ValueError, match=sentence):
        Recipe(**wrong)
