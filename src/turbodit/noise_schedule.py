"""Diffusion times: how they convert, shift, and which ones the few-step sampler visits.

Three times name the same noise level: the TrigFlow angle s in [0, pi/2] of sCM
(arXiv:2410.11081), where x = cos(s) x0 + sin(s) noise; the rectified-flow time t in [0, 1],
where x = (1 - t) x0 + t noise; and sigma = tan(s) = t / (1 - t).
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from itertools import pairwise
from typing import TYPE_CHECKING, TypeVar

if TYPE_CHECKING:
    import torch

# The angles between the first step and the clean video in rCM (arXiv:2510.08431).
MID_TIMES = (1.5, 1.4, 1.0)

Time = TypeVar("Time", "float", "torch.Tensor")


def angle_to_time(angle: float) -> float:
    """Rectified-flow time of a TrigFlow angle: sin s / (cos s + sin s)."""
    return math.sin(angle) / (math.cos(angle) + math.sin(angle))


def shift_time(t: Time, shift: float) -> Time:
    """shift * t / (1 + (shift - 1) * t): larger shifts dwell at higher noise (SD3, Wan)."""
    return shift * t / (1 + (shift - 1) * t)


def few_step_times(
    steps: int, sigma_max: float, mid_times: Sequence[float] = MID_TIMES
) -> tuple[float, ...]:
    """Times of rCM's few-step sampler: `steps` + 1 of them, strictly falling, the last 0.

    Args:
        steps: number of network evaluations, at most len(mid_times) + 1.
        sigma_max: noise level of the first evaluation.
        mid_times: TrigFlow angles of the later evaluations; the first steps - 1 are used.

    Raises:
        ValueError: too few or too many steps, or times that do not fall.
    """
    if not 1 <= steps <= len(mid_times) + 1:
        raise ValueError(
            f"few-step sampling got {steps} steps, supported: 1 to {len(mid_times) + 1} "
            f"with the {len(mid_times)} mid times {tuple(mid_times)}"
        )
    if not 0 < sigma_max < math.inf:
        raise ValueError(f"sigma_max must be positive and finite, got {sigma_max}")
    angles = (math.atan(sigma_max), *mid_times[: steps - 1], 0.0)
    if not all(after < before for before, after in pairwise(angles)):
        raise ValueError(
            f"mid times must fall from atan(sigma_max) = {angles[0]:.4f} towards 0 "
            f"(radians), got {tuple(mid_times[: steps - 1])} with sigma_max {sigma_max:g}"
        )
    return tuple(angle_to_time(angle) for angle in angles)
