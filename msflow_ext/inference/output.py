"""What a prediction leaves in a folder: ``scores.csv``, heat maps and masks."""

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
    """The row of ``scores.csv`` that says what a detector says."""
    if result.error:
        return Row(result.name, error=result.error)
    p_value = result.p_value
    return Row(result.name, score=result.score, verdict=result.label, p_value_at_most=p_value)


def remove_earlier(out: Path, images: Iterable[Path] = ()) -> None:
    """Remove an earlier prediction or evaluation from a folder: its table and the pictures of its rows.

    So no picture of one prediction stands beside the rows of another. Nothing is removed if an
    error is raised.

    Args:
        images: what is to be scored, and so must stay.

    Raises:
        ValueError: the table is another file of this name, a picture is of none of its rows or is
            one of ``images``.
    """
    table = out / TABLE
    rows = read_scores(table) if table.is_file() else []
    every, scored = ((r.name for r in kept) for kept in (rows, [r for r in rows if not r.error]))
    known = {path.name for names in (every, scored) for path in map_paths(out, names)}
    kept = {path.resolve() for path in images}
    pictures = [path for kind in ("maps", "masks") for path in sorted((out / kind).glob("[!.]*"))]
    for path in pictures:
        if path.name.removesuffix(".tmp") not in known or path.resolve() in kept:
            what = "an image to score" if path.resolve() in kept else f"of no row of {table}"
            raise ValueError(f"--out {out} holds {path}, which is {what}: choose another folder")
    for path in (*pictures, table, out / "evaluation.json"):
        path.unlink(missing_ok=True)
    for kind in ("maps", "masks"):
        with suppress(OSError):  # there is none, or a hidden file is in it
            (out / kind).rmdir()


def write_pictures(out: Path, results: Iterable[Result], colours: Sequence[float] | None) -> None:
    """Write a heat map, and a mask if it has one, per result; one result is in memory at a time."""
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
    """Pass results on and write their masks, white where the map exceeds the threshold."""
    from PIL import Image

    taken: set[str] = set()
    for result in results:
        name = file_name(result.name, taken)
        if result.mask is not None:
            with replacing(out / "masks" / name) as temporary:
                Image.fromarray(result.mask).save(temporary, "PNG")
        yield result
