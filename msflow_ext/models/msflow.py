"""MSFlow: asymmetrical parallel flows on the scales of a frozen backbone, and a fusion flow across them.

Source: Zhou et al., "MSFlow: Multi-Scale Flow-based Framework for Unsupervised Anomaly Detection", TNNLS 2024.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch.nn.functional as F
from torch import Tensor

from msflow_ext import ops
from msflow_ext.choices import AnomalyMap, ClampForm, PaddingMode, Score
from msflow_ext.models.backbone import Backbone
from msflow_ext.models.base import AnomalyModel, Prediction
from msflow_ext.models.msflow_head import MSFlowHead

__all__ = ["MSFlow", "MSFlowHead", "Prediction"]

#: Settings of the paper for its backbone. Other backbones keep their padding, and their features are standardized.
PRESETS: dict[str, dict[str, Any]] = {
    "wide_resnet50_2": {"image_size": 512, "padding_mode": "reflect", "standardize": False},
    "efficientnet_lite0": {"image_size": 192, "padding_mode": "zeros", "standardize": True},
}
OTHER: dict[str, Any] = {"image_size": None, "padding_mode": "zeros", "standardize": True}


class MSFlow(AnomalyModel):
    """MSFlow model: frozen backbone, pooling, flows and scores.

    The maps of a pyramid are pooled (3x3, stride 2), as in the paper. The maps of a transformer whose blocks share one
    grid are not. Its patches are already as coarse as the paper's coarsest pooled map.

    Args:
        backbone: name of a timm network, or ``efficientnet_lite0``, whose weights come with a pip package.
        image_size: side ``S`` of the square input and of the maps, in pixels. Default: the paper's for its backbone,
            the training size of a transformer of fixed size, else 256.
        pretrained: True; the path of local weights; or False for random weights, if a checkpoint is loaded next.
        blocks, cond_channels, clamp, clamp_form, seed: see :class:`MSFlowHead`.
        out_indices: maps of the backbone, one per entry of ``blocks``. Default: see
            :class:`~msflow_ext.models.backbone.Backbone`.
        padding_mode: padding of the backbone's convolutions, ``"reflect"`` or ``"zeros"``. Default: the paper's for its
            backbone, else ``"zeros"``.
        standardize: whether features are standardized per channel by statistics of the training set
            (:meth:`set_statistics`). Default: False for the paper's backbone, True for others.
        score: image score. ``"log"``: the paper's score as ``-log(1 - score)``, which has the same order and does not
            saturate. ``"paper"``: the paper's score. ``"nll"``: top-k mean of the summed negative log-likelihoods.
            ``"map"``: top-k mean of the anomaly map.
        top_k: share of the pixels from which the score is computed.
        anomaly_map: ``"paper"``: additive over scales. ``"clamped"``: see
            :class:`~msflow_ext.models.anomaly_map.ClampedMap`.
        smoothing: standard deviation of a Gaussian filter over the clamped map, in pixels.
        whiten: whether standardized features are whitened at every position, given the coarser scales there. Use it
            for parts that always lie in the same place, see :class:`~msflow_ext.models.gaussians.Whitening`.

    Raises:
        ValueError: an argument is out of range; the message names it.
        RuntimeError: the pretrained weights are not available.

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
                f"image_size must give maps of at least 3 x 3 at stride {network.strides[-1]} of {backbone}, "
                f"got {self.image_size}, which gives {smallest} x {smallest}"
            )

    @property
    def pooled(self) -> bool:
        """Return whether the backbone's maps are pooled."""
        return not self.backbone.is_flat

    def pool(self, x: Tensor) -> Tensor:
        return F.avg_pool2d(x, 3, stride=2, padding=1) if self.pooled else x

    def pooled_size(self, height: int, width: int) -> tuple[int, int]:
        return ((height + 1) // 2, (width + 1) // 2) if self.pooled else (height, width)

    def predict_features(self, features: Sequence[Tensor]) -> Prediction:
        """Score the pooled feature maps that :meth:`features` returns."""
        log_likelihood = self.head.log_likelihood(features)
        maps = ops.aggregate(log_likelihood, self.image_size, top_k=self.top_k)
        anomaly_map = self.localize(log_likelihood, maps.anomaly_map)
        if self.score == "map":
            score = self.top_k_mean(anomaly_map)
        else:
            score = {"log": maps.log_score, "paper": maps.score, "nll": maps.nll_score}[self.score]
        return Prediction(score, anomaly_map, maps.image_map, log_likelihood)
