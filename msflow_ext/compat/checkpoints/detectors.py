"""Detectors from checkpoints of other packages, and checkpoints for those packages."""

from __future__ import annotations

import math
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from msflow_ext.choices import ClampForm
from msflow_ext.compat.checkpoints import fastflow, msflow
from msflow_ext.compat.checkpoints.torch_file import read_torch_file
from msflow_ext.models.base import AnomalyModel
from msflow_ext.models.fastflow import FastFlow
from msflow_ext.models.msflow import MSFlow

#: Settings by format that its code fixes and its file does not hold.
PEERS: dict[str, dict[str, Any]] = {
    "msflow": {"standardize": False, "padding_mode": "reflect"},
    "gathierry": {"standardize": False, "padding_mode": "zeros", "clamp": 2.0},
    "anomalib": {"standardize": False, "padding_mode": "zeros", "clamp": 2.0, "clamp_form": "0.2"},
}


def read_detector(
    path: str | Path,
    backbone: str | None = None,
    *,
    clamp: float | None = None,
    clamp_form: ClampForm = "0.2",
    image_size: int | None = None,
    pretrained: bool | str = True,
) -> AnomalyModel:
    """Load a detector from a checkpoint of the MSFlow authors' code, of gathierry/FastFlow or of anomalib.

    Which one it is shows in the file, which is opened without executing code.

    Args:
        path: what ``torch.save`` or Lightning wrote.
        backbone: the network below; by default the one that an anomalib file names, else ``"wide_resnet50_2"``.
        clamp, clamp_form: what the model was trained with, which no file says; by default 1.9 for MSFlow, 2 for
            FastFlow, and the clamp of FrEIA 0.2.
        image_size: side in pixels; by default that of the LayerNorms in the file, else the preset's.
        pretrained: weights of the backbone where the file has none, see :class:`msflow_ext.MSFlow`.

    Raises:
        FileNotFoundError: no such file. ValueError: not such a checkpoint, or not for this backbone; keys missing,
            unexpected or misshapen, all named. RuntimeError: no pretrained weights within reach.
    """
    content = read_torch_file(path)
    read = _msflow if isinstance(content, Mapping) and "fusion_flow" in content else _fastflow
    try:
        return read(
            content, backbone, clamp, clamp_form, image_size=image_size, pretrained=pretrained
        )
    except ValueError as error:
        raise ValueError(f"{path}: {error}") from error


def for_peer(model: AnomalyModel, to: str) -> dict[str, Any]:
    """Return ``model`` as a checkpoint of another package, ready for ``torch.save``.

    FastFlow's have the backbone, too, unless it is a transformer, of which we keep a part only. anomalib reads it with
    ``Fastflow.load_from_checkpoint`` or as ``ckpt_path``; where images are not of 256 pixels, its ``pre_processor`` must
    say so. Its thresholds are not set before ``Engine.validate``.

    Args:
        to: ``"msflow"`` (the authors' code), ``"gathierry"`` or ``"anomalib"`` (their FastFlow).

    Raises:
        ValueError: the package would compute something else with these weights.
    """
    if isinstance(model, MSFlow) != (to == "msflow"):
        raise ValueError(f"a checkpoint of {to} cannot hold a {type(model).__name__}")
    for name, value in PEERS[to].items():
        if model.config[name] != value:
            raise ValueError(
                f"a checkpoint of {to} means {name} {value!r}, this model has {model.config[name]!r}"
            )
    if to == "msflow":
        flat = msflow.to_reference_state_dict(model.head)
        flows = [_below(f"parallel_flows.{i}.", flat) for i in range(len(model.head.channels))]
        return {"epoch": 0, "fusion_flow": _below("fusion_flow.", flat), "parallel_flows": flows}
    state = fastflow.to_peer_state_dict(model.head, to)
    if not model.backbone.is_flat:
        network = model.backbone.network.state_dict()
        state |= {f"{_EXTRACTOR}{key}": value for key, value in network.items()}
    if to == "gathierry":
        return {"epoch": 0, "model_state_dict": state}
    unset = {f"post_processor.{name}": torch.tensor(math.nan) for name in _LEARNED}
    return {
        "epoch": 0,
        "global_step": 0,
        "pytorch-lightning_version": "2.6.0",  # the oldest that anomalib 2.7 takes
        "state_dict": {f"model.{key}": value for key, value in state.items()} | unset,
        "hparams_name": "kwargs",
        "hyper_parameters": {
            "backbone": model.config["backbone"],
            "pre_trained": model.backbone.is_flat,
            "flow_steps": model.config["steps"],
            "conv3x3_only": model.config["conv3x3_only"],
            "hidden_ratio": model.config["hidden_ratio"],
        },
    }


