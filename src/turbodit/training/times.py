"""Which noise levels training sees: distributions of times, and tensor conversions.

The three times of `turbodit.noise_schedule`, as float64 tensors: the TrigFlow angle s, the
rectified-flow time t, and sigma = tan(s) = t / (1 - t).
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from itertools import pairwise
from typing import Protocol

import torch

from turbodit.noise_schedule import few_step_times, shift_time

_TRIES = 1000


def time_of_angle(angle: torch.Tensor) -> torch.Tensor:
    """t = sin s / (cos s + sin s)."""
    return angle.sin() / (angle.cos() + angle.sin())


def angle_of_time(t: torch.Tensor) -> torch.Tensor:
    """s = atan(t / (1 - t)), pi/2 at t = 1."""
    return torch.atan2(t, 1 - t)


def angle_of_sigma(sigma: torch.Tensor) -> torch.Tensor:
    """s = atan(sigma)."""
    return sigma.atan()


class Angles(Protocol):
    """A distribution of angles."""

    def sample(self, count: int, generator: torch.Generator) -> torch.Tensor:
        """`count` independent angles in [0, pi/2), float64, on the generator's device."""


@dataclass(frozen=True)
class LogNormal:
    """sigma = exp(n) with n normal: as in EDM (arXiv:2206.00364), sCM and SLA.

    Raises:
        ValueError: p_std is not positive.
    """

    p_mean: float
    p_std: float

    def __post_init__(self) -> None:
        if not self.p_std > 0:
            raise ValueError(f"p_std must be positive, got {self.p_std}")

    def sample(self, count: int, generator: torch.Generator) -> torch.Tensor:
        """See `Angles`."""
        n = torch.randn(count, generator=generator, device=generator.device, dtype=torch.float64)
        return angle_of_sigma((self.p_mean + self.p_std * n).exp())


@dataclass(frozen=True)
class UniformShifted:
    """t uniform in [0, 1), then shifted: rCM's p_D, shift 5 (arXiv:2510.08431).

    Raises:
        ValueError: the shift is not positive.
    """

    shift: float

    def __post_init__(self) -> None:
        _check_shift(self.shift)

    def sample(self, count: int, generator: torch.Generator) -> torch.Tensor:
        """See `Angles`."""
        u = torch.rand(count, generator=generator, device=generator.device, dtype=torch.float64)
        return angle_of_time(shift_time(u, self.shift))


@dataclass(frozen=True)
class FewStep:
    """The times at which the few-step sampler asks the network, one as often as another.

    Raises:
        ValueError: see `turbodit.noise_schedule.few_step_times`.
    """

    steps: int
    sigma_max: float

    def __post_init__(self) -> None:
        few_step_times(self.steps, self.sigma_max)

    def sample(self, count: int, generator: torch.Generator) -> torch.Tensor:
        """See `Angles`."""
        *times, _ = few_step_times(self.steps, self.sigma_max)
        drawn = torch.randint(self.steps, (count,), generator=generator, device=generator.device)
        t = torch.tensor(times, dtype=torch.float64, device=generator.device)
        return angle_of_time(t)[drawn]


@dataclass(frozen=True)
class Intervals:
    """The intervals between `steps` + 1 shifted times from 0 to 1: of the discrete-time CM.

    Raises:
        ValueError: fewer than one step, or a shift that is not positive.
    """

    steps: int = 48
    shift: float = 5.0

    def __post_init__(self) -> None:
        if self.steps < 1:
            raise ValueError(f"steps must be at least 1, got {self.steps}")
        _check_shift(self.shift)

    def sample(self, count: int, generator: torch.Generator) -> tuple[torch.Tensor, torch.Tensor]:
        """Noisier and cleaner end (t_{n+1}, t_n) of `count` random intervals, (B,) float64."""
        device = generator.device
        n = torch.randint(self.steps, (count,), generator=generator, device=device).double()
        t_next, t = (shift_time(i / self.steps, self.shift) for i in (n, n + 1))
        return t, t_next


def random_rollout_times(
    steps: int, distribution: Angles, generator: torch.Generator
) -> tuple[float, ...]:
    """Times of a random roll-out: 1 (pure noise), steps - 1 drawn ones that fall, 0.

    The fixed roll-out of pure DMD is `turbodit.noise_schedule.few_step_times`.

    Raises:
        ValueError: fewer than one step.
    """
    if steps < 1:
        raise ValueError(f"a roll-out needs at least 1 step, got {steps}")
    drawn = time_of_angle(distribution.sample(steps - 1, generator))
    times = (1.0, *drawn.sort(descending=True).values.tolist(), 0.0)
    assert all(after < before for before, after in pairwise(times)), times
    return times


def _check_shift(shift: float) -> None:
    if not 0 < shift < math.inf:
        raise ValueError(f"the shift must be positive and finite, got {shift}")


@dataclass(frozen=True)
class Within:
    """A distribution of angles, of which those count whose rectified-flow time is in [low, high].

    For one expert of two. Others are drawn again.

    Raises:
        ValueError: an empty range, or one that the distribution hardly ever meets.
    """

    distribution: Angles
    low: float = 0.0
    high: float = 1.0

    def __post_init__(self) -> None:
        if not 0 <= self.low < self.high <= 1:
            raise ValueError(f"times are from 0 to 1, got a range from {self.low} to {self.high}")

    def sample(self, count: int, generator: torch.Generator) -> torch.Tensor:
        """See `Angles`."""
        found = self.distribution.sample(count, generator)
        for _ in range(_TRIES):
            t = time_of_angle(found)
            outside = (t < self.low) | (t > self.high)
            if not outside.any():
                return found
            found = torch.where(outside, self.distribution.sample(count, generator), found)
        raise ValueError(
            f"{self.distribution} hardly ever gives a time from {self.low} to {self.high}"
        )
