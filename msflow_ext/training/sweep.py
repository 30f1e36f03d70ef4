"""Series of trainings, each in its own folder, with one table of results."""

from __future__ import annotations

import logging
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import closing
from dataclasses import dataclass
from itertools import product
from pathlib import Path
from typing import Any

from msflow_ext.distributed.executors import Engine, one_by_one
from msflow_ext.errors import sentence
from msflow_ext.runs import table
from msflow_ext.runs.checkpoint import CHECKPOINT
from msflow_ext.runs.folder import METRICS

log = logging.getLogger(__name__)


@dataclass(frozen=True)
class Trial:
    """One training of a series.

    Attributes:
        category: category of the data set; None if it has no categories.
        split_seed: seed of the split into training and test images.
        seed: seed of the training.
        folder: the run folder.
    """

    category: str | None
    split_seed: int
    seed: int
    folder: Path


def plan(
    out: Path,
    categories: Sequence[str | None],
    split_seeds: Sequence[int],
    seeds: Sequence[int],
) -> list[Trial]:
    """Return the trials of all combinations.

    The folder of a trial is ``out/CATEGORY/split-K/seed-N``. The seeds are part of it only if there are several.

    Raises:
        ValueError: a list is empty or has duplicates.
    """
    for name, values in (("category", categories), ("split_seeds", split_seeds), ("seeds", seeds)):
        if not values or len(set(values)) < len(values):
            raise ValueError(f"{name} must have one value or more, each once, got {list(values)}")
    trials = []
    for category, split_seed, seed in product(categories, split_seeds, seeds):
        parts = [category] if category is not None else []
        parts += [f"split-{split_seed}"] if len(split_seeds) > 1 else []
        parts += [f"seed-{seed}"] if len(seeds) > 1 else []
        trials.append(Trial(category, split_seed, seed, out.joinpath(*parts)))
    return trials


def do_all(
    trials: Sequence[Trial],
    out: Path,
    one: Callable[[Trial], Mapping[str, Any]],
    failures: tuple[type[Exception], ...],
    engine: Engine = one_by_one,
    *,
    write: bool = True,
) -> list[table.Run]:
    """Run all trials, and write the table to ``out`` after each one.

    Args:
        trials: trials to run.
        out: folder of the table.
        one: function that runs a trial and returns the content of its ``metrics.json``.
        failures: errors that end a trial but not the series; the table lists them.
        engine: executor of the trials.
        write: whether this process writes the table.

    Returns:
        The runs, in the order of the trials.
    """
    runs: dict[Trial, table.Run] = {}
    with closing(engine(one, _announced(trials))) as outcomes:
        for trial, metrics, error in outcomes:
            failure = sentence(error) if error else ""
            if error and not isinstance(error, failures):
                raise error
            if error:
                log.error("%s failed: %s", trial.folder, failure)
            category, folder = trial.category or "", str(trial.folder)
            seeds = trial.split_seed, trial.seed
            runs[trial] = table.Run(category, *seeds, folder, metrics, failure)
            log.info("%s has ended, %d of %d", trial.folder, len(runs), len(trials))
            if write:
                table.write(out, [runs[each] for each in trials if each in runs])
    return [runs[each] for each in trials]


def _announced(trials: Sequence[Trial]) -> Iterator[Trial]:
    for number, trial in enumerate(trials, 1):
        log.info("%d of %d: %s", number, len(trials), trial.folder)
        yield trial


def refuse_old(trials: Sequence[Trial]) -> None:
    """Raise a ValueError if the folder of a trial holds a run, before any training begins."""
    for trial in trials:
        if any((trial.folder / name).exists() for name in (METRICS, CHECKPOINT)):
            raise ValueError(
                f"{trial.folder} holds a run: --resume continues and skips finished runs, "
                "--overwrite starts all runs again"
            )
