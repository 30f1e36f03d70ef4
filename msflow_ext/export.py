"""A trained detector as a graph that needs this package no more: torch.export, AOTInductor, ONNX or OpenVINO."""

from __future__ import annotations

import copy
import io
import json
import os
import shlex
import shutil
import sys
import tempfile
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from msflow_ext.choices import EXPORT_FORMATS, ExportFormat
from msflow_ext.files import FULL, check_writable, replacing
from msflow_ext.inference import detector
from msflow_ext.models.base import AnomalyModel
from msflow_ext.models.optimized.head import OptimizedHead
from msflow_ext.version import __version__

#: How far a graph may be from the run; relative, as :func:`export` measures it.
TOLERANCE = 1e-4
#: The results of a graph.
OUTPUTS: tuple[str, ...] = ("score", "anomaly_map")
#: What follows the name of an output that was read as its runtime does without settings.
BY_DEFAULT = " by default"


def export(
    source: str | Path | detector.Detector | AnomalyModel,
    format: ExportFormat,
    out: str | Path,
    *,
    images: Tensor | None = None,
) -> dict[str, float]:
    """Write a detector as a graph, if it computes what the detector does.

    The graph maps ``images (N, 3, S, S)`` float32, RGB in 0..1, N of any size, to ``score (N,)`` and
    ``anomaly_map (N, S, S)``, both float32; normalisation and aggregation are inside. The file is read back and
    compared, as one image and as a batch of others, on three seeded random images and on ``images``. It carries what
    deployment needs, see :func:`metadata`: the metadata of an ONNX file or of an AOTInductor package, text by text;
    ``rt_info`` of OpenVINO below ``msflow_ext``; of ``"torch"`` the extra file ``metadata.json``.

    Args:
        source: a run folder or checkpoint file, what :func:`msflow_ext.load` made of it, or a model; left untouched.
        format: ``"torch"``, for ``torch.export.load``; ``"aoti"``, the same compiled by AOTInductor for CPUs with the
            instructions of this one, for C++ (``docs/cpp``) or ``torch._inductor.aoti_load_package``; ``"onnx"``; or
            ``"openvino"``, float32. OpenVINO itself computes in bfloat16 on CPUs that can, unless
            ``INFERENCE_PRECISION_HINT`` is ``"f32"``; of images with NaN its results may be finite.
        out: new file, ``.pt2``, ``.onnx`` or ``.xml``, the latter with its weights beside it in ``.bin``.
        images: ``(N, 3, S, S)`` real images to compare on besides.

    Returns:
        For each output the largest difference from the detector on the CPU, over the largest absolute value that the
        detector gave on all these images. For ``"openvino"`` that is with ``INFERENCE_PRECISION_HINT`` ``"f32"``, and
        ``"score by default"`` and ``"anomaly_map by default"`` are the differences without it, which have no limit.

    Raises:
        ValueError: an unknown format, a file name or images that do not fit.
        TypeError: a source that is no such model, or one not in float32.
        FileExistsError: the file is there already. OSError: it cannot be written.
        ModuleNotFoundError: the extra ``export`` is not installed.
        RuntimeError: the model cannot be converted, there is no C++ compiler for ``"aoti"``, or the graph differs by
            more than 1e-4; no file is left.
    """
    out = Path(out)
    chosen = _checked(format, out)
    if isinstance(source, (str, Path)):
        source = detector.load(source, "cpu")
    model = _model_of(source)
    facts = metadata(source)
    seen = _images(model.image_size, images)
    check_writable(out.parent)
    out.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(prefix=".export-", dir=out.parent) as folder, torch.no_grad():
        built = Path(folder) / out.name
        wanted = _in_two_batches(_Graph(model), seen)
        try:
            chosen.write(_program(model), built, facts)
            got = _in_two_batches(chosen.read(built), seen)
            default = chosen.read_by_default and _in_two_batches(
                chosen.read_by_default(built), seen
            )
        except OSError as error:
            if error.errno in FULL:
                raise OSError(f"{out} cannot be written: {error.strerror}") from error
            raise
        except Exception as error:  # exporters raise what they like
            reason = next(iter(str(error).strip().splitlines()), type(error).__name__)
            name = f"{type(model).__name__} on {model.backbone.name}"
            raise RuntimeError(f"{name} cannot be exported to {format}: {reason}") from error
        found = dict(zip(OUTPUTS, map(_difference, got, wanted), strict=True))
        for name, difference in found.items():
            if not difference <= TOLERANCE:
                raise RuntimeError(
                    f"{out} was not written: its {name} would differ from the run's by {difference:.1e} of the "
                    f"largest value, {TOLERANCE:.0e} is granted"
                )
        for name, values, expected in zip(OUTPUTS, default or (), wanted, strict=bool(default)):
            found[f"{name}{BY_DEFAULT}"] = _difference(values, expected)
        for suffix in chosen.suffixes:
            with replacing(out.with_suffix(suffix)) as temporary:
                os.replace(built.with_suffix(suffix), temporary)
    return found


