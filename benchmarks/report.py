"""Write pages and charts from documents of results, into benchmarks/results and between the markers of pages."""

from __future__ import annotations

from collections.abc import Collection, Iterable, Iterator, Sequence
from pathlib import Path
from typing import Any

from benchmarks import charts, comparisons, results, tables
from msflow_ext.bench import baseline, quantiles, ratio

Row = dict[str, Any]
Table = tuple[tuple[str, str], ...]
ROOT = Path(__file__).parents[1]
README = ROOT / "README.md"
GUIDE = Path(__file__).parent / "README.md"
#: Pages of the documentation that hold generated tables.
SPEED, ACCURACY, SETTINGS = (
    ROOT / "docs" / f"{name}.md" for name in ("benchmarks", "accuracy", "choose-settings")
)
#: Absolute address of the files of the repository, which works on a package index too.
RAW = "https://github.com/msflow-ext/msflow_ext/raw/main"
MARKERS = "<!-- {}:begin -->", "<!-- {}:end -->"

#: Title and case of each row on the page of benchmarks.
HEADLINES: Table = (
    ("Flows, one image", "flows 512 px b1"),
    ("Image to scores, one image", "pipeline wide_resnet50_2 512 px b1"),
    ("Training step, 8 images", f"{comparisons.STEP} b8"),
    ("Maps and scores from likelihoods, 8 images", "aggregation 512 px b8"),
    ("Pixel AUROC, 83 images", "pixel AUROC 83 images 512 px"),
    ("AUPRO, 83 images", "AUPRO 83 images 512 px"),
)
HEADLINE_CASES = {case for _, case in HEADLINES}
CLAIM = HEADLINES[1][1]
#: The rows in the README.
SHORT = HEADLINES[:3]
CHARTS = {"flows": 0, "pipeline": 1, "training": 2}

#: Groups with a column per provider. The others have a column per case.
OPS = (
    "coupling",
    "norm",
    "pooling",
    "upsampling",
    "winograd",
    "likelihood",
    "aggregation",
    "pixel AUROC",
    "AUPRO",
    "model",
)
OTHERS = ("flows", "pipeline", "training step", "training run", tables.LATENCY)


def write(document: dict[str, Any]) -> Iterator[str]:
    """Write the page of a document, the charts and the generated blocks, and yield the files."""
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
                path.write_text(chart(f"{title}, 512 px: {tables.threads(threads)}", row))
                yield str(path)
    for path, name, lines in blocks(documents):
        update(path, name, "\n".join(lines))
        yield str(path)


def blocks(documents: Sequence[dict[str, Any]]) -> Iterator[tuple[Path, str, Iterable[str]]]:
    """Yield page, marker and lines of each block that is generated from times."""
    yield README, "headline", claim(documents)
    yield README, "speed", short(documents)
    yield SPEED, "benchmarks", headlines(documents)
    yield GUIDE, "comparisons", comparisons.legend()
    if SETTINGS.exists():
        yield SETTINGS, "settings", settings(documents)


def speeds(documents: Sequence[dict[str, Any]]) -> list[dict[str, Any]]:
    """Return the newest document with a headline of each kind of processor, most instruction sets first.

    ``documents`` must be in the order of their dates.
    """
    newest = {
        tuple(document["machine"]["flags"]): document
        for document in documents
        if any(row["case"] in HEADLINE_CASES for row in document["rows"])
    }
    return sorted(newest.values(), key=lambda document: -len(document["machine"]["flags"]))


def usual_threads(document: dict[str, Any], cases: Collection[str]) -> int:
    """Return the number of threads with which most of these cases were measured."""
    counts = [row["threads"] for row in document["rows"] if row["case"] in cases]
    return max(counts, key=lambda each: (counts.count(each), each), default=1)


def markdown(document: dict[str, Any]) -> Iterator[str]:
    """Yield the page of a document with all its results."""
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
    yield from ("", "## Comparisons", "")
    yield from comparisons.table(document)
    for group in (*OTHERS, *OPS):
        rows = [row for row in document["rows"] if row["case"].startswith(f"{group} ")]
        if rows:
            yield from ("", f"## {group.capitalize()}", "")
            yield from tables.by_case(rows) if group in OPS else tables.by_provider(rows)
    refused = [
        f"* {row['case']}, {name}: {found['refused']}"
        for row in document["rows"]
        for name, found in row["providers"].items()
        if "refused" in found
    ]
    if refused:
        yield from ("", "## Not timed", "", *refused)


def claim(documents: Sequence[dict[str, Any]]) -> Iterator[str]:
    """Yield the README's first sentence, about the machine with the most instruction sets."""
    for document in speeds(documents)[:1]:
        threads = usual_threads(document, HEADLINE_CASES)
        compared = _compared(document, CLAIM, threads)
        if compared:
            reference, other, ours = (ms for _, ms in compared)
            cores = "one CPU core" if threads == 1 else f"{threads} CPU cores"
            yield f"**From photo (512 px) to heat map in {tables.time(quantiles(ours)[0])} on {cores}:"
            yield f"{ratio(reference, ours):.1f} times as fast as the reference implementation,"
            yield f"{ratio(other, ours):.1f} times as fast as the fastest alternative.**"


