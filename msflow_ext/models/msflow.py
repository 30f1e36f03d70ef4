"""MSFlow: asymmetrical parallel flows on the scales of a frozen backbone, and a fusion flow across them.

Source: Zhou et al., "MSFlow: Multi-Scale Flow-based Framework for Unsupervised Anomaly Detection", TNNLS 2024.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

import torch.nn.functional as F
from torch import Tensor

from msflow_ext import ops
from msflow_ext.choices import AnomalyMap, ClampForm, PaddingMode, Score
from msflow_ext.models.backbone import Backbone
from msflow_ext.models.base import AnomalyModel, Prediction
from msflow_ext.models.msflow_head import MSFlowHead

if TYPE_CHECKING:
    pass

__all__ = ["MSFlow", "MSFlowHead", "Prediction"]

#: What the paper fixes for its backbone; every other backbone keeps its own padding and has its features standardised.
PRESETS: dict[str, dict[str, Any]] = {
    "wide_resnet50_2": {"image_size": 512, "padding_mode": "reflect", "standardize": False},
    "efficientnet_lite0": {"image_size": 192, "padding_mode": "zeros", "standardize": True},
}
OTHER: dict[str, Any] = {"image_size": None, "padding_mode": "zeros", "standardize": True}


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

    Examples:
        >>> import torch
        >>> model = MSFlow("test_efficientnet", image_size=64, pretrained=False, seed=0).eval()
        >>> images = torch.rand(2, 3, 64, 64)
        >>> model(images).anomaly_map.shape
        torch.Size([2, 64, 64])
        >>> fast = model.optimize()  # for inference
        >>> torch.allclose(fast(images).score, model(images).score, rtol=1e-3)
        True
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
        clamp_form: ClampForm = "0.2",
        out_indices: Sequence[int] | None = None,
        padding_mode: PaddingMode | None = None,
        standardize: bool | None = None,
        whiten: bool = False,
        score: Score = "log",
        top_k: float = 0.03,
        anomaly_map: AnomalyMap = "paper",
        smoothing: float = 0.0,
        seed: int | None = None,
    ) -> None:
        preset = PRESETS.get(backbone, OTHER)
        size = preset["image_size"] if image_size is None else image_size
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
