"""The chart of the benchmark, as SVG.

It shows each ratio as "times as fast", on a logarithmic axis around 1: a bar to the right is faster
than the peer, a bar to the left slower, equally long for twice and for half. A tick across the bar
is the target. Colours repeat what lengths and ticks show.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Iterator, Sequence
from html import escape
from typing import NamedTuple


class Bar(NamedTuple):
    """One case: how many times as fast it is as its best peer, and how fast it should be."""

    name: str
    speed: float
    target: float | None

    @property
    def reached(self) -> bool | None:
        """Whether the target was reached; None without one."""
        return None if self.target is None else self.speed >= self.target


#: In pixels: the drawing, names on its left, figures on its right, a case, its bar, the legend.
WIDTH, LABELS, MARGIN, ROW, BAR, TOP = 900, 190, 150, 28, 16, 56
COLOURS = {True: "#2f7d4f", False: "#c2571a", None: "#6b7280"}
MEANINGS = {True: "target reached", False: "target missed", None: "no target set"}

#: Where the axis has lines, as far as it reaches.
GRID = (0.25, 0.5, 1, 2, 5, 10, 20, 50, 100)


class _Axis:
    """From a speed to a place on the logarithmic axis, which holds all of ``speeds`` and 1."""

    def __init__(self, speeds: Iterable[float]) -> None:
        values = [0.5, 2, *speeds]
        self.low, self.high = math.log(min(values) * 0.9), math.log(max(values) * 1.1)

    def __call__(self, speed: float) -> float:
        share = (math.log(speed) - self.low) / (self.high - self.low)
        return LABELS + share * (WIDTH - LABELS - MARGIN)

    def holds(self, speed: float) -> bool:
        """Whether the axis reaches that far."""
        return self.low <= math.log(speed) <= self.high


def chart(bars: Sequence[Bar]) -> str:
    """A bar for every case, as SVG."""
    targets = [one.target for one in bars if one.target is not None]
    axis = _Axis([*(one.speed for one in bars), *targets])
    height = TOP + ROW * len(bars) + 40
    lines = [
        f'<svg xmlns="http://www.w3.org/2000/svg" width="{WIDTH}" height="{height}" '
        f'viewBox="0 0 {WIDTH} {height}" font-family="sans-serif" font-size="13">',
        f'<rect width="{WIDTH}" height="{height}" fill="#ffffff"/>',
        _text(12, 24, "Times as fast as the best peer", 'font-size="16" font-weight="bold"'),
        *_legend(),
        *_grid(axis, height - 34),
        *(line for number, one in enumerate(bars) for line in _bar(axis, number, one)),
        "</svg>",
    ]
    return "\n".join(lines) + "\n"


def _text(x: float, y: float, words: str, more: str = "") -> str:
    return f'<text x="{x:.1f}" y="{y:.1f}" fill="#1f2937" {more}>{escape(words)}</text>'


def _legend() -> Iterator[str]:
    for number, (meaning, words) in enumerate(MEANINGS.items()):
        x = 330 + 140 * number
        yield f'<rect x="{x}" y="13" width="12" height="12" fill="{COLOURS[meaning]}"/>'
        yield _text(x + 18, 24, words)
    yield _tick(760, 10, 28) + _text(768, 24, "target")


def _tick(x: float, top: float, bottom: float) -> str:
    return (
        f'<line x1="{x:.1f}" x2="{x:.1f}" y1="{top}" y2="{bottom}" stroke="#111827" '
        'stroke-width="3"/>'
    )


def _grid(axis: _Axis, bottom: float) -> Iterator[str]:
    for speed in filter(axis.holds, GRID):
        x, colour = axis(speed), "#6b7280" if speed == 1 else "#e5e7eb"
        yield (f'<line x1="{x:.1f}" x2="{x:.1f}" y1="{TOP - 14}" y2="{bottom}" stroke="{colour}"/>')
        yield _text(x, bottom + 18, f"{speed:g}×", 'text-anchor="middle"')  # noqa: RUF001


def _bar(axis: _Axis, number: int, bar: Bar) -> Iterator[str]:
    y = TOP + ROW * number
    left, right = sorted((axis(1), axis(bar.speed)))
    colour, middle = COLOURS[bar.reached], y + BAR - 3
    yield _text(LABELS - 10, middle, bar.name, 'text-anchor="end"')
    yield (
        f'<rect x="{left:.1f}" y="{y}" width="{right - left:.1f}" height="{BAR}" fill="{colour}"/>'
    )
    text = f"{bar.speed:.2f}"
    if bar.target is not None:
        x = axis(bar.target)
        yield _tick(x, y - 4, y + BAR + 4)
        text, right = f"{text} (target {bar.target:.2f})", max(right, x)
    yield _text(right + 8, middle, text)
