"""Read models with their backbones from checkpoints of other packages, and make such checkpoints."""

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

#: For each format, the settings of its code that its files do not hold.
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
    """Load a model from a checkpoint of the MSFlow reference implementation, gathierry/FastFlow or anomalib.

    The format is detected from the file, which is opened without executing code.

    Args:
        path: a file of ``torch.save`` or Lightning.
        backbone: name of the backbone; by default the one that an anomalib file names, else ``"wide_resnet50_2"``.
        clamp, clamp_form: the clamp in training, which no file holds; by default 1.9 for MSFlow, 2 for FastFlow, and
            the form of FrEIA 0.2.
        image_size: side in pixels; by default that of the LayerNorms in the file, else that of the preset.
        pretrained: weights of the backbone if the file has none, see :class:`msflow_ext.MSFlow`.

    Raises:
        FileNotFoundError: if the file does not exist.
        ValueError: if the file is not such a checkpoint, or does not fit the backbone. Missing, unexpected and
            misshapen keys are named.
        RuntimeError: if the pretrained weights cannot be found.
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
    """Return a checkpoint of another package with the weights of ``model``, for ``torch.save``.

    Checkpoints of FastFlow include the backbone, except a transformer, of which the model keeps only a part. anomalib
    reads the file with ``Fastflow.load_from_checkpoint`` or as ``ckpt_path``. If images do not have 256 pixels, pass
    it a ``pre_processor`` for their size. Its thresholds are not set before ``Engine.validate``.

    Args:
        model: the model.
        to: ``"msflow"`` (reference implementation), or ``"gathierry"`` or ``"anomalib"`` (their FastFlow).

    Raises:
        ValueError: if the package would give other results with these weights.
    """
    if isinstance(model, MSFlow) != (to == "msflow"):
        expected = "an MSFlow" if to == "msflow" else "a FastFlow"
        raise ValueError(f"model must be {expected} for {to}, got {type(model).__name__}")
    for name, value in PEERS[to].items():
        if model.config[name] != value:
            raise ValueError(
                f"{name} of the model must be {value!r} for {to}, got {model.config[name]!r}"
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
        "pytorch-lightning_version": "2.6.0",  # the oldest that anomalib 2.7 accepts
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
#: Values that anomalib's post-processor learns in validation, NaN before.
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
    """Load the weights of ``head``, and those of the backbone if there are any, into ``model``."""
    name = model.backbone.name
    if model.head.channels != head.channels:
        raise ValueError(
            f"backbone must have channels {head.channels}, got {name} with {model.head.channels}"
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
    """Return the weights of a whole transformer that ``network``, a part of it, has below ``model``."""
    names = {key: key.removeprefix("model.") for key in network.state_dict()}
    return {key: found[name] for key, name in names.items() if name in found}


def _below(prefix: str, state: Mapping[str, Tensor]) -> dict[str, Tensor]:
    return {k.removeprefix(prefix): v for k, v in state.items() if k.startswith(prefix)}
