"""MSFlow: asymmetrical parallel flows on the scales of a frozen backbone, and a fusion flow across them.

Source: Zhou et al., "MSFlow: Multi-Scale Flow-based Framework for Unsupervised Anomaly Detection", TNNLS 2024.
"""

from __future__ import annotations

import copy
from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from msflow_ext import ops
from msflow_ext.flows import FlowOutput
from msflow_ext.models.msflow_flows import ConditionalFlow, FusionFlow

if TYPE_CHECKING:
    from msflow_ext.models.msflow_inference import OptimizedHead

#: What the paper fixes for its backbone; every other backbone keeps its own padding and has its features standardised.
PRESETS: dict[str, dict[str, Any]] = {
    "wide_resnet50_2": {"image_size": 512, "padding_mode": "reflect", "standardize": False}
}
OTHER: dict[str, Any] = {"image_size": 256, "padding_mode": "zeros", "standardize": True}


@dataclass(frozen=True)
class Prediction:
    """What a detector says of a batch of images.

    Attributes:
        score: ``(N,)``, the larger the more anomalous; which score, the model's ``score`` option says.
        anomaly_map: ``(N, S, S)`` for localization.
        image_map: ``(N, S, S)``, the map behind the paper's image score.
        log_likelihood: one ``(N, H_i, W_i)`` per scale.
    """

    score: Tensor
    anomaly_map: Tensor
    image_map: Tensor
    log_likelihood: list[Tensor]


