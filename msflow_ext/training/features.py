"""The features of the images to train on, hold out and test on."""

from __future__ import annotations

import logging
from collections.abc import Mapping, Sequence
from contextlib import ExitStack, closing
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch

from msflow_ext.data import Images, Item
from msflow_ext.distributed.ranks import Ranks
from msflow_ext.features import Features

if TYPE_CHECKING:
    from msflow_ext.training.recipe import Recipe

log = logging.getLogger(__name__)


def features_of_parts(
    stack: ExitStack,
    model: Any,
    parts: Mapping[str, Sequence[Item]],
    run: Path,
    recipe: Recipe,
    progress: bool,
    ranks: Ranks,
) -> list[Features]:
    """Features of each part of the images, closed with ``stack``; each process has its share of all parts.

    If the model wants that, all are standardised by the first part, the images to train on.
    """

    def compute(name: str) -> Features:
        features = Features(
            model,
            Images(parts[name], model.image_size, recipe.fit),
            cache=recipe.cache,
            dtype=torch.bfloat16 if recipe.precision == "bfloat16" else torch.float32,
            file=run
            / (f"features-{name}-{ranks.rank}.cache" if ranks.rank else f"features-{name}.cache"),
            batch_size=recipe.batch_size,
            workers=recipe.workers,
            progress=f"{name} features" if progress else None,
            ranks=ranks,
        )
        return stack.enter_context(closing(features))

    if model.standardize:  # what a former training left would count twice
        model.forget_statistics()
    trained, *others = parts
    with ranks.agreed():
        found = [compute(trained)]
    if model.standardize:
        found[0].standardize(recipe.batch_size)
    with ranks.agreed():
        found += map(compute, others)
    megabytes = int(ranks.total(torch.tensor(sum(each.nbytes for each in found)))) / 1e6
    filled = [each for each in found if len(each)]
    counts = " + ".join(str(len(each)) for each in filled)
    places = "+".join(dict.fromkeys(each.place for each in filled))
    log.info("features of %s images: %.0f MB (cache: %s)", counts, megabytes, places)
    return found
