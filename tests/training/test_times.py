from __future__ import annotations

import math

import pytest
import torch

from turbodit.noise_schedule import MID_TIMES, angle_to_time, few_step_times
from turbodit.training.times import (
    FewStep,
    Intervals,
    LogNormal,
    UniformShifted,
    angle_of_sigma,
    angle_of_time,
    random_rollout_times,
    time_of_angle,
)


def seeded(seed=0):
    return torch.Generator().manual_seed(seed)


def test_conversions_agree_with_the_float_ones_and_undo_each_other():
    angles = torch.tensor([0.0, *MID_TIMES, math.pi / 2], dtype=torch.float64)
    t = time_of_angle(angles)
    torch.testing.assert_close(t.tolist(), [angle_to_time(angle) for angle in angles.tolist()])
    torch.testing.assert_close(angle_of_time(t), angles)
    torch.testing.assert_close(angle_of_sigma(angles[:-1].tan()), angles[:-1])


def test_log_normal_sigma_has_the_given_mean_and_deviation():
    angles = LogNormal(0.7, 1.6).sample(20_000, seeded())
    n = angles.tan().log()
    assert angles.dtype == torch.float64
    assert n.mean().item() == pytest.approx(0.7, abs=4 * 1.6 / math.sqrt(20_000))
    assert n.std().item() == pytest.approx(1.6, rel=0.02)


def test_few_step_gives_each_of_the_samplers_times_as_often():
    t = time_of_angle(FewStep(3, 70.0).sample(30_000, seeded()))
    found, counts = t.unique(return_counts=True)
    wanted = torch.tensor(sorted(few_step_times(3, 70.0)[:-1]), dtype=torch.float64)
    torch.testing.assert_close(found, wanted)
    assert (counts - 10_000).abs().max() < 4 * math.sqrt(30_000 * 2 / 9)


def test_few_step_of_more_steps_than_the_sampler_has_is_refused():
    with pytest.raises(ValueError, match="supported: 1 to 4"):
        FewStep(5, 80.0)


def test_uniform_shifted_undone_is_uniform():
    t = time_of_angle(UniformShifted(5.0).sample(20_000, seeded()))
    u = t / (5 - 4 * t)
    # Kolmogorov-Smirnov: the largest gap to the uniform distribution, 0.1 % level.
    gap = (u.sort().values - torch.linspace(0, 1, 20_000)).abs().max()
    assert gap < 1.95 / math.sqrt(20_000)
    assert u.min() >= 0 and u.max() < 1


def test_intervals_are_neighbours_of_the_shifted_grid_and_all_appear():
    t, t_next = Intervals(4, shift=3.0).sample(200, seeded())
    grid = [3 * u / (1 + 2 * u) for u in (0, 0.25, 0.5, 0.75, 1)]
    pairs = {(round(a, 9), round(b, 9)) for a, b in zip(t.tolist(), t_next.tolist(), strict=True)}
    assert pairs == {(round(grid[i + 1], 9), round(grid[i], 9)) for i in range(4)}


def test_a_roll_out_falls_from_pure_noise_to_clean_through_drawn_times():
    times = random_rollout_times(4, UniformShifted(5.0), seeded(3))
    drawn = time_of_angle(UniformShifted(5.0).sample(3, seeded(3))).tolist()
    assert times == (1.0, *sorted(drawn, reverse=True), 0.0)
    assert random_rollout_times(1, UniformShifted(5.0), seeded()) == (1.0, 0.0)


def test_draws_come_from_the_generator_alone():
    for distribution in (LogNormal(0.0, 1.0), UniformShifted(5.0)):
        first, again = (distribution.sample(3, seeded(5)) for _ in range(2))
        torch.testing.assert_close(first, again, rtol=0, atol=0)


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: LogNormal(0.0, 0.0), "p_std must be positive, got 0.0"),
        (lambda: UniformShifted(0.0), "shift must be positive and finite, got 0.0"),
        (lambda: Intervals(0), "steps must be at least 1, got 0"),
        (lambda: Intervals(4, math.inf), "shift must be positive and finite, got inf"),
        (lambda: random_rollout_times(0, UniformShifted(1.0), seeded()), "at least 1 step, got 0"),
    ],
)
def test_what_cannot_be_drawn_from(make, message):
    with pytest.raises(ValueError, match=message):
        make()