def metadata(source: detector.Detector | AnomalyModel) -> dict[str, str]:
    """What an exported file says of itself, as texts: JSON where they are no words.

    * ``model``, ``backbone``, ``image_size`` (pixels), ``fit``: how a file becomes the square input, ``resize`` or ``pad``.
    * ``input_name``, ``input_layout``, ``input_channels``, ``input_dtype``, ``input_range``; ``outputs``.
    * ``normalization``: ``inside``, by ``mean`` and ``std`` of the channels: the input is not normalised.
    * ``threshold``: an image with a larger score is defective; ``pixel_threshold``: a larger value of the map is;
      ``false_alarms``: the share of normal images that may exceed them; ``null`` where the run knows none.
    * ``colours``: the range of map values that heat maps show, or ``null``.
    * ``package``, ``version``: what wrote it.
    """
    model: Any = source.model if isinstance(source, detector.Detector) else source
    known = ("fit", "threshold", "pixel_threshold", "false_alarms", "colours")
    facts: dict[str, Any] = {
        "model": type(model).__name__,
        "backbone": model.backbone.name,
        "image_size": model.image_size,
        "input_name": "images",
        "input_layout": "NCHW",
        "input_channels": "RGB",
        "input_dtype": "float32",
        "input_range": [0.0, 1.0],
        "normalization": "inside",
        "mean": model.backbone.mean.flatten().tolist(),
        "std": model.backbone.std.flatten().tolist(),
        "outputs": list(OUTPUTS),
        **{name: getattr(source, name, None) for name in known},
        "package": "msflow_ext",
        "version": __version__,
    }
    return {
        name: each if isinstance(each, str) else json.dumps(each) for name, each in facts.items()
    }


class _Graph(nn.Module):
    def __init__(self, model: AnomalyModel) -> None:
        super().__init__()
        self.model = model

    def forward(self, images: Tensor) -> tuple[Tensor, Tensor]:
        found = self.model(images)
        return found.score, found.anomaly_map


def _checked(format: ExportFormat, out: Path) -> _Format:
    if format not in EXPORT_FORMATS:
        raise ValueError(f"format must be one of {', '.join(EXPORT_FORMATS)}, got {format!r}")
    chosen = _FORMATS[format]
    if out.suffix != chosen.suffixes[-1]:
        raise ValueError(f"{out} must end in {chosen.suffixes[-1]} for format {format}")
    for path in map(out.with_suffix, chosen.suffixes):
        if path.exists():
            raise FileExistsError(f"{path} is there already: choose another name, or remove it")
    if missing := [name for name in chosen.needs if find_spec(name) is None]:
        raise ModuleNotFoundError(
            f"format {format} needs {', '.join(missing)}: pip install 'msflow-ext[export]'"
        )
    if chosen.compiled and shutil.which(_compiler()) is None:
        raise RuntimeError(
            f"format {format} needs a C++ compiler, {_compiler()} is not there: install it, or name another in CXX"
        )
    return chosen


def _compiler() -> str:
    """The program that PyTorch will compile with."""
    default = {"darwin": "clang++", "win32": "cl"}.get(sys.platform, "g++")
    return next(iter(shlex.split(os.environ.get("CXX", ""))), default)


def _model_of(source: detector.Detector | AnomalyModel) -> AnomalyModel:
    """A copy of the model on the CPU, of which nothing is trained."""
    model = source.model if isinstance(source, detector.Detector) else source
    if not isinstance(model, AnomalyModel) or isinstance(model.head, OptimizedHead):
        raise TypeError(
            "source must be a run, or an MSFlow or FastFlow as training leaves it, not its inference form, "
            f"got {type(model).__name__}"
        )
    if wrong := {p.dtype for p in model.parameters()} - {torch.float32}:
        raise TypeError(f"source must be in float32 to be exported, got {wrong.pop()}")
    return copy.deepcopy(model).cpu().eval().requires_grad_(False)


def _images(size: int, real: Tensor | None) -> Tensor:
    """What the graph is compared on: smooth random images, then the real ones."""
    coarse = torch.rand(3, 3, 8, 8, generator=torch.Generator().manual_seed(0))
    images = F.interpolate(coarse, (size, size), mode="bilinear")
    if real is None:
        return images
    if real.dim() != 4 or real.shape[1:] != (3, size, size) or real.dtype is not torch.float32:
        raise ValueError(
            f"images must be (N, 3, {size}, {size}) float32, got {tuple(real.shape)} {real.dtype}"
        )
    return torch.cat((images, real.cpu()))


def _in_two_batches(run: Callable[[Tensor], Sequence[Any]], images: Tensor) -> list[Tensor]:
    """Outputs for the first image alone, then for the others together."""
    pairs = zip(run(images[:1]), run(images[1:]), strict=True)
    return [torch.cat([torch.as_tensor(part) for part in pair]) for pair in pairs]


