"""Tables and charts from a document of results: into benchmarks/results and between the README's markers."""

from __future__ import annotations

from collections.abc import Collection, Iterator, Sequence
from pathlib import Path
from typing import Any

from benchmarks import bench_models, charts, latency, results, targets
from benchmarks.targets import STEP, baseline
from msflow_ext.bench import quantiles, ratio

Row = dict[str, Any]
README = Path(__file__).parents[1] / "README.md"
MARKERS = "<!-- {}:begin -->", "<!-- {}:end -->"

#: What the README shows: a title, and the case.
HEADLINES = (
    ("Flows, one image", "flows 512 px b1"),
    ("Image to scores, one image", "pipeline wide_resnet50_2 512 px b1"),
    ("Training step, 8 images", f"{STEP} b8"),
    ("Maps and scores from likelihoods, 8 images", "aggregation 512 px b8"),
    ("Pixel AUROC, 83 images", "pixel AUROC 83 images 512 px"),
    ("AUPRO, 83 images", "AUPRO 83 images 512 px"),
)
HEADLINE_CASES = {case for _, case in HEADLINES}
CHARTS = {"flows": 0, "pipeline": 1, "training": 2}

#: Groups whose few providers stand side by side; elsewhere the cases do.
OPS = ("coupling", "norm", "winograd", "likelihood", "aggregation", "pixel AUROC", "AUPRO", "model")
OTHERS = ("flows", "pipeline", "training step", "training run", latency.GROUP)


def write(document: dict[str, Any]) -> Iterator[str]:
    """Write all tables of a document; and from all documents the charts and the README's block."""
    page = results.file_for(document["machine"]).with_suffix(".md")
    page.write_text("\n".join(markdown(document)) + "\n")
    yield str(page)
    documents = results.times()
    for best in speeds(documents)[:1]:
        threads = usual_threads(best, HEADLINE_CASES)
        for name, headline in CHARTS.items():
            title, case = HEADLINES[headline]
            row = _find(best, case, threads)
            if row:
                path = results.FOLDER / f"{name}.svg"
                path.write_text(chart(f"{title}, 512 px: {_threads(threads)}", row))
                yield str(path)
    update(README, "benchmarks", "\n".join(headlines(documents)))
    yield str(README)


def speeds(documents: Sequence[dict[str, Any]]) -> list[dict[str, Any]]:
    """Of each kind of processor the newest document with a headline, those with the most instructions first.

    ``documents`` are in the order of their dates.
    """
    newest = {
        tuple(document["machine"]["flags"]): document
        for document in documents
        if any(row["case"] in HEADLINE_CASES for row in document["rows"])
    }
    return sorted(newest.values(), key=lambda document: -len(document["machine"]["flags"]))


def usual_threads(document: dict[str, Any], cases: Collection[str]) -> int:
    """The number of threads that most of these cases were measured with."""
    counts = [row["threads"] for row in document["rows"] if row["case"] in cases]
    return max(counts, key=lambda each: (counts.count(each), each), default=1)


def markdown(document: dict[str, Any]) -> Iterator[str]:
    """Everything that was measured."""
    facts = document["machine"]
    versions = ", ".join(f"{name} {version}" for name, version in facts["versions"].items())
    yield f"# Benchmarks: {facts['cpu']}, {facts['date'][:10]}"
    yield ""
    yield f"{machine_line(facts)}. {versions}; commit {facts['commit']}."
    yield ""
    yield "Milliseconds: median [20th, 80th percentile]; x: how many times faster than the first."
    busy = [row for row in document["rows"] if (row["others"] or 0) > 0.1]
    if busy:
        yield ""
        yield f"**{len(busy)} rows were measured while others used the machine: do not trust them.**"
    yield from ("", "## Targets", "")
    yield from targets.table(document)
    for group in (*OTHERS, *OPS):
        rows = [row for row in document["rows"] if row["case"].startswith(f"{group} ")]
        if rows:
            yield from ("", f"## {group.capitalize()}", "")
            yield from _by_case(rows) if group in OPS else _by_provider(rows)
    refused = [
        f"* {row['case']}, {name}: {found['refused']}"
        for row in document["rows"]
        for name, found in row["providers"].items()
        if "refused" in found
    ]
    if refused:
        yield from ("", "## Not timed", "", *refused)


def headlines(documents: Sequence[dict[str, Any]]) -> Iterator[str]:
    """The README's block, from documents in the order of their dates."""
    yield "Images of 512 px; `benchmarks/README.md` says how this was measured, and how to repeat it."
    for document in speeds(documents):
        threads = usual_threads(document, HEADLINE_CASES)
        yield from ("", f"{machine_line(document['machine'])}, {_threads(threads)}:", "")
        yield from _speed_table(document, threads)
    for name in CHARTS:
        if (results.FOLDER / f"{name}.svg").exists():
            yield from ("", f"![Time of {name} by provider](benchmarks/results/{name}.svg)")
    for table in (bench_models.table, latency.markdown):
        found = ((document, list(table(document))) for document in reversed(documents))
        document, lines = next((each for each in found if each[1]), (None, []))
        if document:
            yield from ("", f"{machine_line(document['machine'])}:", *lines)


