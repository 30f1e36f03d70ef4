"""How to train: the paper's numbers, and what follows from them for each epoch."""

from __future__ import annotations

import math
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from msflow_ext.data import FITS
from msflow_ext.features import CACHES

PRECISIONS = ("float32", "bfloat16")


@dataclass(frozen=True)
class Recipe:
    """How to train; the defaults are the paper's.

    Attributes:
        epochs: passes over the training images (the paper's sub-epochs).
        batch_size: images per step; the last step of an epoch may have fewer.
        lr: Adam's learning rate between warm-up and decay.
        clip: largest norm of the whole gradient.
        warmup: share of the epochs in which the rate rises linearly from ``warmup_from`` times ``lr``.
        warmup_from: where it starts.
        decay: factor at each of ``milestones``.
        milestones: shares of the epochs.
        seed: of the order of the images.
        precision: ``float32``, or ``bfloat16`` (autocast; weights stay float32, cached features are halved).
        cache: where the backbone's features are kept: ``memory``, ``disk`` or ``off``.
        eval_every: epochs between tests; a tenth of them if None.
        workers: threads that decode images.
        fit: how images become square, see :class:`msflow_ext.data.Images`: ``resize`` or ``pad``.

    Raises:
        ValueError: a value out of range.
    """

    epochs: int = 100
    batch_size: int = 8
    lr: float = 1e-4
    clip: float = 2.0
    warmup: float = 0.12
    warmup_from: float = 0.1
    decay: float = 0.33
    milestones: tuple[float, ...] = (0.7, 0.9)
    seed: int = 9826
    precision: str = "float32"
    cache: str = "memory"
    eval_every: int | None = None
    workers: int = 2
    fit: str = "resize"

    def __post_init__(self) -> None:
        for name in ("epochs", "batch_size", "eval_every", "workers"):
            value = getattr(self, name)
            if value is not None and value < 1:
                raise ValueError(f"{name} must be 1 or more, got {value}")
        for name in ("lr", "clip", "warmup_from", "decay"):
            if not (0 < getattr(self, name) < math.inf):
                raise ValueError(f"{name} must be above 0, got {getattr(self, name)}")
        for share in (self.warmup, *self.milestones):
            if not 0 <= share <= 1:
                raise ValueError(f"warmup and milestones are shares in 0..1, got {share}")
        if self.seed < 0:
            raise ValueError(f"seed must be 0 or more, got {self.seed}")
        for name, known in (("precision", PRECISIONS), ("cache", CACHES), ("fit", FITS)):
            if getattr(self, name) not in known:
                raise ValueError(
                    f"{name} must be one of {', '.join(known)}, got {getattr(self, name)!r}"
                )

    def learning_rate(self, epoch: int) -> float:
        """Rate of ``epoch``, counted from 0: that of torch's ``LinearLR`` and ``MultiStepLR`` together."""
        rising = round(self.warmup * self.epochs)
        rise = min(epoch / rising, 1.0) if rising else 1.0
        drops = sum(epoch >= round(share * self.epochs) for share in self.milestones)
        return self.lr * (self.warmup_from + (1 - self.warmup_from) * rise) * self.decay**drops

    def order(self, epoch: int, images: int) -> Tensor:
        """The order of the images in ``epoch``, ``(images,)`` int64: a function of seed and epoch alone."""
        return torch.from_numpy(np.random.default_rng((self.seed, epoch)).permutation(images))
