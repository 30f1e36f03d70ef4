"""Train a model's head on normal images, test it, and write the run folder."""

from __future__ import annotations

import json
import logging
import math
import time
from collections.abc import Iterator, Mapping
from contextlib import ExitStack
from dataclasses import asdict
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from msflow_ext.data import DataSet, Images
from msflow_ext.distributed import ranks as distributed
from msflow_ext.distributed.ranks import Ranks
from msflow_ext.evaluation.calibration import Calibration, judged
from msflow_ext.evaluation.evaluator import Evaluation, Truth, evaluate
from msflow_ext.features import Features
from msflow_ext.files import read_json, write_text
from msflow_ext.hardware import has_bfloat16, pick_device
from msflow_ext.metrics import RESULTS
from msflow_ext.models.padim import Padim
from msflow_ext.reports.results import write_results
from msflow_ext.runs.checkpoint import CHECKPOINT, Saver, previous, restore, save_checkpoint
from msflow_ext.runs.folder import METRICS
from msflow_ext.training.features import features_of_parts
from msflow_ext.training.recipe import Recipe
from msflow_ext.training.resume import clear_run, initial_state, open_run_together, summary
from msflow_ext.training.step import TrainingDiverged, make_optimizer, train_epoch

if TYPE_CHECKING:
    from tqdm import tqdm

log = logging.getLogger(__name__)