class MSFlowHead(nn.Module):
    """The trainable part of MSFlow: parallel flows and fusion flow over pooled feature maps.

    Args:
        channels: channels of each scale, two scales or more, even numbers.
        blocks: flow steps of each scale; the paper's 2, 5, 8 grow with depth.
        cond_channels: channels of the positional condition, a multiple of 4, one number or one per scale.
        clamp: alpha of the soft clamp.
        clamp_form: ``"0.2"`` (the authors' code, FrEIA 0.2) or ``"head"`` (FrEIA master); the fusion flow has its own.
        seed: of permutations and initial weights; None draws from torch's global generator.

    Raises:
        ValueError: an argument does not fit; it is named.
    """

    def __init__(
        self,
        channels: Sequence[int] = (256, 512, 1024),
        *,
        blocks: Sequence[int] = (2, 5, 8),
        cond_channels: int | Sequence[int] = 64,
        clamp: float = 1.9,
        clamp_form: str = "0.2",
        seed: int | None = None,
    ) -> None:
        super().__init__()
        self.channels = tuple(int(c) for c in channels)
        self.blocks = tuple(int(b) for b in blocks)
        conds = [cond_channels] * len(channels) if isinstance(cond_channels, int) else cond_channels
        self.cond_channels = tuple(int(c) for c in conds)
        self.clamp = float(clamp)
        self.clamp_form = clamp_form
        self._check_arguments()
        with torch.random.fork_rng(devices=[], enabled=seed is not None):
            if seed is not None:
                torch.manual_seed(seed)
            self.flows = nn.ModuleList(
                ConditionalFlow(c, n, d, clamp=self.clamp, clamp_form=clamp_form)
                for c, n, d in zip(self.channels, self.blocks, self.cond_channels, strict=True)
            )
            self.fusion = FusionFlow(self.channels, clamp=self.clamp)

    def forward(self, features: Sequence[Tensor]) -> FlowOutput:
        """Map pooled features ``[(N, C_i, H_i, W_i)]`` to the latent space."""
        self._check_features(features)
        halves, total = [], []
        for x, flow, perm in zip(features, self.flows, self.fusion.perms(), strict=True):
            x1, x2, log_det = flow(x, then=perm, split=x.size(1) // 2)
            halves.append((x1, x2))
            total.append(log_det)
        z, log_det = self.fusion.couple(halves)
        total = sum(total, log_det)
        _refuse_non_finite(total, features)
        return FlowOutput(z, total)

    def inverse(self, z: Sequence[Tensor]) -> FlowOutput:
        """Map latent tensors back to pooled features; ``log_det`` is the inverse's."""
        self._check_features(z, "z")
        x, total = self.fusion.inverse(z)
        features = []
        for u, flow in zip(x, self.flows, strict=True):
            y, log_det = flow.inverse(u)  # type: ignore[operator]
            features.append(y)
            total = total + log_det
        return FlowOutput(features, total)

    def log_likelihood(self, features: Sequence[Tensor]) -> list[Tensor]:
        """Log-likelihood maps ``[(N, H_i, W_i)]``: see :func:`msflow_ext.ops.log_likelihood_map`."""
        return [ops.log_likelihood_map(z) for z in self(features).z]

    def loss(self, features: Sequence[Tensor]) -> Tensor:
        """Mean over the batch of the negative log-likelihood in nats, without its constant."""
        out = self(features)
        return (sum(ops.half_square_norm(z) for z in out.z) - out.log_det).mean()

    def optimize(self, dtype: torch.dtype | None = None) -> OptimizedHead:
        """The inference form: a snapshot, channels_last, with prepacked weights in ``dtype`` (None: as they are)."""
        from msflow_ext.models.msflow_inference import OptimizedHead

        return OptimizedHead(self, dtype)

    def _check_arguments(self) -> None:
        if len(self.channels) < 2:
            raise ValueError(f"channels must name two scales or more, got {self.channels}")
        for name in ("blocks", "cond_channels"):
            if len(getattr(self, name)) != len(self.channels):
                raise ValueError(
                    f"{name} must be one per scale ({len(self.channels)}), got {getattr(self, name)}"
                )
        if any(c < 2 or c % 2 for c in self.channels):
            raise ValueError(
                f"channels must be even, because the fusion flow halves them, got {self.channels}"
            )
        if sum(self.channels) // 2 < 4:
            raise ValueError(f"channels must sum to 8 or more, got {self.channels}")
        if any(b < 1 for b in self.blocks):
            raise ValueError(f"blocks must be at least 1 on every scale, got {self.blocks}")
        if any(c < 4 or c % 4 for c in self.cond_channels):
            raise ValueError(f"cond_channels must be multiples of 4, got {self.cond_channels}")
        if not self.clamp > 0:
            raise ValueError(f"clamp must be positive, got {self.clamp}")
        if self.clamp_form not in ("0.2", "head"):
            raise ValueError(f"clamp_form must be '0.2' or 'head', got {self.clamp_form!r}")

    def _check_features(self, features: Sequence[Tensor], name: str = "features") -> None:
        got = [tuple(f.shape) for f in features]
        if len(got) != len(self.channels) or any(len(s) != 4 for s in got):
            raise ValueError(
                f"{name} must be {len(self.channels)} tensors (N, C, H, W), got shapes {got}"
            )
        if tuple(s[1] for s in got) != self.channels or len({s[0] for s in got}) != 1:
            raise ValueError(
                f"{name} must have one N and channels {self.channels}, got shapes {got}"
            )
        if any(0 in s[1:] for s in got):
            raise ValueError(f"{name} must have at least one position per scale, got shapes {got}")


class MSFlow(nn.Module):
    """MSFlow whole: frozen backbone, pooling, flows, scores.

    Args:
        backbone: name of a timm CNN, or ``efficientnet_lite0``, whose weights a pip package ships.
        image_size: side ``S`` of the square input and of the maps, in pixels; the preset's by default.
        pretrained: True, a path of local weights, or False for random weights (loading a checkpoint, tests).
        blocks, cond_channels, clamp, clamp_form, seed: see :class:`MSFlowHead`.
        padding_mode: ``"reflect"`` or ``"zeros"`` in the backbone; the preset's by default.
        standardize: whether features are standardised per channel by statistics of the training set
            (:meth:`set_statistics`); off in the paper's presets, on otherwise.
        score: ``"log"``, the paper's image score as ``-log(1 - score)``, which has the same order and cannot saturate;
            ``"paper"``, the value itself; ``"nll"``, the mean of the largest summed negative log-likelihoods.
        top_k: share of the pixels that make the score.

    Raises:
        ValueError: an argument does not fit. RuntimeError: no pretrained weights within reach.
    """

    def __init__(
        self,
        backbone: str = "wide_resnet50_2",
        *,
        image_size: int | None = None,
        pretrained: bool | str = True,
        blocks: Sequence[int] = (2, 5, 8),
        cond_channels: int | Sequence[int] = 64,
        clamp: float = 1.9,
        clamp_form: str = "0.2",
        padding_mode: str | None = None,
        standardize: bool | None = None,
        score: str = "log",
        top_k: float = 0.03,
        seed: int | None = None,
    ) -> None:
        from msflow_ext.models.backbone import Backbone

        super().__init__()
        preset = PRESETS.get(backbone, OTHER)
        self.image_size = preset["image_size"] if image_size is None else int(image_size)
        self.standardize = preset["standardize"] if standardize is None else bool(standardize)
        if self.image_size < 1:
            raise ValueError(f"image_size must be at least 1 pixel, got {image_size}")
        if score not in ("log", "paper", "nll"):
            raise ValueError(f"score must be 'log', 'paper' or 'nll', got {score!r}")
        if not 0 < top_k <= 1:
            raise ValueError(f"top_k must be in (0, 1], got {top_k}")
        self.score = score
        self.top_k = float(top_k)
        padding: str = preset["padding_mode"] if padding_mode is None else padding_mode
        self.backbone = Backbone(
            backbone,
            out_indices=tuple(range(1, 1 + len(blocks))),
            pretrained=pretrained,
            padding_mode=padding,
        )
        self.head = MSFlowHead(
            self.backbone.channels,
            blocks=blocks,
            cond_channels=cond_channels,
            clamp=clamp,
            clamp_form=clamp_form,
            seed=seed,
        )
        for i, c in enumerate(self.backbone.channels):
            self.register_buffer(f"feature_mean{i}", torch.zeros(c))
            self.register_buffer(f"feature_std{i}", torch.ones(c))
        self.config: dict[str, Any] = {
            "backbone": backbone,
            "image_size": self.image_size,
            "blocks": list(self.head.blocks),
            "cond_channels": list(self.head.cond_channels),
            "clamp": self.head.clamp,
            "clamp_form": clamp_form,
            "padding_mode": padding,
            "standardize": self.standardize,
            "score": score,
            "top_k": self.top_k,
        }

    def forward(self, images: Tensor) -> Prediction:
        """Score RGB ``images (N, 3, S, S)`` in 0..1; normalisation happens inside."""
        return self.predict_features(self.features(images))

    @torch.no_grad()
    def features(self, images: Tensor) -> list[Tensor]:
        """Pooled feature maps ``[(N, C_i, H_i, W_i)]``, standardised once :meth:`set_statistics` was called."""
        pooled = [F.avg_pool2d(f, 3, stride=2, padding=1) for f in self.backbone(images)]
        if not self.standardize:
            return pooled
        return [
            (f - _column(getattr(self, f"feature_mean{i}")))
            / _column(getattr(self, f"feature_std{i}"))
            for i, f in enumerate(pooled)
        ]

    def set_statistics(self, means: Sequence[Tensor], stds: Sequence[Tensor]) -> None:
        """Store per-channel mean and standard deviation ``(C_i,)`` of the training set's pooled features."""
        for i, (mean, std) in enumerate(zip(means, stds, strict=True)):
            if not (torch.isfinite(mean).all() and torch.isfinite(std).all()):
                raise ValueError(f"set_statistics: scale {i} holds non-finite values")
            getattr(self, f"feature_mean{i}").copy_(mean)
            getattr(self, f"feature_std{i}").copy_(std.clamp_min(1e-6))

    def loss(self, images: Tensor) -> Tensor:
        """Training loss of a batch of images: see :meth:`MSFlowHead.loss`."""
        return self.head.loss(self.features(images))

    def optimize(self, dtype: torch.dtype | None = None) -> MSFlow:
        """The inference form of the whole pipeline; this model stays as it is.

        Batch norms of the backbone are folded, all convolutions prepacked, everything runs channels_last in ``dtype``:
        float32 (None) or bfloat16. Statistics and weights are those of this moment.
        """
        form = copy.copy(self)
        form._modules = dict(self._modules)
        form.backbone = self.backbone.optimize(self.image_size, dtype)
        form.head = self.head.optimize(dtype)  # type: ignore[assignment]
        return form.eval()

    def predict_features(self, features: Sequence[Tensor]) -> Prediction:
        """Score pooled features as :meth:`features` gives them."""
        log_likelihood = self.head.log_likelihood(features)
        maps = ops.aggregate(log_likelihood, self.image_size, top_k=self.top_k)
        score = {"log": maps.log_score, "paper": maps.score, "nll": maps.nll_score}[self.score]
        return Prediction(score, maps.anomaly_map, maps.image_map, log_likelihood)


def _column(vector: Tensor) -> Tensor:
    return vector.view(-1, 1, 1)


def _refuse_non_finite(log_det: Tensor, features: Sequence[Tensor]) -> None:
    """Non-finite features show in ``log_det``, where looking costs nothing; other causes are the caller's."""
    if (
        log_det.device.type != "cpu"
        or torch.compiler.is_compiling()
        or torch._C._get_tracing_state()
    ):
        return
    if bool(torch.isfinite(log_det).all()):
        return
    for i, f in enumerate(features):
        if not bool(torch.isfinite(f).all()):
            raise ValueError(f"features: scale {i} holds NaN or infinite values")
