"""Draw bar charts as SVG."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from xml.sax.saxutils import escape

WIDTH, LABELS, VALUES, TOP, STEP, THICK = 760, 210, 90, 46, 24, 16
OURS, THEIRS, INK = "#127a57", "#9aa5b1", "#1f2933"


@dataclass(frozen=True)
class Bar:
    """Bar of a provider: its median, and the ends of its whisker."""

    label: str
    value: float
    low: float
    high: float
    ours: bool


def bars(title: str, drawn: Sequence[Bar], unit: Callable[[float], str]) -> str:
    """Return horizontal bars from zero, each with its value and a whisker, where shorter is better."""
    height = TOP + STEP * len(drawn) + 10
    scale = (WIDTH - LABELS - VALUES) / max(bar.high for bar in drawn)
    parts = [
        f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {WIDTH} {height}" '
        f'font-family="system-ui, sans-serif" font-size="13" fill="{INK}" role="img">',
        f"<title>{escape(title)}</title>",
        f'<rect width="{WIDTH}" height="{height}" fill="#ffffff"/>',
        f'<text x="12" y="24" font-size="15" font-weight="600">{escape(title)}</text>',
        f'<text x="{WIDTH - 12}" y="24" text-anchor="end" fill="#616e7c">shorter is better</text>',
    ]
    for i, bar in enumerate(drawn):
        y = TOP + STEP * i
        middle, baseline = y + THICK / 2, y + THICK - 3
        colour, weight = (OURS, 600) if bar.ours else (THEIRS, 400)
        low, end, high = (LABELS + scale * v for v in (bar.low, bar.value, bar.high))
        parts += [
            f'<text x="{LABELS - 8}" y="{baseline}" text-anchor="end" font-weight="{weight}">'
            f"{escape(bar.label)}</text>",
            f'<rect x="{LABELS}" y="{y}" width="{end - LABELS:.1f}" height="{THICK}" '
            f'fill="{colour}"/>',
            f'<path d="M{low:.1f} {middle}H{high:.1f}" stroke="{INK}"/>',
            f'<text x="{max(end, high) + 6:.1f}" y="{baseline}" font-weight="{weight}">'
            f"{escape(unit(bar.value))}</text>",
        ]
    return "\n".join([*parts, "</svg>"]) + "\n"
