"""Two videos beside each other, under strips that say what they are."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import numpy as np
from PIL import Image, ImageDraw, ImageFont

PAPER, INK = (255, 255, 255), (30, 30, 30)
GAP = 4  # pixels between the videos, and around a label
SMALLEST_TEXT, LETTERS = 12, 60  # pixels; about so many letters fit a wide video's strip


def side_by_side(
    left: np.ndarray, right: np.ndarray, labels: tuple[Sequence[str], Sequence[str]]
) -> np.ndarray:
    """Frames of the left and of the right video in one picture.

    Args:
        left, right: (T, H, W, 3) uint8, of one shape.
        labels: lines of text for each; what is too long is cut short.

    Returns:
        (T, H + strip, 2 W + gap, 3) uint8.

    Raises:
        ValueError: the shapes differ.
    """
    if left.shape != right.shape:
        raise ValueError(f"the videos' shapes differ: {left.shape} and {right.shape}")
    count, height, width, _ = left.shape
    lines = max(map(len, labels))
    strips = [strip(width, text, lines) for text in labels]
    top = len(strips[0])
    picture = np.full((count, top + height, 2 * width + GAP, 3), PAPER, np.uint8)
    for start, clip, label in zip((0, width + GAP), (left, right), strips, strict=True):
        picture[:, :top, start : start + width] = label
        picture[:, top:, start : start + width] = clip
    return picture


def strip(width: int, text: Sequence[str], lines: int) -> np.ndarray:
    """`text` on white, with room for `lines` lines: (height, width, 3) uint8."""
    size = max(SMALLEST_TEXT, width // LETTERS)
    row = round(1.4 * size)
    picture = Image.new("RGB", (width, lines * row + 2 * GAP), PAPER)
    pen = ImageDraw.Draw(picture)
    font = ImageFont.load_default(size)
    for index, line in enumerate(text):
        shown = _fitting(line, width - 2 * GAP, lambda words: pen.textlength(words, font))
        pen.text((GAP, GAP + index * row), shown, INK, font)
    return np.asarray(picture)


def _fitting(text: str, width: float, length: Callable[[str], float]) -> str:
    """`text`, or as much of its beginning as has room."""
    if length(text) <= width:
        return text
    while text and length(f"{text}...") > width:
        text = text[:-1]
    return f"{text}..."
