"""Start a run, resume an interrupted one, and summarize its metrics."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
from torch import Tensor

from msflow_ext.data import DataSet
from msflow_ext.files import check_writable
from msflow_ext.hardware import versions
from msflow_ext.runs.checkpoint import CHECKPOINT, is_number, previous, read_checkpoint
from msflow_ext.runs.curves import CURVES
from msflow_ext.runs.folder import METRICS

if TYPE_CHECKING:
    from msflow_ext.distributed.ranks import Ranks
    from msflow_ext.training.recipe import Recipe

BEST = "best epoch of each metric, chosen on the test set: not a result"


def initial_state(model: Any, dataset: DataSet, recipe: Recipe) -> dict[str, Any]:
    """Return the header of a run's checkpoints before the first epoch, in JSON's types."""
    items = hashlib.sha256()
    for item in (*dataset.train, *dataset.test):
        items.update(f"{item.name} {item.label}\n".encode("utf-8", "surrogateescape"))
        items.update(item.image.tobytes() if isinstance(item.image, np.ndarray) else b"")
    state = {
        "model": type(model).__name__,
        "config": model.config,
        "recipe": asdict(recipe),
        "data": {
            "name": dataset.name,
            "category": dataset.category,
            "train": len(dataset.train),
            "test": len(dataset.test),
            "sha256": items.hexdigest(),
        },
        "epoch": 0,
        "losses": [],
        "evaluations": [],
        "seconds": 0.0,
    }
    return json.loads(json.dumps(state))


def open_run(
    run: Path, state: dict[str, Any], *, resume: bool, overwrite: bool
) -> tuple[dict[str, Any], dict[str, Tensor]]:
    """Return the state and tensors to start from: ``state`` and no tensors, or those of the checkpoint.

    Raises:
        ValueError: the folder holds a run, and neither ``resume`` nor ``overwrite`` is given; or the
            run to resume is damaged, or differs from ``state`` in model, recipe or data.
    """
    old = [run / name for name in (METRICS, CHECKPOINT) if (run / name).exists()]
    if old and not (resume or overwrite):
        raise ValueError(f"{run} holds a run: --resume continues it, --overwrite starts it again")
    if overwrite or not old:
        return state, {}
    saved, tensors = read_checkpoint(run / CHECKPOINT)
    _check_progress(run / CHECKPOINT, saved)
    for part in ("model", "config", "recipe", "data"):
        if saved.get(part) != state[part]:
            there, here = _first_difference(saved.get(part), state[part])
            raise ValueError(
                f"{run / CHECKPOINT} cannot be resumed: its {part} has {there}, this one has {here}"
            )
    return saved, tensors


def _check_progress(path: Path, saved: Mapping[str, Any]) -> None:
    """Raise a ValueError if the progress of the training in a checkpoint's header is not valid."""
    losses: Any = saved.get("losses")
    seconds: Any = saved.get("seconds")
    epoch, tests = saved.get("epoch"), saved.get("evaluations")
    counted = isinstance(epoch, int) and isinstance(losses, list) and len(losses) == epoch
    if not counted or not all(map(is_number, losses)):
        raise ValueError(f"{path} is damaged: epoch must be the number of losses, got {epoch!r}")
    if not is_number(seconds) or seconds < 0:
        raise ValueError(f"{path} is damaged: seconds must be a number from 0 up, got {seconds!r}")
    for test in tests if isinstance(tests, list) else [None]:
        if not isinstance(test, dict) or "epoch" not in test:
            raise ValueError(f"{path} is damaged: evaluations must be objects with an epoch")
        if not all(value is None or is_number(value) for value in test.values()):
            raise ValueError(f"{path} is damaged: evaluations must hold numbers")


def open_run_together(
    ranks: Ranks, run: Path, state: dict[str, Any], *, resume: bool, overwrite: bool
) -> tuple[dict[str, Any], dict[str, Tensor]]:
    """Return the result of :func:`open_run` on the first process to all processes; empty if the run is finished.

    Afterwards the folder exists on every machine and can be written.

    Raises:
        ValueError: as in :func:`open_run`; or the processes have different models, recipes or data.
        OSError: the folder cannot be written.
    """
    expected = ranks.broadcast(state)
    opened: tuple[dict[str, Any], dict[str, Tensor]] = {}, {}
    with ranks.agreed():
        for part, value in expected.items():
            if state[part] != value:
                there, here = _first_difference(value, state[part])
                raise ValueError(
                    f"{part} must be the same on all processes, got {there} on the first and {here} on "
                    f"process {ranks.rank}"
                )
        if ranks.first:
            opened = open_run(run, state, resume=resume, overwrite=overwrite)
            for stale in run.glob("features-*.cache"):  # killed processes may have left them
                stale.unlink()
            if (run / METRICS).exists() and not overwrite:
                opened = {}, {}
    opened = ranks.broadcast(opened)
    with ranks.agreed():
        if opened[0]:
            check_writable(run)
            run.mkdir(parents=True, exist_ok=True)
    return opened


def clear_run(run: Path) -> None:
    """Remove the files of an older run from the folder."""
    written = ("scores.csv", CURVES, "report.html")
    names = (METRICS, CHECKPOINT, previous(Path(CHECKPOINT)), *written)
    for path in (*(run / name for name in names), *run.glob("maps/*.png")):
        path.unlink(missing_ok=True)


def _first_difference(there: Any, here: Any) -> tuple[str, str]:
    if not (isinstance(there, dict) and isinstance(here, dict)):
        return str(there), str(here)
    key = next(key for key in (*here, *there) if here.get(key) != there.get(key))
    return f"{key} {there.get(key)}", f"{key} {here.get(key)}"


def summary(state: Mapping[str, Any], result: Mapping[str, float | None]) -> dict[str, Any]:
    """Return the content of ``metrics.json`` for a finished run, without its duration and its baseline."""
    evaluations = state["evaluations"]
    best: dict[str, Any] = {"chosen": BEST}
    epochs = {}
    for name, value in result.items():
        known = [each for each in evaluations if each.get(name) is not None]
        top = max(known, key=lambda each: each[name]) if value is not None and known else None
        best[name] = top and top[name]
        epochs[name] = top and top["epoch"]
    return {
        **result,
        "best": {**best, "epochs": epochs},
        "epochs": state["epoch"],
        "losses": state["losses"],
        "evaluations": evaluations,
        "recipe": state["recipe"],
        "model": {"name": state["model"], **state["config"]},
        "data": state["data"],
        "versions": versions(),
    }
