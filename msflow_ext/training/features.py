"""Features of the training, held-out and test images of a run."""

from __future__ import annotations

import logging
from collections.abc import Callable, Iterator
from contextlib import ExitStack, closing, contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch

from msflow_ext.data import DataSet, Images
from msflow_ext.distributed.ranks import Ranks
from msflow_ext.evaluation.evaluator import Evaluation, Truth, evaluate
from msflow_ext.features import Features

if TYPE_CHECKING:
    from msflow_ext.training.recipe import Recipe

log = logging.getLogger(__name__)


@dataclass(frozen=True)
class Parts:
    """Features of each part of the images, of which each process has a share.

    Attributes:
        training: features of the images to train on.
        held_out: features of the images that set the thresholds.
        test: features of the test images.
        shown: test images as the report shows them: resized, whatever the recipe's fit.
        truth: labels and masks of the test images, on the first process.
        batch_size: images per call of the model.
    """

    training: Features
    held_out: Features
    test: Features
    shown: Images
    truth: Truth
    batch_size: int

    def evaluate(self, predict: Callable[..., Any]) -> Evaluation:
        """Test ``predict`` on the test images, see :func:`msflow_ext.evaluation.evaluate`."""
        return evaluate(predict, self.test, self.truth, self.batch_size)


@contextmanager
def features_of_parts(
    model: Any, dataset: DataSet, run: Path, recipe: Recipe, ranks: Ranks, progress: bool
) -> Iterator[Parts]:
    """Compute the features of each part of the images, and release them at the end of the context.

    If the model standardizes features, the statistics are those of the training images.
    """
    kept, held = recipe.split(len(dataset.train))
    items = {
        "training": [dataset.train[i] for i in kept],
        "held-out": [dataset.train[i] for i in held],
        "test": dataset.test,
    }
    shown = Images(dataset.test, model.image_size)
    with ranks.agreed():
        truth = Truth.of(shown) if ranks.first else Truth(None, None)
    with ExitStack() as stack:

        def compute(name: str) -> Features:
            number = f"-{ranks.rank}" if ranks.rank else ""
            features = Features(
                model,
                Images(items[name], model.image_size, recipe.fit),
                cache=recipe.cache,
                dtype=torch.bfloat16 if recipe.precision == "bfloat16" else torch.float32,
                file=run / f"features-{name}{number}.cache",
                batch_size=recipe.batch_size,
                workers=recipe.workers,
                progress=f"{name} features" if progress else None,
                ranks=ranks,
            )
            return stack.enter_context(closing(features))

        if model.standardize:  # statistics of an earlier training would be applied twice
            model.forget_statistics()
        with ranks.agreed():
            training = compute("training")
        if model.standardize:
            training.standardize(recipe.batch_size)
        with ranks.agreed():
            held_out, test = compute("held-out"), compute("test")
        _announce((training, held_out, test), ranks)
        yield Parts(training, held_out, test, shown, truth, recipe.batch_size)


def _announce(parts: tuple[Features, ...], ranks: Ranks) -> None:
    """Log the number of images, and where their features are cached."""
    megabytes = int(ranks.total(torch.tensor(sum(each.nbytes for each in parts)))) / 1e6
    filled = [each for each in parts if len(each)]
    counts = " + ".join(str(len(each)) for each in filled)
    places = "+".join(dict.fromkeys(each.place for each in filled))
    log.info("features of %s images: %.0f MB (cache: %s)", counts, megabytes, places)
