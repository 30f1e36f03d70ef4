"""Make Markdown tables of times: by case, by provider, of whole models, and of latency."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Any

from msflow_ext.bench import baseline, quantiles, ratio
from msflow_ext.models import fastflow, msflow
from msflow_ext.training.recipe import PRESETS

Row = dict[str, Any]

#: Beginnings of the names of cases that have a separate table.
LATENCY, MODEL_IMAGE, MODEL_STEP = "latency", "model image", "model step"
MODEL_BATCH = 8  # images of a model's training step
IMAGES = 100  # training images in the table of settings


def by_case(rows: Sequence[Row]) -> Iterator[str]:
    """Yield a line per case and number of threads, with a column per provider."""
    names = list(dict.fromkeys(name for row in rows for name in row["providers"]))
    speed = ["GB/s of ours", "of a copy"] if any(row["bytes"] for row in rows) else []
    yield f"| case | threads | {' | '.join([*names, *speed])} |"
    yield "|---|---:|" + "---:|" * (len(names) + len(speed))
    for row in rows:
        times, base = timed(row), baseline(row)
        cells = [_cell(times, name, base) for name in names]
        if speed and "ours" in times:
            rate = row["bytes"] / quantiles(times["ours"])[0] / 1e6
            cells += [f"{rate:.1f}", f"{ratio(times['copy'], times['ours']):.0%}"]
        yield f"| {row['case']} | {row['threads']} | {' | '.join(cells)} |"


def by_provider(rows: Sequence[Row]) -> Iterator[str]:
    """Yield for each number of threads a line per provider and a column per case, first times, then memory."""
    for count in sorted({row["threads"] for row in rows}):
        chosen = [row for row in rows if row["threads"] == count]
        names = list(dict.fromkeys(name for row in chosen for name in row["providers"]))
        yield f"| {threads(count)} | {' | '.join(row['case'] for row in chosen)} |"
        yield "|---|" + "---:|" * len(chosen)
        for name in names:
            cells = [_cell(timed(row), name, baseline(row)) for row in chosen]
            yield f"| {name} | {' | '.join(cells)} |"
        for key, what in (("peak_mb", "peak MB"), ("saved_mb", "saved MB")):
            for name in names:
                memory = [row["providers"].get(name, {}).get(key) for row in chosen]
                if any(memory):
                    cells = ["-" if m is None else f"{m:.4g}" for m in memory]
                    yield f"| {what}: {name} | {' | '.join(cells)} |"
        yield ""


def models(document: dict[str, Any]) -> Iterator[str]:
    """Yield for each number of threads a line per model and backbone, with its fastest provider."""
    for count in sorted({row["threads"] for row in document["rows"]}):
        rows = {row["case"]: row for row in document["rows"] if row["threads"] == count}
        prefix = f"{MODEL_IMAGE} "
        names = [case.removeprefix(prefix) for case in rows if case.startswith(prefix)]
        if not names:
            continue
        what = "trained + frozen parameters | GFLOP an image | ms an image | MB"
        title = f"model, backbone, image; {threads(count)}"
        yield from ("", f"| {title} | {what} | ms a step of {MODEL_BATCH} | MB |")
        yield "|---|---:|---:|---:|---:|---:|---:|"
        for name in names:
            row = rows[f"{prefix}{name}"]
            found = row["facts"]
            parameters = f"{found['trained'] / 1e6:.1f} + {found['frozen'] / 1e6:.1f} M"
            cells = [parameters, f"{found['flops'] / 1e9:.1f}"]
            cells += _time_and_memory(row) + _time_and_memory(rows.get(f"{MODEL_STEP} {name}"))
            yield f"| {name} | {' | '.join(cells)} |"


def named(document: dict[str, Any], *groups: str) -> Iterator[str]:
    """Yield the tables by provider of cases whose names begin with one of ``groups``."""
    rows = [row for row in document["rows"] if row["case"].startswith(groups)]
    if rows:
        yield from ("", *by_provider(rows))


def training_runs(document: dict[str, Any]) -> Iterator[str]:
    """Yield the tables of whole training runs."""
    return named(document, "training run ")


def accelerated(document: dict[str, Any]) -> Iterator[str]:
    """Yield the tables of anomalib's models before and after ``accelerate()``."""
    kinds = (
        f"{what} {model} "
        for what in ("flows", "training step")
        for model in ("FastFlow", "U-Flow")
    )
    return named(document, *kinds)


def settings(document: dict[str, Any]) -> Iterator[str]:
    """Yield a line per model and backbone with minutes of training for each preset, and memory.

    The minutes include all steps and the features of ``IMAGES`` images, without tests. Steps are timed with the flows
    of the preset paper; those of MSFlow are smaller in the preset robust.
    """
    steps = [row for row in document["rows"] if row["case"].startswith(f"{MODEL_STEP} ")]
    count = max((row["threads"] for row in steps), default=0)
    rows = {row["case"]: row for row in document["rows"] if row["threads"] == count}
    lines = []
    for case, step in rows.items():
        name = case.removeprefix(f"{MODEL_STEP} ")
        image = rows.get(f"{MODEL_IMAGE} {name}")
        if name != case and image and timed(step) and timed(image):
            lines.append(f"| {_with_size(name)} | {' | '.join(_needs(name, image, step))} |")
    if lines:
        cells = [f"minutes of `{preset}`{', at most' * (preset != 'paper')}" for preset in PRESETS]
        what = " | ".join((*cells, "GB in training", "ms an image", "GB in prediction"))
        yield from ("", f"| model, backbone, image; {threads(count)} | {what} |")
        yield "|---|" + "---:|" * (len(cells) + 3)
        yield from lines