def _difference(got: Tensor, wanted: Tensor) -> float:
    if got.shape != wanted.shape:
        return float("inf")
    smallest = torch.finfo(wanted.dtype).tiny
    return float((got - wanted).abs().max() / wanted.abs().max().clamp_min(smallest))


def _program(model: AnomalyModel) -> torch.export.ExportedProgram:
    # Two images: a batch of one would be taken for a constant.
    example = torch.zeros(2, 3, model.image_size, model.image_size)
    program = torch.export.export(_Graph(model), (example,), dynamic_shapes=_BATCH)
    for node in program.graph.nodes:
        node.meta.pop("stack_trace", None)  # paths on this machine are nobody's business
    return program


_BATCH = ({0: torch.export.Dim("batch")},)


@dataclass(frozen=True)
class _Format:
    """Suffixes of its files, the one that readers open last; what must be installed; how to write and read it.

    ``read`` computes in float32; ``read_by_default`` is the reader without settings, where that is another.
    """

    suffixes: tuple[str, ...]
    needs: tuple[str, ...]
    write: Callable[[torch.export.ExportedProgram, Path, dict[str, str]], None]
    read: Callable[[Path], Callable[[Tensor], Sequence[Any]]]
    compiled: bool = False
    read_by_default: Callable[[Path], Callable[[Tensor], Sequence[Any]]] | None = None


def _write_torch(program: torch.export.ExportedProgram, path: Path, facts: dict[str, str]) -> None:
    # Into memory first: where its own writer finds the disk full, it ends the process.
    written = io.BytesIO()
    torch.export.save(program, written, extra_files={"metadata.json": json.dumps(facts)})
    path.write_bytes(written.getbuffer())


def _read_torch(path: Path) -> Callable[[Tensor], Sequence[Any]]:
    return torch.export.load(path).module()


def _write_aoti(program: torch.export.ExportedProgram, path: Path, facts: dict[str, str]) -> None:
    from torch._inductor import aoti_compile_and_package

    settings = {
        "aot_inductor.metadata": facts,
        "cpp.dynamic_threads": True,  # the caller's, not as many as compiled it
    }
    written = io.BytesIO()
    aoti_compile_and_package(program, package_path=written, inductor_configs=settings)
    path.write_bytes(written.getbuffer())


def _read_aoti(path: Path) -> Callable[[Tensor], Sequence[Any]]:
    from torch._inductor import aoti_load_package

    return aoti_load_package(str(path))


def _write_onnx(
    program: torch.export.ExportedProgram,
    path: Path,
    facts: dict[str, str],
    external_data: bool = False,
) -> None:
    graph = torch.onnx.export(
        program,
        dynamo=True,
        input_names=["images"],
        output_names=OUTPUTS,
        dynamic_shapes=_BATCH,
        verbose=False,
    )
    assert graph is not None
    graph.model.metadata_props.update(facts)
    graph.save(path, external_data=external_data)
    if not external_data and len(list(path.parent.iterdir())) > 1:
        raise ValueError(
            "its weights are more than one ONNX file holds; openvino has no such limit"
        )


def _read_onnx(path: Path) -> Callable[[Tensor], Sequence[Any]]:
    import onnxruntime

    session = onnxruntime.InferenceSession(path, providers=["CPUExecutionProvider"])
    return lambda images: session.run(OUTPUTS, {"images": images.numpy()})


def _write_openvino(
    program: torch.export.ExportedProgram, path: Path, facts: dict[str, str]
) -> None:
    """By way of ONNX, whose converter keeps the names and knows more operators."""
    import openvino

    onnx = path.with_suffix(".onnx")
    _write_onnx(program, onnx, facts, external_data=True)
    model = openvino.convert_model(onnx)
    for name, fact in facts.items():
        model.set_rt_info(fact, ["msflow_ext", name])
    openvino.save_model(model, path, compress_to_fp16=False)


def _read_openvino(path: Path, hint: str | None = "f32") -> Callable[[Tensor], Sequence[Any]]:
    import openvino

    settings = {"INFERENCE_PRECISION_HINT": hint} if hint else {}
    compiled = openvino.compile_model(path, "CPU", settings)

    def run(images: Tensor) -> Sequence[Any]:
        found = compiled(images.numpy())
        return [found[name] for name in OUTPUTS]

    return run


_ONNX = ("onnx", "onnxscript")
_FORMATS: dict[ExportFormat, _Format] = {
    "torch": _Format((".pt2",), (), _write_torch, _read_torch),
    "aoti": _Format((".pt2",), (), _write_aoti, _read_aoti, compiled=True),
    "onnx": _Format((".onnx",), (*_ONNX, "onnxruntime"), _write_onnx, _read_onnx),
    "openvino": _Format(
        (".bin", ".xml"),
        (*_ONNX, "openvino"),
        _write_openvino,
        _read_openvino,
        read_by_default=partial(_read_openvino, hint=None),
    ),
}
