"""Pooled features of a frozen backbone, by image: computed once and kept, or anew on every use."""

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

#: Into how many parts images are split that are whitened by each other's statistics.
FOLDS = 5


log = logging.getLogger(__name__)


class Features:
    """``features[indices]`` are the pooled maps ``[(N, C_i, H_i, W_i)]`` of those images, float32.

    The backbone is frozen and nothing is augmented: an image's features are the same every epoch.
    Of several processes each computes and keeps those of its own images only, and ``[]`` gives no others.

    Args:
        model: has ``features(images)``.
        images: what the features are of.
        cache: ``"memory"`` keeps the features there, or if ``file`` is given and they need more than
            half of what is free, in that file; ``"disk"`` in the mapped ``file``, which :meth:`close`
            removes; ``"off"`` computes them on every use.
        dtype: of the cache: float32, or bfloat16 for half the space.
        batch_size: images per call of the backbone.
        workers: threads that decode images.
        progress: title of the progress bar (stderr, terminals only); None for none.
        ranks: the processes that share the images; by default this one has all.

    Attributes:
        own: indices of this process's images, in their order.

    Raises:
        ValueError: an argument does not fit, or an image cannot be decoded.
        OSError: the disk is too small for the cache.
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
            raise ValueError("cache 'disk' needs file, the path of the mapped file")
        self.images = images
        self.ranks = ranks or Ranks()
        self.own = self.ranks.own(len(images))
        self._model = model
        self._device = next(chain(model.parameters(), model.buffers())).device
        self._workers = workers
        self._maps: list[Tensor] = []
        self._folds: list[Any] = []  # where nothing is cached
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
        """Features of the images at ``indices (N,)``, int64, on the model's device."""
        if self._maps:
            kept = indices // self.ranks.size
            return [maps[kept].to(self._device, torch.float32) for maps in self._maps]
        if not len(indices):  # not every backbone takes no images
            return [maps[:0] for maps in self[self.own[:1]]]
        (pixels,) = decoded(self.images.__getitem__, [indices.tolist()], self._workers)
        return self._pooled(indices, torch.stack(pixels))

    def close(self) -> None:
        """Let go of the cache, and remove its file."""
        self._maps = []
        if self._file is not None:
            self._file.unlink(missing_ok=True)

    @property
    def place(self) -> str:
        """Where the features are: ``memory``, ``disk`` or nowhere, ``off``."""
        return "off" if self._cache == "off" else "memory" if self._file is None else "disk"

    @property
    def nbytes(self) -> int:
        """Size of the cache in bytes."""
        return sum(maps.nbytes for maps in self._maps)

    def share(self, indices: Tensor) -> Tensor:
        """Which of ``indices (N,)``, a batch of all processes, this one takes: places in it, int64."""
        return self._shares(indices)[1][self.ranks.rank]

    def part(self, indices: Tensor) -> list[Tensor]:
        """Features of this process's :meth:`share` of a batch; those that others keep are sent by them."""
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
        """The features of all images, or of this process's own, in their order."""
        chunks = self.own.split(batch_size) if len(self.own) else ()
        return (self[indices] for indices in chunks)

    def standardize(self, batch_size: int = 8) -> None:
        """Give the model the statistics of these features, and bring what is cached in line.

        Mean and standard deviation of every channel, summed in float64 over all images and positions; and where the
        model whitens, of what that makes the mean and covariance at every position. But these images are whitened
        by each other, every fifth by the other four fifths, such that they are to the flow what new images will be.

        Raises:
            ValueError: the model whitens, and there are fewer than three images.
        """
        sums: list[Tensor] = []
        for batch in self.batches(batch_size):
            wide = [x.double() for x in batch]
            moments = [torch.stack([(x**k).sum((0, 2, 3)) for k in (0, 1, 2)]) for x in wide]
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
        """Fit it to all images; whiten each of them by those of the other folds."""
        if len(self) < 3:
            raise ValueError(f"whiten needs 3 training images or more, got {len(self)}")
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
            whitening.reset()  # features that are computed anew shall be plain
        whitening.take(whole)
        self._folds = folds

    def _change(
        self, change: Callable[[list[Tensor]], list[Tensor]], rows: Tensor, batch_size: int
    ) -> None:
        """Replace these rows of what is cached."""
        for part in rows.split(batch_size) if self._maps and len(rows) else ():
            changed = change([maps[part].to(self._device, torch.float32) for maps in self._maps])
            for maps, new in zip(self._maps, changed, strict=True):
                maps[part] = new.to(maps)

    def _shares(self, indices: Tensor) -> tuple[Tensor, list[Tensor]]:
        """Who keeps the images of a batch, or may compute them as well as others, and who takes which."""
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
                    maps[done : done + len(new)].copy_(new)  # fewer before a broken image
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
            raise ValueError(f"the backbone's features of image {name} hold NaN or infinite values")
        return pooled

    def _allocate(self, shapes: list[tuple[int, ...]], dtype: torch.dtype) -> list[Tensor]:
        shapes = [(len(self.own), *shape) for shape in shapes]
        sizes = [math.prod(shape) for shape in shapes]
        expected, left = sum(sizes) * dtype.itemsize, free_memory()
        fits = left is None or expected * self.ranks.size <= left / 2  # all may be on one machine
        if self._file is None or (self._cache == "memory" and fits):
            self._file = None
            return [torch.empty(shape, dtype=dtype) for shape in shapes]
        free = shutil.disk_usage(self._file.parent).free
        if expected > free:
            raise OSError(f"{self._file} needs {expected:,} bytes, the disk has {free:,} left")
        _reserve(self._file, expected)
        whole = torch.from_file(str(self._file), shared=True, size=sum(sizes), dtype=dtype)
        return [part.view(shape) for part, shape in zip(whole.split(sizes), shapes, strict=True)]


def _reserve(path: Path, size: int) -> None:
    """Make a file of ``size`` bytes, so that a disk that fills up is an error now and no crash later."""
    with path.open("wb") as file:
        try:
            if hasattr(os, "posix_fallocate"):
                os.posix_fallocate(file.fileno(), 0, size)
        except OSError as error:
            if error.errno in (errno.ENOSPC, errno.EFBIG, errno.EDQUOT):  # else it knows no way
                raise OSError(f"{path} cannot be written: {error.strerror}") from error