def train(
    model: Any,
    dataset: DataSet,
    run: str | Path,
    recipe: Recipe | None = None,
    *,
    device: str | torch.device | None = None,
    settings: Mapping[str, Any] | None = None,
    resume: bool = False,
    overwrite: bool = False,
    baseline: bool = False,
    progress: bool = False,
    ranks: Ranks | None = None,
) -> dict[str, Any]:
    """Train ``model.head`` on ``dataset.train``, test it on ``dataset.test``, and write the folder ``run``.

    The result is that of the last epoch; the best epoch on the test set stands beside it, as such.
    A checkpoint is written after the first epoch, after every test and at least once a minute, but for large models
    (:class:`msflow_ext.runs.checkpoint.Saver`).
    Several processes take the steps that one would take, and the first of them writes all files.

    Args:
        model: such as :class:`msflow_ext.MSFlow`; only its head is trained.
        device: where to compute; by default on the GPU if there is one.
        settings: plain values that ``config.yaml`` shall hold.
        resume: continue the run that the folder holds, bit for bit as if it had not been interrupted.
        overwrite: remove the run that the folder holds, once all images of the new one are decoded.
        baseline: also fit :class:`msflow_ext.models.padim.Padim` to the same features.
        progress: show bars on stderr when that is a terminal.
        ranks: the processes that train together; by default those that ``torchrun`` started, if any.

    Returns:
        What ``metrics.json`` holds.

    Raises:
        ValueError: the folder holds a run and neither ``resume`` nor ``overwrite`` is given, or that run is
            another one; no training images, or too few to hold some out, or fewer than processes; an
            image that cannot be decoded; processes that are not given the same.
        OSError: the folder cannot be written. ConnectionError: another process has ended.
        ProcessFailed: another process has one of these errors.
        TrainingDiverged: a loss, a gradient or a score is not finite; the last checkpoint is kept.
    """
    import yaml

    run, recipe = Path(run), recipe or Recipe()
    ranks = distributed.join(device) if ranks is None else ranks
    with ranks.agreed():
        if resume and overwrite:
            raise ValueError("resume and overwrite exclude each other")
        if not dataset.train:
            raise ValueError(f"{dataset.name} {dataset.category} has no images to train on")
        kept, held = recipe.split(len(dataset.train))
        if len(kept) < ranks.size:
            raise ValueError(
                f"{ranks.size} processes are more than the {len(kept)} training images"
            )
        device = pick_device(distributed.own_device(device))
    _warn_of_slow_bfloat16(device, recipe)
    first = initial_state(model, dataset, recipe)
    state, tensors = open_run_together(ranks, run, first, resume=resume, overwrite=overwrite)
    if not state:
        if ranks.first:
            log.info("%s is finished already", run)
        return ranks.broadcast(read_json(run / METRICS) if ranks.first else {})
    began = time.monotonic() - state["seconds"]

    model.to(device)
    model.head.memory = recipe.memory
    adam = make_optimizer(model.head, recipe.weight_decay)
    if tensors:
        restore(run / CHECKPOINT, tensors, model, adam)
    ranks.synchronize(model)
    shown = Images(dataset.test, model.image_size)
    with ranks.agreed():
        truth = Truth.of(shown) if ranks.first else Truth(None, None)
    with ExitStack() as stack:
        items = {
            "training": [dataset.train[i] for i in kept],
            "held-out": [dataset.train[i] for i in held],
            "test": dataset.test,
        }
        progress = progress and ranks.first
        parts = features_of_parts(stack, model, items, run, recipe, progress, ranks)
        trained, held_out, tested = parts
        with ranks.agreed():
            if overwrite and ranks.first:  # now that all images and masks are known to be sound
                clear_run(run)
            if ranks.first:
                settled = yaml.safe_dump(dict(settings or {}), sort_keys=False)
                write_text(run / "config.yaml", settled)
        model.eval()
        bar = stack.enter_context(_bar(recipe, state["epoch"], len(trained), progress))
        saver = Saver(run / CHECKPOINT)
        test = partial(_test, model, tested, truth, state, run)
        # A training that was interrupted after its last epoch, or in the test of one, is tested now.
        final = test() if recipe.is_tested(state["epoch"]) else None
        while state["epoch"] < recipe.epochs:
            model.train()
            loss = _epoch(model.head, adam, trained, recipe, state["epoch"], run, bar)
            model.eval()
            state["losses"].append(loss)
            state["epoch"] += 1
            due = recipe.is_tested(state["epoch"])
            if due:  # before the checkpoint, which keeps no model whose scores are not finite
                model.fit_map(trained.batches(recipe.batch_size), ranks.total)
                final = test()
            with ranks.agreed():
                if ranks.first and saver.is_due(tested=due):
                    state["seconds"] = time.monotonic() - began
                    saver.save(state, model, adam)
        gaussian = _baseline(trained, tested, truth, recipe.batch_size) if baseline else None
        calibration = _calibration(model, held_out, recipe.batch_size) if held else None

    metrics: dict[str, Any] = {}
    with ranks.agreed():
        if ranks.first:
            assert final is not None  # the last epoch is tested
            metrics = summary(state, final.metrics)
            metrics |= {"baseline": gaussian, "seconds": round(time.monotonic() - began, 3)}
            _finish(run, model, shown, final, state, metrics, calibration)
    return ranks.broadcast(metrics)


def _finish(
    run: Path,
    model: Any,
    shown: Images,
    final: Evaluation,
    state: Mapping[str, Any],
    metrics: dict[str, Any],
    calibration: Calibration | None,
) -> None:
    """Write what a finished run leaves, its metrics last."""
    if calibration:
        labels = [item.label for item in shown.items]
        false_alarms = state["recipe"]["false_alarms"]
        metrics["decisions"] = judged(calibration, false_alarms, labels, final.scores)
    colours = write_results(run, shown, final, metrics)
    last = {**state, "colours": colours, "calibration": calibration and asdict(calibration)}
    save_checkpoint(run / CHECKPOINT, last, model)
    previous(run / CHECKPOINT).unlink(missing_ok=True)
    write_text(run / METRICS, json.dumps(metrics, indent=1, allow_nan=False))


def _warn_of_slow_bfloat16(device: torch.device, recipe: Recipe) -> None:
    if recipe.precision == "bfloat16" and device.type == "cpu" and not has_bfloat16():
        log.warning(
            "this processor has no instructions for bfloat16: precision float32 is much faster here"
        )


