from __future__ import annotations

import io

import pytest
from PIL import Image

from turbodit.benchmark.draw import COLOURS, INK, PAPER, Bar, bars, lines


def reopened(picture: Image.Image) -> Image.Image:
    file = io.BytesIO()
    picture.save(file, format="PNG")
    return Image.open(file).convert("RGB")


def widths(picture: Image.Image, count: int) -> list[int]:
    """Pixels of each bar's colour in its longest row."""
    pixels = picture.load()
    return [
        max(
            sum(pixels[x, y] == COLOURS[index] for x in range(picture.width))
            for y in range(picture.height)
        )
        for index in range(count)
    ]


def test_bars_are_as_long_as_their_values():
    picture = reopened(bars("title", [Bar("a", 10.0, "10"), Bar("b", 5.0, "5")]))
    long, short = widths(picture, 2)
    assert long == pytest.approx(2 * short, abs=3)


def test_logarithmic_bars_fall_by_the_same_length():
    rows = [Bar(str(value), value, "") for value in (1000.0, 100.0, 10.0)]
    first, second, third = widths(reopened(bars("title", rows, log=True)), 3)
    assert first - second == pytest.approx(second - third, abs=3)
    assert third > 10


def test_a_row_without_a_value_is_its_text():
    picture = bars("title", [Bar("a", None, "out of memory"), Bar("b", 1.0, "1")])
    colours = {colour for _, colour in reopened(picture).getcolors(1 << 20)}
    assert COLOURS[0] not in colours
    assert COLOURS[1] in colours


def test_nothing_but_texts_can_be_drawn():
    reopened(bars("title", [Bar("a", None, "out of memory")], log=True))


def test_lines_have_all_curves_within_the_page():
    curves = {"up": {512: 1.0, 1024: 8.0, 2048: 64.0}, "flat": {512: 5.0, 2048: 5.0}}
    picture = reopened(lines("title", curves, "tokens", "TFLOP/s"))
    colours = {colour for _, colour in picture.getcolors(1 << 20)}
    assert {PAPER, INK, COLOURS[0], COLOURS[1]} <= colours


def test_one_point_is_drawn_too():
    reopened(lines("title", {"point": {512: 1.0}}, "tokens", "TFLOP/s"))


@pytest.mark.parametrize("rows", [[], [Bar("a", 0.0, "0")]])
def test_bars_need_positive_values(rows):
    with pytest.raises(ValueError, match="positive"):
        bars("title", rows)


@pytest.mark.parametrize("curves", [{}, {"a": {}}, {"a": {1: -1.0}}])
def test_lines_need_positive_values(curves):
    with pytest.raises(ValueError, match="positive"):
        lines("title", curves, "x", "y")
