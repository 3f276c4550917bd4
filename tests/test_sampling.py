from __future__ import annotations

import pytest
import torch

from turbodit.noise_schedule import few_step_times
from turbodit.sampling import few_step, gaussian_noise, guide, solver_sample, switch_experts

SHAPE = (2, 3, 4, 4)


def seeded(*seeds):
    return [torch.Generator().manual_seed(seed) for seed in seeds]


def ones(latents, t):
    return torch.ones_like(latents)


def test_sde_steps_by_hand():
    (generator,) = seeded(7)
    noise = gaussian_noise(SHAPE, [generator], "cpu").double()
    (replay,) = seeded(7)
    _, fresh = (torch.randn(SHAPE, generator=replay).double() for _ in range(2))
    # From 0.8 to 0.5: half the estimate x - 0.8 v, half fresh noise. Then the estimate x - 0.5 v.
    expected = (0.5 * (0.8 * noise - 0.8) + 0.5 * fresh) - 0.5
    out = few_step(ones, noise, (0.8, 0.5, 0.0), generators=[generator])
    assert out.dtype == torch.float32
    torch.testing.assert_close(out, expected.float(), rtol=1e-6, atol=1e-6)


def test_ode_steps_by_hand_and_draw_no_noise():
    noise = gaussian_noise(SHAPE, seeded(7), "cpu")
    out = few_step(ones, noise, (0.8, 0.5, 0.0), generators=[], ode=True)
    torch.testing.assert_close(out, 0.8 * noise - 0.3 - 0.5)


def test_few_step_evaluates_the_velocity_at_the_scheduled_times():
    seen = []

    def velocity(latents, t):
        seen.append(t)
        return torch.zeros_like(latents)

    times = few_step_times(4, 80.0)
    steps = []
    few_step(
        velocity,
        torch.ones(1, *SHAPE),
        times,
        generators=seeded(0),
        on_step=lambda done, total: steps.append((done, total)),
    )
    assert seen == list(times[:-1])
    assert steps == [(1, 4), (2, 4), (3, 4), (4, 4)]


@pytest.mark.parametrize("ode", [False, True])
def test_a_sample_of_a_batch_equals_the_same_seed_alone(ode):
    def sample(seeds):
        generators = seeded(*seeds)
        noise = gaussian_noise(SHAPE, generators, "cpu")
        times = few_step_times(3, 80.0)
        return few_step(lambda x, t: x.tanh() * t, noise, times, generators=generators, ode=ode)

    torch.testing.assert_close(sample([4, 5, 6])[2:], sample([6]), rtol=0, atol=0)


@pytest.mark.parametrize("solver", ["unipc", "euler", "dpm++"])
def test_solvers_converge_to_the_exact_flow(solver):
    # Data N(0, 0.25): the velocity is linear in x, and the flow carries x(1) to x(1) / 2.
    def velocity(x, t):
        return x * (t - (1 - t) * 0.25) / ((1 - t) ** 2 * 0.25 + t**2)

    noise = gaussian_noise(SHAPE, seeded(1), "cpu")
    steps = 200 if solver == "euler" else 40
    out = solver_sample(velocity, noise, solver=solver, steps=steps, shift=3.0)
    torch.testing.assert_close(out, noise / 2, rtol=0.02, atol=1e-3)


def test_every_step_of_a_solver_is_taken_where_timesteps_round_to_the_same_integer():
    seen = []

    def velocity(x, t):
        seen.append(t)
        return x

    solver_sample(velocity, torch.ones(1, *SHAPE), solver="unipc", steps=100, shift=30.0)
    assert len(seen) == 100
    assert len(set(seen)) < 100


def test_unknown_solver():
    with pytest.raises(ValueError, match="supported: unipc, euler, dpm"):
        solver_sample(ones, torch.ones(1, *SHAPE), solver="ddim", steps=2, shift=1.0)


def test_guidance_by_hand():
    guided = guide(lambda x, t: 3 * x, lambda x, t: x, 5.0)
    torch.testing.assert_close(guided(torch.ones(2), 0.5), torch.full((2,), 11.0))


def test_guidance_of_one_never_runs_the_unconditional_pass():
    def forbidden(latents, t):
        raise AssertionError("unconditional pass was run")

    assert guide(ones, forbidden, 1.0)(torch.zeros(2), 0.5).sum() == 2


def test_the_boundary_itself_belongs_to_the_high_noise_expert():
    switched = switch_experts(lambda x, t: x + 1, lambda x, t: x - 1, 0.9)
    zero = torch.zeros(())
    assert [switched(zero, t).item() for t in (1.0, 0.9, 0.899, 0.0)] == [1, 1, -1, -1]
