"""Measures of single videos, on frames whose measures are known."""

from __future__ import annotations

import sys

import numpy as np
import pytest

from turbodit.evaluation.no_reference import (
    describe,
    dynamic_degree,
    flicker,
    load_opencv,
    sharpness,
)


def grey(*levels: int, height: int = 24, width: int = 32) -> np.ndarray:
    """A frame of one level for each of `levels`: (T, height, width, 3)."""
    frames = np.empty((len(levels), height, width, 3), np.uint8)
    frames[:] = np.array(levels, np.uint8)[:, None, None, None]
    return frames


def textured_square(left: int) -> np.ndarray:
    """A frame of noise, 96 pixels high, with a smooth square `left` pixels from the left."""
    frame = np.random.default_rng(0).integers(0, 40, (96, 128, 3)).astype(np.uint8)
    y, x = np.ogrid[:32, :32]
    frame[30:62, left : left + 32] = (170 + 60 * np.sin(x / 3) * np.cos(y / 4))[..., None]
    return frame


def test_still_and_changing_brightness() -> None:
    still = describe(grey(90, 90, 90), flow=False)
    assert still == {"frames": 3, "flicker": 0, "colour_drift": 0, "sharpness": 0}
    # Differences of 10 and 4; the largest distance from the first is 10 in each channel.
    changing = describe(grey(90, 100, 96), flow=False)
    assert changing["flicker"] == pytest.approx(7)
    assert changing["colour_drift"] == pytest.approx(10 * 3**0.5)
    assert flicker(*grey(0, 255)) == flicker(*grey(255, 0)) == 255  # no wrap-around of bytes


def test_sharpness_as_opencv_finds_it() -> None:
    t, y, x = np.ogrid[:2, :192, :176]
    channels = [
        (3 * x + 2 * y + 5 * t) % 256,
        (x * y // 16 + 0 * t) % 256,
        128 + 60 * ((x // 8 + y // 8 + t) % 2),
    ]
    frame = np.stack(channels, axis=-1).astype(np.uint8)[0]
    # cv2.Laplacian(luma, CV_64F).var()
    assert sharpness(frame) == pytest.approx(3505.291088274597, rel=1e-6)
    blurred = ((frame[:-1].astype(int) + frame[1:]) // 2).astype(np.uint8)
    assert sharpness(blurred) < sharpness(frame)


def test_dynamic_degree_is_the_speed_of_what_moves() -> None:
    opencv = pytest.importorskip("cv2")
    still, moved = textured_square(20), textured_square(23)
    assert dynamic_degree(still, still, opencv) == pytest.approx(0, abs=0.05)
    want = 100 * 3 / 96  # 3 of 96 pixels, and the square is a twelfth of the frame
    assert dynamic_degree(still, moved, opencv) == pytest.approx(want, rel=0.1)
    large = [opencv.resize(frame, (640, 480)) for frame in (still, moved)]
    assert dynamic_degree(*large, opencv) == pytest.approx(want, rel=0.1)
    assert describe([still, moved])["dynamic_degree"] == dynamic_degree(still, moved, opencv)


def test_without_opencv_the_error_says_what_to_install(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "cv2", None)
    with pytest.raises(ValueError, match=r"pip install 'turbodit\[eval\]'"):
        load_opencv()
    with pytest.raises(ValueError, match="needs the package opencv"):
        describe(grey(1, 2))


@pytest.mark.parametrize("count", [0, 1])
def test_one_frame_is_not_enough(count: int) -> None:
    with pytest.raises(ValueError, match=f"got {count} frame"):
        describe(grey(5)[:count], flow=False)
