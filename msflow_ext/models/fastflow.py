"""FastFlow: an unconditional flow on each scale of a frozen backbone, convolutional or transformer.

Source: Yu et al., "FastFlow: Unsupervised Anomaly Detection and Localization via 2D Normalizing Flows", 2021. Details
that the paper leaves open follow ``gathierry/FastFlow`` and anomalib.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from msflow_ext import ops
from msflow_ext.choices import AnomalyMap, ClampForm, PaddingMode, Score
from msflow_ext.flows import AffineCoupling, Flow, FlowOutput
from msflow_ext.models.backbone import Backbone
from msflow_ext.models.base import (
    AnomalyModel,
    FlowHead,
    Prediction,
    refuse_non_finite,
    seeded,
    side,
)
from msflow_ext.models.conv.training import TrainedConv2d, laid_out

if TYPE_CHECKING:
    from msflow_ext.models.optimized.fastflow import OptimizedFastFlowHead

#: Settings of the paper for its backbones. Other backbones have the common settings of their kind.
PRESETS: dict[str, dict[str, Any]] = {
    "resnet18": {"image_size": 256, "conv3x3_only": True},
    "wide_resnet50_2": {"image_size": 256},
    "deit_base_distilled_patch16_384": {"image_size": 384, "out_indices": (7,)},
    "cait_m48_448": {"image_size": 448, "out_indices": (40,)},
}
PYRAMID: dict[str, Any] = {"steps": 8, "hidden_ratio": 1.0, "conv3x3_only": False}
#: For a pyramid with a map of fewer than 64 channels, the paper's fewest: the paper's subnets would be too narrow.
NARROW: dict[str, Any] = {**PYRAMID, "hidden_ratio": 2.0}
TRANSFORMER: dict[str, Any] = {"steps": 20, "hidden_ratio": 0.16, "conv3x3_only": False}


class FastFlowHead(FlowHead):
    """Trainable part of FastFlow: an optional LayerNorm and a flow on every scale.

    The subnet of a step is Conv - ReLU - Conv of the conditioning half.

    Args:
        channels: channels of each scale, 2 or more.
        steps: flow steps of every scale.
        hidden_ratio: hidden channels of a subnet, as a share of its input channels (rounded down).
        conv3x3_only: whether all steps use 3x3 convolutions, instead of alternating 3x3 and 1x1.
        clamp, clamp_form: see :func:`msflow_ext.ops.affine_coupling`.
        input_sizes: ``(height, width)`` of each scale, for LayerNorms over channels and positions before the flows.
            They have a weight and a bias for each channel at each position. None: no norms, and inputs of any size.
        seed: seed of permutations and initial weights; None uses torch's global generator.

    Raises:
        ValueError: an argument is out of range; the message names it.

    Examples:
        >>> head = FastFlowHead((8, 16), steps=2, seed=0)
        >>> features = [torch.randn(2, 8, 4, 4), torch.randn(2, 16, 2, 2)]
        >>> head.loss(features).backward()
        >>> head(features)
        FlowOutput(z=[(2, 8, 4, 4), (2, 16, 2, 2)], log_det=(2,))
    """

    def __init__(
        self,
        channels: Sequence[int],
        *,
        steps: int = 8,
        hidden_ratio: float = 1.0,
        conv3x3_only: bool = False,
        clamp: float = 2.0,
        clamp_form: ClampForm = "0.2",
        input_sizes: Sequence[tuple[int, int]] | None = None,
        seed: int | None = None,
    ) -> None:
        super().__init__(channels, clamp=clamp, clamp_form=clamp_form)
        self.steps = int(steps)
        self.hidden_ratio = float(hidden_ratio)
        self.conv3x3_only = bool(conv3x3_only)
        self.input_sizes = (
            None if input_sizes is None else [(int(h), int(w)) for h, w in input_sizes]
        )
        self._check_arguments()
        with seeded(seed):
            self.flows = nn.ModuleList(self._flow(c) for c in self.channels)
        sizes = self.input_sizes or ()
        self.norms = nn.ModuleList(
            nn.LayerNorm([c, *size]) for c, size in zip(self.channels, sizes, strict=False)
        )

    def forward(self, features: Sequence[Tensor]) -> FlowOutput:
        """Map features ``[(N, C_i, H_i, W_i)]`` to the latent space; ``log_det`` omits the LayerNorms."""
        normed = self.normalize(features)
        z, log_dets = [], []
        for x, flow in zip(normed, self.flows, strict=True):
            whole, _, log_det = laid_out(flow, x, flow.steps[0].subnet[0])  # type: ignore[union-attr, index]
            z.append(whole)
            log_dets.append(log_det)
        total = sum(log_dets[1:], log_dets[0])
        refuse_non_finite(total, features)
        return FlowOutput(z, total)

    def normalize(self, features: Sequence[Tensor]) -> list[Tensor]:
        """Return the input of the flows: the features after the LayerNorms."""
        self._check_features(features)
        if not self.norms:
            return list(features)
        return [norm(f) for f, norm in zip(features, self.norms, strict=True)]

    def inverse(self, z: Sequence[Tensor]) -> FlowOutput:
        """Map latent tensors back to the input of the flows; the LayerNorms cannot be inverted.

        ``log_det`` is that of the inverse.
        """
        self._check_features(z, "z")
        pairs: Any = [flow.inverse(t) for t, flow in zip(z, self.flows, strict=True)]  # type: ignore[operator]
        return FlowOutput([x for x, _ in pairs], sum(d for _, d in pairs))  # type: ignore[arg-type]

    def optimize(self, dtype: torch.dtype | None = None) -> OptimizedFastFlowHead:
        """Return an optimized copy for inference: channels_last, with packed weights in ``dtype`` (None: unchanged)."""
        from msflow_ext.models.optimized.fastflow import OptimizedFastFlowHead

        return OptimizedFastFlowHead(self, dtype)

    def _flow(self, channels: int) -> Flow:
        transformed = channels // 2
        conditioning = channels - transformed
        hidden = int(conditioning * self.hidden_ratio)
        if hidden < 1:
            raise ValueError(
                f"hidden_ratio must leave at least 1 of a subnet's {conditioning} input channels, got {self.hidden_ratio}"
            )

        def step(i: int) -> AffineCoupling:
            k = 3 if self.conv3x3_only or i % 2 == 0 else 1
            subnet = nn.Sequential(
                TrainedConv2d(conditioning, hidden, k, padding=k // 2),
                nn.ReLU(inplace=True),
                TrainedConv2d(hidden, 2 * transformed, k, padding=k // 2),
            )
            return AffineCoupling(channels, subnet, clamp=self.clamp, clamp_form=self.clamp_form)

        return Flow([step(i) for i in range(self.steps)])

    def _check_features(self, features: Sequence[Tensor], name: str = "features") -> None:
        super()._check_features(features, name)
        sizes = [(f.size(2), f.size(3)) for f in features]
        if self.input_sizes is not None and sizes != self.input_sizes:
            raise ValueError(
                f"{name} must have the sizes {self.input_sizes} of the LayerNorms, got {sizes}"
            )

    def _check_arguments(self) -> None:
        if not self.channels or any(c < 2 for c in self.channels):
            raise ValueError(
                f"channels must have one scale or more, of 2 channels or more, got {self.channels}"
            )
        if self.steps < 1:
            raise ValueError(f"steps must be at least 1, got {self.steps}")
        if not 0 < self.hidden_ratio < math.inf:
            raise ValueError(f"hidden_ratio must be above 0 and finite, got {self.hidden_ratio}")
        sizes = self.input_sizes
        if sizes is not None and (len(sizes) != len(self.channels) or min(map(min, sizes)) < 1):
            raise ValueError(
                f"input_sizes must have a (height, width) for each of {len(self.channels)} scales, got {sizes}"
            )


class FastFlow(AnomalyModel):
    """FastFlow model: frozen backbone, LayerNorms, flows and scores.

    A convolutional backbone, or a transformer whose grid shrinks, is read at three scales, each with a trainable
    LayerNorm. A transformer whose blocks share one grid is read after one block, through its own final norm.

    Args:
        backbone: name of a timm network, or ``efficientnet_lite0``, whose weights come with a pip package.
        image_size: side ``S`` of the square input and of the map, in pixels. Default: the paper's for its backbones,
            the training size of a transformer of fixed size, else 256.
        pretrained: True; the path of local weights; or False for random weights, if a checkpoint is loaded next.
        out_indices: maps of the backbone. Default: the paper's for its backbones, else see
            :class:`~msflow_ext.models.backbone.Backbone`.
        steps, conv3x3_only: see :class:`FastFlowHead`. Default: the paper's for the backbone or its kind.
        hidden_ratio: see :class:`FastFlowHead`. Default: the paper's for the backbone or its kind, but 2 for a pyramid
            with a map of fewer than 64 channels (mobile networks).
        clamp, clamp_form, seed: see :class:`FastFlowHead`.
        layer_norm: whether there are trainable LayerNorms. Default: True unless the backbone applies its own norm.
        padding_mode: padding of the backbone's convolutions, ``"reflect"`` or ``"zeros"``.
        standardize: whether features are standardized per channel by statistics of the training set
            (:meth:`set_statistics`).
        score: image score. ``"paper"``: the maximum of the map. ``"log"``, ``"nll"``, ``"map"``: as in
            :class:`~msflow_ext.MSFlow`.
        top_k: share of the pixels from which ``"log"``, ``"nll"`` and ``"map"`` are computed.
        anomaly_map: ``"paper"``: the mean over scales. ``"clamped"``: see
            :class:`~msflow_ext.models.anomaly_map.ClampedMap`.
        smoothing: standard deviation of a Gaussian filter over the clamped map, in pixels.
        whiten: whether standardized features are whitened at every position, given the coarser scales there. Use it
            for parts that always lie in the same place, see :class:`~msflow_ext.models.gaussians.Whitening`.

    Raises:
        ValueError: an argument is out of range; the message names it.
        RuntimeError: the pretrained weights are not available.

    Examples:
        >>> model = FastFlow("test_efficientnet", image_size=64, pretrained=False, seed=0).eval()
        >>> model(torch.rand(2, 3, 64, 64)).score.shape
        torch.Size([2])
    """

    def __init__(
        self,
        backbone: str = "wide_resnet50_2",
        *,
        image_size: int | None = None,
        pretrained: bool | str = True,
        out_indices: int | Sequence[int] | None = None,
        steps: int | None = None,
        hidden_ratio: float | None = None,
        conv3x3_only: bool | None = None,
        clamp: float = 2.0,
        clamp_form: ClampForm = "0.2",
        layer_norm: bool | None = None,
        padding_mode: PaddingMode = "zeros",
        standardize: bool = False,
        whiten: bool = False,
        score: Score = "paper",
        top_k: float = 0.03,
        anomaly_map: AnomalyMap = "paper",
        smoothing: float = 0.0,
        seed: int | None = None,
    ) -> None:
        preset = PRESETS.get(backbone, {})
        size = preset.get("image_size") if image_size is None else image_size
        network = Backbone(
            backbone,
            out_indices=preset.get("out_indices") if out_indices is None else out_indices,
            image_size=size,
            pretrained=pretrained,
            padding_mode=padding_mode,
        )
        narrow = min(network.channels) < 64
        kind = TRANSFORMER if network.is_flat else NARROW if narrow else PYRAMID
        defaults = {**kind, **preset}
        if layer_norm is None:
            layer_norm = not network.is_flat
        head = FastFlowHead(
            network.channels,
            steps=defaults["steps"] if steps is None else steps,
            hidden_ratio=defaults["hidden_ratio"] if hidden_ratio is None else hidden_ratio,
            conv3x3_only=defaults["conv3x3_only"] if conv3x3_only is None else conv3x3_only,
            clamp=clamp,
            clamp_form=clamp_form,
            input_sizes=network.grids(side(size, network)) if layer_norm else None,
            seed=seed,
        )
        super().__init__(
            network,
            head,
            image_size=size,
            standardize=bool(standardize),
            whiten=bool(whiten),
            steps=head.steps,
            hidden_ratio=head.hidden_ratio,
            conv3x3_only=head.conv3x3_only,
            layer_norm=bool(layer_norm),
            score=score,
            top_k=float(top_k),
            anomaly_map=anomaly_map,
            smoothing=float(smoothing),
        )

    def predict_features(self, features: Sequence[Tensor]) -> Prediction:
        """Score the feature maps that :meth:`features` returns."""
        log_likelihood = self.head.log_likelihood(features)
        maps = ops.mean_aggregate(log_likelihood, self.image_size)
        anomaly_map = self.localize(log_likelihood, maps.anomaly_map)
        if self.score == "map":
            score = self.top_k_mean(anomaly_map)
        elif self.score == "paper":
            score = maps.score
        else:
            others = ops.aggregate(log_likelihood, self.image_size, top_k=self.top_k)
            score = others.log_score if self.score == "log" else others.nll_score
        return Prediction(score, anomaly_map, maps.anomaly_map, log_likelihood)
