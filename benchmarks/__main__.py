"""Time the cases of the benchmark files, and store a row of results for each; see benchmarks/README.md."""

from __future__ import annotations

import argparse
import gc
import importlib
import sys
from collections.abc import Iterator, Sequence
from pathlib import Path

from benchmarks import report, results
from msflow_ext.bench import Case, machine, measure, table, threads

BUSY = 0.1  # share of the machine that other processes may use
ROOT = Path(__file__).parent

#: The benchmark files by their short names: ``norm`` for kernels/bench_norm.py.
MODULES = {
    path.stem.removeprefix("bench_"): f"benchmarks.{room}.{path.stem}"
    for room in ("kernels", "end_to_end")
    for path in sorted((ROOT / room).glob("bench_*.py"))
}


def main(arguments: Sequence[str] | None = None) -> int:
    options = parser().parse_args(arguments)
    if options.report:
        document = results.read(options.file) if options.file else results.newest()
        for line in report.write(document):
            print(line)
        return 0
    cases = list(chosen(options.select, options.quick))
    others = machine.others_now()
    if others is not None and others > BUSY and not (options.busy or options.quick):
        print(
            f"other processes must use at most {BUSY:.0%} of this machine, got {others:.0%}; "
            "wait, or measure unreliable times with --busy"
        )
        return 2
    facts = machine.facts() | ({"toy": True} if options.quick else {})
    file = options.file or (None if options.quick else results.file_for(facts))
    for count in options.threads:
        for case in cases:
            with threads(count):
                row = measure(case, slow=options.slow, seconds=options.seconds)
            gc.collect()
            print("\n".join(table(row)), flush=True)
            if (row["others"] or 0) > BUSY:
                print(f"  BUSY: others used {row['others']:.0%} of the machine", flush=True)
            if file:
                results.add(file, facts, row)
    return 0


def parser() -> argparse.ArgumentParser:
    found = argparse.ArgumentParser(prog="python -m benchmarks", description=__doc__)
    add = found.add_argument
    add(
        "select",
        nargs="*",
        metavar="NAME",
        help=f"Files to run ({', '.join(MODULES)}), or beginnings of names of cases (default: all).",
    )
    counts = sorted({1, machine.cores()})
    add(
        "--threads",
        type=int,
        nargs="+",
        default=counts,
        help=f"Numbers of threads to measure with (default: {counts}).",
    )
    text = "Also time torch.compile, which takes a minute or more for each provider."
    add("--slow", action="store_true", help=text)
    add("--seconds", type=float, default=20.0, help="Measuring time of each case, in seconds.")
    add("--quick", action="store_true", help="Measure toy sizes as a trial, and keep no results.")
    add("--busy", action="store_true", help="Measure even if other processes use the machine.")
    text = "File of results (default: benchmarks/results/<machine>-<date>.json)."
    add("--file", type=Path, help=text)
    text = "Write tables and charts of the newest results, and measure nothing."
    add("--report", action="store_true", help=text)
    return found


def chosen(select: Sequence[str], quick: bool) -> Iterator[Case]:
    """Yield the cases of the selected files, and those whose names begin with another selected word.

    Raises:
        SystemExit: if a word selects nothing.
    """
    prefixes = tuple(each for each in select if each not in MODULES)
    unknown = set(prefixes)
    for name, module in MODULES.items():
        whole = not select or name in select
        for case in importlib.import_module(module).cases(quick) if whole or prefixes else ():
            begun = {prefix for prefix in prefixes if case.name.startswith(prefix)}
            unknown -= begun
            if whole or begun:
                yield case
    if unknown:
        raise SystemExit(
            f"select must be a file ({', '.join(MODULES)}) or begin the name of a case, "
            f"got {', '.join(sorted(unknown))}"
        )


if __name__ == "__main__":
    sys.exit(main())
