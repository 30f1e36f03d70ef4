"""MSFlow: asymmetrical parallel flows on the scales of a frozen backbone, and a fusion flow across them.

Source: Zhou et al., "MSFlow: Multi-Scale Flow-based Framework for Unsupervised Anomaly Detection", TNNLS 2024.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from msflow_ext import ops
from msflow_ext.flows import FlowOutput
from msflow_ext.models.backbone import Backbone
from msflow_ext.models.base import AnomalyModel, FlowHead, Prediction, refuse_non_finite, seeded
from msflow_ext.models.msflow_layers import ConditionalFlow, FusionFlow

if TYPE_CHECKING:
    from msflow_ext.models.optimized.msflow import OptimizedHead

__all__ = ["MSFlow", "MSFlowHead", "Prediction"]

#: What the paper fixes for its backbone; every other backbone keeps its own padding and has its features standardised.
PRESETS: dict[str, dict[str, Any]] = {
    "wide_resnet50_2": {"image_size": 512, "padding_mode": "reflect", "standardize": False},
    "efficientnet_lite0": {"image_size": 192, "padding_mode": "zeros", "standardize": True},
}
OTHER: dict[str, Any] = {"image_size": None, "padding_mode": "zeros", "standardize": True}


class MSFlowHead(FlowHead):
    """The trainable part of MSFlow: parallel flows and fusion flow over pooled feature maps.

    Args:
        channels: channels of each scale, two scales or more, even numbers.
        blocks: flow steps of each scale; the paper's 2, 5, 8 grow with depth.
        cond_channels: channels of the positional condition, a multiple of 4, one number or one per scale.
        clamp: alpha of the soft clamp.
        clamp_form: form of the soft clamp, ``"0.2"`` (the authors' code, FrEIA 0.2) or ``"head"`` (FrEIA master); the
            fusion flow has its own.
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
        super().__init__(channels, clamp=clamp, clamp_form=clamp_form)
        self.blocks = tuple(int(b) for b in blocks)
        conds = [cond_channels] if isinstance(cond_channels, int) else list(cond_channels)
        conds = conds * len(channels) if len(conds) == 1 else conds
        self.cond_channels = tuple(int(c) for c in conds)
        self._check_arguments()
        with seeded(seed):
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
        refuse_non_finite(total, features)
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

    def optimize(self, dtype: torch.dtype | None = None) -> OptimizedHead:
        """The inference form: a snapshot, channels_last, with prepacked weights in ``dtype`` (None: as they are)."""
        from msflow_ext.models.optimized.msflow import OptimizedHead

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


class MSFlow(AnomalyModel):
    """MSFlow whole: frozen backbone, pooling, flows, scores.

    The maps of a pyramid are pooled (3x3, stride 2), as in the paper. Where all maps of a transformer have one grid,
    they are not: its patches are as coarse as the paper's coarsest pooled map, and attention has mixed neighbours.

    Args:
        backbone: name of a timm network, or ``efficientnet_lite0``, whose weights a pip package ships.
        image_size: side ``S`` of the square input and of the maps, in pixels; by default the paper's for the
            backbone, else the one that a transformer was trained with, else 256.
        pretrained: True, a path of local weights, or False for random weights (loading a checkpoint, tests).
        blocks, cond_channels, clamp, clamp_form, seed: see :class:`MSFlowHead`.
        out_indices: maps of the backbone to read, one per entry of ``blocks``; by default the backbone chooses: see
            :class:`~msflow_ext.models.backbone.Backbone`.
        padding_mode: padding of the backbone's convolutions, ``"reflect"`` or ``"zeros"``; by default the paper's for the
            backbone, else ``"zeros"``.
        standardize: whether features are standardised per channel by statistics of the training set
            (:meth:`set_statistics`); by default off for the backbone of the paper, on for others.
        score: score of an image: ``"log"``, the paper's image score as ``-log(1 - score)``, which has the same order
            and cannot saturate; ``"paper"``, the value itself; ``"nll"``, the mean of the largest summed negative
            log-likelihoods; ``"map"``, that of the anomaly map's largest values.
        top_k: share of the pixels that make the score.
        anomaly_map: anomaly map: ``"paper"``, additive over scales; or ``"clamped"``: see
            :class:`~msflow_ext.models.anomaly_map.ClampedMap`.
        smoothing: standard deviation in pixels of a Gaussian filter over the clamped map.
        whiten: for parts that always lie alike: standardised features are whitened at every position given the coarser
            scales there, by the training set's means and covariances: see :class:`~msflow_ext.models.gaussians.Whitening`.

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
        out_indices: Sequence[int] | None = None,
        padding_mode: str | None = None,
        standardize: bool | None = None,
        whiten: bool = False,
        score: str = "log",
        top_k: float = 0.03,
        anomaly_map: str = "paper",
        smoothing: float = 0.0,
        seed: int | None = None,
    ) -> None:
        preset = PRESETS.get(backbone, OTHER)
        size = preset["image_size"] if image_size is None else int(image_size)
        network = Backbone(
            backbone,
            out_indices=len(blocks) if out_indices is None else out_indices,
            image_size=size,
            pretrained=pretrained,
            padding_mode=preset["padding_mode"] if padding_mode is None else padding_mode,
        )
        head = MSFlowHead(
            network.channels,
            blocks=blocks,
            cond_channels=cond_channels,
            clamp=clamp,
            clamp_form=clamp_form,
            seed=seed,
        )
        super().__init__(
            network,
            head,
            image_size=size,
            standardize=preset["standardize"] if standardize is None else bool(standardize),
            whiten=bool(whiten),
            blocks=list(head.blocks),
            cond_channels=list(head.cond_channels),
            score=score,
            top_k=float(top_k),
            anomaly_map=anomaly_map,
            smoothing=float(smoothing),
        )
        smallest = -(-self.image_size // network.strides[-1])
        if self.pooled and smallest < 3:
            raise ValueError(
                f"image_size {self.image_size} leaves maps of {smallest} x {smallest} at stride {network.strides[-1]} "
                f"of {backbone}, smaller than the 3 x 3 that are pooled"
            )

    @property
    def pooled(self) -> bool:
        """Whether the backbone's maps are pooled."""
        return not self.backbone.is_flat

    def pool(self, x: Tensor) -> Tensor:
        return F.avg_pool2d(x, 3, stride=2, padding=1) if self.pooled else x

    def pooled_size(self, height: int, width: int) -> tuple[int, int]:
        return ((height + 1) // 2, (width + 1) // 2) if self.pooled else (height, width)

    def predict_features(self, features: Sequence[Tensor]) -> Prediction:
        """Score pooled features as :meth:`features` gives them."""
        log_likelihood = self.head.log_likelihood(features)
        maps = ops.aggregate(log_likelihood, self.image_size, top_k=self.top_k)
        anomaly_map = self.localize(log_likelihood, maps.anomaly_map)
        if self.score == "map":
            score = self.hottest(anomaly_map)
        else:
            score = {"log": maps.log_score, "paper": maps.score, "nll": maps.nll_score}[self.score]
        return Prediction(score, anomaly_map, maps.image_map, log_likelihood)
