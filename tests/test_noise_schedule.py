from __future__ import annotations

import math

import pytest
import torch

from turbodit.noise_schedule import angle_to_time, few_step_times, shift_time


def test_angle_sigma_and_time_name_the_same_noise_level():
    for sigma in (0.01, 0.5, 1.0, 80.0, 1600.0):
        assert angle_to_time(math.atan(sigma)) == pytest.approx(sigma / (1 + sigma), rel=1e-14)
    assert angle_to_time(0.0) == 0.0
    assert angle_to_time(math.pi / 2) == 1.0


def test_shift_by_hand_on_numbers_and_tensors():
    assert shift_time(0.5, 5.0) == pytest.approx(2.5 / 3.0, rel=1e-15)
    assert shift_time(0.3, 1.0) == 0.3
    shifted = shift_time(torch.tensor([0.0, 0.5, 1.0]), 3.0)
    torch.testing.assert_close(shifted, torch.tensor([0.0, 0.75, 1.0]))


def test_four_steps_by_hand():
    # The tangents of 1.5, 1.4 and 1, from a table.
    sigmas = (80.0, 14.10141994717172, 5.797883715482887, 1.557407724654902, 0.0)
    expected = [sigma / (1 + sigma) for sigma in sigmas]
    assert few_step_times(4, 80.0) == pytest.approx(expected, rel=1e-13)


@pytest.mark.parametrize("steps", [1, 2, 3, 4])
def test_fewer_steps_keep_the_first_mid_times(steps):
    times = few_step_times(steps, 200.0)
    assert times[:-1] == few_step_times(4, 200.0)[:steps]
    assert times[-1] == 0.0


def test_own_mid_times_allow_more_steps():
    times = few_step_times(6, 80.0, (1.5, 1.3, 1.0, 0.7, 0.3))
    assert len(times) == 7
    assert times[5] == angle_to_time(0.3)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ((0, 80.0), "1 to 4"),
        ((5, 80.0), "1 to 4"),
        ((4, 0.0), "sigma_max"),
        ((4, float("nan")), "sigma_max"),
        ((4, math.inf), "sigma_max"),
        ((2, 10.0), "fall"),  # atan(10) < 1.5
        ((3, 80.0, (1.4, 1.5)), "fall"),
        ((2, 80.0, (0.0,)), "fall"),
        ((2, 80.0, (float("nan"),)), "fall"),
    ],
)
def test_impossible_schedules_are_refused(arguments, message):
    with pytest.raises(ValueError, match=message):
        few_step_times(*arguments)
