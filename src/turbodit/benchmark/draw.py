"""Charts, drawn with Pillow alone: horizontal bars, and lines over two logarithmic axes."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from itertools import cycle

from PIL import Image, ImageDraw, ImageFont

PAPER, INK, PALE = (255, 255, 255), (30, 30, 30), (222, 222, 222)
COLOURS = (
    (76, 114, 176), (221, 132, 82), (85, 168, 104), (196, 78, 82), (129, 114, 179),
    (147, 120, 96), (218, 139, 195), (140, 140, 140), (204, 185, 116), (100, 181, 205),
    (47, 111, 79), (0, 0, 0),
)  # fmt: skip
WIDTH, MARGIN = 1200, 24  # pixels
ROW, BAR = 44, 28  # height of a bar's row and of the bar
TEXT_SIZE, TITLE_SIZE = 17, 22
PLOT = (90, 70, 900, 560)  # left, top, right, bottom of the lines' area
CHART_HEIGHT = 640
GAP = 12  # between a bar and the texts beside it


@dataclass(frozen=True)
class Bar:
    """One bar: `text` stands at its end; without a value there is only the text."""

    label: str
    value: float | None
    text: str


def bars(title: str, rows: Sequence[Bar], *, log: bool = False) -> Image.Image:
    """Horizontal bars, one under the other; on a logarithmic scale a grid says so.

    Raises:
        ValueError: no rows, or values that are not positive.
    """
    values = [row.value for row in rows if row.value is not None]
    if not rows or any(value <= 0 for value in values):
        raise ValueError(f"bars need rows with positive values, got {values}")
    picture, pen = _page(title, MARGIN + ROW + len(rows) * ROW + (ROW if log else MARGIN))
    font = ImageFont.load_default(TEXT_SIZE)
    left = MARGIN + GAP + max(pen.textlength(row.label, font) for row in rows)
    room = WIDTH - MARGIN - GAP - left - max(pen.textlength(row.text, font) for row in rows)
    top, bottom = MARGIN + ROW, MARGIN + ROW + len(rows) * ROW
    low, high = _decades(values) if log else (0.0, max(values, default=1.0))

    def length(value: float) -> float:
        share = _log_share(value, low, high) if log else value / high
        return room * share

    if log and values:
        for power in range(round(math.log10(low)), round(math.log10(high)) + 1):
            x = left + length(10.0**power)
            pen.line((x, top, x, bottom), PALE)
            pen.text((x, bottom + 4), _number(10.0**power), INK, font, anchor="ma")
    for index, row in enumerate(rows):
        y = top + index * ROW + (ROW - BAR) / 2
        middle = y + BAR / 2
        pen.text((left - GAP, middle), row.label, INK, font, anchor="rm")
        end = left if row.value is None else left + max(length(row.value), 1)
        if row.value is not None:
            pen.rectangle((left, y, end, y + BAR), COLOURS[index % len(COLOURS)])
        pen.text((end + GAP, middle), row.text, INK, font, anchor="lm")
    return picture


def lines(
    title: str, curves: Mapping[str, Mapping[int, float]], x_label: str, y_label: str
) -> Image.Image:
    """Curves of positive values over positive numbers, both axes logarithmic, named at the end.

    Raises:
        ValueError: no curves, an empty one, or values that are not positive.
    """
    points = [point for curve in curves.values() for point in curve.items()]
    if not points or not all(curves.values()) or any(x <= 0 or y <= 0 for x, y in points):
        raise ValueError("lines need curves of positive values")
    picture, pen = _page(title, CHART_HEIGHT)
    font = ImageFont.load_default(TEXT_SIZE)
    left, top, right, bottom = PLOT
    xs, ys = sorted({x for x, _ in points}), [y for _, y in points]

    def place(x: float, y: float) -> tuple[float, float]:
        across = left + (right - left) * _log_share(x, xs[0], xs[-1])
        return across, bottom - (bottom - top) * _log_share(y, min(ys), max(ys))

    for x in xs:
        across, _ = place(x, ys[0])
        pen.line((across, top, across, bottom), PALE)
        pen.text((across, bottom + 6), str(x), INK, font, anchor="ma")
    for y in _ticks(min(ys), max(ys)):
        _, down = place(xs[0], y)
        pen.line((left, down, right, down), PALE)
        pen.text((left - 8, down), _number(y), INK, font, anchor="rm")
    pen.text(((left + right) / 2, bottom + 40), x_label, INK, font, anchor="ma")
    pen.text((left, top - 8), y_label, INK, font, anchor="ls")
    ends = {name: place(*max(curve.items()))[1] for name, curve in curves.items()}
    names = _spread_out(ends, TEXT_SIZE + 3)
    for (name, curve), colour in zip(curves.items(), cycle(COLOURS), strict=False):
        pen.line([place(*point) for point in sorted(curve.items())], colour, width=3)
        pen.text((right + 12, names[name]), name, colour, font, anchor="lm")
    return picture


def _page(title: str, height: int) -> tuple[Image.Image, ImageDraw.ImageDraw]:
    picture = Image.new("RGB", (WIDTH, height), PAPER)
    pen = ImageDraw.Draw(picture)
    pen.text((MARGIN, MARGIN / 2), title, INK, ImageFont.load_default(TITLE_SIZE))
    return picture, pen


def _log_share(value: float, low: float, high: float) -> float:
    """Where a value lies between two others on a logarithmic scale, 0 to 1."""
    return 1.0 if low == high else math.log(value / low) / math.log(high / low)


def _decades(values: Sequence[float]) -> tuple[float, float]:
    """Powers of ten around all values; the lower one well below them, so that bars show."""
    low = math.floor(math.log10(min(values, default=1.0)) - 0.3)
    high = math.ceil(math.log10(max(values, default=10.0)))
    return 10.0**low, 10.0 ** max(high, low + 1)


def _ticks(low: float, high: float) -> list[float]:
    """1, 2 and 5 times powers of ten from `low` to `high`, and these two where there are none."""
    powers = range(math.floor(math.log10(low)), math.ceil(math.log10(high)) + 1)
    ticks = [step * 10.0**power for power in powers for step in (1, 2, 5)]
    return [tick for tick in ticks if low <= tick <= high] or [low, high]


def _number(value: float) -> str:
    return f"{value:,.0f}" if value >= 10 else f"{value:.3g}"


def _spread_out(places: Mapping[str, float], gap: float) -> dict[str, float]:
    """The places, moved down as little as it takes for them to be `gap` apart."""
    moved: dict[str, float] = {}
    last = -math.inf
    for name, place in sorted(places.items(), key=lambda item: item[1]):
        last = max(place, last + gap)
        moved[name] = last
    return moved
