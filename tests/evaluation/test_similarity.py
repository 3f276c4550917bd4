"""PSNR, SSIM and MS-SSIM against numbers of other implementations, and what must always hold."""

from __future__ import annotations

import math
from collections.abc import Callable

import numpy as np
import pytest
import torch
from torch import Tensor

from turbodit.evaluation import similarity as module
from turbodit.evaluation.similarity import MAX_DECIBELS, decibels, ms_ssim, psnr, similarity, ssim


def clips() -> tuple[np.ndarray, np.ndarray]:
    """Two frames of gradients and squares, and the same with a pattern over them: (2,192,176,3)."""
    t, y, x = np.ogrid[:2, :192, :176]
    channels = [
        (3 * x + 2 * y + 5 * t) % 256,
        (x * y // 16 + 0 * t) % 256,
        128 + 60 * ((x // 8 + y // 8 + t) % 2),
    ]
    one = np.stack(channels, axis=-1)
    pattern = (x * x + 3 * y * y + 7 * t) % 61 - 30
    return one.astype(np.uint8), np.clip(one + pattern[..., None], 0, 255).astype(np.uint8)


def tensors() -> tuple[Tensor, Tensor]:
    one, other = (torch.from_numpy(clip).permute(0, 3, 1, 2) for clip in clips())
    return one, other


# scikit-image 0.26 (peak_signal_noise_ratio; structural_similarity with gaussian_weights,
# sigma 1.5, use_sample_covariance False) and pytorch-msssim 1.0 (ms_ssim), in float64.
PSNR = 23.32319288091754
SSIM = [0.582054175378397, 0.5842930791324314]
MS_SSIM = [0.94515206, 0.94491607]


def test_known_values() -> None:
    one, other = tensors()
    assert psnr(one, other) == pytest.approx(PSNR, abs=1e-6)
    # Variances are differences of squares in float32: errors of 1e-6.
    assert ssim(one, other).tolist() == pytest.approx(SSIM, abs=1e-5)
    assert ms_ssim(one, other).tolist() == pytest.approx(MS_SSIM, abs=1e-5)


@pytest.mark.parametrize("measure", [ssim, ms_ssim])
def test_equal_frames_and_order(measure: Callable[[Tensor, Tensor], Tensor]) -> None:
    one, other = tensors()
    assert measure(one, one).tolist() == [1.0, 1.0]
    assert torch.equal(measure(one, other), measure(other, one))
    assert (measure(one, 255 - one) < 0.3).all()


def test_psnr_is_of_the_whole_video() -> None:
    one = torch.zeros(2, 3, 4, 4, dtype=torch.uint8)
    other = one.clone()
    assert psnr(one, other) == MAX_DECIBELS
    other[1] = 10  # errors of 0 and 100: not the mean of infinity and 28
    assert psnr(one, other) == psnr(other, one) == pytest.approx(10 * math.log10(255**2 / 50))
    assert decibels(255.0**2) == 0
    assert decibels(1e-9) == MAX_DECIBELS


def test_a_video_in_pieces_is_the_video(monkeypatch: pytest.MonkeyPatch) -> None:
    one, other = (np.concatenate([clip, clip[:1]]) for clip in clips())
    whole = similarity(one, other)
    assert whole.ssim == pytest.approx((2 * SSIM[0] + SSIM[1]) / 3, abs=1e-5)
    assert whole.ms_ssim == pytest.approx((2 * MS_SSIM[0] + MS_SSIM[1]) / 3, abs=1e-5)
    monkeypatch.setattr(module, "CHUNK", 2)
    pieces = similarity(iter(one), iter(other))
    assert pieces.psnr == pytest.approx(whole.psnr)
    assert pieces.ssim == pytest.approx(whole.ssim, abs=1e-6)
    assert similarity(one, other, multi_scale=False).ms_ssim is None


def test_sizes_that_are_too_small() -> None:
    small = torch.zeros(1, 3, 10, 300, dtype=torch.uint8)
    with pytest.raises(ValueError, match=r"300x10 are too small for SSIM, .* at least 11"):
        ssim(small, small)
    small = torch.zeros(1, 3, 175, 300, dtype=torch.uint8)
    with pytest.raises(ValueError, match=r"300x175 are too small for MS-SSIM, .* at least 176"):
        ms_ssim(small, small)
    least = torch.zeros(1, 3, 176, 176, dtype=torch.uint8)
    assert ms_ssim(least, least).tolist() == [1.0]


def test_what_cannot_be_compared() -> None:
    one, other = clips()
    with pytest.raises(ValueError, match="second video ends after 1 frames"):
        similarity(one, other[:1])
    with pytest.raises(ValueError, match="first video ends after 1 frames"):
        similarity(one[:1], other)
    with pytest.raises(ValueError, match="sizes differ: 176x192 and 176x100"):
        similarity(one, other[:, :100])
    with pytest.raises(ValueError, match="without frames"):
        similarity([], [])
    bytes_, floats = torch.zeros(1, 3, 20, 20, dtype=torch.uint8), torch.zeros(1, 3, 20, 20)
    with pytest.raises(ValueError, match="expected uint8"):
        psnr(bytes_, floats)
    with pytest.raises(ValueError, match="shapes differ"):
        ssim(bytes_, bytes_[:, :1])
