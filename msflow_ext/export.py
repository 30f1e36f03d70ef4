"""A trained detector as a graph that needs this package no more: torch.export, AOTInductor, ONNX or OpenVINO."""

from __future__ import annotations

import copy
import io
import os
import shlex
import shutil
import sys
import tempfile
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from msflow_ext.files import FULL, check_writable, replacing
from msflow_ext.inference import detector
from msflow_ext.models.base import AnomalyModel
from msflow_ext.models.optimized.head import OptimizedHead

#: How far a graph may be from the run; relative, as :func:`export` measures it.
TOLERANCE = 1e-4
#: The results of a graph.
OUTPUTS: tuple[str, ...] = ("score", "anomaly_map")


def export(
    source: str | Path | detector.Detector | AnomalyModel,
    format: str,
    out: str | Path,
    *,
    images: Tensor | None = None,
) -> dict[str, float]:
    """Write a detector as a graph, if it computes what the detector does.

    The graph maps ``images (N, 3, S, S)`` float32, RGB in 0..1, N of any size, to ``score (N,)`` and
    ``anomaly_map (N, S, S)``, both float32; normalisation and aggregation are inside. The file is read back and
    compared, as one image and as a batch of others, on three seeded random images and on ``images``.

    Args:
        source: a run folder or checkpoint file, what :func:`msflow_ext.load` made of it, or a model; left untouched.
        format: ``"torch"``, for ``torch.export.load``; ``"aoti"``, the same compiled by AOTInductor for CPUs with the
            instructions of this one, for C++ (``docs/cpp``) or ``torch._inductor.aoti_load_package``; ``"onnx"``; or
            ``"openvino"``, float32. OpenVINO itself computes in bfloat16 on CPUs that can, unless
            ``INFERENCE_PRECISION_HINT`` is ``"f32"``.
        out: new file, ``.pt2``, ``.onnx`` or ``.xml``, the latter with its weights beside it in ``.bin``.
        images: ``(N, 3, S, S)`` real images to compare on besides.

    Returns:
        For each output the largest difference from the detector on the CPU, over the largest absolute value that the
        detector gave on all these images.

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
    model = _model_of(source)
    seen = _images(model.image_size, images)
    check_writable(out.parent)
    out.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(prefix=".export-", dir=out.parent) as folder, torch.no_grad():
        built = Path(folder) / out.name
        wanted = _in_two_batches(_Graph(model), seen)
        try:
            chosen.write(_program(model), built)
            got = _in_two_batches(chosen.read(built), seen)
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
        for suffix in chosen.suffixes:
            with replacing(out.with_suffix(suffix)) as temporary:
                os.replace(built.with_suffix(suffix), temporary)
    return found


class _Graph(nn.Module):
    def __init__(self, model: AnomalyModel) -> None:
        super().__init__()
        self.model = model

    def forward(self, images: Tensor) -> tuple[Tensor, Tensor]:
        found = self.model(images)
        return found.score, found.anomaly_map


def _checked(format: str, out: Path) -> _Format:
    if format not in FORMATS:
        raise ValueError(f"format must be one of {', '.join(FORMATS)}, got {format!r}")
    chosen = FORMATS[format]
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


def _model_of(source: str | Path | detector.Detector | AnomalyModel) -> AnomalyModel:
    """A copy of the model on the CPU, of which nothing is trained."""
    if isinstance(source, (str, Path)):
        source = detector.load(source, "cpu")
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
    """Suffixes of its files, the one that readers open last; what must be installed; how to write and read it."""

    suffixes: tuple[str, ...]
    needs: tuple[str, ...]
    write: Callable[[torch.export.ExportedProgram, Path], None]
    read: Callable[[Path], Callable[[Tensor], Sequence[Any]]]
    compiled: bool = False


def _write_torch(program: torch.export.ExportedProgram, path: Path) -> None:
    # Into memory first: where its own writer finds the disk full, it ends the process.
    written = io.BytesIO()
    torch.export.save(program, written)
    path.write_bytes(written.getbuffer())


def _read_torch(path: Path) -> Callable[[Tensor], Sequence[Any]]:
    return torch.export.load(path).module()


def _write_aoti(program: torch.export.ExportedProgram, path: Path) -> None:
    from torch._inductor import aoti_compile_and_package

    assert program.example_inputs is not None
    side = program.example_inputs[0][0].shape[-1]
    settings = {
        "aot_inductor.metadata": {"image_size": str(side)},
        "cpp.dynamic_threads": True,  # the caller's, not as many as compiled it
    }
    written = io.BytesIO()
    aoti_compile_and_package(program, package_path=written, inductor_configs=settings)
    path.write_bytes(written.getbuffer())


def _read_aoti(path: Path) -> Callable[[Tensor], Sequence[Any]]:
    from torch._inductor import aoti_load_package

    return aoti_load_package(str(path))


def _write_onnx(
    program: torch.export.ExportedProgram, path: Path, external_data: bool = False
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
    graph.save(path, external_data=external_data)
    if not external_data and len(list(path.parent.iterdir())) > 1:
        raise ValueError(
            "its weights are more than one ONNX file holds; openvino has no such limit"
        )


def _read_onnx(path: Path) -> Callable[[Tensor], Sequence[Any]]:
    import onnxruntime

    session = onnxruntime.InferenceSession(path, providers=["CPUExecutionProvider"])
    return lambda images: session.run(OUTPUTS, {"images": images.numpy()})


def _write_openvino(program: torch.export.ExportedProgram, path: Path) -> None:
    """By way of ONNX, whose converter keeps the names and knows more operators."""
    import openvino

    onnx = path.with_suffix(".onnx")
    _write_onnx(program, onnx, external_data=True)
    openvino.save_model(openvino.convert_model(onnx), path, compress_to_fp16=False)


def _read_openvino(path: Path) -> Callable[[Tensor], Sequence[Any]]:
    import openvino

    exactly = {"INFERENCE_PRECISION_HINT": "f32"}
    compiled = openvino.compile_model(path, "CPU", exactly)

    def run(images: Tensor) -> Sequence[Any]:
        found = compiled(images.numpy())
        return [found[name] for name in OUTPUTS]

    return run


_ONNX = ("onnx", "onnxscript")
FORMATS = {
    "torch": _Format((".pt2",), (), _write_torch, _read_torch),
    "aoti": _Format((".pt2",), (), _write_aoti, _read_aoti, compiled=True),
    "onnx": _Format((".onnx",), (*_ONNX, "onnxruntime"), _write_onnx, _read_onnx),
    "openvino": _Format((".bin", ".xml"), (*_ONNX, "openvino"), _write_openvino, _read_openvino),
}
