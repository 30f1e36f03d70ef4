"""Base classes of MSFlow and FastFlow: frozen backbone, feature statistics, flow head, scores."""

from __future__ import annotations

import contextlib
import copy
import math
import operator
from abc import ABC, abstractmethod
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any, Self

import torch
from torch import Tensor, nn

from msflow_ext import ops
from msflow_ext.choices import (
    ANOMALY_MAPS,
    CLAMP_FORMS,
    MEMORY,
    SCORES,
    AnomalyMap,
    ClampForm,
    Memory,
    Score,
)
from msflow_ext.models.anomaly_map import ClampedMap
from msflow_ext.models.backbone import Backbone
from msflow_ext.models.gaussians import Total, Whitening, one_process
from msflow_ext.ops._backend import hides_values

ROUNDING = 1e-3  # a quarter of a gray level


@dataclass(frozen=True, repr=False)
class Prediction:
    """Scores and maps of a batch of images.

    Attributes:
        score: ``(N,)``, larger for more anomalous images; the model's ``score`` argument selects which one.
        anomaly_map: ``(N, S, S)``, for localization.
        image_map: ``(N, S, S)``, the map from which the paper computes its image score.
        log_likelihood: ``(N, H_i, W_i)`` per scale.

    Examples:
        >>> import msflow_ext as mx
        >>> model = mx.MSFlow("test_efficientnet", image_size=64, pretrained=False).eval()
        >>> model(torch.rand(2, 3, 64, 64))
        Prediction(score=(2,), anomaly_map=(2, 64, 64), image_map=(2, 64, 64), log_likelihood=[(2, 8, 8), (2, 4, 4), (2, 2, 2)], device='cpu')
    """

    score: Tensor
    anomaly_map: Tensor
    image_map: Tensor
    log_likelihood: list[Tensor]

    def __repr__(self) -> str:
        named = {name: getattr(self, name) for name in ("score", "anomaly_map", "image_map")}
        shapes = ", ".join(f"{name}={tuple(tensor.shape)}" for name, tensor in named.items())
        scales = [tuple(each.shape) for each in self.log_likelihood]
        return f"Prediction({shapes}, log_likelihood={scales}, device={str(self.score.device)!r})"


class FlowHead(nn.Module):
    """Base class of the trainable part of a detector, a normalizing flow over features of several scales.

    It maps the features to a standard normal distribution. A subclass implements ``forward(features) -> FlowOutput`` and
    its ``inverse``.

    Args:
        channels: channels of each scale.
        clamp, clamp_form: soft clamp of the coupling steps, see :func:`msflow_ext.ops.affine_coupling`.

    Attributes:
        memory: what training keeps for the backward pass. ``"lean"``: the activations, except those that are cheap to
            recompute. ``"reversible"``: only the latent tensors, from which the inverse recovers the activations. That
            is slower, needs float32 or float64, and ignores forward hooks of subnets.

    Raises:
        ValueError: ``clamp`` is not positive, or ``clamp_form`` is unknown.

    Examples:
        >>> from msflow_ext import FlowOutput
        >>> class Identity(FlowHead):
        ...     def forward(self, features):
        ...         return FlowOutput(list(features), torch.zeros(len(features[0])))
        >>> head = Identity([4], clamp=2.0, clamp_form="0.2")
        >>> head.log_likelihood([torch.zeros(1, 4, 8, 8)])[0].shape
        torch.Size([1, 8, 8])
    """

    def __init__(self, channels: Sequence[int], *, clamp: float, clamp_form: ClampForm) -> None:
        super().__init__()
        self.channels = tuple(int(c) for c in channels)
        self.clamp = float(clamp)
        self.clamp_form = clamp_form
        self._memory: Memory = "lean"
        if not 0 < self.clamp < math.inf:
            raise ValueError(f"clamp must be positive and finite, got {self.clamp}")
        if self.clamp_form not in CLAMP_FORMS:
            raise ValueError(f"clamp_form must be '0.2' or 'head', got {self.clamp_form!r}")

    @property
    def memory(self) -> Memory:
        return self._memory

    @memory.setter
    def memory(self, value: Memory) -> None:
        if value not in MEMORY:
            raise ValueError(f"memory must be one of {MEMORY}, got {value!r}")
        self._memory = value
        for part in self.children():
            for module in part.modules():
                if hasattr(module, "memory"):
                    module.memory = value  # type: ignore[assignment]

    def log_likelihood(self, features: Sequence[Tensor]) -> list[Tensor]:
        """Return log-likelihood maps ``[(N, H_i, W_i)]``, see :func:`msflow_ext.ops.log_likelihood_map`."""
        return [ops.log_likelihood_map(z) for z in self(features).z]

    def loss(self, features: Sequence[Tensor]) -> Tensor:
        """Return the mean negative log-likelihood of the batch in nats, without its constant."""
        out = self(features)
        return (sum(ops.half_square_norm(z) for z in out.z) - out.log_det).mean()

    def _check_features(self, features: Sequence[Tensor], name: str = "features") -> None:
        got = [tuple(f.shape) for f in features]
        if len(got) != len(self.channels) or any(len(s) != 4 for s in got):
            raise ValueError(
                f"{name} must be {len(self.channels)} tensors (N, C, H, W), got shapes {got}"
            )
        if tuple(s[1] for s in got) != self.channels or any(s[0] != got[0][0] for s in got):
            raise ValueError(
                f"{name} must have the same N and channels {self.channels}, got shapes {got}"
            )
        if any(0 in s[1:] for s in got):
            raise ValueError(f"{name} must have at least one position per scale, got shapes {got}")


