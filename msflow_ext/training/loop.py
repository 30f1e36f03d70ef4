"""Train a model's head on normal images, test it, and write the run folder."""

from __future__ import annotations

import logging
import math
import time
from collections.abc import Iterator, Mapping
from contextlib import AbstractContextManager, ExitStack, contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from msflow_ext.data import DataSet
from msflow_ext.distributed.ranks import Ranks, join, own_device
from msflow_ext.evaluation.evaluator import Evaluation
from msflow_ext.features import Features
from msflow_ext.files import locked, read_json, write_text
from msflow_ext.hardware import has_bfloat16, pick_device
from msflow_ext.metrics import RESULTS
from msflow_ext.models.base import AnomalyModel
from msflow_ext.runs.checkpoint import CHECKPOINT, Saver, restore
from msflow_ext.runs.folder import METRICS
from msflow_ext.training.features import Parts, features_of_parts
from msflow_ext.training.finish import Metrics, Outcome, write_run
from msflow_ext.training.recipe import Recipe
from msflow_ext.training.resume import clear_run, initial_state, open_run_together
from msflow_ext.training.step import TrainingDiverged, make_optimizer, train_epoch

if TYPE_CHECKING:
    from tqdm import tqdm

log = logging.getLogger(__name__)


def train(
    model: AnomalyModel,
    dataset: DataSet,
    run: str | Path,
    recipe: Recipe | None = None,
    *,
    device: str | torch.device | None = None,
    settings: Mapping[str, object] | None = None,
    resume: bool = False,
    overwrite: bool = False,
    baseline: bool = False,
    progress: bool = False,
    ranks: Ranks | None = None,
) -> Metrics:
    """Train ``model.head`` on ``dataset.train``, test it on ``dataset.test``, and write the run folder.

    The result is that of the last epoch. The best epoch on the test set is reported beside it, marked as such.

    A checkpoint is written after the first epoch, after every test and at least once a minute, less often for large
    models (:class:`msflow_ext.runs.checkpoint.Saver`). If several processes train together, they take the same steps as
    one process, and the first one writes all files.

    Args:
        model: a model such as :class:`msflow_ext.MSFlow`, of which only the head is trained.
        dataset: images to train on and to test on.
        run: the run folder to write.
        recipe: how to train; by default that of the MSFlow paper.
        device: device of the model; by default a GPU if there is one.
        settings: plain values to write to ``config.yaml``.
        resume: whether to continue the run in the folder. The result is bit-identical to that of an uninterrupted run.
        overwrite: whether to replace the run in the folder, after all images of the new one are decoded.
        baseline: whether to fit :class:`msflow_ext.models.padim.Padim` to the same features.
        progress: whether to show progress bars if stderr is a terminal.
        ranks: the processes that train together; by default those that ``torchrun`` started, if any.

    Returns:
        The content of ``metrics.json``.

    Raises:
        ValueError: the folder holds a run, and neither ``resume`` nor ``overwrite`` is given; the run to resume differs
            in model, recipe or data; there are too few training images; an image cannot be decoded; or the processes
            have different arguments.
        BlockingIOError: another process writes to the folder.
        OSError: the folder cannot be written.
        ConnectionError: another process has ended.
        ProcessFailed: another process has one of these errors.
        TrainingDiverged: a loss, a gradient or a score is not finite; the last checkpoint is kept.

    Examples:
        >>> import msflow_ext as mx
        >>> dataset = mx.open_dataset(None, "folder", normal="normal")
        >>> model = mx.MSFlow("efficientnet_lite0", image_size=64)
        >>> metrics = mx.train(model, dataset, "runs/new", mx.Recipe(epochs=1, cache="memory"))
        >>> metrics["epochs"], len(metrics["losses"])
        (1, 1)
        >>> mx.load("runs/new").predict("photos/small.png")[0].size
        (64, 64)
    """
    recipe = recipe or Recipe()
    ranks = join(device) if ranks is None else ranks
    with ranks.agreed():
        _check_images(model, dataset, recipe, ranks, baseline)
    progress = progress and ranks.first
    with _writing(Path(run), ranks):
        session = Session.open(
            model, dataset, Path(run), recipe, device, ranks, resume=resume, overwrite=overwrite
        )
        if session is not None:
            with session.features(progress) as parts:
                session.write_settings(settings or {}, overwrite=overwrite)
                final = session.fit(parts, progress)
                outcome = Outcome.of(final, model, parts, baseline=baseline)
            session.finish(outcome)
        metrics: Any = read_json(Path(run) / METRICS) if ranks.first else {}
        return ranks.broadcast(metrics)