def _bar(recipe: Recipe, epoch: int, images: int, progress: bool) -> tqdm:
    from tqdm import tqdm

    steps = math.ceil(images / recipe.batch_size)
    return tqdm(
        total=(recipe.epochs - epoch) * steps,
        desc="training",
        unit="step",
        disable=None if progress else True,
    )


def _epoch(
    head: Any,
    optimizer: torch.optim.Optimizer,
    features: Features,
    recipe: Recipe,
    epoch: int,
    run: Path,
    bar: tqdm,
) -> float:
    """Train one epoch, and return its mean loss in nats per dimension of the latent space.

    The constant log(2 pi) / 2 = 0.9189 per dimension is left out, as in the loss itself.
    """
    for group in optimizer.param_groups:
        group["lr"] = recipe.learning_rate(epoch)
    ranks = features.ranks
    chunks = recipe.order(epoch, len(features)).split(recipe.batch_size)
    shares = ((features.share(chunk), len(chunk)) for chunk in chunks)

    def batches() -> Iterator[list[Tensor]]:
        for chunk in chunks:
            yield features.part(chunk)
            bar.update()

    try:
        disturbed = recipe.disturbed(epoch, batches(), shares)
        steps = train_epoch(
            head, optimizer, disturbed, clip=recipe.clip, precision=recipe.precision, ranks=ranks
        )
    except TrainingDiverged as error:
        items = features.images.items
        names = ", ".join(items[i].name for i in chunks[error.step].tolist())
        what = f"{error} in step {error.step + 1} (images {names})"
        with ranks.agreed():
            raise _stopped(run / CHECKPOINT, epoch + 1, what) from None
    total = sum(loss * len(chunk) for (loss, _), chunk in zip(steps, chunks, strict=True))
    return total / len(features) / sum(x[0].numel() for x in features[features.own[:1]])


def _test(
    model: Any, tested: Features, truth: Truth, state: dict[str, Any], run: Path
) -> Evaluation:
    """Test the model as it is, and note what was found, once for an epoch.

    Raises:
        TrainingDiverged, ProcessFailed: a score or a map is not finite.
    """
    epoch = state["epoch"]
    try:
        found = evaluate(model.predict_features, tested, truth, state["recipe"]["batch_size"])
    except FloatingPointError as error:
        raise _stopped(run / CHECKPOINT, epoch, str(error)) from None
    if epoch not in (each["epoch"] for each in state["evaluations"]):
        state["evaluations"].append({"epoch": epoch, **found.metrics})
    if found.metrics:  # those of several processes are with the first
        log.info(
            "epoch %d: loss %.4f, %s", epoch, state["losses"][epoch - 1], _brief(found.metrics)
        )
    return found


def _stopped(kept: Path, epoch: int, what: str) -> TrainingDiverged:
    rest = f"{kept} keeps the last good state" if kept.exists() else "nothing was saved yet"
    return TrainingDiverged(f"training stopped in epoch {epoch}: {what}; {rest}")


def _baseline(trained: Features, tested: Features, truth: Truth, batch_size: int) -> dict[str, Any]:
    """The metrics of a Gaussian per position on the same features."""
    padim = Padim().fit(trained.batches(batch_size), trained.ranks.total)
    predict = partial(padim.predict, size=tested.images.size)
    return {"name": "PaDiM-style Gaussian", **evaluate(predict, tested, truth, batch_size).metrics}


def _calibration(model: Any, held_out: Features, batch_size: int) -> Calibration:
    found = evaluate(model.predict_features, held_out, Truth(None, None), batch_size)
    return Calibration.of(found.scores, found.maps)


def _brief(metrics: Mapping[str, float | None]) -> str:
    shown = (f"{name} {metrics[k]:.4f}" for k, name in RESULTS.items() if metrics[k] is not None)
    return ", ".join(shown) or "nothing to measure: good and defective test images are wanted"
