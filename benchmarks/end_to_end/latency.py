"""Measure latency and throughput of a detector in several runtimes: `python -m benchmarks.end_to_end.latency`."""

from __future__ import annotations

import argparse
import sys
import tempfile
from collections.abc import Callable, Sequence
from functools import cache
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from benchmarks import results
from benchmarks.tables import LATENCY
from msflow_ext import MSFlow, ops
from msflow_ext.bench import Case, Provider, machine, measure, table, threads
from msflow_ext.bench.cases import BF16, FP32
from msflow_ext.bench.modes import autocast, compiled
from msflow_ext.choices import ExportFormat
from msflow_ext.export import OUTPUTS, export
from msflow_ext.inference.detector import Detector

BATCHES = 1, 8


def main(arguments: Sequence[str] | None = None) -> int:
    options = parser().parse_args(arguments)
    facts = machine.facts()
    file = options.file or results.file_for(facts)
    with tempfile.TemporaryDirectory() as folder, threads(options.threads):
        graphs = Graphs(build(options.backbone, options.size), Path(folder))
        for batch in BATCHES:
            row = measure(case(graphs, batch, options.aoti), slow=True, seconds=options.seconds)
            print("\n".join(table(row)), flush=True)
            results.add(file, facts, row)
    print(f"{file}; write its tables with python -m benchmarks --report")
    return 0


def parser() -> argparse.ArgumentParser:
    found = argparse.ArgumentParser(
        prog="python -m benchmarks.end_to_end.latency", description=__doc__
    )
    add = found.add_argument
    text = "Backbone with random weights, which do not change the times."
    add("--backbone", default="efficientnet_lite0", help=text)
    add("--size", type=int, default=256, help="Side of the images in pixels.")
    text = "Number of threads of every runtime (default: all cores)."
    add("--threads", type=int, default=machine.cores(), help=text)
    text = "Measuring time of each batch size, in seconds."
    add("--seconds", type=float, default=20.0, help=text)
    text = "Also measure AOTInductor, which takes minutes to compile."
    add("--aoti", action="store_true", help=text)
    text = "File of results (default: benchmarks/results/<machine>-<date>.json)."
    add("--file", type=Path, help=text)
    return found


def build(backbone: str, size: int) -> MSFlow:
    """Return a model with random weights and the statistics of features that training would set."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        model = MSFlow(backbone, image_size=size, pretrained=False, standardize=True, seed=0)
        features = model.features(torch.rand(4, 3, size, size))
    means = [each.mean((0, 2, 3)) for each in features]
    model.set_statistics(means, [each.std((0, 2, 3)) for each in features])
    return model.eval().requires_grad_(False)


class Graphs:
    """A detector and its exported graphs, each written when it is first used."""

    def __init__(self, model: Any, folder: Path) -> None:
        self.model = model
        self.name = f"{type(model).__name__} {model.backbone.name} {model.image_size} px"
        self.file = cache(lambda format, suffix: self._write(folder / f"{format}{suffix}", format))

    def _write(self, path: Path, format: ExportFormat) -> Path:
        export(self.model, format, path)
        return path


def case(graphs: Graphs, batch: int, aoti: bool = False) -> Case:
    """Return the case of score and map of a batch of images, given as a float32 tensor of the model's size."""
    model, size = graphs.model, graphs.model.image_size
    compiled_ahead = {"AOTInductor fp32": Provider(lambda: _aoti(graphs), FP32, slow=True)}
    return Case(
        name=f"{LATENCY} {graphs.name} b{batch}",
        inputs=lambda: [torch.rand(batch, 3, size, size, generator=_seed())],
        providers={
            "eager fp32": Provider(lambda: _reference(_forward(model)), FP32),
            "eager bf16": Provider(lambda: _reference(autocast(_forward(model))), BF16, bf16=True),
            "torch.compile fp32": Provider(
                lambda: _reference(compiled(_forward(model))), FP32, slow=True
            ),
            "ONNX Runtime fp32": Provider(lambda: _onnxruntime(graphs), FP32),
            "OpenVINO fp32": Provider(
                lambda: _openvino(graphs, INFERENCE_PRECISION_HINT="f32"), FP32
            ),
            "OpenVINO as it comes": Provider(lambda: _openvino(graphs), BF16),
            **(compiled_ahead if aoti else {}),
            "ours predict fp32": Provider(lambda: _predict(model.optimize(), batch), FP32),
            "ours predict bf16": Provider(
                lambda: _predict(model.optimize(torch.bfloat16), batch), BF16
            ),
        },
        expected="eager fp32",
    )


def _seed() -> torch.Generator:
    return torch.Generator().manual_seed(0)


def _forward(model: Any) -> Callable[[Tensor], Any]:
    def run(images: Tensor) -> tuple[Tensor, Tensor]:
        with torch.no_grad():
            found = model(images)
        return found.score, found.anomaly_map

    return run


def _reference(run: Callable[[Tensor], Any]) -> Callable[[Tensor], Any]:
    """Return ``run`` with PyTorch's operators instead of the kernels."""

    def without_kernels(images: Tensor) -> Any:
        with ops.backend("reference"):
            return run(images)

    return without_kernels


def _predict(model: Any, batch: int) -> Callable[[Tensor], Any]:
    """Return ``Detector.predict``, from the tensor to results with their images."""
    detector = Detector(model)

    def run(images: Tensor) -> tuple[Tensor, Tensor]:
        found = detector.predict(images, batch_size=batch)
        maps = torch.from_numpy(np.stack([each.map for each in found]))
        return torch.tensor([each.score for each in found]), maps

    return run


def _onnxruntime(graphs: Graphs) -> Callable[[Tensor], Any]:
    import onnxruntime

    settings = onnxruntime.SessionOptions()
    settings.intra_op_num_threads = torch.get_num_threads()
    session = onnxruntime.InferenceSession(graphs.file("onnx", ".onnx"), settings)
    return lambda images: _tensors(session.run(OUTPUTS, {"images": images.numpy()}))


def _openvino(graphs: Graphs, **settings: Any) -> Callable[[Tensor], Any]:
    import openvino

    settings = {"INFERENCE_NUM_THREADS": torch.get_num_threads(), **settings}
    model = openvino.compile_model(graphs.file("openvino", ".xml"), "CPU", settings)

    def run(images: Tensor) -> list[Tensor]:
        found = model(images.numpy())
        return _tensors([found[name] for name in OUTPUTS])

    return run


def _aoti(graphs: Graphs) -> Callable[[Tensor], Any]:
    from torch._inductor import aoti_load_package

    return aoti_load_package(str(graphs.file("aoti", ".pt2")))


def _tensors(arrays: Sequence[Any]) -> list[Tensor]:
    return [torch.from_numpy(each) for each in arrays]


if __name__ == "__main__":
    sys.exit(main())
