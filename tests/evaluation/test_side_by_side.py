"""Two videos in one picture: every pixel kept, labels within their strips."""

from __future__ import annotations

import numpy as np
import pytest

from turbodit.evaluation.side_by_side import GAP, PAPER, side_by_side, strip


def test_both_videos_are_kept_and_labelled() -> None:
    rng = np.random.default_rng(0)
    left, right = rng.integers(0, 256, (2, 3, 40, 64, 3)).astype(np.uint8)
    picture = side_by_side(left, right, (("spritewan", "1.00 s"), ("other", "2.00 s")))
    top = picture.shape[1] - 40
    assert picture.shape == (3, top + 40, 2 * 64 + GAP, 3)
    assert np.array_equal(picture[:, top:, :64], left)
    assert np.array_equal(picture[:, top:, 64 + GAP :], right)
    assert (picture[:, :, 64 : 64 + GAP] == PAPER).all()
    strips = picture[0, :top, :64], picture[0, :top, 64 + GAP :]
    assert all((one < 100).any() for one in strips), "no text"
    assert not np.array_equal(*strips)


def test_what_is_too_long_is_cut() -> None:
    long = strip(256, ["spritewan:" + "steps=4," * 40], 1)
    assert long.shape == strip(256, ["x"], 1).shape
    assert (long[:, -GAP:] == PAPER).all()
    assert (strip(200, ["", ""], 2) == PAPER).all()


def test_videos_of_other_shapes() -> None:
    one = np.zeros((2, 8, 8, 3), np.uint8)
    with pytest.raises(ValueError, match="shapes differ"):
        side_by_side(one, one[:1], (("a",), ("b",)))
