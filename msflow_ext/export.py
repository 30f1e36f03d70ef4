"""Export a trained detector to torch.export, AOTInductor, ONNX or OpenVINO, without a dependency on this package."""

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

#: Largest allowed relative difference between a graph and its run, see :func:`export`.
TOLERANCE = 1e-4
#: Names of a graph's outputs.
OUTPUTS: tuple[str, ...] = ("score", "anomaly_map")
#: Suffix of an output's name when its runtime ran with its default settings.
BY_DEFAULT = " by default"


def export(
    source: str | Path | detector.Detector | AnomalyModel,
    format: ExportFormat,
    out: str | Path,
    *,
    images: Tensor | None = None,
) -> dict[str, float]:
    """Export a detector as a graph, and check that the graph computes the same.

    The written file is read back and compared with the detector on three seeded random images and on ``images``. The
    first image is a batch of one, the others are a second batch. Normalization and aggregation are part of the graph.

    ``"aoti"`` is the program of ``"torch"``, compiled for CPUs with the instructions of this one. C++ (``docs/cpp``) and
    ``torch._inductor.aoti_load_package`` load it. OpenVINO computes in bfloat16 on CPUs that support it, unless
    ``INFERENCE_PRECISION_HINT`` is ``"f32"``. Its results may be finite for images with NaN.

    The file has the texts of :func:`metadata`: in the extra file ``metadata.json`` of ``"torch"``, in the metadata of
    AOTInductor packages and ONNX models, or in OpenVINO's ``rt_info`` below ``msflow_ext``.

    Args:
        source: run folder, checkpoint file, detector of :func:`msflow_ext.load`, or model; it is not changed.
        format: ``"torch"``, ``"aoti"``, ``"onnx"`` or ``"openvino"``.
        out: path of the new file: ``.pt2``, ``.onnx``, or ``.xml`` with its weights beside it in ``.bin``.
        images: additional images to compare on.

    Shape:
        images: ``(N, 3, S, S)``, float32, RGB in 0..1, with any ``N``; also the graph's input.
        score: ``(N,)``, float32.
        anomaly_map: ``(N, S, S)``, float32.

    Returns:
        For each output, the largest difference from the detector on the CPU, relative to the detector's largest
        absolute value on all these images. For ``"openvino"``, these are with ``INFERENCE_PRECISION_HINT`` ``"f32"``.
        Its ``"score by default"`` and ``"anomaly_map by default"`` are differences without it, which have no limit.

    Raises:
        ValueError: ``format`` is unknown, or ``out`` or ``images`` does not fit it.
        TypeError: ``source`` is not such a model, or is not float32.
        FileExistsError: ``out`` exists already.
        OSError: ``out`` cannot be written.
        ModuleNotFoundError: the extra ``export`` is not installed.
        RuntimeError: the model cannot be converted, ``"aoti"`` finds no C++ compiler, or the graph differs by more than
            1e-4. No file is left.

    Examples:
        >>> differences = export("runs/mine", "torch", "detector.pt2")  # doctest: +SKIP
        >>> sorted(differences)  # doctest: +SKIP
        ['anomaly_map', 'score']
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
        expected = _in_two_batches(_Graph(model), seen)
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
        except Exception as error:  # exporters raise errors of any type
            reason = next(iter(str(error).strip().splitlines()), type(error).__name__)
            name = f"{type(model).__name__} on {model.backbone.name}"
            raise RuntimeError(f"{name} cannot be exported to {format}: {reason}") from error
        found = dict(zip(OUTPUTS, map(_difference, got, expected), strict=True))
        for name, difference in found.items():
            if not difference <= TOLERANCE:
                raise RuntimeError(
                    f"{out} was not written: its {name} must be within {TOLERANCE:.0e} of the run's, relative to the "
                    f"largest value, but differs by {difference:.1e}"
                )
        for name, values, truth in zip(OUTPUTS, default or (), expected, strict=bool(default)):
            found[f"{name}{BY_DEFAULT}"] = _difference(values, truth)
        for suffix in chosen.suffixes:
            with replacing(out.with_suffix(suffix)) as temporary:
                os.replace(built.with_suffix(suffix), temporary)
    return found


def metadata(source: detector.Detector | AnomalyModel) -> dict[str, str]:
    """Return the metadata of an exported file, as texts; numbers, lists and ``null`` are JSON.

    * ``model``, ``backbone``: names of model and backbone.
    * ``image_size``: side of the square input in pixels.
    * ``fit``: how an image becomes square, ``resize`` or ``pad``.
    * ``input_name``, ``input_layout``, ``input_channels``, ``input_dtype``, ``input_range``: the input.
    * ``outputs``: names of the outputs.
    * ``normalization``: ``inside``: the graph normalizes its input by ``mean`` and ``std``.
    * ``threshold``: an image with a larger score is defective.
    * ``pixel_threshold``: a pixel with a larger map value is defective.
    * ``false_alarms``: share of normal images that may exceed the thresholds.
    * ``colours``: range of map values that heat maps show.
    * ``package``, ``version``: the package that wrote the file.

    The thresholds, ``false_alarms`` and ``colours`` are ``null`` if the run has none.

    Args:
        source: detector or model.

    Examples:
        >>> facts = metadata(detector.load("runs/mine"))
        >>> facts["model"], facts["input_layout"], facts["image_size"]
        ('MSFlow', 'NCHW', '64')
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
    """A model that returns its outputs as a tuple, for exporters."""

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
            raise FileExistsError(f"{path} exists already. Choose another name, or remove it")
    if missing := [name for name in chosen.needs if find_spec(name) is None]:
        raise ModuleNotFoundError(
            f"format {format} needs {', '.join(missing)}: pip install 'msflow-ext[export]'"
        )
    if chosen.compiled and shutil.which(_compiler()) is None:
        raise RuntimeError(
            f"format {format} needs a C++ compiler, but {_compiler()} is not found. Install it, or set CXX to another"
        )
    return chosen


