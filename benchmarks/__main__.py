"""Runs cases round by round and keeps their rows: `python -m benchmarks [ROW or FILE ...]`; see README.md."""

from __future__ import annotations

import argparse
import gc
import sys
from collections.abc import Iterator, Sequence
from pathlib import Path

from benchmarks import report, results, targets
from benchmarks.harness import MODULES, all_cases
from msflow_ext.bench import Case, machine, measure, table, threads

BUSY = 0.1  # share of the machine that other processes may take


def main(arguments: Sequence[str] | None = None) -> int:
    options = parser().parse_args(arguments)
    if options.targets or options.report:
        document = results.read(options.file) if options.file else results.newest()
        for line in report.write(document) if options.report else targets.table(document):
            print(line)
        return 0
    cases = list(chosen(options.select, options.quick))
    others = machine.others_now()
    if others is not None and others > BUSY and not (options.busy or options.quick):
        print(
            f"other processes take {others:.0%} of this machine: wait, or pass --busy and mistrust"
        )
        return 2
    facts = machine.facts() | ({"toy": True} if options.quick else {})
    file = options.file or (None if options.quick else results.file_for(facts))
    for count in options.threads:
        for case in cases:
            with threads(count):
                row = measure(case, slow=options.slow, seconds=options.seconds)
            gc.collect()
            print("\n".join(table(row, targets.baseline(row))), flush=True)
            if (row["others"] or 0) > BUSY:
                print(f"  BUSY: others took {row['others']:.0%} of the machine", flush=True)
            if file:
                results.add(file, facts, row)
    return 0


def parser() -> argparse.ArgumentParser:
    found = argparse.ArgumentParser(prog="python -m benchmarks", description=__doc__)
    add = found.add_argument
    add("select", nargs="*", help=f"rows of the table of targets, or of {', '.join(MODULES)}")
    counts = sorted({1, machine.cores()})
    add("--threads", type=int, nargs="+", default=counts, help=f"default: {counts}")
    add("--slow", action="store_true", help="also torch.compile: a minute or more for each")
    add("--seconds", type=float, default=20.0, help="how long the rounds of a case go on")
    add("--quick", action="store_true", help="toy sizes, to see that it works; nothing is kept")
    add("--busy", action="store_true", help="measure although others use the machine")
    add("--file", type=Path, help="results (default: benchmarks/results/<machine>-<date>.json)")
    add("--targets", action="store_true", help="print how the newest results meet the targets")
    add("--report", action="store_true", help="write tables and charts of the newest results")
    return found


def chosen(select: Sequence[str], quick: bool) -> Iterator[Case]:
    rows = {int(each) for each in select if each.isdigit()}
    modules = [each for each in select if not each.isdigit()]
    unknown = set(modules) - set(MODULES)
    if unknown:
        raise SystemExit(f"no such benchmarks: {', '.join(sorted(unknown))}")
    for module in MODULES:
        for case in all_cases(quick, [module]):
            if not select or module in modules or rows & set(case.rows):
                yield case


if __name__ == "__main__":
    sys.exit(main())
