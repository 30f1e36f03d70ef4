"""List the allowed values of arguments in recipes, in models and on the command line."""

from __future__ import annotations

from typing import Literal, get_args

AnomalyMap = Literal["paper", "clamped"]
Cache = Literal["memory", "disk", "off"]
CheckpointFormat = Literal["msflow_ext", "msflow", "gathierry", "anomalib"]
ClampForm = Literal["0.2", "head"]
Engine = Literal["local", "ray"]
ExportFormat = Literal["torch", "aoti", "onnx", "openvino"]
Fit = Literal["resize", "pad"]
Layout = Literal["mvtec", "visa", "btad", "mtd", "mstc", "folder"]
Maps = Literal["array", "png"]
Memory = Literal["lean", "reversible"]
OnError = Literal["skip", "stop"]
PaddingMode = Literal["zeros", "reflect"]
Precision = Literal["float32", "bfloat16"]
Schedule = Literal["steps", "cosine"]
Score = Literal["paper", "log", "nll", "map"]

ANOMALY_MAPS: tuple[AnomalyMap, ...] = get_args(AnomalyMap)
CACHES: tuple[Cache, ...] = get_args(Cache)
CHECKPOINT_FORMATS: tuple[CheckpointFormat, ...] = get_args(CheckpointFormat)
CLAMP_FORMS: tuple[ClampForm, ...] = get_args(ClampForm)
ENGINES: tuple[Engine, ...] = get_args(Engine)
EXPORT_FORMATS: tuple[ExportFormat, ...] = get_args(ExportFormat)
FITS: tuple[Fit, ...] = get_args(Fit)
LAYOUTS: tuple[Layout, ...] = get_args(Layout)
MAPS: tuple[Maps, ...] = get_args(Maps)
MEMORY: tuple[Memory, ...] = get_args(Memory)
ON_ERROR: tuple[OnError, ...] = get_args(OnError)
PADDING_MODES: tuple[PaddingMode, ...] = get_args(PaddingMode)
PRECISIONS: tuple[Precision, ...] = get_args(Precision)
SCHEDULES: tuple[Schedule, ...] = get_args(Schedule)
SCORES: tuple[Score, ...] = get_args(Score)

#: Allowed values by the name of the argument.
CHOICES: dict[str, tuple[str, ...]] = {
    "anomaly_map": ANOMALY_MAPS,
    "cache": CACHES,
    "clamp_form": CLAMP_FORMS,
    "engine": ENGINES,
    "fit": FITS,
    "maps": MAPS,
    "memory": MEMORY,
    "padding_mode": PADDING_MODES,
    "precision": PRECISIONS,
    "schedule": SCHEDULES,
    "score": SCORES,
}