def _compiler() -> str:
    """Return the C++ compiler that PyTorch will use."""
    default = {"darwin": "clang++", "win32": "cl"}.get(sys.platform, "g++")
    return next(iter(shlex.split(os.environ.get("CXX", ""))), default)


def _model_of(source: detector.Detector | AnomalyModel) -> AnomalyModel:
    """Return a copy of the model on the CPU, in evaluation mode and without gradients."""
    model = source.model if isinstance(source, detector.Detector) else source
    if not isinstance(model, AnomalyModel) or isinstance(model.head, OptimizedHead):
        raise TypeError(
            "source must be a run, or an MSFlow or FastFlow that is not an optimized model, "
            f"got {type(model).__name__}. Export the model before optimize()"
        )
    if wrong := {p.dtype for p in model.parameters()} - {torch.float32}:
        raise TypeError(f"source must be float32, got {wrong.pop()}")
    return copy.deepcopy(model).cpu().eval().requires_grad_(False)


def _images(size: int, real: Tensor | None) -> Tensor:
    """Return the images to compare on: smooth random images, then the given ones."""
    coarse = torch.rand(3, 3, 8, 8, generator=torch.Generator().manual_seed(0))
    images = F.interpolate(coarse, (size, size), mode="bilinear")
    if real is None:
        return images
    if real.dim() != 4 or real.shape[1:] != (3, size, size) or real.dtype is not torch.float32:
        raise ValueError(
            f"images must have shape (N, 3, {size}, {size}) and dtype float32, got {tuple(real.shape)} and {real.dtype}"
        )
    return torch.cat((images, real.cpu()))


def _in_two_batches(run: Callable[[Tensor], Sequence[Any]], images: Tensor) -> list[Tensor]:
    """Run the first image and the other images as two batches, and return the joined outputs."""
    pairs = zip(run(images[:1]), run(images[1:]), strict=True)
    return [torch.cat([torch.as_tensor(part) for part in pair]) for pair in pairs]


def _difference(got: Tensor, expected: Tensor) -> float:
    if got.shape != expected.shape:
        return float("inf")
    smallest = torch.finfo(expected.dtype).tiny
    return float((got - expected).abs().max() / expected.abs().max().clamp_min(smallest))


def _program(model: AnomalyModel) -> torch.export.ExportedProgram:
    # Two images, because the exporter would make a batch size of 1 a constant.
    example = torch.zeros(2, 3, model.image_size, model.image_size)
    program = torch.export.export(_Graph(model), (example,), dynamic_shapes=_BATCH)
    for node in program.graph.nodes:
        node.meta.pop("stack_trace", None)  # holds private paths of this machine
    return program


_BATCH = ({0: torch.export.Dim("batch")},)


@dataclass(frozen=True)
class _Format:
    """How to write and read a format.

    Attributes:
        suffixes: suffixes of its files; the last is that of the file to open.
        needs: modules that must be installed.
        write: writes a program and its metadata to a path.
        read: returns a function that runs the file in float32.
        compiled: whether a C++ compiler is needed.
        read_by_default: like ``read``, with the runtime's default settings, if they differ.
    """

    suffixes: tuple[str, ...]
    needs: tuple[str, ...]
    write: Callable[[torch.export.ExportedProgram, Path, dict[str, str]], None]
    read: Callable[[Path], Callable[[Tensor], Sequence[Any]]]
    compiled: bool = False
    read_by_default: Callable[[Path], Callable[[Tensor], Sequence[Any]]] | None = None


def _write_torch(program: torch.export.ExportedProgram, path: Path, facts: dict[str, str]) -> None:
    # Into memory first: torch's own writer ends the process if the disk is full.
    written = io.BytesIO()
    torch.export.save(program, written, extra_files={"metadata.json": json.dumps(facts)})
    path.write_bytes(written.getbuffer())


def _read_torch(path: Path) -> Callable[[Tensor], Sequence[Any]]:
    return torch.export.load(path).module()


def _write_aoti(program: torch.export.ExportedProgram, path: Path, facts: dict[str, str]) -> None:
    from torch._inductor import aoti_compile_and_package

    settings = {
        "aot_inductor.metadata": facts,
        "cpp.dynamic_threads": True,  # use the caller's number of threads, not the compiler's
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
        raise ValueError("its weights are too large for one ONNX file. Use the format openvino")


def _read_onnx(path: Path) -> Callable[[Tensor], Sequence[Any]]:
    import onnxruntime

    session = onnxruntime.InferenceSession(path, providers=["CPUExecutionProvider"])
    return lambda images: session.run(OUTPUTS, {"images": images.numpy()})


def _write_openvino(
    program: torch.export.ExportedProgram, path: Path, facts: dict[str, str]
) -> None:
    """Convert through ONNX, because that converter keeps the names and supports more operators."""
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
