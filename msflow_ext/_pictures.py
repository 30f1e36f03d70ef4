"""The pictures of predictions, written as these come: heat maps, and masks of runs with thresholds."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from itertools import chain, tee
from pathlib import Path
from typing import TYPE_CHECKING

from msflow_ext._heat_maps import file_name
from msflow_ext.checkpoint import replacing
from msflow_ext.report import colour_range, save_maps

if TYPE_CHECKING:
    from msflow_ext.inference import Result


def write_pictures(out: Path, results: Iterator[Result], colours: Sequence[float] | None) -> None:
    """Write a heat map, and a mask if it has one, per result; one result is in memory at a time."""
    first = next(results)
    low, high = colours or colour_range([first.map])
    a, b, c, d = tee(_with_masks(out, chain([first], results)), 4)
    columns = (r.name for r in a), (r.image for r in b), (r.map for r in c), (r.mask for r in d)
    save_maps(out, *columns, low=low, high=high)


def _with_masks(out: Path, results: Iterable[Result]) -> Iterator[Result]:
    """Pass results on and write their masks, white where the map exceeds the threshold."""
    from PIL import Image

    taken: set[str] = set()
    for result in results:
        name = file_name(result.name, taken)
        if result.mask is not None:
            with replacing(out / "masks" / name) as temporary:
                Image.fromarray(result.mask).save(temporary, "PNG")
        yield result