@contextmanager
def _writing(run: Path, ranks: Ranks) -> Iterator[None]:
    """Lock the run folder for the processes of this training; the first one holds the lock."""
    with ExitStack() as stack:
        with ranks.agreed():
            if ranks.first:
                stack.enter_context(locked(run))
        yield


@dataclass
class Session:
    """One training, from its initial state to its files.

    Attributes:
        state: current header of the checkpoints, see :func:`msflow_ext.training.resume.initial_state`.
        began: start of the training on the monotonic clock, as if there had been no interruptions.
    """

    model: Any
    dataset: DataSet
    run: Path
    recipe: Recipe
    ranks: Ranks
    state: dict[str, Any]
    optimizer: torch.optim.Optimizer
    saver: Saver
    began: float

    @classmethod
    def open(
        cls,
        model: Any,
        dataset: DataSet,
        run: Path,
        recipe: Recipe,
        device: str | torch.device | None,
        ranks: Ranks,
        *,
        resume: bool,
        overwrite: bool,
    ) -> Session | None:
        """Check the arguments, move the model to its device, and restore the checkpoint of a run to resume.

        Returns:
            The session, or None if the run is already finished.
        """
        with ranks.agreed():
            if resume and overwrite:
                raise ValueError("overwrite must be False if resume is True, got True")
            device = pick_device(own_device(device))
        if recipe.precision == "bfloat16" and device.type == "cpu" and not has_bfloat16():
            log.warning(
                "this processor has no bfloat16 instructions: precision float32 is much faster"
            )
        first = initial_state(model, dataset, recipe)
        state, tensors = open_run_together(ranks, run, first, resume=resume, overwrite=overwrite)
        if not state:
            if ranks.first:
                log.info("%s is finished already", run)
            return None
        began = time.monotonic() - state["seconds"]
        model.to(device)
        model.head.memory = recipe.memory
        adam = make_optimizer(model.head, recipe.weight_decay)
        if tensors:
            restore(run / CHECKPOINT, tensors, model, adam)
        ranks.synchronize(model)
        return cls(model, dataset, run, recipe, ranks, state, adam, Saver(run / CHECKPOINT), began)

    def features(self, progress: bool) -> AbstractContextManager[Parts]:
        """Return a context with the features of all images."""
        return features_of_parts(
            self.model, self.dataset, self.run, self.recipe, self.ranks, progress
        )

    def write_settings(self, settings: Mapping[str, Any], *, overwrite: bool) -> None:
        """Write ``config.yaml``, and remove the run to overwrite, now that all images have been decoded."""
        import yaml

        class Dumper(yaml.SafeDumper):
            """Dumper that writes a shared list twice, because readers refuse aliases."""

            def ignore_aliases(self, data: Any) -> bool:
                return True

        with self.ranks.agreed():
            if self.ranks.first:
                if overwrite:
                    clear_run(self.run)
                text = yaml.dump(dict(settings), Dumper=Dumper, sort_keys=False)
                write_text(self.run / "config.yaml", text)

    def fit(self, parts: Parts, progress: bool) -> Evaluation:
        """Train the remaining epochs with tests and checkpoints, and return the evaluation after the last one.

        An epoch is tested before its checkpoint is written, so that no model with non-finite scores is saved.
        """
        self.model.eval()
        # A run may have been interrupted after its last epoch, or by an older version before a test.
        found = self._test(parts) if self.recipe.is_tested(self.state["epoch"]) else None
        with self._bar(parts, progress) as bar:
            while self.state["epoch"] < self.recipe.epochs:
                self._train_epoch(parts.training, bar)
                tested = self.recipe.is_tested(self.state["epoch"])
                if tested:
                    normal = parts.training.batches(self.recipe.batch_size)
                    self.model.fit_map(normal, self.ranks.total)
                    found = self._test(parts)
                self._save(tested)
        assert found is not None  # the last epoch is tested
        return found

    def finish(self, outcome: Outcome) -> None:
        """Write the files of a finished run."""
        with self.ranks.agreed():
            if self.ranks.first:
                self.state["seconds"] = time.monotonic() - self.began
                write_run(self.run, self.model, self.state, outcome)

    def _bar(self, parts: Parts, progress: bool) -> tqdm:
        from tqdm import tqdm

        left = self.recipe.epochs - self.state["epoch"]
        steps = left * math.ceil(len(parts.training) / self.recipe.batch_size)
        hidden = None if progress else True
        return tqdm(total=steps, desc="training", unit="step", disable=hidden)

    def _train_epoch(self, features: Features, bar: tqdm) -> None:
        """Train one epoch, and record its mean loss in nats per dimension of the latent space.

        As in the loss itself, the constant log(2 pi) / 2 = 0.9189 per dimension is omitted.
        """
        epoch, recipe = self.state["epoch"], self.recipe
        for group in self.optimizer.param_groups:
            group["lr"] = recipe.learning_rate(epoch)
        chunks = recipe.order(epoch, len(features)).split(recipe.batch_size)
        shares = ((features.share(chunk), len(chunk)) for chunk in chunks)

        def batches() -> Iterator[list[Tensor]]:
            for chunk in chunks:
                yield features.part(chunk)
                bar.update()

        disturbed = recipe.disturbed(epoch, batches(), shares)
        self.model.train()
        try:
            steps = train_epoch(
                self.model.head,
                self.optimizer,
                disturbed,
                clip=recipe.clip,
                precision=recipe.precision,
                ranks=self.ranks,
            )
        except TrainingDiverged as error:
            items = features.images.items
            names = ", ".join(items[i].name for i in chunks[error.step].tolist())
            what = f"{error} in step {error.step + 1} (images {names})"
            with self.ranks.agreed():
                raise self._stopped(epoch + 1, what) from None
        self.model.eval()
        total = sum(loss * len(chunk) for (loss, _), chunk in zip(steps, chunks, strict=True))
        dimensions = sum(x[0].numel() for x in features[features.own[:1]])
        self.state["losses"].append(total / len(features) / dimensions)
        self.state["epoch"] += 1

    def _test(self, parts: Parts) -> Evaluation:
        """Test the model, and record the metrics once per epoch.

        Raises:
            TrainingDiverged: a score or a map is not finite.
            ProcessFailed: the same in another process.
        """
        epoch, evaluations = self.state["epoch"], self.state["evaluations"]
        try:
            found = parts.evaluate(self.model.predict_features)
        except FloatingPointError as error:
            raise self._stopped(epoch, str(error)) from None
        if epoch not in (each["epoch"] for each in evaluations):
            evaluations.append({"epoch": epoch, **found.metrics})
        if found.metrics:  # only the first process has them
            loss = self.state["losses"][epoch - 1]
            log.info("epoch %d: loss %.4f, %s", epoch, loss, _brief(found.metrics))
        return found

    def _save(self, tested: bool) -> None:
        """Write a checkpoint if one is due."""
        with self.ranks.agreed():
            if self.ranks.first and self.saver.is_due(tested=tested):
                self.state["seconds"] = time.monotonic() - self.began
                self.saver.save(self.state, self.model, self.optimizer)

    def _stopped(self, epoch: int, what: str) -> TrainingDiverged:
        kept = self.saver.path
        rest = f"{kept} keeps the last good state" if kept.exists() else "nothing was saved yet"
        return TrainingDiverged(f"training stopped in epoch {epoch}: {what}; {rest}")


def _check_images(
    model: Any, dataset: DataSet, recipe: Recipe, ranks: Ranks, baseline: bool
) -> None:
    """Raise a ValueError if there are too few training images, or too few for the baseline or for whitening."""
    if not dataset.train:
        raise ValueError(f"{dataset.name} {dataset.category} has no images to train on")
    kept, _ = recipe.split(len(dataset.train))
    if len(kept) < ranks.size:
        raise ValueError(
            f"processes must not outnumber the {len(kept)} training images, got {ranks.size}"
        )
    whiten = getattr(model, "whitening", None) is not None
    for name, asked, least in (("baseline", baseline, 2), ("whiten", whiten, 3)):
        if asked and len(kept) < least:
            raise ValueError(
                f"{name} must have {least} training images or more, got {len(kept)}: train without it, "
                f"or use {least} images that are not held out"
            )


def _brief(metrics: Mapping[str, float | None]) -> str:
    shown = (f"{name} {metrics[k]:.4f}" for k, name in RESULTS.items() if metrics[k] is not None)
    return ", ".join(shown) or "no metrics, because they need good and defective test images"