_EXTRACTOR = "feature_extractor."
#: Statistics of anomalib's post-processor, NaN before validation.
_LEARNED = (
    *("_image_threshold", "_pixel_threshold"),
    *("image_min", "image_max", "pixel_min", "pixel_max"),
)


def _msflow(
    content: Any, backbone: str | None, clamp: float | None, clamp_form: ClampForm, **options: Any
) -> MSFlow:
    head = msflow.head_from_state_dict(
        msflow.flatten_checkpoint(content),
        clamp=1.9 if clamp is None else clamp,
        clamp_form=clamp_form,
    )
    options |= {"blocks": head.blocks, "cond_channels": head.cond_channels}
    options |= {"clamp": head.clamp, "clamp_form": clamp_form, **PEERS["msflow"]}
    model = MSFlow(backbone or "wide_resnet50_2", **options)
    _fill(model, head, {})
    return model


def _fastflow(
    content: Any, backbone: str | None, clamp: float | None, clamp_form: ClampForm, **options: Any
) -> FastFlow:
    state = fastflow.unpacked(content)
    head = fastflow.head_from_state_dict(
        state, clamp=2.0 if clamp is None else clamp, clamp_form=clamp_form
    )
    named = content.get("hyper_parameters")
    if backbone is None and isinstance(named, Mapping):
        backbone = named.get("backbone")
    found = _below(_EXTRACTOR, {key.removeprefix("model."): value for key, value in state.items()})
    options |= {name: getattr(head, name) for name in ("steps", "hidden_ratio", "conv3x3_only")}
    options |= {"clamp": head.clamp, "clamp_form": clamp_form}
    options["layer_norm"] = head.input_sizes is not None
    options["pretrained"] = False if found else options["pretrained"]
    if options["image_size"] is None and head.input_sizes is not None:
        options["image_size"] = 4 * head.input_sizes[0][0]  # the first map has stride 4
    model = FastFlow(backbone or "wide_resnet50_2", **options)
    _fill(model, head, found)
    return model


def _fill(model: AnomalyModel, head: torch.nn.Module, network: Mapping[str, Tensor]) -> None:
    """Give ``model`` the weights of ``head``, and those of the backbone where there are any."""
    name = model.backbone.name
    if model.head.channels != head.channels:
        raise ValueError(
            f"the flows have channels {head.channels}, backbone {name} gives {model.head.channels}"
        )
    try:
        if network:
            own = model.backbone.network
            own.load_state_dict(_kept(network, own) if model.backbone.is_flat else network)
        model.head.load_state_dict(head.state_dict())
    except RuntimeError as error:
        raise ValueError(f"the weights do not fit {name}: {error}") from error
    model.eval()


def _kept(found: Mapping[str, Tensor], network: torch.nn.Module) -> dict[str, Tensor]:
    """Return the weights of the part of a transformer that our backbone keeps, under the name ``model``."""
    names = {key: key.removeprefix("model.") for key in network.state_dict()}
    return {key: found[name] for key, name in names.items() if name in found}


def _below(prefix: str, state: Mapping[str, Tensor]) -> dict[str, Tensor]:
    return {k.removeprefix(prefix): v for k, v in state.items() if k.startswith(prefix)}