def short(documents: Sequence[dict[str, Any]]) -> Iterator[str]:
    """Yield the README's table of speed on the machine with the most instruction sets."""
    for document in speeds(documents)[:1]:
        threads = usual_threads(document, HEADLINE_CASES)
        yield f"Images of 512 px on {machine_line(document['machine'])}, {tables.threads(threads)}:"
        yield ""
        yield from _speed_table(document, threads, SHORT)


def headlines(documents: Sequence[dict[str, Any]]) -> Iterator[str]:
    """Yield the block of the page of benchmarks, from documents in the order of their dates."""
    yield "### Compared with alternatives"
    for document in speeds(documents):
        threads = usual_threads(document, HEADLINE_CASES)
        yield from ("", f"{machine_line(document['machine'])}, {tables.threads(threads)}:", "")
        yield from _speed_table(document, threads, HEADLINES)
    for name in CHARTS:
        if (results.FOLDER / f"{name}.svg").exists():
            yield from ("", f"![Time of {name} by provider]({RAW}/benchmarks/results/{name}.svg)")
    for title, table in (
        ("Whole models", tables.models),
        ("Whole training runs", tables.training_runs),
        ("Models of anomalib, before and after accelerate()", tables.accelerated),
        ("One detector in several runtimes", tables.latency),
    ):
        found = ((document, list(table(document))) for document in reversed(documents))
        document, lines = next((each for each in found if each[1]), (None, []))
        if document:
            yield from ("", f"### {title}", "", f"{machine_line(document['machine'])}:", *lines)


def settings(documents: Sequence[dict[str, Any]]) -> Iterator[str]:
    """Yield time and memory of training and prediction, from the newest times on each kind of processor."""
    newest = {
        tuple(document["machine"]["flags"]): document
        for document in documents
        if any(tables.settings(document))
    }
    for flags in sorted(newest, key=len, reverse=True):
        facts = newest[flags]["machine"]
        yield from (f"{machine_line(facts)}:", *tables.settings(newest[flags]), "")
    if newest:
        yield f"Minutes of training on {tables.IMAGES} images, without tests: an estimate from single steps of"
        yield "the preset `paper`. GB are weights, optimizer and working memory, without PyTorch itself."


def _speed_table(document: dict[str, Any], threads: int, shown: Table) -> Iterator[str]:
    yield "| | reference | fastest alternative | ours | times faster than the reference | than the alternative |"
    yield "|---|---:|---:|---:|---:|---:|"
    for title, case in shown:
        compared = _compared(document, case, threads)
        if compared:
            reference, other, ours = (ms for _, ms in compared)
            cells = [
                *(f"{tables.time(quantiles(ms)[0])}, {name}" for name, ms in compared),
                *(f"{ratio(ms, ours):.1f}x" for ms in (reference, other)),
            ]
            yield f"| {title} | {' | '.join(cells)} |"


def _compared(document: dict[str, Any], case: str, threads: int) -> list[tuple[str, list[float]]]:
    """Return names and times of the reference, the fastest alternative and the fastest of ours, or [] without all."""
    row = _find(document, case, threads)
    if row is None:
        return []
    times = tables.timed(row)
    ours = tables.fastest(times, [n for n in times if n.startswith("ours")])
    other = tables.fastest(times, [n for n in times if not n.startswith("ours") and n != "copy"])
    if not ours or not other:
        return []
    return [(name, times[name]) for name in (baseline(row), other, ours)]


def update(path: Path, name: str, block: str) -> None:
    """Replace the text between the markers of that name in a file.

    Raises:
        ValueError: if the file does not have the markers once.
    """
    text = path.read_text()
    begin, end = (marker.format(name) for marker in MARKERS)
    if text.count(begin) != 1 or text.count(end) != 1:
        raise ValueError(f"{path} must hold {begin} and {end} once")
    before, _, rest = text.partition(begin)
    path.write_text(f"{before}{begin}\n{block}\n{end}{rest.partition(end)[2]}")


def chart(title: str, row: Row) -> str:
    """Return the bar chart of the providers of a case as SVG."""
    bars = [
        charts.Bar(name, *quantiles(samples), ours=name.startswith("ours"))
        for name, samples in tables.timed(row).items()
        if name != "copy"
    ]
    return charts.bars(title, bars, tables.time)


def machine_line(facts: dict[str, Any]) -> str:
    flags = [f for f in facts["flags"] if f not in ("avx2", "neon")] or facts["flags"]
    amx = "" if "amx_bf16" in flags else ", no AMX"
    return (
        f"{facts['cpu']}, {facts['cores']} cores ({', '.join(flags)}{amx}), "
        f"{facts['memory_gib']:.0f} GiB, torch {facts['versions']['torch']}"
    )


def _find(document: dict[str, Any], case: str, threads: int) -> Row | None:
    found = (r for r in document["rows"] if (r["case"], r["threads"]) == (case, threads))
    return next(found, None)
