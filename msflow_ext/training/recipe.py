"""Recipes of training: the papers' settings, and the rate, order and noise of each epoch."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass, field, fields
from itertools import repeat
from typing import TYPE_CHECKING, Any

from msflow_ext.choices import CHOICES, Cache, Fit, Memory, Precision, Schedule

if TYPE_CHECKING:
    from torch import Tensor


@dataclass(frozen=True, repr=False)
class Recipe:
    """Settings of training. The defaults are those of the MSFlow paper; ``PRESETS`` has others.

    The command line has a flag for each attribute, with this text as its help.

    Attributes:
        epochs: passes over the training images (the paper's sub-epochs).
        batch_size: images per training step; the last step of an epoch may have fewer.
        lr: learning rate of Adam between warm-up and decay.
        clip: largest norm of the whole gradient; None for no limit.
        weight_decay: weight decay of Adam, added to the gradient.
        warmup: share of the epochs in which the learning rate rises linearly to ``lr``.
        warmup_from: learning rate at the start of the warm-up, as a factor of ``lr``.
        schedule: decay of the learning rate: ``steps``, by the factor ``decay`` at each of ``milestones``; or
            ``cosine``, half a wave from ``lr`` to 0.
        decay: factor of the learning rate at each of ``milestones``.
        milestones: shares of the epochs after which the learning rate decays; none for a constant rate.
        noise: standard deviation of normal noise on the features, new in every epoch, which acts as regularization.
        seed: seed of the order of the images, of the noise and, on the command line, of the initial weights.
        precision: precision of the flows in training: ``float32``, or ``bfloat16`` (autocast; weights stay float32,
            cached features are halved).
        memory: what training keeps for the backward pass: ``lean`` recomputes cheap activations; ``reversible`` keeps
            no activations, is slower and needs ``float32``.
        cache: where the backbone's features are kept: ``memory`` (on disk if they need more than half of the free
            memory), ``disk`` or ``off``.
        eval_every: epochs between tests; by default a tenth of all epochs.
        workers: threads that decode images.
        fit: how images become square: ``resize`` fills the square, ``pad`` keeps their aspect.
        hold_out: share of the training images that are not trained on, but set the thresholds (see
            :class:`msflow_ext.evaluation.calibration.Calibration`); the papers hold out none.
        false_alarms: share of normal images that may exceed a threshold.

    Raises:
        ValueError: a value is out of range; the message names it.

    Examples:
        >>> recipe = Recipe(epochs=20, schedule="cosine", hold_out=0.2)
        >>> recipe  # what differs from the paper
        Recipe(epochs=20, schedule='cosine', hold_out=0.2)
        >>> recipe.learning_rate(epoch=0), recipe.is_tested(2)  # the warm-up begins at a tenth
        (1e-05, True)
    """

    epochs: int = 100
    batch_size: int = 8
    lr: float = 1e-4
    clip: float | None = 2.0
    weight_decay: float = 0.0
    warmup: float = 0.12
    warmup_from: float = 0.1
    schedule: Schedule = "steps"
    decay: float = 0.33
    milestones: tuple[float, ...] = (0.7, 0.9)
    noise: float = 0.0
    seed: int = 9826
    precision: Precision = "float32"
    memory: Memory = "lean"
    cache: Cache = "memory"
    eval_every: int | None = None
    workers: int = 2
    fit: Fit = "resize"
    hold_out: float = 0.0
    false_alarms: float = 0.05

    def __post_init__(self) -> None:
        object.__setattr__(self, "milestones", tuple(self.milestones))
        for (expectation, holds), names in _EXPECTED.items():
            for name in names:
                value = getattr(self, name)
                if not (holds(value) if value is not None else name in _OPTIONAL):
                    raise ValueError(f"{name} must be {expectation}, got {value}")
        for name in _WORDS:
            value, words = getattr(self, name), CHOICES[name]
            if value not in words:
                raise ValueError(f"{name} must be one of {', '.join(words)}, got {value!r}")
        if self.memory == "reversible" and self.precision != "float32":
            raise ValueError(
                f"precision must be float32 if memory is 'reversible', got {self.precision!r}"
            )

    def __repr__(self) -> str:
        changed = [(each.name, getattr(self, each.name)) for each in fields(self)]
        changed = [(name, value) for name, value in changed if value != getattr(Recipe, name)]
        return f"Recipe({', '.join(f'{name}={value!r}' for name, value in changed)})"

    def learning_rate(self, epoch: int) -> float:
        """Return the learning rate of ``epoch``, counted from 0.

        It equals torch's ``LinearLR`` chained with ``MultiStepLR`` or ``CosineAnnealingLR``.
        """
        rising = round(self.warmup * self.epochs)
        rise = min(epoch / rising, 1.0) if rising else 1.0
        rate = self.lr * (self.warmup_from + (1 - self.warmup_from) * rise)
        if self.schedule == "cosine":
            return rate * (1 + math.cos(math.pi * epoch / self.epochs)) / 2
        return rate * self.decay ** sum(epoch >= round(s * self.epochs) for s in self.milestones)

    def is_tested(self, epoch: int) -> bool:
        """Return whether the model is tested after this number of epochs."""
        every = self.eval_every or math.ceil(self.epochs / 10)
        return epoch == self.epochs or (epoch > 0 and epoch % every == 0)

    def order(self, epoch: int, images: int) -> Tensor:
        """Return the order of the images in ``epoch``, ``(images,)`` int64. It depends only on seed and epoch."""
        import numpy as np
        import torch

        return torch.from_numpy(np.random.default_rng((self.seed, epoch)).permutation(images))

    def split(self, images: int) -> tuple[list[int], list[int]]:
        """Return the indices of the images to train on and of those to hold out, which depend on the seed.

        Raises:
            ValueError: too few images are held out for the rate of false alarms, or none are left.
        """
        import numpy as np

        from msflow_ext.evaluation.calibration import images_needed

        held = round(self.hold_out * images)
        if not self.hold_out:
            return list(range(images)), []
        needed = images_needed(self.false_alarms)
        if held < needed or held == images:
            raise ValueError(
                f"hold_out must hold out {needed} or more of {images} training images for "
                f"false_alarms {self.false_alarms:g}, and leave 1 to train on, got {self.hold_out:g}, "
                f"which holds out {held}: {_offer(images, held, needed)}"
            )
        order = np.random.default_rng((self.seed, 0, 1)).permutation(images).tolist()
        return sorted(order[held:]), sorted(order[:held])

    def disturbed(
        self,
        epoch: int,
        batches: Iterable[list[Tensor]],
        shares: Iterable[tuple[Tensor, int]] | None = None,
    ) -> Iterator[list[Tensor]]:
        """Yield the batches of an epoch with noise, which depends only on seed and epoch.

        Args:
            epoch: the epoch, counted from 0.
            batches: features of each batch, or this process's share of them.
            shares: for shares, the indices of each share within its batch, and the size of the batch.
        """
        import numpy as np
        import torch

        seed = np.random.SeedSequence((self.seed, epoch)).generate_state(1)
        generator = torch.Generator().manual_seed(int(seed[0]))
        for batch, share in zip(batches, shares or repeat(None), strict=False):
            if self.noise:
                places, images = share or (slice(None), len(batch[0]))
                shapes = [(images, *x.shape[1:]) for x in batch]
                drawn = [torch.randn(shape, generator=generator)[places] for shape in shapes]
                batch = [x + self.noise * n.to(x) for x, n in zip(batch, drawn, strict=True)]
            yield batch


def _offer(images: int, held: int, needed: int) -> str:
    """Return a sentence with values that hold out enough of so many images."""
    if images < 2:
        return "at least 2 images are needed"
    rate = ""
    if needed >= images:
        needed = min(max(held, 1), images - 1)
        rate = f" with false_alarms {math.ceil(1000 / (needed + 1)) / 1000:g}"
    shares = (round(needed / images, digits) for digits in (2, 3, 6, 12))
    share = next(share for share in shares if round(share * images) == needed)
    return f"use hold_out {share:g}{rate}"


#: Expectations of numbers, in words and as a condition, with the attributes that they apply to.
_EXPECTED: dict[tuple[str, Callable[[Any], bool]], tuple[str, ...]] = {
    ("1 or more", lambda x: x >= 1): ("epochs", "batch_size", "eval_every", "workers"),
    ("above 0", lambda x: 0 < x < math.inf): ("lr", "clip", "warmup_from", "decay"),
    ("0 or more", lambda x: 0 <= x < math.inf): ("weight_decay", "noise"),
    ("a whole number from 0 to 2**64 - 1", lambda x: x % 1 == 0 and 0 <= x < 2**64): ("seed",),
    ("at most 2**31 - 1", lambda x: x < 2**31): ("epochs", "batch_size", "eval_every", "workers"),
    ("a share from 0 to 1", lambda x: 0 <= x <= 1): ("warmup",),
    ("shares from 0 to 1", lambda x: all(0 <= share <= 1 for share in x)): ("milestones",),
    ("a share from 0 to below 1", lambda x: 0 <= x < 1): ("hold_out",),
    ("above 0 and below 1", lambda x: 0 < x < 1): ("false_alarms",),
}
_OPTIONAL = ("clip", "eval_every")
_WORDS = ("schedule", "precision", "memory", "cache", "fit")


@dataclass(frozen=True)
class Preset:
    """Recipe, and arguments of the model that belong to it.

    Attributes:
        recipe: settings of training.
        model: arguments of the model.

    Examples:
        >>> preset = PRESETS["robust"]["msflow"]
        >>> preset.recipe.lr, preset.model["blocks"]
        (0.001, (1, 1, 2))
    """

    recipe: Recipe
    model: Mapping[str, Any] = field(default_factory=dict)


_CONSTANT: dict[str, Any] = {"clip": None, "warmup": 0.0, "milestones": ()}

_SHORT = Recipe(lr=1e-3, warmup=0.0, schedule="cosine", noise=0.5)
_WHITENED: dict[str, Any] = {
    "standardize": True,
    "whiten": True,
    "score": "map",
    "anomaly_map": "clamped",
    "smoothing": 4.0,
}

#: Settings of the papers, and settings with better and steadier results on other data (``docs/notes/accuracy.md``).
PRESETS: dict[str, dict[str, Preset]] = {
    "paper": {
        "msflow": Preset(Recipe()),
        "fastflow": Preset(
            Recipe(epochs=500, batch_size=32, lr=1e-3, weight_decay=1e-5, **_CONSTANT)
        ),
    },
    "robust": {
        "msflow": Preset(_SHORT, {"blocks": (1, 1, 2), "top_k": 0.01, **_WHITENED}),
        "fastflow": Preset(_SHORT, {"layer_norm": False, **_WHITENED}),
    },
}
