"""How alike two videos are, frame by frame: PSNR, SSIM, MS-SSIM.

For changes that should change nothing: kernels, 8 bits, parallelism, with the same sampler and
the same noise. Two samples of one distribution are not alike, however good both are.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from itertools import zip_longest

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

PEAK = 255.0  # largest value of a byte
MAX_DECIBELS = 100.0  # of exact copies, whose PSNR would be infinite
WINDOW, WINDOW_SIGMA = 11, 1.5  # of SSIM, pixels
K1, K2 = 0.01, 0.03  # keep SSIM's quotients stable
SCALE_WEIGHTS = (0.0448, 0.2856, 0.3001, 0.2363, 0.1333)  # of MS-SSIM, from the finest
MS_SSIM_SIDE = WINDOW * 2 ** (len(SCALE_WEIGHTS) - 1)  # the window fits the coarsest scale
CHUNK = 4  # frames compared at a time


@dataclass(frozen=True)
class Similarity:
    """Of two videos.

    Attributes:
        psnr: decibels, of the mean squared error over all frames; at most MAX_DECIBELS.
        ssim, ms_ssim: means over all frames, 1 for equal ones; `ms_ssim` is None if left out.
    """

    psnr: float
    ssim: float
    ms_ssim: float | None


def similarity(
    one: Iterable[np.ndarray], other: Iterable[np.ndarray], *, multi_scale: bool = True
) -> Similarity:
    """Compare two videos, a few frames at a time.

    Args:
        one, other: frames (H, W, 3) uint8, such as `read.read_frames` gives.
        multi_scale: compute MS-SSIM too.

    Raises:
        ValueError: their numbers of frames or their sizes differ; there are no frames; frames
            are too small.
    """
    errors, ssims, ms_ssims = [], [], []
    for a, b in _chunks(one, other):
        errors.append(squared_error(a, b))
        ssims.append(ssim(a, b))
        if multi_scale:
            ms_ssims.append(ms_ssim(a, b))
    if not errors:
        raise ValueError("videos without frames cannot be compared")
    return Similarity(
        decibels(torch.cat(errors).mean().item()),
        torch.cat(ssims).mean().item(),
        torch.cat(ms_ssims).mean().item() if multi_scale else None,
    )


def _chunks(
    one: Iterable[np.ndarray], other: Iterable[np.ndarray]
) -> Iterator[tuple[Tensor, Tensor]]:
    """Both videos in pieces of up to CHUNK frames, uint8 (N, 3, H, W)."""
    pairs: list[tuple[np.ndarray, np.ndarray]] = []
    for index, (a, b) in enumerate(zip_longest(one, other)):
        if a is None or b is None:
            which = "first" if a is None else "second"
            raise ValueError(f"the {which} video ends after {index} frames, the other goes on")
        if a.shape != b.shape:
            sizes = " and ".join(f"{x.shape[1]}x{x.shape[0]}" for x in (a, b))
            raise ValueError(f"the videos' sizes differ: {sizes}")
        pairs.append((a, b))
        if len(pairs) == CHUNK:
            yield _tensors(pairs)
            pairs = []
    if pairs:
        yield _tensors(pairs)


def _tensors(pairs: list[tuple[np.ndarray, np.ndarray]]) -> tuple[Tensor, Tensor]:
    one, other = (
        torch.from_numpy(np.stack(frames)).permute(0, 3, 1, 2)
        for frames in zip(*pairs, strict=True)
    )
    return one, other


def psnr(one: Tensor, other: Tensor) -> float:
    """Peak signal-to-noise ratio of two videos, uint8 (T, C, H, W), in decibels.

    Of the squared error over the whole video, so that single bad frames weigh as they should.

    Raises:
        ValueError: wrong dtype or shapes.
    """
    return decibels(squared_error(one, other).mean().item())


def decibels(squared_error: float) -> float:
    """PSNR of a mean squared error of bytes; of exact copies MAX_DECIBELS."""
    if squared_error == 0:
        return MAX_DECIBELS
    return min(10 * float(np.log10(PEAK**2 / squared_error)), MAX_DECIBELS)


def squared_error(one: Tensor, other: Tensor) -> Tensor:
    """Mean squared error of each frame: uint8 (N, C, H, W) -> float64 (N,).

    Raises:
        ValueError: wrong dtype or shapes.
    """
    _check(one, other, smallest=1, measure="PSNR")
    return (one.float() - other.float()).square().mean(dim=(1, 2, 3), dtype=torch.float64)


def ssim(one: Tensor, other: Tensor) -> Tensor:
    """Structural similarity of each frame: uint8 (N, C, H, W) -> float32 (N,).

    Wang et al., "Image quality assessment: from error visibility to structural similarity",
    IEEE TIP 2004: Gaussian windows of 11x11 pixels that lie within the frame; every channel for
    itself, then their mean.

    Raises:
        ValueError: wrong dtype or shapes; a side of less than 11 pixels.
    """
    _check(one, other, smallest=WINDOW, measure="SSIM")
    return _ssim_and_contrast(one.float(), other.float())[0].mean(dim=1)


def ms_ssim(one: Tensor, other: Tensor) -> Tensor:
    """Structural similarity over five scales, of each frame: uint8 (N, C, H, W) -> float32 (N,).

    Wang et al., "Multiscale structural similarity for image quality assessment", Asilomar 2003:
    contrast and structure at every scale, luminance at the coarsest; every channel for itself,
    then their mean. A factor below 0, which has no real power, counts as 0.

    Raises:
        ValueError: wrong dtype or shapes; a side of less than 176 pixels.
    """
    _check(one, other, smallest=MS_SSIM_SIDE, measure="MS-SSIM")
    a, b = one.float(), other.float()
    product = torch.ones(a.shape[:2])
    for scale, weight in enumerate(SCALE_WEIGHTS, start=1):
        whole, contrast = _ssim_and_contrast(a, b)
        coarsest = scale == len(SCALE_WEIGHTS)
        product = product * (whole if coarsest else contrast).clamp(min=0) ** weight
        if not coarsest:
            a, b = F.avg_pool2d(a, 2), F.avg_pool2d(b, 2)
    return product.mean(dim=1)


def _check(one: Tensor, other: Tensor, smallest: int, measure: str) -> None:
    for frames in (one, other):
        if frames.dtype != torch.uint8 or frames.ndim != 4:
            raise ValueError(
                f"got {frames.dtype} {tuple(frames.shape)}, expected uint8 (N, C, H, W)"
            )
    if one.shape != other.shape:
        raise ValueError(f"shapes differ: {tuple(one.shape)} and {tuple(other.shape)}")
    height, width = one.shape[2:]
    if min(height, width) < smallest:
        raise ValueError(
            f"frames of {width}x{height} are too small for {measure}, expected sides of at least "
            f"{smallest}"
        )


def _ssim_and_contrast(a: Tensor, b: Tensor) -> tuple[Tensor, Tensor]:
    """SSIM, and its part without the luminance: float32 (N, C, H, W) in bytes -> (N, C) each."""
    c1, c2 = (K1 * PEAK) ** 2, (K2 * PEAK) ** 2
    mean_a, mean_b, aa, bb, ab = _window_means(torch.stack((a, b, a * a, b * b, a * b))).unbind()
    variances = aa - mean_a**2 + bb - mean_b**2
    contrast = (2 * (ab - mean_a * mean_b) + c2) / (variances + c2)
    luminance = (2 * mean_a * mean_b + c1) / (mean_a**2 + mean_b**2 + c1)
    return (luminance * contrast).mean(dim=(2, 3)), contrast.mean(dim=(2, 3))


def _window_means(x: Tensor) -> Tensor:
    """Gaussian means at every place where the window fits: (..., H, W) -> (..., H-10, W-10)."""
    distance = torch.arange(WINDOW, device=x.device) - WINDOW // 2
    weights = torch.exp(-(distance**2) / (2 * WINDOW_SIGMA**2))
    weights = weights / weights.sum()
    # As channels of one picture: five times as fast as a batch of grey pictures.
    planes = x.reshape(-1, *x.shape[-2:])
    count = len(planes)
    down = weights.view(1, 1, -1, 1).expand(count, -1, -1, -1)
    means = F.conv2d(F.conv2d(planes, down, groups=count), down.mT, groups=count)
    return means.view(*x.shape[:-2], *means.shape[-2:])
