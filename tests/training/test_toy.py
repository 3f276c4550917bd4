from __future__ import annotations

import pytest
import torch
from benchmarks.toy_rcm import (
    STEPS,
    Options,
    distil,
    draw,
    energy_distance,
    ring,
    samples_of,
    train_teacher,
)

OPTIONS = Options(
    teacher_iterations=300,
    teacher_lr=3e-3,
    updates=120,
    warmup=20,
    fake_updates=2,
    lr=1e-3,
    batch=256,
    samples=2048,
    seed=1,
)
TOLERANCE = 0.15  # energy distance; between two sets of exact samples it is 0.001


def test_rcm_reaches_the_mixture_in_one_to_four_steps_and_its_teacher_does_not():
    data = ring(modes=4, std=0.3)
    target = data.sample(OPTIONS.samples, torch.Generator().manual_seed(9)).float()
    teacher = train_teacher(data, OPTIONS)
    student = distil(teacher, data, "rCM", OPTIONS)
    for steps in STEPS:
        found, before = (
            data.measure(samples_of(model, steps, OPTIONS), target) for model in (student, teacher)
        )
        assert before["energy_distance"] > 1.5 * TOLERANCE
        assert found["energy_distance"] < TOLERANCE
        assert found["least_share"] > 0.5  # no mode is lost


def test_the_exact_velocity_carries_noise_to_the_mixture():
    data = ring()
    target = data.sample(2048, torch.Generator().manual_seed(9)).float()
    found = samples_of(lambda x, t: data.velocity(x.double(), t), 60, OPTIONS, ode=True)
    assert data.measure(found, target)["energy_distance"] < 0.003


def test_energy_distance_by_hand():
    x, y = torch.tensor([[0.0, 0.0], [0.0, 2.0]]), torch.tensor([[1.0, 0.0], [1.0, 2.0]])
    between = (1 + 5**0.5) / 2
    assert energy_distance(x, y) == pytest.approx(2 * between - 2 - 2, abs=1e-6)


def test_shares_tell_a_lost_mode():
    data = ring(modes=4, std=0.1)
    samples = data.means[[0, 0, 1, 2]].float()
    found = data.measure(samples, samples)
    assert (found["least_share"], found["greatest_share"]) == (0.0, 2.0)
    assert found["on_a_mode"] == 1.0


def test_the_picture_is_dark_where_the_points_are():
    points = torch.tensor([[1.0, 1.0]]).repeat(50, 1)
    picture = draw([("a", points), ("b", -points)], columns=2).convert("L")
    half = picture.width // 2
    darkest = [
        min((picture.getpixel((x, y)), x, y) for x in columns for y in range(40, picture.height))
        for columns in (range(20, half - 5), range(half + 5, picture.width - 20))
    ]
    (_, x_a, y_a), (_, x_b, y_b) = darkest
    assert x_a > half / 2 and x_b - half < half / 2
    assert y_a < y_b  # up is positive