def _needs(name: str, image: Row, step: Row) -> Iterator[str]:
    """Yield minutes by preset, then memory and time of training and prediction with the fastest provider of each."""
    (image_ms, image_mb), (step_ms, step_mb) = map(_fastest, (image, step))
    for preset in PRESETS.values():
        epochs = preset[name.split()[0].lower()].recipe.epochs
        ms = epochs * IMAGES / MODEL_BATCH * step_ms + IMAGES * image_ms
        yield _two_digits(ms / 6e4)
    trained, frozen = image["facts"]["trained"], image["facts"]["frozen"]
    # 16 bytes: a weight, its gradient, and two numbers of Adam.
    yield _two_digits((16 * trained + 4 * frozen) / 1e9 + step_mb / 1e3)
    yield _digits(image_ms)
    yield _two_digits(4 * (trained + frozen) / 1e9 + image_mb / 1e3)


def _with_size(name: str) -> str:
    """Return the name of a case with the side of its images, which the name omits for the default size."""
    if name.endswith(" px"):
        return name
    model, backbone = name.split()
    size = (
        {"MSFlow": msflow, "FastFlow": fastflow}[model].PRESETS.get(backbone, {}).get("image_size")
    )
    return f"{name} {size or backbone.rpartition('_')[2]} px"


def _fastest(row: Row) -> tuple[float, float]:
    """Return milliseconds and peak megabytes of a row's fastest provider."""
    times = timed(row)
    best = min(times, key=lambda name: quantiles(times[name])[0])
    return quantiles(times[best])[0], row["providers"][best].get("peak_mb") or 0.0


def latency(document: dict[str, Any]) -> Iterator[str]:
    """Yield for each detector a line per runtime with milliseconds and images per second by batch size."""
    found: dict[str, dict[int, Any]] = {}
    for row in document["rows"]:
        group, _, name = row["case"].partition(" ")
        name, _, batch = name.rpartition(" b")
        if group == LATENCY:
            detector = f"{name}, {threads(row['threads'])}"
            found.setdefault(detector, {})[int(batch)] = row["providers"]
    for detector, batches in found.items():
        yield ""
        yield f"| {detector} | {' | '.join(f'batch {n}: ms | images/s' for n in batches)} |"
        yield "|---|" + "---:|---:|" * len(batches)
        for provider in dict.fromkeys(p for providers in batches.values() for p in providers):
            cells = (_rate(each.get(provider, {}), n) for n, each in batches.items())
            yield f"| {provider} | {' | '.join(cells)} |"


def timed(row: Row) -> dict[str, list[float]]:
    """Return the milliseconds of each round by provider."""
    return {n: found["ms"] for n, found in row["providers"].items() if "ms" in found}


def fastest(times: dict[str, list[float]], names: Sequence[str]) -> str | None:
    """Return the name with the lowest median."""
    return min(names, key=lambda name: quantiles(times[name])[0], default=None)


def time(ms: float) -> str:
    return f"{ms / 1e3:.3g} s" if ms >= 1000 else f"{ms:.3g} ms"


def threads(count: int) -> str:
    return "1 thread" if count == 1 else f"{count} threads"


def _cell(times: dict[str, list[float]], name: str, base: str) -> str:
    if name not in times:
        return "-"
    mid, low, high = quantiles(times[name])
    against = "" if name in (base, "copy") else f" {ratio(times[base], times[name]):.2f}x"
    return f"{mid:.4g} [{low:.3g}, {high:.3g}]{against}"


def _time_and_memory(row: Row | None) -> list[str]:
    """Return milliseconds and peak megabytes of a row's fastest provider."""
    times = timed(row) if row else {}
    best = fastest(times, list(times))
    if row is None or best is None:
        return ["-", "-"]
    memory = row["providers"][best].get("peak_mb")
    return [_digits(quantiles(times[best])[0]), "-" if memory is None else _digits(memory)]


def _digits(value: float) -> str:
    """Return three digits, or all digits before the point."""
    return f"{value:.0f}" if value >= 100 else f"{value:.3g}"


def _two_digits(value: float) -> str:
    """Return two digits, or all digits before the point."""
    return f"{value:.0f}" if value >= 10 else f"{value:.2g}"


def _rate(found: dict[str, Any], batch: int) -> str:
    if "ms" not in found:
        return f"off by {found['error']:.0%} | -" if "error" in found else "- | -"
    mid = quantiles(found["ms"])[0]
    return f"{mid:.1f} | {1e3 * batch / mid:.1f}"