class AnomalyModel(nn.Module, ABC):
    """Base class of the models, which score images by the likelihood of their features.

    A subclass implements ``predict_features(features) -> Prediction``, and may pool the backbone's maps.

    Args:
        backbone: the frozen network that computes the features.
        head: a :class:`FlowHead` for the maps that :meth:`features` returns.
        image_size: side ``S`` of the square input and of the maps, in pixels. None: the size that the backbone
            requires, else 256.
        standardize: whether features are standardized per channel, by the statistics of :meth:`set_statistics`.
        whiten: whether standardized features are whitened at every position, see :class:`Whitening`.
        score: image score: ``paper``, ``log``, ``nll`` or ``map``.
        top_k: share of the pixels from which the score is computed.
        anomaly_map: ``paper`` or ``clamped``.
        smoothing: standard deviation of the clamped map's Gaussian filter, in pixels, see :class:`ClampedMap`.
        config: further arguments of the subclass.

    Attributes:
        config: plain values that build the model again: ``type(model)(**model.config)``.

    Raises:
        ValueError: an argument is out of range; the message names it.

    Examples:
        >>> from msflow_ext import FastFlow
        >>> model = FastFlow("test_resnet", image_size=64, pretrained=False, steps=1)
        >>> isinstance(model, AnomalyModel), model(torch.rand(2, 3, 64, 64)).score.shape
        (True, torch.Size([2]))
    """

    def __init__(
        self,
        backbone: Backbone,
        head: FlowHead,
        *,
        image_size: int | None,
        standardize: bool,
        whiten: bool,
        score: Score,
        top_k: float,
        anomaly_map: AnomalyMap,
        smoothing: float,
        **config: Any,
    ) -> None:
        super().__init__()
        choices = (("score", score, SCORES), ("anomaly_map", anomaly_map, ANOMALY_MAPS))
        for name, value, known in choices:
            if value not in known:
                raise ValueError(f"{name} must be one of {', '.join(known)}, got {value!r}")
        if not 0 < top_k <= 1:
            raise ValueError(f"top_k must be in (0, 1], got {top_k}")
        if whiten and not standardize:
            raise ValueError("standardize must be True if whiten is True, got False")
        self.score, self.top_k = score, top_k
        self.image_size = side(image_size, backbone)
        self.standardize = standardize
        self.backbone = backbone
        self.head: Any = head  # or an optimized one
        self.whitening = Whitening(head.channels, self._sizes()) if whiten else None
        if not 0 <= smoothing < self.image_size:
            raise ValueError(
                f"smoothing must be in [0, image_size {self.image_size}) pixels, got {smoothing}"
            )
        if smoothing and anomaly_map != "clamped":
            raise ValueError(
                f"smoothing must be 0 unless anomaly_map is 'clamped', got {smoothing} and {anomaly_map!r}"
            )
        clamped = anomaly_map == "clamped"
        self.clamped = ClampedMap(len(head.channels), smoothing) if clamped else None
        for i, c in enumerate(backbone.channels):
            self.register_buffer(f"feature_mean{i}", torch.zeros(c))
            self.register_buffer(f"feature_std{i}", torch.ones(c))
        self.config: dict[str, Any] = {
            "backbone": backbone.name,
            "image_size": self.image_size,
            "out_indices": list(backbone.out_indices),
            "padding_mode": backbone.padding_mode,
            "standardize": standardize,
            "whiten": whiten,
            "score": score,
            "top_k": top_k,
            "anomaly_map": anomaly_map,
            "smoothing": smoothing,
            "clamp": head.clamp,
            "clamp_form": head.clamp_form,
            **config,
        }

    def forward(self, images: Tensor) -> Prediction:
        """Score a batch of images; the backbone normalizes them itself.

        Args:
            images: RGB in 0..1.

        Shape:
            images: ``(N, 3, S, S)``.

        Raises:
            ValueError: ``images`` has another shape, or values outside 0..1, such as 0..255 or normalized ones. Values
                are not checked on a GPU, where that would wait for the device, nor in a traced or compiled graph.
        """
        return self.predict_features(self.features(images))

    @torch.no_grad()
    def features(self, images: Tensor) -> list[Tensor]:
        """Return the feature maps ``[(N, C_i, H_i, W_i)]`` that are the head's input."""
        found = self.plain_features(images)
        return found if self.whitening is None else self.whitening(found)

    @torch.no_grad()
    def plain_features(self, images: Tensor) -> list[Tensor]:
        """Return the feature maps of :meth:`features` before whitening."""
        if images.is_cpu and images.is_floating_point() and not hides_values(images):
            refuse_range(images, "images")
        pooled = [self.pool(f) for f in self.backbone(images)]
        return self.standardized(pooled) if self.standardize else pooled

    def standardized(self, pooled: Sequence[Tensor]) -> list[Tensor]:
        """Return pooled maps standardized by the mean and the standard deviation of each channel."""
        return [
            (f - _column(getattr(self, f"feature_mean{i}")))
            / _column(getattr(self, f"feature_std{i}"))
            for i, f in enumerate(pooled)
        ]

    def pool(self, x: Tensor) -> Tensor:
        """Return the head's input from a map of the backbone: here the map itself."""
        return x

    def _sizes(self) -> list[tuple[int, int]]:
        """Return the sizes of the head's input maps."""
        return [self.pooled_size(*grid) for grid in self.backbone.grids(self.image_size)]

    def pooled_size(self, height: int, width: int) -> tuple[int, int]:
        """Return the size that :meth:`pool` makes of a map of this size."""
        return height, width

    def localize(self, log_likelihood: Sequence[Tensor], paper: Tensor) -> Tensor:
        """Return the clamped anomaly map if the model has one, else the paper's."""
        return paper if self.clamped is None else self.clamped(log_likelihood, self.image_size)

    def top_k_mean(self, anomaly_map: Tensor) -> Tensor:
        """Return the mean of the largest ``top_k`` share of each map, ``(N,)``: the score ``map``."""
        count = max(1, int(self.top_k * self.image_size**2))
        return anomaly_map.flatten(1).topk(count, sorted=False).values.mean(1)

    @torch.no_grad()
    def fit_map(self, batches: Iterable[Sequence[Tensor]], total: Total = one_process) -> None:
        """Fit the clamped map to the log-likelihoods of normal images; without such a map, do nothing.

        Args:
            batches: the features of all normal images.
            total: sums a tensor over the processes, if each has a share of the batches.
        """
        if self.clamped is not None:
            self.clamped.fit(map(self.head.log_likelihood, batches), total)

    @abstractmethod
    def predict_features(self, features: Sequence[Tensor]) -> Prediction:
        """Score the feature maps that :meth:`features` returns."""

    def set_statistics(self, means: Sequence[Tensor], stds: Sequence[Tensor]) -> None:
        """Store mean and standard deviation ``(C_i,)`` of each channel of the training set's pooled features.

        Raises:
            ValueError: a value is not finite.
        """
        for i, (mean, std) in enumerate(zip(means, stds, strict=True)):
            if not (torch.isfinite(mean).all() and torch.isfinite(std).all()):
                raise ValueError(f"means and stds must be finite, scale {i} has NaN or infinity")
            getattr(self, f"feature_mean{i}").copy_(mean)
            getattr(self, f"feature_std{i}").copy_(std.clamp_min(1e-6))

    def forget_statistics(self) -> None:
        """Return to features that are neither standardized nor whitened, until statistics are set again."""
        for i in range(len(self.head.channels)):
            getattr(self, f"feature_mean{i}").zero_()
            getattr(self, f"feature_std{i}").fill_(1)
        if self.whitening is not None:
            self.whitening.reset()

    def loss(self, images: Tensor) -> Tensor:
        """Return the training loss of a batch of images, see :meth:`FlowHead.loss`."""
        return self.head.loss(self.features(images))

    def optimize(self, dtype: torch.dtype | None = None) -> Self:
        """Return an optimized copy of the model for inference; this model does not change.

        Batch norms of the backbone are folded into its convolutions, weights are packed, and memory is channels_last.

        The copy shares no tensors with this model. It has the same ``state_dict`` and can be copied and pickled. After
        its weights change, it packs them again, see :class:`~msflow_ext.models.optimized.packing.Optimized`. The score
        of an image does not depend on the rest of its batch, bit for bit.

        Args:
            dtype: float32 (None) or bfloat16. A backbone that loses accuracy in bfloat16 stays in float32, see
                :meth:`Backbone.optimize`.
        """
        parts: dict[int, Any] = {
            id(self.backbone): self.backbone.optimize(self.image_size, dtype),
            id(self.head): self.head.optimize(dtype),
        }
        with torch.inference_mode(False):
            optimized = copy.deepcopy(self, parts)  # which uses these parts instead of its own
        if optimized.whitening is not None:
            optimized.whitening.one_by_one = True
        return optimized.eval()


