"""Write the files of a prediction: ``scores.csv``, heat maps and masks."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from contextlib import suppress
from itertools import chain, tee
from pathlib import Path

from msflow_ext.files import replacing
from msflow_ext.inference.result import Result
from msflow_ext.reports.heat_maps import colour_range, save_maps
from msflow_ext.runs.folder import file_name, map_paths
from msflow_ext.runs.score_table import Row, read_scores

TABLE = "scores.csv"
NOT_SCORED = "the prediction ended before this image was scored"


def row_of(result: Result) -> Row:
    """Return the row of ``scores.csv`` for a result."""
    if result.error:
        return Row(result.name, error=result.error)
    p_value = result.p_value
    return Row(result.name, score=result.score, verdict=result.label, p_value_at_most=p_value)


def remove_earlier(out: Path, images: Iterable[Path] = ()) -> None:
    """Remove the table and pictures of an earlier prediction or evaluation from a folder.

    This keeps the pictures and the table of a folder in agreement. If an error is raised, nothing
    has been removed.

    Args:
        out: output folder.
        images: images to be scored, which must stay.

    Raises:
        ValueError: ``scores.csv`` is not a table of scores, or a picture belongs to no row of it or
            is one of ``images``.
    """
    table = out / TABLE
    rows = read_scores(table) if table.is_file() else []
    every, scored = ((r.name for r in kept) for kept in (rows, [r for r in rows if not r.error]))
    known = {path.name for names in (every, scored) for path in map_paths(out, names)}
    kept = {path.resolve() for path in images}
    pictures = [path for kind in ("maps", "masks") for path in sorted((out / kind).glob("[!.]*"))]
    for path in pictures:
        if path.name.removesuffix(".tmp") not in known or path.resolve() in kept:
            what = "is an image to score" if path.resolve() in kept else f"has no row in {table}"
            raise ValueError(
                f"--out must be another folder, got {out}: {path} {what} and would be removed"
            )
    for path in (*pictures, table, out / "evaluation.json"):
        path.unlink(missing_ok=True)
    for kind in ("maps", "masks"):
        with suppress(OSError):  # it does not exist, or has a hidden file
            (out / kind).rmdir()


def write_pictures(out: Path, results: Iterable[Result], colours: Sequence[float] | None) -> None:
    """Write a heat map per result, and its mask if it has one; one result is in memory at a time."""
    results = iter(results)
    first = next(results, None)
    if first is None:
        return
    low, high = colours or colour_range([first.map])
    shown = (result.shown() for result in chain([first], results))
    a, b, c, d = tee(_with_masks(out, shown), 4)
    columns = (r.name for r in a), (r.image for r in b), (r.map for r in c), (r.mask for r in d)
    save_maps(out, *columns, low=low, high=high)


def _with_masks(out: Path, results: Iterable[Result]) -> Iterator[Result]:
    """Yield the results and write their masks, white where the map exceeds the threshold."""
    from PIL import Image

    taken: set[str] = set()
    for result in results:
        name = file_name(result.name, taken)
        if result.mask is not None:
            with replacing(out / "masks" / name) as temporary:
                Image.fromarray(result.mask).save(temporary, "PNG")
        yield result