def _speed_table(document: dict[str, Any], threads: int) -> Iterator[str]:
    yield "| | the usual way | the best other | ours | faster than usual | than the best other |"
    yield "|---|---:|---:|---:|---:|---:|"
    for title, case in HEADLINES:
        row = _find(document, case, threads)
        if row is None:
            continue
        usual, times = baseline(row), _timed(row)
        ours = _fastest(times, [n for n in times if n.startswith("ours")])
        other = _fastest(times, [n for n in times if not n.startswith("ours") and n != "copy"])
        if not ours or not other:
            continue
        cells = [
            *(f"{_time(quantiles(times[n])[0])}, {n}" for n in (usual, other, ours)),
            *(f"{ratio(times[n], times[ours]):.1f}x" for n in (usual, other)),
        ]
        yield f"| {title} | {' | '.join(cells)} |"


def update(path: Path, name: str, block: str) -> None:
    """Replace what stands between the markers of that name in a file; ValueError if it has none."""
    text = path.read_text()
    begin, end = (marker.format(name) for marker in MARKERS)
    if text.count(begin) != 1 or text.count(end) != 1:
        raise ValueError(f"{path} must hold {begin} and {end} once")
    before, _, rest = text.partition(begin)
    path.write_text(f"{before}{begin}\n{block}\n{end}{rest.partition(end)[2]}")


def chart(title: str, row: Row) -> str:
    """The providers of one case as bars, as SVG."""
    bars = [
        charts.Bar(name, *quantiles(samples), ours=name.startswith("ours"))
        for name, samples in _timed(row).items()
        if name != "copy"
    ]
    return charts.bars(title, bars, _time)


def machine_line(facts: dict[str, Any]) -> str:
    flags = [f for f in facts["flags"] if f not in ("avx2", "neon")] or facts["flags"]
    amx = "" if "amx_bf16" in flags else ", no AMX"
    return (
        f"{facts['cpu']}, {facts['cores']} cores ({', '.join(flags)}{amx}), "
        f"{facts['memory_gib']:.0f} GiB, torch {facts['versions']['torch']}"
    )


def _by_case(rows: Sequence[Row]) -> Iterator[str]:
    """A line per case and number of threads, a column per provider."""
    names = list(dict.fromkeys(name for row in rows for name in row["providers"]))
    speed = ["GB/s of ours", "of a copy"] if any(row["bytes"] for row in rows) else []
    yield f"| case | threads | {' | '.join([*names, *speed])} |"
    yield "|---|---:|" + "---:|" * (len(names) + len(speed))
    for row in rows:
        times, base = _timed(row), baseline(row)
        cells = [_cell(times, name, base) for name in names]
        if speed and "ours" in times:
            rate = row["bytes"] / quantiles(times["ours"])[0] / 1e6
            cells += [f"{rate:.1f}", f"{ratio(times['copy'], times['ours']):.0%}"]
        yield f"| {row['case']} | {row['threads']} | {' | '.join(cells)} |"


def _by_provider(rows: Sequence[Row]) -> Iterator[str]:
    """Per number of threads a line per provider and a column per case, times first, then memory."""
    for threads in sorted({row["threads"] for row in rows}):
        chosen = [row for row in rows if row["threads"] == threads]
        names = list(dict.fromkeys(name for row in chosen for name in row["providers"]))
        yield f"| {_threads(threads)} | {' | '.join(row['case'] for row in chosen)} |"
        yield "|---|" + "---:|" * len(chosen)
        for name in names:
            cells = [_cell(_timed(row), name, baseline(row)) for row in chosen]
            yield f"| {name} | {' | '.join(cells)} |"
        for key, what in (("peak_mb", "peak MB"), ("saved_mb", "saved MB")):
            for name in names:
                memory = [row["providers"].get(name, {}).get(key) for row in chosen]
                if any(memory):
                    cells = ["-" if m is None else f"{m:.4g}" for m in memory]
                    yield f"| {what}: {name} | {' | '.join(cells)} |"
        yield ""


def _timed(row: Row) -> dict[str, list[float]]:
    return {n: found["ms"] for n, found in row["providers"].items() if "ms" in found}


def _fastest(times: dict[str, list[float]], names: Sequence[str]) -> str | None:
    return min(names, key=lambda name: quantiles(times[name])[0], default=None)


def _cell(times: dict[str, list[float]], name: str, base: str) -> str:
    if name not in times:
        return "-"
    mid, low, high = quantiles(times[name])
    against = "" if name in (base, "copy") else f" {ratio(times[base], times[name]):.2f}x"
    return f"{mid:.4g} [{low:.3g}, {high:.3g}]{against}"


def _find(document: dict[str, Any], case: str, threads: int) -> Row | None:
    found = (r for r in document["rows"] if (r["case"], r["threads"]) == (case, threads))
    return next(found, None)


def _time(ms: float) -> str:
    return f"{ms / 1e3:.3g} s" if ms >= 1000 else f"{ms:.3g} ms"


def _threads(count: int) -> str:
    return "1 thread" if count == 1 else f"{count} threads"
