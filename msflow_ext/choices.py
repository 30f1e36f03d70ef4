"""List the allowed values of arguments in recipes, in models and on the command line."""

from __future__ import annotations

ANOMALY_MAPS = ("paper", "clamped")
CACHES = ("memory", "disk", "off")
CLAMP_FORMS = ("0.2", "head")
ENGINES = ("local", "ray")
FITS = ("resize", "pad")
MAPS = ("array", "png")
MEMORY = ("lean", "reversible")
ON_ERROR = ("skip", "stop")
PADDING_MODES = ("zeros", "reflect")
PRECISIONS = ("float32", "bfloat16")
SCHEDULES = ("steps", "cosine")
SCORES = ("paper", "log", "nll", "map")

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