def side(image_size: int | None, backbone: Backbone) -> int:
    """Return the side of the images in pixels: ``image_size``, else the backbone's required size, else 256.

    Raises:
        TypeError: ``image_size`` is not a whole number.
    """
    if image_size is not None:
        try:
            return operator.index(image_size)
        except TypeError:
            text = f"image_size must be a whole number, the side of a square, got {image_size!r}"
            raise TypeError(text) from None
    return 256 if backbone.image_size is None else backbone.image_size[0]


@contextlib.contextmanager
def seeded(seed: int | None) -> Iterator[None]:
    """Seed torch's random numbers in a block, and restore the generator afterwards; None does neither."""
    if seed is not None and not -(2**63) <= seed < 2**64:
        raise ValueError(f"seed must be a whole number from -2**63 to 2**64 - 1, got {seed}")
    with torch.random.fork_rng(devices=[], enabled=seed is not None):
        if seed is not None:
            torch.manual_seed(seed)
        yield


def refuse_range(images: Tensor, name: str) -> None:
    """Raise a ValueError unless ``images`` are in 0..1, up to rounding: the model has not seen other values."""
    if not images.numel():
        return
    low, high = (end.item() for end in images.detach().aminmax())
    if not (low >= -ROUNDING and high <= 1 + ROUNDING):  # NaN fails too
        raise ValueError(f"{name} must be RGB in 0..1, got {low:.3g}..{high:.3g}")


def refuse_non_finite(log_det: Tensor, features: Sequence[Tensor]) -> None:
    """Raise a ValueError if ``log_det``, which is cheap to check, is not finite because of the features."""
    if log_det.device.type != "cpu" or hides_values(log_det):
        return
    if bool(torch.isfinite(log_det).all()):
        return
    for i, f in enumerate(features):
        if not bool(torch.isfinite(f).all()):
            raise ValueError(f"features must be finite, scale {i} has NaN or infinity")


def _column(vector: Tensor) -> Tensor:
    return vector.view(-1, 1, 1)
