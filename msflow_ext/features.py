"""Pooled features of a frozen backbone for each image, cached or computed on every use."""

from __future__ import annotations

import copy
import errno
import logging
import math
import os
import shutil
from collections.abc import Callable, Iterator
from itertools import chain
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from msflow_ext.choices import CACHES, Cache
from msflow_ext.data import Images
from msflow_ext.data.prefetch import decoded
from msflow_ext.distributed.ranks import Ranks, even_shares
from msflow_ext.hardware import free_memory

#: Number of folds of cross-fitted whitening.
FOLDS = 5


log = logging.getLogger(__name__)


class Features:
    """Pooled backbone features of images; ``features[indices]`` are maps ``[(N, C_i, H_i, W_i)]`` in float32.

    The backbone is frozen and images are not augmented, so that an image has the same features in every epoch. Each of
    several processes computes and caches the features of its own images, and ``[]`` accepts only these.

    Args:
        model: Model with a method ``features(images)``.
        images: Images to compute features of.
        cache: ``"memory"`` caches features in memory. If ``file`` is given and they need more than half of the free
            memory, they are cached in ``file`` instead. ``"disk"`` caches them in the mapped ``file``, which
            :meth:`close` removes. ``"off"`` computes them on every use.
        dtype: Dtype of the cache: float32, or bfloat16 for half the space.
        file: Path of the cache on disk.
        batch_size: Number of images per call of the backbone.
        workers: Number of threads that decode images.
        progress: Title of the progress bar (on stderr, only in a terminal); None for no bar.
        ranks: Processes that share the images. By default this process has all.

    Attributes:
        own: Indices of this process's images, in order.

    Raises:
        ValueError: An argument does not fit, or an image cannot be decoded.
        OSError: The disk is too small for the cache.

    Examples:
        >>> import numpy as np
        >>> from msflow_ext import FastFlow
        >>> from msflow_ext.data import Item
        >>> model = FastFlow("test_resnet", image_size=64, pretrained=False)
        >>> items = [Item(str(i), 0, "good", np.full((64, 64), i, np.uint8)) for i in range(3)]
        >>> features = Features(model, Images(items, 64))
        >>> {len(maps) for maps in features[torch.tensor([0, 2])]}
        {2}
    """

    def __init__(
        self,
        model: Any,
        images: Images,
        *,
        cache: Cache = "memory",
        dtype: torch.dtype = torch.float32,
        file: Path | None = None,
        batch_size: int = 8,
        workers: int = 2,
        progress: str | None = None,
        ranks: Ranks | None = None,
    ) -> None:
        if cache not in CACHES:
            raise ValueError(f"cache must be one of {', '.join(CACHES)}, got {cache!r}")
        if cache == "disk" and file is None:
            raise ValueError("file must be a path for cache 'disk', got None")
        self.images = images
        self.ranks = ranks or Ranks()
        self.own = self.ranks.own(len(images))
        self._model = model
        self._device = next(chain(model.parameters(), model.buffers())).device
        self._workers = workers
        self._maps: list[Tensor] = []
        self._folds: list[Any] = []  # only without a cache
        self._file, self._cache = file if cache != "off" else None, cache
        if cache != "off" and len(self.own):
            try:
                self._fill(dtype, batch_size, progress)
            except BaseException:
                self.close()
                raise

    def __len__(self) -> int:
        return len(self.images)

    def __getitem__(self, indices: Tensor) -> list[Tensor]:
        """Return the features of the images at ``indices (N,)``, int64, on the model's device."""
        if self._maps:
            kept = indices // self.ranks.size
            return [maps[kept].to(self._device, torch.float32) for maps in self._maps]
        if not len(indices):  # not every backbone accepts an empty batch
            return [maps[:0] for maps in self[self.own[:1]]]
        (pixels,) = decoded(self.images.__getitem__, [indices.tolist()], self._workers)
        return self._pooled(indices, torch.stack(pixels))

    def close(self) -> None:
        """Release the cache and remove its file."""
        self._maps = []
        if self._file is not None:
            self._file.unlink(missing_ok=True)

    @property
    def place(self) -> str:
        """Return where features are cached: ``memory``, ``disk`` or ``off``."""
        return "off" if self._cache == "off" else "memory" if self._file is None else "disk"

    @property
    def nbytes(self) -> int:
        """Return the size of the cache in bytes."""
        return sum(maps.nbytes for maps in self._maps)

    def share(self, indices: Tensor) -> Tensor:
        """Return this process's share of a batch ``indices (N,)`` of all processes, as positions in it, int64."""
        return self._shares(indices)[1][self.ranks.rank]

    def part(self, indices: Tensor) -> list[Tensor]:
        """Return the features of this process's :meth:`share` of a batch; other processes send those that they cache."""
        ranks = self.ranks
        owners, shares = self._shares(indices)
        mine = shares[ranks.rank]
        with ranks.agreed():
            batch = self[indices[mine[owners[mine] == ranks.rank]]]
        for taker, places in enumerate(shares):
            for place in places[owners[places] != taker].tolist():
                owner, kept = int(owners[place]), int(indices[place]) // ranks.size
                if ranks.rank == owner:
                    for maps in self._maps:
                        ranks.move(maps[kept], owner, taker)
                elif ranks.rank == taker:
                    row = [torch.empty_like(maps[:1]) for maps in self._maps]
                    for each in row:
                        ranks.move(each[0], owner, taker)
                    batch = [torch.cat((x, e.to(x))) for x, e in zip(batch, row, strict=True)]
        return batch

    def batches(self, batch_size: int) -> Iterator[list[Tensor]]:
        """Yield the features of this process's images in order."""
        chunks = self.own.split(batch_size) if len(self.own) else ()
        return (self[indices] for indices in chunks)

    def standardize(self, batch_size: int = 8) -> None:
        """Set the model's statistics from these features, and standardize the cache.

        The statistics are the mean and the standard deviation of every channel, summed in float64 over all images and
        positions. If the model whitens, they also include the mean and the covariance of the standardized features at
        every position. These images are whitened by cross-fitting: each fifth uses the statistics of the other four.
        So the flow sees them as it will see new images.

        Raises:
            ValueError: The model whitens, and there are fewer than three images.
        """
        sums: list[Tensor] = []
        for batch in self.batches(batch_size):
            doubles = [x.double() for x in batch]
            moments = [torch.stack([(x**k).sum((0, 2, 3)) for k in (0, 1, 2)]) for x in doubles]
            sums = [a + b for a, b in zip(sums, moments, strict=True)] if sums else moments
        sums = [self.ranks.total(each) for each in sums]
        means = [first / count for count, first, _ in sums]
        stds = [
            (second / count - mean.square()).clamp_min(0).sqrt().clamp_min(1e-6)
            for (count, _, second), mean in zip(sums, means, strict=True)
        ]
        self._model.set_statistics(means, stds)
        rows = torch.arange(len(self.own))
        self._change(self._model.standardized, rows, batch_size)
        if self._model.whitening is not None:
            self._whiten(self._model.whitening, batch_size)

    def _whiten(self, whitening: Any, batch_size: int) -> None:
        """Fit the whitening to all images; whiten each image with the statistics of the other folds."""
        if len(self) < 3:
            raise ValueError(f"whiten must have at least 3 training images, got {len(self)}")
        total, folds = self.ranks.total, []
        whole = whitening.count(self.batches(batch_size), total)
        for fold in range(min(FOLDS, len(self))):
            rows = (self.own % FOLDS == fold).nonzero().squeeze(1)
            chunks = self.own[rows].split(batch_size) if len(rows) else ()
            part = whitening.count((self[indices] for indices in chunks), total, whole)
            whitening.take([a.without(b) for a, b in zip(whole, part, strict=True)])
            self._change(whitening, rows, batch_size)
            if not self._maps:
                folds.append(copy.deepcopy(whitening))
            whitening.reset()  # the next fold reads features that are not whitened
        whitening.take(whole)
        self._folds = folds

    def _change(
        self, change: Callable[[list[Tensor]], list[Tensor]], rows: Tensor, batch_size: int
    ) -> None:
        """Apply a change to these rows of the cache."""
        for part in rows.split(batch_size) if self._maps and len(rows) else ():
            changed = change([maps[part].to(self._device, torch.float32) for maps in self._maps])
            for maps, new in zip(self._maps, changed, strict=True):
                maps[part] = new.to(maps)

    def _shares(self, indices: Tensor) -> tuple[Tensor, list[Tensor]]:
        """Return the process that owns each image of a batch, and the positions that each process uses."""
        owners = (indices if self._maps else torch.arange(len(indices))) % self.ranks.size
        return owners, even_shares(owners, self.ranks.size)

    def _fill(self, dtype: torch.dtype, batch_size: int, progress: str | None) -> None:
        from tqdm import tqdm

        chunks = list(self.own.split(batch_size))
        batches = decoded(self.images.__getitem__, (c.tolist() for c in chunks), self._workers)
        bar = tqdm(
            total=len(self.own), desc=progress, unit="image", disable=None if progress else True
        )
        done = 0
        with bar:
            for indices, pixels in zip(chunks, batches, strict=True):
                pooled = self._pooled(indices, torch.stack(pixels))
                if not self._maps:
                    self._maps = self._allocate([tuple(x.shape[1:]) for x in pooled], dtype)
                for maps, new in zip(self._maps, pooled, strict=True):
                    maps[done : done + len(new)].copy_(new)  # a broken image ends a batch early
                done += len(indices)
                bar.update(len(indices))

    def _pooled(self, indices: Tensor, pixels: Tensor) -> list[Tensor]:
        pixels = pixels.to(self._device)
        if self._folds:
            pooled = self._model.plain_features(pixels)
            for fold in (indices % FOLDS).unique():
                rows = indices % FOLDS == fold
                parts = self._folds[fold]([x[rows] for x in pooled])
                for x, new in zip(pooled, parts, strict=True):
                    x[rows] = new
        else:
            pooled = self._model.features(pixels)
        finite = torch.stack([x.isfinite().flatten(1).all(1) for x in pooled]).all(0)
        if not finite.all():
            name = self.images.items[int(indices[int(finite.int().argmin())])].name
            raise ValueError(f"features of image {name} must be finite, got NaN or infinite values")
        return pooled

    def _allocate(self, shapes: list[tuple[int, ...]], dtype: torch.dtype) -> list[Tensor]:
        shapes = [(len(self.own), *shape) for shape in shapes]
        sizes = [math.prod(shape) for shape in shapes]
        expected, left = sum(sizes) * dtype.itemsize, free_memory()
        fits = (
            left is None or expected * self.ranks.size <= left / 2
        )  # all processes may be on one machine
        if self._file is None or (self._cache == "memory" and fits):
            self._file = None
            return [torch.empty(shape, dtype=dtype) for shape in shapes]
        free = shutil.disk_usage(self._file.parent).free
        if expected > free:
            raise OSError(
                f"{self._file} cannot be written: it needs {expected:,} bytes, the disk has {free:,} free"
            )
        _reserve(self._file, expected)
        whole = torch.from_file(str(self._file), shared=True, size=sum(sizes), dtype=dtype)
        return [part.view(shape) for part, shape in zip(whole.split(sizes), shapes, strict=True)]


def _reserve(path: Path, size: int) -> None:
    """Reserve a file of ``size`` bytes, so that a full disk raises an error now instead of a crash later."""
    with path.open("wb") as file:
        try:
            if hasattr(os, "posix_fallocate"):
                os.posix_fallocate(file.fileno(), 0, size)
        except OSError as error:
            if error.errno in (
                errno.ENOSPC,
                errno.EFBIG,
                errno.EDQUOT,
            ):  # other errors: the file system cannot reserve
                raise OSError(f"{path} cannot be written: {error.strerror}") from error
